"""The numbered steps at which a process may die: tests stop or kill it exactly there.

Every place where shared state is between two truths calls `reach`. In production nobody listens.
"""

from collections.abc import Callable

STEPS = (
    "lock taken",
    "frame logged",
    "frame taken",
    "node copied",
    "data stored",
    "limbo appended",
    "live root written",
    "published",
    "reclaim decided",
    "frame released",
    "sync intended",
    "checksums set",
    "pages flushed",
    "superblock stored",
    "durable noted",
    "flags cleaned",
    "blocks taken over",
)
NATIVE = (  # in the order of daxemu/_fault.h
    "block locked",
    "frames claimed",
    "pages copied",
    "half entered",
    "entries changed",
    "peers told",
    "pages mapped",
    "all blocks locked",
    "transaction published",
    "entry log applied",
    "entry log done",
    "frame held",
    "frame filled",
    "stores stopped",
    "frame written back",
    "frame punched",
    "frame stored",
)
_NUMBER = {name: number for number, name in enumerate(STEPS)}

hook: Callable[[int], None] | None = None


def reach(name: str) -> None:
    """Tell the hook, if any, that step `name` has been reached."""
    if hook is not None:
        hook(_NUMBER[name])


def signal_at(name: str, nth: int, number: int) -> None:
    """Send signal `number` to this process at the `nth` arrival (from 1) at the native step `name`; "" for never."""
    from onecopy.daxemu import _fault

    _fault.signal_at(NATIVE.index(name) if name else -1, nth, number)
