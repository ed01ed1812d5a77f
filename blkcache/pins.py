"""Pins: which frames are mapped, by whom (S5). A pinned frame is neither handed out again nor stored into.

The truth is one list of runs per slot; the PINNED bit of a frame only says that a list may name it. A holder's death
drops its list; the bits are then recomputed from the lists that are left. All under the transaction lock.
"""

import errno

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import PINNED, Frames, Run, cut_runs, pack_run
from onecopy.blkcache.limbo import Limbo
from onecopy.daxemu import slots
from onecopy.daxemu.errors import OneCopyError
from onecopy.daxemu.runtime import PINS
from onecopy.daxemu.steps import reach


class Pins:
    """The pin lists of one handle's run-time file."""

    def __init__(self, frames: Frames, limbo: Limbo) -> None:
        self.frames, self.limbo, self.runtime = frames, limbo, frames.runtime

    def _list(self, slot: int) -> int:
        return self.runtime.layout.pins // 8 + slot * PINS

    def write(self, slot: int, runs: list[Run]) -> None:
        """Make `runs` the slot's list and set their bits; bits of runs dropped from the list stay until `settle`.

        OneCopyError (ENOMEM) when there are more runs than a list holds; NoSpace when /dev/shm is full.
        """
        runs = cut_runs(runs)
        if len(runs) > PINS:
            raise OneCopyError(f"{len(runs)} mapped runs; a process can pin {PINS}", code=errno.ENOMEM)
        words, first = self.runtime.words, self._list(slot)
        self.runtime.reserve(slots.pins_room_word(self.runtime, slot), first * 8, len(runs) * 8)
        for i, (pfn, pages) in enumerate(runs):
            words[first + i] = pack_run(pfn, pages)
            self.frames.array[pfn : pfn + pages] |= np.uint8(PINNED)
        reach("pins listed")
        # A death before this store leaves bits without a list; the dead slot's reaping clears them.
        words[slots.pins_word(self.runtime, slot)] = len(runs)

    def pinned(self, low: int, high: int) -> npt.NDArray[np.bool_]:
        """Return, for each frame of [low, high), whether a list names it."""
        depth = np.zeros(high - low + 1, np.int32)
        for slot in slots.taken(self.runtime):
            count = self.runtime.words[slots.pins_word(self.runtime, slot)]
            packed = np.array(self.runtime.words[self._list(slot) : self._list(slot) + count], np.uint64)
            start = (packed & np.uint64((1 << 40) - 1)).astype(np.int64)
            end = np.clip(start + (packed >> np.uint64(40)).astype(np.int64), low, high) - low
            start = np.clip(start, low, high) - low
            np.add.at(depth, start, 1)
            np.add.at(depth, end, -1)
        mask: npt.NDArray[np.bool_] = np.cumsum(depth[:-1]) > 0
        return mask

    def settle(self, low: int = 0, high: int | None = None) -> None:
        """Clear the bits in [low, high) that no list backs, and free the frames that only waited for that."""
        if high is None:
            high = self.frames.pool.frames
        piece = self.frames.array[low:high]
        piece[((piece & PINNED) != 0) & ~self.pinned(low, high)] &= np.uint8(0xFF ^ PINNED)
        self.limbo.settle(low, high)

    def reap(self) -> list[int]:
        """Free the slots of dead processes and what only they pinned; return these slots."""
        gone = slots.dead(self.runtime)
        if gone:
            for slot in gone:
                self.runtime.words[slots.pins_word(self.runtime, slot)] = 0
            reach("pins settled")
            self.settle()
            self.frames.recount()
            for slot in gone:  # last: until then the next one to reap finds them and does all this again
                slots.clear(self.runtime, slot)
        return gone
