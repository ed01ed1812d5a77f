"""Pins: which frames are mapped, by whom (S5). A pinned frame is neither handed out again nor stored into.

The truth is one list of runs per slot, in which a process keeps the places of its mappings' runs; the PINNED bit of a frame
only says that a list may name it. A holder's death drops its list; the bits are then recomputed from the lists that are
left. All under the transaction lock.
"""

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import PINNED, Frames, Run, pack_run
from onecopy.blkcache.limbo import Limbo
from onecopy.daxemu import slots
from onecopy.daxemu.runtime import PINS
from onecopy.daxemu.steps import reach


class Pins:
    """The pin lists of one handle's run-time file."""

    def __init__(self, frames: Frames, limbo: Limbo) -> None:
        self.frames, self.limbo, self.runtime = frames, limbo, frames.runtime

    def _list(self, slot: int) -> int:
        return self.runtime.layout.pins // 8 + slot * PINS

    def add(self, slot: int, runs: list[Run], places: list[int]) -> None:
        """Pin `runs` for `slot`: write them to free `places` of its list, one each, and set their bits.

        NoSpace when /dev/shm is full.
        """
        end = max(places, default=-1) + 1
        words, first = self.runtime.words, self._list(slot)
        self.runtime.reserve(slots.pins_room_word(self.runtime, slot), first * 8, end * 8)
        array = self.frames.array
        np.frombuffer(words, np.uint64)[np.array(places, np.int64) + first] = [pack_run(*run) for run in runs]
        array[np.array([pfn for pfn, pages in runs if pages == 1], np.int64)] |= np.uint8(PINNED)
        for pfn, pages in runs:
            if pages > 1:
                array[pfn : pfn + pages] |= np.uint8(PINNED)
        reach("pins listed")
        # A death before this store leaves bits without a list; the dead slot's reaping clears them.
        count = slots.pins_word(self.runtime, slot)
        words[count] = max(words[count], end)

    def drop(self, slot: int, runs: list[Run], places: list[int]) -> None:
        """Unpin what was added at `places`, or should have been; free the frames that only waited for that."""
        count = self.runtime.words[slots.pins_word(self.runtime, slot)]
        listed = np.array([place for place in places if place < count], np.int64)  # others may have no storage
        np.frombuffer(self.runtime.words, np.uint64)[listed + self._list(slot)] = 0  # runs of no pages
        if runs:
            self.settle(min(pfn for pfn, _ in runs), max(pfn + pages for pfn, pages in runs))

    def copy(self, slot: int, other: int) -> None:
        """Pin for slot `other` all that `slot` pins, at the same places. NoSpace when /dev/shm is full."""
        words, first, target = self.runtime.words, self._list(slot), self._list(other)
        count = words[slots.pins_word(self.runtime, slot)]
        self.runtime.reserve(slots.pins_room_word(self.runtime, other), target * 8, count * 8)
        words[target : target + count] = words[first : first + count]
        words[slots.pins_word(self.runtime, other)] = count

    def pinned(self, low: int, high: int) -> npt.NDArray[np.bool_]:
        """Return, for each frame of [low, high), whether a list names it."""
        depth = np.zeros(high - low + 1, np.int32)
        words = np.frombuffer(self.runtime.words, np.uint64)
        for slot in slots.taken(self.runtime):
            first = self._list(slot)
            packed = words[first : first + self.runtime.words[slots.pins_word(self.runtime, slot)]]
            start = (packed & np.uint64((1 << 40) - 1)).view(np.int64)
            end = start + (packed >> np.uint64(40)).view(np.int64)
            here = (start < high) & (end > low)
            np.add.at(depth, np.maximum(start[here], low) - low, 1)
            np.add.at(depth, np.minimum(end[here], high) - low, -1)
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
