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
    "pins listed",
    "pins settled",
)
_NUMBER = {name: number for number, name in enumerate(STEPS)}

hook: Callable[[int], None] | None = None


def reach(name: str) -> None:
    """Tell the hook, if any, that step `name` has been reached."""
    if hook is not None:
        hook(_NUMBER[name])
