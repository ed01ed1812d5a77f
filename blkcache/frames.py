"""The frame allocator: one byte of state a frame, in the run-time file, shared by all processes.

Derived, never durable: a cold open fills the table by walking the trees. Bytes rather than bits, so that the one
word that says whether a frame is free also says what may be done with it. Fault handlers take free frames at any time, by
compare-and-swap; all other changes are made under the transaction lock, to frames that are not free. So
free frames are taken by `claim` alone, and bits are changed only where a mask has found a frame in use. Readers may
look at any time at the bits that are only ever hints (SHARED).

What an unpublished transaction took is found again by `undo`, in the process that gave up or in the next one to hold the
lock after a death: runs of data frames in the taken log, nodes by the generation in their headers. Nobody published them,
so nothing names them.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from onecopy.daxemu._fault import Engine
from onecopy.daxemu.errors import NoSpace
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.runtime import COUNTERS, Runtime, W
from onecopy.daxemu.steps import reach
from onecopy.daxemu.units import HUGE, WORDS

# State bits. A free frame is 0, or BACKED when it still has storage of the host.
USED, FRESH, SHARED, LIMBO, PINNED, NODE, DIRTY, BACKED = 1, 2, 4, 8, 16, 32, 64, 128

STATES = {  # for FORMAT.md
    "USED": "has an owner, or waits in limbo for the last one that could reach it",
    "FRESH": "the durable root does not name it",
    "SHARED": "maybe referenced more than once: ask the fragment counts; clear: surely not",
    "LIMBO": "freed, but the durable root names it or a mapping of a deleted file shows it",
    "PINNED": "maybe mapped by who had a file open that is deleted: ask the orphans; clear: surely not",
    "NODE": "a tree node",
    "DIRTY": "content changed since the last durable commit",
    "BACKED": "free, with storage of the host; with USED: taken by a write fault, in no extent yet",
}
HELD = USED | FRESH | DIRTY | BACKED  # what a write fault makes of a free frame
_TAKING = NODE  # alone: neither free nor anybody's, for a moment under the transaction lock

Run = tuple[int, int]  # (first PFN, pages)
T = TypeVar("T", int, npt.NDArray[np.int64])

_TAKEN, _TAKEN_ROOM, _TAKEN_GENERATION, _FREE = W["taken_count"], W["taken_room"], W["taken_generation"], W["free"]
_NODE_HINT, _NODE_FLOOR, _DATA_HINT = W["node_hint"], W["node_floor"], W["data_hint"]

_NODE_GENERATION = 2  # word of a node that says which transaction made it
MAX_RUN = (1 << 24) - 1  # pages: what fits beside a PFN in a word
_CHUNK = 64  # node frames that get storage at once
_KEEP_BACKED = 256  # free frames that keep their storage over a sync, for the nodes to come
_KEEP_PART, _KEEP_MOST = 8, 1 << 16  # ... for faults, which copy into them much faster: a part of the pool, up to 256 MiB


def pack_run(pfn: int, pages: int) -> int:
    """Return a run as one word: PFN in the low 40 bits, pages above."""
    return pages << 40 | pfn


def unpack_run(word: int) -> Run:
    """Return the run that `pack_run` made."""
    return word & ((1 << 40) - 1), word >> 40


def cut_runs(runs: list[Run]) -> list[Run]:
    """Return `runs` with those that are too long for `pack_run` cut into pieces."""
    if max(runs, key=itemgetter(1), default=(0, 0))[1] <= MAX_RUN:
        return runs
    return [(at, min(MAX_RUN, pfn + pages - at)) for pfn, pages in runs for at in range(pfn, pfn + pages, MAX_RUN)]


def free_runs(table: npt.NDArray[np.uint8], first: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (starts, lengths) of the runs of free frames in a piece of the table that begins at PFN `first`."""
    free = (table & ~np.uint8(BACKED)) == 0
    edges = np.flatnonzero(np.diff(free, prepend=False, append=False))
    return edges[::2] + first, edges[1::2] - edges[::2]


def congruent(first: T, page: int) -> T:
    """Return the first frame from `first` on that lies as `page` does in its file, modulo 2 MiB."""
    return first + (page - first) % HUGE


