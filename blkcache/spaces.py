"""Address spaces: which files are mapped, by whom, and where each of their pages is now.

One record in the run-time file for each inode that somebody maps, found by hash. A space that somebody maps for storing
has entries: a window of DAX entries, changed by the native half (see daxemu/_fault.h). One that is only mapped
for reading has none: only transactions move its pages, and their entry log tells the mappers.

A space whose inode is deleted is an orphan: nothing in the trees names its frames any more, so they are kept by the
PINNED bit until the last mapping ends; its entries are the truth about which.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import PINNED, Frames
from onecopy.blkcache.limbo import Limbo
from onecopy.daxemu import slots
from onecopy.daxemu._fault import Engine
from onecopy.daxemu.errors import NoSpace, OneCopyError
from onecopy.daxemu.pool import fallocate
from onecopy.daxemu.runtime import BUCKETS, FOLDER, LOCKS, MAX_PAGES, MESSAGE, MESSAGES, SPACE, SPACES, WINDOW, W
from onecopy.daxemu.steps import reach

PFN_MASK = (1 << 40) - 1
PRIVATE, STORED, BEYOND = 1 << 40, 1 << 41, 1 << 42  # entry bits; STORED is _fault.h's DIRTY
KEEP, ZERO, FOLD, HAND = 1 << 32, 1 << 33, 1 << 34, 1 << 35  # bits of an entry log run's space

LIVE, ORPHAN = 1, 2

_STEP = SPACE.size // 8
_SUBVOLUME, _INODE, _STATE, _PAGES, _NEXT, _LENGTH, _DIRTY, _VERSION, _MAPPERS = (SPACE.word(name) for name in SPACE.offset)
_USED, _FREE, _ROOM = W["spaces_used"], W["spaces_free"], W["spaces_room"]
_BUCKETS_ROOM, _WINDOWS = W["buckets_room"], W["windows_used"]
_CHAINS = W["chains"]
_CLAIMING = (1 << 64) - 1
_WALKS = 1000  # through a chain that changes all the time, or was left changing by a death

Words = npt.NDArray[np.uint64]


class Spaces:
    """The address spaces of one handle's run-time file. Changes are made under the transaction lock; `find` needs none."""

    def __init__(self, frames: Frames, limbo: Limbo, engine: Engine) -> None:
        self.frames, self.limbo, self.engine, self.runtime = frames, limbo, engine, frames.runtime
        self._first = self.runtime.layout.spaces // 8
        self._buckets = self.runtime.layout.buckets // 8

    # ---------------------------------------------------------- looking

    @property
    def any(self) -> bool:
        """Whether there are address spaces at all."""
        return self.runtime.words[_USED] != 0

    @property
    def any_entries(self) -> bool:
        """Whether there are, or were, address spaces with entries."""
        return self.runtime.words[_WINDOWS] != 0

    def _at(self, index: int) -> int:
        return self._first + index * _STEP

    def _bucket(self, subvolume: int, inode: int) -> int:
        return self._buckets + (inode * 0x9E3779B1 + subvolume * 0x85EBCA77 >> 7) % BUCKETS

    def find(self, subvolume: int, inode: int) -> int:
        """Return the index of the inode's space, -1 when there is none. Without the lock, it may be ending."""
        words = self.runtime.words
        if not words[_USED]:
            return -1
        for _ in range(_WALKS):  # again, when the chains have changed under a reader: it may have been led astray
            before = self.runtime.atomic.load(_CHAINS)
            index = words[self._bucket(subvolume, inode)] - 1
            for _ in range(SPACES):
                if index < 0:
                    break
                at = self._first + index * _STEP
                if words[at + _INODE] == inode and words[at + _SUBVOLUME] == subvolume and words[at + _STATE]:
                    return int(index)
                index = words[at + _NEXT] - 1
            if not before & 1 and self.runtime.atomic.load(_CHAINS) == before:
                break
        return -1

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around changes of the hash chains; who dies within leaves the word odd, until `settle_chains`."""
        self.runtime.atomic.store(_CHAINS, self.runtime.words[_CHAINS] | 1)
        yield
        self.settle_chains()

    def settle_chains(self) -> None:
        """The hash chains are whole."""
        if self.runtime.words[_CHAINS] & 1:
            self.runtime.atomic.store(_CHAINS, self.runtime.words[_CHAINS] + 1)

    def version(self, index: int) -> int:
        """Return what a commit that changes the entries makes odd, and then even again."""
        return self.runtime.atomic.load(self._at(index) + _VERSION)

    def pages(self, index: int) -> int:
        """Return how many entries the space has; 0: it is only mapped for reading."""
        return self.runtime.words[self._at(index) + _PAGES]

    def length(self, index: int) -> int:
        """Return the length, in pages, of the longest mapping."""
        return self.runtime.words[self._at(index) + _LENGTH]

    def state(self, index: int) -> int:
        """Return LIVE or ORPHAN; 0: free."""
        return self.runtime.words[self._at(index) + _STATE]

    def key(self, index: int) -> tuple[int, int]:
        """Return (subvolume, inode number)."""
        at = self._at(index)
        return self.runtime.words[at + _SUBVOLUME], self.runtime.words[at + _INODE]

    def entries(self, index: int, low: int, high: int) -> Words:
        """Return the entries of pages [low, high), each read whole."""
        return np.frombuffer(self.engine.entries(index, low, high), np.uint64)

    def _all(self, index: int) -> Words:
        return self.entries(index, 0, self.pages(index))

    def is_dirty(self, index: int) -> bool:
        """Return whether there may be entries that are not in the extents."""
        return self.runtime.words[self._at(index) + _DIRTY] != 0

    def _records(self) -> Words:
        used = self.runtime.words[_USED]
        return np.frombuffer(self.runtime.words, np.uint64)[self._first : self._first + used * _STEP].reshape(used, _STEP)

    def dirty(self) -> list[int]:
        """Return the live spaces that may have been stored to."""
        records = self._records()
        return [int(i) for i in np.flatnonzero((records[:, _STATE] == LIVE) & (records[:, _DIRTY] != 0))]

    def of_subvolume(self, subvolume: int) -> list[int]:
        """Return the live spaces of a subvolume's files."""
        records = self._records()
        return [int(i) for i in np.flatnonzero((records[:, _STATE] == LIVE) & (records[:, _SUBVOLUME] == subvolume))]

    def with_entries(self, state: int = 0) -> list[int]:
        """Return the spaces, of one state or of any, that have entries."""
        records = self._records()
        wanted = records[:, _STATE] == state if state else records[:, _STATE] != 0
        return [int(i) for i in np.flatnonzero(wanted & (records[:, _PAGES] != 0))]

    def shadows(self, pfn: int) -> list[tuple[int, int, int]]:
        """Return (subvolume, inode number, page) of every entry that points at frame `pfn`: the reverse map.

        Nothing keeps it: who needs it (a memory error, say) looks at all entries, in one vectorised pass a space. A private
        page has one such entry (S2), a shared one as many as files that are mapped show it.
        """
        found = []
        for index in self.with_entries():
            words = self._all(index)
            here = (words & np.uint64(PFN_MASK) == np.uint64(pfn)) & (words & np.uint64(BEYOND) == 0)
            found += [(*self.key(index), int(page)) for page in np.flatnonzero(here)]
        return found

    def private_runs(self) -> list[tuple[int, int]]:
        """Return the runs of frames that may be stored to at any time, without anybody being told."""
        found = [np.zeros(0, np.int64)]
        for index in self.with_entries(LIVE):
            words = self._all(index)
            found.append((words[(words & np.uint64(PRIVATE)) != 0] & np.uint64(PFN_MASK)).astype(np.int64))
        return runs_of(np.unique(np.concatenate(found)))

    # --------------------------------------------------------- changing

    def ensure(self, subvolume: int, inode: int) -> int:
        """Return the inode's space, made when there is none. NoSpace when /dev/shm is full, ENFILE past the limit."""
        index = self.find(subvolume, inode)
        if index >= 0:
            return index
        words, runtime = self.runtime.words, self.runtime
        runtime.reserve(_BUCKETS_ROOM, runtime.layout.buckets, BUCKETS * 8)
        index = words[_FREE] - 1
        if index < 0:
            index = words[_USED]
            if index == SPACES:
                raise OneCopyError(f"{SPACES} files are mapped, which is the limit", path=runtime.pool.path, code=23)
            runtime.reserve(_ROOM, runtime.layout.spaces, (index + 1) * SPACE.size)
        else:
            words[_FREE] = words[self._at(index) + _NEXT]
        at, bucket = self._at(index), self._bucket(subvolume, inode)
        with self._changing():
            for word, value in (
                (_PAGES, 0),
                (_LENGTH, 0),
                (_DIRTY, 0),
                (_SUBVOLUME, subvolume),
                (_INODE, inode),
                (_STATE, LIVE),
            ):
                words[at + word] = value
            words[at + _NEXT] = words[bucket]
            words[_USED] = max(words[_USED], index + 1)
            words[bucket] = index + 1  # from here on it is found
        return index

    def lengthen(self, index: int, pages: int) -> None:
        """Note that a mapping of `pages` pages is about to be made."""
        at = self._at(index) + _LENGTH
        self.runtime.words[at] = max(self.runtime.words[at], pages)

    def enter(self, index: int, low: int, entries: Words) -> None:
        """Give the space entries from page `low` on, where it has none yet. NoSpace, EFBIG."""
        pages = low + len(entries)
        if pages > MAX_PAGES:
            raise OneCopyError(f"a file of {pages} pages can't be mapped for storing; {MAX_PAGES} is the limit", code=27)
        window = self.runtime.layout.windows + index * WINDOW
        try:
            fallocate(self.runtime.fd, 0, window, -(-pages // 512) * 8)
            fallocate(self.runtime.fd, 0, window + LOCKS + low * 8, max(1, len(entries)) * 8)
        except OSError as error:
            raise NoSpace(f"{FOLDER} has no room for the entries of an address space", path=self.runtime.path) from error
        self.engine.enter(index, low, entries.tobytes())
        self.runtime.words[_WINDOWS] = 1
        self.runtime.atomic.store(self._at(index) + _PAGES, pages)  # the entries stand there before it

    def folded(self, index: int) -> None:
        """After a transaction that folded the space's entries: note whether stores have come since."""
        atomic, at = self.runtime.atomic, self._at(index) + _DIRTY
        stores = atomic.load(at)
        # A fault counts the word up after it has changed entries: if we don't see them here, it has yet to count.
        if not (self._all(index) & np.uint64(STORED)).any():
            atomic.swap_if(at, stores, 0)

    def orphan(self, index: int) -> None:
        """The inode is deleted; `pin` has been called in the transaction that did it."""
        self.runtime.words[self._at(index) + _STATE] = ORPHAN

    def pin(self, index: int) -> None:
        """Keep the frames that the entries name when the trees let go of them. Bits of an abandoned deletion do no harm."""
        words = self._all(index)
        pfns = (words & np.uint64(PFN_MASK)).astype(np.int64)[(words & np.uint64(BEYOND)) == 0]
        self.frames.array[pfns[pfns != 0]] |= np.uint8(PINNED)
        self.engine.await_faults(index)  # those that they had ceased to name may go then

    def is_mapped(self, index: int) -> bool:
        """Return whether any slot maps the space."""
        at = self._at(index) + _MAPPERS
        return any(self.runtime.words[at : at + 8])

    def is_idle(self, index: int) -> bool:
        """Return whether the space holds nothing that must be folded."""
        return self.state(index) == ORPHAN or not self.is_dirty(index)

    def end_unmapped(self) -> None:
        """End all spaces that nobody maps and that hold nothing unfolded."""
        records = self._records()
        unmapped = ~records[:, _MAPPERS:].any(1)
        idle = (records[:, _STATE] == ORPHAN) | ((records[:, _STATE] == LIVE) & (records[:, _DIRTY] == 0))
        for index in np.flatnonzero(unmapped & idle).tolist():
            self.end(index)

    def end(self, index: int) -> None:
        """Free the space; nobody maps it, and what was stored is in the extents, or the inode is deleted."""
        words, at = self.runtime.words, self._at(index)
        state, pages = words[at + _STATE], words[at + _PAGES]
        named = self.entries(index, 0, pages)
        if pages:
            self.engine.count("epoch", 1)  # before it can't be found any more: see fs.mapped
        bucket = self._bucket(words[at + _SUBVOLUME], words[at + _INODE])
        before = bucket
        with self._changing():
            while words[before] not in (0, index + 1):
                before = self._at(words[before] - 1) + _NEXT
            if words[before]:  # else it never came into the chain, or is out of it: somebody died over it
                words[before] = words[at + _NEXT]
            words[at + _VERSION] += 2
            words[at + _STATE] = 0
            words[at + _PAGES] = 0
            words[at + _NEXT], words[_FREE] = words[_FREE], index + 1
        if pages:
            window = self.runtime.layout.windows + index * WINDOW
            fallocate(self.runtime.fd, 3, window, WINDOW)  # punch, keep the size
            self.frames.pool.end_copies(index)
            stored = int(np.count_nonzero(named & np.uint64(STORED)))
            self.engine.count("dirty", -stored)
            self.engine.count("strays", stored)
            if state == ORPHAN:
                self.settle_pins()  # all: it may have stored to pages since, and name others than it pinned

    # ------------------------------------------------------------ frames

    def settle_pins(self, low: int = 0, high: int | None = None) -> None:
        """Clear the PINNED bits in [low, high) that no orphan backs, and free the frames that only waited for that."""
        high = self.frames.pool.frames if high is None else high
        piece = self.frames.array[low:high]
        stale = (piece & PINNED) != 0
        for index in self.with_entries(ORPHAN) if stale.any() else ():
            pfns = self._all(index) & np.uint64(PFN_MASK)
            pfns = pfns[(pfns >= low) & (pfns < high)] - np.uint64(low)
            stale[pfns.astype(np.int64)] = False
        for index in self.with_entries(ORPHAN) if stale.any() else ():
            self.engine.await_faults(index)
        piece[stale] &= np.uint8(0xFF ^ PINNED)
        self.limbo.settle(low, high)

    def strays(self) -> list[tuple[int, int]] | None:
        """Return the runs of frames that faults have taken and nothing names: of the dead, or of pages frozen and stored to.

        None: it can't be said now. Argument: a fault's record says that it claims before it does, and so until its entries name
        the frames. We look at the frames first, then at the records, then at the entries: a frame that we see was taken by a
        fault whose record we see, or whose entries. At last we wait for the faults that took a name away and may not have told
        everybody yet.
        """
        held = self.frames.held()
        named = self._claimed()
        if named is None:
            return None
        for index in self.with_entries():
            entries = self._all(index)
            named.append((entries[(entries & np.uint64(STORED)) != 0] & np.uint64(PFN_MASK)).astype(np.int64))
        found = np.setdiff1d(held, np.concatenate(named))
        for index in self.with_entries() if len(found) else ():
            self.engine.await_faults(index)
        return runs_of(found)

    def _claimed(self) -> list[npt.NDArray[np.int64]] | None:
        """Return the frames that the records of faults vouch for; None while one claims."""
        words, layout = self.runtime.words, self.runtime.layout
        named = [np.zeros(0, np.int64)]
        for slot in slots.taken(self.runtime):
            for n in range(MESSAGES):
                at = (layout.messages + (slot * MESSAGES + n) * MESSAGE.size) // 8
                count = self.runtime.atomic.load(at + MESSAGE.word("count"))
                if count == _CLAIMING:
                    return None
                if count:
                    first = words[at + MESSAGE.word("claimed")]
                    named.append(np.arange(first, first + count, dtype=np.int64))
        return named

    # -------------------------------------------------------------- slots

    def reap(self) -> list[int]:
        """Free the slots of dead processes, finish what they were doing, end what only they mapped; return these slots."""
        gone = slots.dead(self.runtime)
        if gone:
            for slot in gone:
                self.engine.bury(slot)
            reach("blocks taken over")
            self.end_unmapped()
            self.settle_pins()
            self.frames.recount()
            stored = sum(int(np.count_nonzero(self._all(index) & np.uint64(STORED))) for index in self.with_entries())
            self.engine.count("dirty", stored - self.engine.count("dirty", 0))  # who died may not have counted
            self.engine.count("strays", 1)  # maybe: the next sync looks
            for slot in gone:  # last: until then the next one to reap finds them and does all this again
                slots.clear(self.runtime, slot)
        return gone


def runs_of(pfns: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return ascending PFNs as runs (first, pages)."""
    if not len(pfns):
        return []
    starts = np.flatnonzero(np.r_[True, np.diff(pfns) != 1])
    lengths = np.diff(np.r_[starts, len(pfns)])
    return list(zip(pfns[starts].tolist(), lengths.tolist(), strict=True))
