"""Reading without a lock: a view of the live generation that stays as it is until the read ends."""

import errno
import struct
from types import TracebackType
from typing import TYPE_CHECKING

from onecopy.daxemu.errors import CorruptRecord, OneCopyError
from onecopy.daxemu.runtime import W
from onecopy.fs.tx import View

if TYPE_CHECKING:
    from onecopy.fs.mount import Mount

_LIVE = W["live_generation"]

# What Python raises when code follows a damaged pointer or count. A cold open looks at all of them, so it is damage since then.
ASTRAY = (IndexError, OverflowError, struct.error)


class Reading:
    """Context manager around a lock-free read: frames of its view stay as they are until it ends."""

    __slots__ = ("_closing", "_losses", "_mount", "_slot", "_word")

    def __init__(self, mount: "Mount", *, closing: bool = False) -> None:
        self._mount, self._closing = mount, closing

    def __enter__(self) -> View:
        mount = self._mount
        if not self._closing or mount.lost:
            mount.check_open()
        self._losses = mount.pool.losses()
        self._slot = slot = mount.slot
        self._word, generation = slot.announce()
        try:
            view = mount.view
            while view.generation != generation:
                # The live root's slot is overwritten two generations later. We read it and then see that not even one
                # has been published since `announce` looked, so the fields belong together.
                view = View(mount.runtime, mount.pool, generation)
                view.seen = mount.seen
                if mount.runtime.atomic.load(_LIVE) == generation:
                    mount.view = view
                    break
                generation = slot.renew(self._word)
            return view
        except BaseException:
            slot.retract(self._word)
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._slot is self._mount.slot:
            self._slot.retract(self._word)
        elif kind is None:  # the slot and the word in it are the parent's
            raise OneCopyError("a read begun before fork can't be finished by the child", code=errno.EPERM)
        if value is None or isinstance(value, (CorruptRecord, *ASTRAY)):
            self._mount.pool.raise_lost(self._losses)
        if isinstance(value, ASTRAY):
            raise damage(value) from value


def damage(error: BaseException) -> CorruptRecord:
    """Return what an error in ASTRAY means to a caller of the package (S10)."""
    return CorruptRecord("tree", 0, "a pointer or count in it", expected="one that fits", actual=repr(error))