def reserve_of(pool: Pool) -> int:
    """Return how many frames are kept: deleting in a full pool, and syncing it, copies paths of nodes."""
    return max(48, min(pool.frames // 64, 8192))


class Frames:
    """The allocator over one handle's run-time file. The caller holds the transaction lock throughout."""

    def __init__(self, runtime: Runtime, pool: Pool, engine: Engine) -> None:
        self.runtime, self.pool, self.engine = runtime, pool, engine
        self.table, self.array = runtime.table, runtime.table_array
        self._base = runtime.layout.table
        self._log = runtime.layout.taken // 8
        self.reserve = reserve_of(pool)
        self.room = 0  # frames that the running transaction may still take
        self._node_room = 0  # ... and at which value of it nodes end, too
        self._generation = 0  # of the running transaction
        self._held = 0  # frames that faults had taken when it began
        self.adopted = 0  # frames of faults that it makes its own

    def begin(self, generation: int, *, reserve: bool) -> None:
        """Start the transaction that will become `generation`; `reserve`: it may use the frames kept for deletions."""
        words = self.runtime.words
        words[_TAKEN] = 0
        words[_TAKEN_GENERATION] = self._generation = generation  # from here on a death is undone
        self._held, self.adopted = max(0, self.engine.count("held", 0)), 0
        self.room = words[_FREE] - self._held - (0 if reserve else self.reserve)
        # Half of what is kept is for everybody's nodes: changing what has frames already must not fail for want of one.
        self._node_room = 0 if reserve else -(self.reserve // 2)

    def settle_room(self, *, reserve: bool) -> None:
        """Before publishing: write what the transaction took into the free counter."""
        self.runtime.words[_FREE] = self.room + self._held - self.adopted + (0 if reserve else self.reserve)

    def _no_room(self, pages: int) -> NoSpace:
        return NoSpace(
            f"the pool has no {pages} free pages left ({max(0, self.room)} free, besides {self.reserve} kept for deletions); "
            "delete something, dedupe, or use a larger pool",
            path=self.pool.path,
        )

    def take_node(self) -> int:
        """Take one frame with storage for a tree node; return its PFN. Its header has the transaction's generation.

        Nodes grow down from the pool's end, data grows up from its start: data keeps long runs. NoSpace.
        """
        if self.room <= self._node_room:
            raise self._no_room(1)
        words, base, claimed = self.runtime.words, self._base, False
        while not claimed:
            at = self.runtime.memory.rfind(b"\x80", base + words[_NODE_FLOOR], base + words[_NODE_HINT] + 1)
            if at < 0:
                at = self._back_chunk()
            words[_NODE_HINT] = pfn = at - base
            claimed = self.engine.claim(pfn, 1, _TAKING)
        if self.pool.cached:
            try:
                self.pool.ready(pfn, 1)
            except BaseException:
                self.table[pfn] = BACKED
                raise
        # The generation first: who finds the frame in use after a death must see whose it is.
        self.pool.words[pfn * WORDS + _NODE_GENERATION] = self._generation
        self.table[pfn] = USED | FRESH | NODE | DIRTY
        self.room -= 1
        return pfn

    def _back_chunk(self) -> int:
        runtime, base, frames = self.runtime, self._base, self.pool.frames
        memory = runtime.memory
        end = base + frames
        for size in (_CHUNK, 8, 1):
            at = memory.rfind(bytes(size), base, end)
            while at >= 0 and not self.engine.claim(at - base, size, _TAKING):
                at = memory.rfind(bytes(size), base, end)
            if at >= 0:
                pfn = at - base
                try:
                    self.pool.back(pfn, size)
                except BaseException:
                    self.array[pfn : pfn + size] = 0
                    raise
                self.array[pfn : pfn + size] = BACKED
                runtime.set("node_floor", min(runtime.get("node_floor"), pfn))
                runtime.set("node_hint", pfn + size - 1)
                return at + size - 1
        at = memory.rfind(b"\x80", base, end)
        if at < 0:
            raise NoSpace("the pool has no free page left", path=self.pool.path)
        runtime.set("node_floor", min(runtime.get("node_floor"), at - base))
        return at

    def take_data(self, pages: int, goal: int = 0, page: int = 0) -> list[Run]:
        """Take `pages` frames for file data in as few runs as there are; NoSpace takes none beyond what undo returns.

        `goal`: the first frame wanted, if it and those behind it are free; 0: none in particular. `page`: what page of the
        file the first is for; large runs lie as the file does, modulo 2 MiB.
        """
        if self.room < pages:
            raise self._no_room(pages)
        if goal and self.are_free(goal, pages) and self._take_run(goal, pages):
            return [(goal, pages)]
        runs: list[Run] = []
        while pages:
            run = self._next_run(min(pages, MAX_RUN), page)
            if not self._take_run(*run):
                continue  # a fault was faster
            self.runtime.words[_DATA_HINT] = run[0] + run[1]
            runs.append(run)
            page, pages = page + run[1], pages - run[1]
        return runs

    def are_free(self, pfn: int, pages: int) -> bool:
        """Return whether data may be put into frames [pfn, pfn + pages)."""
        end = pfn + pages
        limit = self.runtime.words[_NODE_FLOOR]
        return pfn > 0 and end <= limit and not (self.array[pfn:end] & ~np.uint8(BACKED)).any()

    def open_window(self, pages: int) -> int:
        """Return the first of `pages` free frames in a row that nothing else is put into for now; 0 when there are none.

        Nothing is taken: the search for frames goes on behind them, and comes back when it has been through the pool.
        512 frames are aligned.
        """
        hint = self.runtime.words[_DATA_HINT]
        if pages >= HUGE:
            hint = congruent(hint, 0)
        if not self.are_free(hint, pages):
            return 0
        self.runtime.words[_DATA_HINT] = hint + pages
        return hint

    def _take_run(self, pfn: int, pages: int) -> bool:
        runtime, words = self.runtime, self.runtime.words
        count = words[_TAKEN]
        runtime.reserve(_TAKEN_ROOM, runtime.layout.taken, (count + 1) * 8)
        words[self._log + count] = pack_run(pfn, pages)
        words[_TAKEN] = count + 1  # from here on a death gives the run back
        reach("frame logged")
        if not self.engine.claim(pfn, pages, USED | FRESH | DIRTY):
            words[_TAKEN] = count
            return False
        self.room -= pages
        reach("frame taken")
        if self.pool.cached:  # it is stored long before it is written: what can't be is to be said now
            self.pool.back(pfn, pages)
        return True

    def adopt(self, runs: list[Run]) -> None:
        """Make frames that faults have taken the running transaction's: it gives them back when it is undone."""
        runtime, words = self.runtime, self.runtime.words
        for pfn, pages in cut_runs(runs):
            count = words[_TAKEN]
            runtime.reserve(_TAKEN_ROOM, runtime.layout.taken, (count + 1) * 8)
            words[self._log + count] = pack_run(pfn, pages)
            words[_TAKEN] = count + 1
            self.array[pfn : pfn + pages] &= np.uint8(0xFF ^ BACKED)
            self.engine.count("held", -pages)
            self.adopted += pages

    def _next_run(self, pages: int, page: int) -> Run:
        hint, limit = self.runtime.words[_DATA_HINT], self.runtime.get("node_floor")
        if pages >= HUGE:
            hint = congruent(hint, page)  # 2 MiB translations need it
        if pages == 1:
            at = self.runtime.memory.find(b"\0", self._base + hint, self._base + limit)
            if at >= 0:
                return at - self._base, 1
        elif self.are_free(hint, pages):
            return hint, pages
        return self._search(pages, hint, page)

    def _search(self, pages: int, hint: int, page: int) -> Run:
        """First run long enough from the hint on, then from the start; else the longest. Large ones are congruent to `page`."""
        starts, lengths = free_runs(self.array)
        if not len(starts):
            raise NoSpace("the pool has no free page left", path=self.pool.path)
        if pages >= HUGE:
            aligned = congruent(starts, page)
            room = lengths - (aligned - starts)
            fits = np.flatnonzero(room >= pages)
            if len(fits):
                ahead = fits[starts[fits] >= hint]
                return int(aligned[ahead[0] if len(ahead) else fits[0]]), pages
            longest = int(np.argmax(room))
            if room[longest] >= 2 * HUGE:  # the next run goes on where a translation begins
                return int(aligned[longest]), int(room[longest] - (page + room[longest]) % HUGE)
        fits = np.flatnonzero(lengths >= pages)
        if len(fits):
            ahead = fits[starts[fits] >= hint]
            return int(starts[ahead[0] if len(ahead) else fits[0]]), pages
        longest = int(np.argmax(lengths))
        return int(starts[longest]), int(lengths[longest])

    def release(self, pfn: int, pages: int) -> None:
        """Make frames free at once; they keep their storage until the next sync."""
        self.array[pfn : pfn + pages] = BACKED
        words = self.runtime.words
        words[_FREE] += pages
        words[_NODE_HINT] = max(words[_NODE_HINT], pfn + pages - 1)

    def release_each(self, pfns: npt.NDArray[np.int64]) -> None:
        """`release` for scattered frames, each named once."""
        if len(pfns):
            self.array[pfns] = BACKED
            words = self.runtime.words
            words[_FREE] += len(pfns)
            words[_NODE_HINT] = max(words[_NODE_HINT], int(pfns.max()))

    def undo(self) -> None:
        """Give back what an unpublished transaction took, ours or a dead process's; idempotent."""
        runtime = self.runtime
        if runtime.get("taken_generation") <= runtime.get("live_generation"):
            return
        for word in runtime.words[self._log : self._log + runtime.get("taken_count")].tolist():
            pfn, pages = unpack_run(word)
            piece = self.array[pfn : pfn + pages]
            piece[((piece & USED) != 0) & ((piece & BACKED) == 0)] = BACKED  # what it logged, but a fault took, is the fault's
        self.array[self.array == _TAKING] = BACKED
        nodes = np.flatnonzero((self.array & (USED | NODE | FRESH)) == USED | NODE | FRESH)
        made = np.frombuffer(self.pool.words, np.uint64)[nodes * WORDS + _NODE_GENERATION]
        self.array[nodes[made > runtime.get("live_generation")]] = BACKED
        runtime.set("node_hint", self.pool.frames - 1)
        self.recount()
        runtime.set("taken_count", 0)
        runtime.set("taken_generation", 0)

    def recount(self) -> None:
        """Set the counters of free frames, and of those that faults have taken, from the table."""
        while True:
            before = self.engine.count("held", 0)
            held = self.held()
            used = int(np.count_nonzero(self.array & USED))
            if self.engine.count("held", 0) == before:  # no fault came in between
                break
        self.engine.count("held", len(held) - before)
        self.runtime.set("free", self.pool.frames - used + len(held))

    def held(self) -> npt.NDArray[np.int64]:
        """Return the frames that faults have taken and no transaction has folded yet."""
        return np.flatnonzero((self.array & (USED | BACKED)) == USED | BACKED)

    def count_free(self) -> int:
        """Return how many frames are free."""
        return int(self.runtime.get("free")) - max(0, self.engine.count("held", 0))

    def give_back(self, keep: int = _KEEP_BACKED, *, faults: bool = False) -> None:
        """Punch free frames out of the pool file, but for the last `keep` of them (the nodes' end).

        `faults`: files are mapped for storing; then more are kept, where faults look first.
        """
        if faults and not self.pool.cached:
            keep = max(keep, min(self.pool.frames // _KEEP_PART, _KEEP_MOST))
        self.array[self.array == _TAKING] = BACKED  # of one who died right here
        backed = self.array == BACKED
        if keep:
            spare = np.flatnonzero(backed)[-keep:]
            backed[spare] = False
            if len(spare) > HUGE:
                self.runtime.words[self.runtime.layout.counters // 8 + COUNTERS.word("hint")] = int(spare[0])
        if self.pool.huge_pages:
            self._round_to_huge_pages(backed)
        self._let_go(backed, self.pool.punch, 0)
        if self.pool.cached:  # the last ones keep their blocks, and with them what was durable one sync before, but no memory
            self._let_go(self.array == BACKED, self.pool.forget, BACKED)

    def _let_go(self, frames: npt.NDArray[np.bool_], how: Callable[[int, int], None], state: int) -> None:
        """Let go of the storage of free frames, which get `state` then."""
        edges = np.flatnonzero(np.diff(frames, prepend=False, append=False)).tolist()
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            if self.engine.claim(first, end - first, _TAKING):  # else a fault was faster: at the next sync
                how(first, end - first)
                self.array[first:end] = state

    def _round_to_huge_pages(self, backed: npt.NDArray[np.bool_]) -> None:
        """Of the huge pages that are free as a whole, have all of `backed` punched or nothing.

        What the frames in use beside them kept from being punched, or a huge page had without being asked, goes with them, and
        the next file that takes all of it gets a huge page again. Those that are free and complete are not cut in two.
        """
        end = len(backed) // HUGE * HUGE
        states, some = self.array[:end].reshape(-1, HUGE), backed[:end].reshape(-1, HUGE)
        is_complete = (states == BACKED).all(1)
        some[is_complete & ~some.all(1)] = False
        some[((states == 0) | (states == BACKED)).all(1) & (states == BACKED).any(1) & ~is_complete] = True
