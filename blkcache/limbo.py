"""Limbo: where freed frames wait until nobody can reach them (S5).

A transaction's freed runs go into the limbo ring with its generation; they become reachable to the reclaimer by
the same store that publishes the transaction, because the ring's tail is part of the live root. A frame leaves limbo when

1. no reader announces an older generation (`slots.oldest_reader`),
2. the durable root does not name it (FRESH), or a newer one has been committed,
3. no mapping of a deleted file shows it (PINNED).

`reclaim` handles 1 and moves what fails 2 or 3 into the LIMBO state; `settle` frees those after a durable commit or an unpin.
"""

from array import array

import numpy as np

from onecopy.blkcache.frames import BACKED, DIRTY, FRESH, LIMBO, PINNED, USED, Frames, Run, cut_runs, pack_run, unpack_run
from onecopy.daxemu.runtime import W
from onecopy.daxemu.slots import oldest_reader
from onecopy.daxemu.steps import reach

INTENT_RECLAIM = 1

_ROOM, _HEAD = W["limbo_room"], W["limbo_head"]


class Limbo:
    """The ring of one handle's run-time file. The caller holds the transaction lock throughout."""

    def __init__(self, frames: Frames) -> None:
        self.frames, self.runtime = frames, frames.runtime
        self._area = self.runtime.layout.limbo
        self._capacity = self.runtime.layout.limbo_capacity

    def append(self, runs: list[Run], tail: int, generation: int) -> int:
        """Write `runs`, freed by `generation`, behind `tail`; return the new tail, for the live root. NoSpace.

        Nothing refers to the entries before the live root with the new tail is published.
        """
        if not runs:
            return tail
        words, first, capacity = self.runtime.words, self._area // 8, self._capacity
        runs = cut_runs(runs)
        start = tail % capacity
        packed = array("Q", [word for pfn, pages in runs for word in (generation, pack_run(pfn, pages))])
        ahead = min(len(runs), capacity - start)  # entries before the ring wraps
        self.runtime.reserve(_ROOM, self._area, (start + ahead) * 16)
        words[first + start * 2 : first + (start + ahead) * 2] = memoryview(packed)[: ahead * 2]
        if ahead < len(runs):
            words[first : first + (len(runs) - ahead) * 2] = memoryview(packed)[ahead * 2 :]
        return tail + len(runs)

    def entries(self, tail: int) -> list[tuple[int, int, int]]:
        """Return what is in the ring up to `tail`: (generation, first PFN, pages)."""
        words, first, capacity = self.runtime.words, self._area // 8, self._capacity
        found = []
        for position in range(words[_HEAD], tail):
            at = first + position % capacity * 2
            found.append((words[at], *unpack_run(words[at + 1])))
        return found

    def reclaim(self, tail: int) -> None:
        """Free what no reader can reach any more."""
        words, first, capacity = self.runtime.words, self._area // 8, self._capacity
        head = words[_HEAD]
        if head == tail:
            return
        oldest = oldest_reader(self.runtime)
        target = head
        while target < tail and words[first + target % capacity * 2] <= oldest:
            target += 1
        if target != head:
            self.runtime.set("intent_value", target)
            self.runtime.set("intent", INTENT_RECLAIM)
            reach("reclaim decided")
            self.finish()

    def finish(self) -> None:
        """Do what `reclaim` decided; also for a process that died at it. Idempotent, as nothing was taken since."""
        table, head, target = self.frames.array, self.runtime.get("limbo_head"), self.runtime.get("intent_value")
        ring = np.frombuffer(self.runtime.words, np.uint64)[self._area // 8 :]
        packed = ring[np.arange(head, target) % self._capacity * 2 + 1]
        first, pages = (packed & np.uint64((1 << 40) - 1)).astype(np.int64), packed >> np.uint64(40)
        single = first[pages == 1]
        state = table[single]
        ready = (state & (USED | FRESH | PINNED)) == USED | FRESH
        self.frames.release_each(single[ready])
        reach("frame released")
        table[single[~ready & ((state & USED) != 0)]] |= np.uint8(LIMBO)
        for pfn, count in zip(first[pages != 1].tolist(), pages[pages != 1].tolist(), strict=True):
            piece = table[pfn : pfn + count]
            piece[(piece & USED) != 0] |= np.uint8(LIMBO)
            self._free_within(pfn, pfn + count)
        self.runtime.set("limbo_head", target)
        self.runtime.set("intent", 0)

    def settle(self, low: int = 0, high: int | None = None) -> None:
        """Free the frames of [low, high) that wait in LIMBO and are neither pinned nor named by the durable root."""
        self._free_within(low, self.frames.pool.frames if high is None else high)

    def _free_within(self, low: int, high: int) -> None:
        piece = self.frames.array[low:high]
        ready = (piece & (LIMBO | FRESH | PINNED)) == LIMBO | FRESH
        edges = np.flatnonzero(np.diff(ready, prepend=False, append=False)).tolist()
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            self.frames.release(low + first, end - first)

    def committed(self, tail: int) -> None:
        """After a durable commit of the live root: what it names is no longer FRESH, what it doesn't is."""
        array = self.frames.array
        waiting = (array & LIMBO) != 0
        array[waiting] |= np.uint8(FRESH)
        array[((array & (USED | BACKED)) == USED) & ~waiting] &= np.uint8(0xFF ^ (FRESH | DIRTY))  # not what faults have taken
        for _, pfn, pages in self.entries(tail):
            array[pfn : pfn + pages] |= np.uint8(FRESH)
        self.settle()

    def waiting(self, tail: int) -> int:
        """Return how many frames are in limbo."""
        ring = sum(pages for _, _, pages in self.entries(tail))
        return ring + int(np.count_nonzero(self.frames.array & LIMBO))
