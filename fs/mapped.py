"""What a transaction does about files that are mapped, and what a reader sees of them.

Stores through mappings reach no tree: they leave entries in the address space (see blkcache.spaces). A transaction that
changes a mapped file first *folds* them: what was stored becomes extents. What it then moves or cuts, it notes
(`touch`), and `commit` publishes it together with the entry log, which changes the entries and tells the mappers.

Stores go on meanwhile, and nobody makes them wait for Python. What keeps them from being lost:

- A private entry's frame stays while we hold the lock, so a fold of it can't be outdated, and a write goes in place (`own`).
- What is to be shared is *frozen* first: its pages are private no more, and the next store to each makes a new copy, which is
  the file's next version and not ours.
- What has to move with its content (collapse, insert, dedupe) is frozen and marked (`keep`): if a store came all the same, the
  publishing is refused, and the transaction starts anew.
- What is thrown away (truncate, punch, the target of a clone) takes the stores made meanwhile along.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import PINNED, SHARED
from onecopy.blkcache.spaces import BEYOND, FOLD, HAND, KEEP, PFN_MASK, PRIVATE, STORED, ZERO, Spaces, Words
from onecopy.daxemu import slots
from onecopy.daxemu.errors import NoSpace, OneCopyError
from onecopy.daxemu.runtime import RUN, SPACES, W
from onecopy.daxemu.units import PAGE, pages_of
from onecopy.fs import bulk, extents
from onecopy.fs import inode as inodes
from onecopy.fs.extents import Extent
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx, View

_PATIENCE = 30_000  # milliseconds that a transaction waits for a process that does not answer
_LOG_COUNT, _LOG_GENERATION, _LOG_ROOM = W["log_count"], W["log_generation"], W["log_room"]
_END = 1 << 62

Range = tuple[int, int]


def entry_words(view: View, inode: Inode, pages: int) -> Words:
    """Return the entries of a file's first `pages` pages, as its extents say; private where nobody else has a part in them."""
    end = min(pages_of(inode.size), pages)
    words = np.zeros(pages, np.uint64)
    found = extents.clip(extents.written(extents.load(view, inode, 0, end)), 0, end)
    if found:
        runs = np.array(found, np.uint64)
        counts = runs[:, 2].astype(np.int64)
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(runs[:, 0].astype(np.int64), counts) + steps
        pfns = np.repeat(runs[:, 1].astype(np.int64), counts) + steps
        if not extents.path_may_share(view, inode):
            alone = (view.array[pfns] & (SHARED | PINNED)) == 0
            words[places] = pfns.astype(np.uint64) | np.where(alone, np.uint64(PRIVATE), np.uint64(0))
        else:
            words[places] = pfns
    words[end:] = BEYOND
    return words


def runs_of_words(words: Words, first: int) -> npt.NDArray[np.uint64]:
    """Return the runs of pages with frames as rows (page, PFN, pages); `first` is the page of the first word."""
    pfns = words & np.uint64(PFN_MASK)
    pfns[(words & np.uint64(BEYOND)) != 0] = 0
    at = np.flatnonzero(pfns)
    if not len(at):
        return np.zeros((0, 3), np.uint64)
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(pfns[at].astype(np.int64)) != 1)) + 1
    starts = np.r_[0, breaks]
    lengths = np.diff(np.r_[starts, len(at)])
    return np.stack([(at[starts] + first).astype(np.uint64), pfns[at[starts]], lengths.astype(np.uint64)], 1)


class Seen:
    """What readers without the lock see of mapped files: their entries, which are newer than any extents."""

    def __init__(self, spaces: Spaces) -> None:
        self.spaces, self.runtime = spaces, spaces.runtime

    def extents(self, view: View, inode: Inode, low: int, high: int) -> list[Extent] | None:
        """Return what covers pages [low, high) of the file now; None: what the view says.

        Argument: an entry's frame is reachable now, so only a later generation than the live one can free it, and the one that
        the reader has announced is not newer than that: the frame stays (S5). When a space ends, what was stored is in the
        extents of a generation published before, but perhaps not in those of our view: the newest are looked at then. The
        ending counts `epoch` up before the space can't be found.
        """
        spaces = self.spaces
        if not spaces.any_entries:
            return None
        index = spaces.find(inode.subvolume, inode.number)
        if index >= 0:
            pages = spaces.pages(index)
            top = min(high, pages)
            if pages and low < top:
                words = spaces.entries(index, low, top)
                found = [(page, pfn, count, 0) for page, pfn, count in runs_of_words(words, low).tolist()]
                if high > pages:
                    found += extents.clip(self._newest(view, inode, pages, high) or [], pages, high)
                if spaces.key(index) == (inode.subvolume, inode.number) and spaces.pages(index):
                    return found
            elif pages:
                return self._newest(view, inode, low, high)
        return self._newest(view, inode, low, high) if self.runtime.counter("epoch") else None

    def version(self, view: View, inode: Inode) -> int:
        """Return a number that is the same after a read of the file if no commit came between; -1: the view is outdated.

        Argument: a commit makes the version odd before it publishes, and even when it has changed all entries. If it is
        even, and the view's generation the live one after that, then no commit to this file is between the two now.
        """
        index = self.spaces.find(inode.subvolume, inode.number) if self.spaces.any_entries else -1
        if index < 0:
            return 0
        version = self.spaces.version(index)
        current = self.runtime.atomic.load(W["live_generation"]) == view.generation
        return version if current and not version & 1 else -1

    def is_still(self, inode: Inode, version: int) -> bool:
        """Return whether no commit to the file has come since `version` said so."""
        index = self.spaces.find(inode.subvolume, inode.number) if self.spaces.any_entries else -1
        return version == (self.spaces.version(index) if index >= 0 else 0)

    def _newest(self, view: View, inode: Inode, low: int, high: int) -> list[Extent] | None:
        generation = self.runtime.atomic.load(W["live_generation"])
        if generation == view.generation:
            return extents.stored(view, inode, low, high)
        newest = View(self.runtime, self.spaces.frames.pool, generation)
        if not inodes.exists(newest, inode.subvolume, inode.number):
            return None
        return extents.stored(newest, inodes.load(newest, inode.subvolume, inode.number), low, high)


class Changes:
    """What one transaction does to mapped files. Made when there are address spaces; the lock is held."""

    def __init__(self, spaces: Spaces) -> None:
        self.spaces, self.engine, self.runtime = spaces, spaces.engine, spaces.runtime
        self._indexes: dict[tuple[int, int], int] = {}
        self._touched: dict[int, list[Range]] = {}
        self._kept: dict[int, list[Range]] = {}
        self._sizes: dict[int, int] = {}  # as the transaction found them
        self._frozen: dict[int, list[Range]] = {}
        self._folded: dict[int, Words] = {}  # by page, the frame that has become the extents'; 0: none
        self._handed: dict[int, list[npt.NDArray[np.uint64]]] = {}  # the same, as runs (page, PFN, pages), of each fold
        self._zeroed: dict[int, list[tuple[int, int, int, int]]] = {}  # (page, PFN, first byte, end)
        self._gone: list[int] = []
        self._looked: list[int] = []  # spaces all of whose entries a fold has looked at
        self._quiet = False

    def of(self, inode: Inode) -> int:
        """Return the inode's address space, -1 when nobody maps it."""
        key = inode.subvolume, inode.number
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = self.spaces.find(*key)
        return index

    def pages(self, inode: Inode) -> int:
        """Return how many entries the inode's space has; 0: stores can't happen."""
        index = self.of(inode)
        return self.spaces.pages(index) if index >= 0 else 0

    # -------------------------------------------------- before changing

    def begin(self, tx: Tx, inode: Inode) -> None:
        """The transaction has loaded `inode` to change it: fold what was stored, so that its extents say all."""
        index = self.of(inode)
        if index >= 0 and inode.is_file:
            self._sizes.setdefault(index, inode.size)
            if self.spaces.is_dirty(index):
                self.fold(tx, inode)

    def fold(self, tx: Tx, inode: Inode, low: int = 0, words: Words | None = None) -> None:
        """Make the file's dirty entries extents, and save it; `words`: of a frozen range from `low` on.

        Not those of pages that this transaction has changed already, or folded as they were frozen: what is stored there
        since is newer than what it is about, and stays for another one.
        """
        index = self.of(inode)
        pages = self.spaces.pages(index)
        whole = words is None
        if words is None:
            low, words = 0, self.spaces.entries(index, 0, pages)
        pfns = np.where(words & np.uint64(STORED), words & np.uint64(PFN_MASK), np.uint64(0))
        for first, end in [*self._touched.get(index, ()), *self._frozen.get(index, ())]:
            pfns[max(0, first - low) : max(0, end - low)] = 0
        known = self._folded.get(index)
        if known is not None:
            here = known[low : low + len(pfns)]
            pfns[pfns == here] = 0
        runs = runs_of_words(pfns, low)
        if whole:
            self._looked.append(index)
        if not len(runs):
            return
        tx.frames.adopted += int(runs[:, 2].sum())
        with self.quiet():
            bulk.replace_many(tx, inode, runs)
            inodes.save(tx, inode)
        if known is None:
            known = self._folded[index] = np.zeros(pages, np.uint64)
        part = known[low : low + len(pfns)]
        part[pfns != 0] = pfns[pfns != 0]
        self._handed.setdefault(index, []).append(runs)

    def own(self, tx: Tx, inode: Inode, low: int, high: int) -> None:
        """Make pages [low, high), as far as stores can come, the file's own: a write goes there in place. NoSpace."""
        top = min(high, self.pages(inode), pages_of(inode.size))
        if low < top:
            try:
                self.engine.make_private(self.of(inode), low, top, False)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise NoSpace("the pool has no free page left for a copy of a shared one", path=tx.pool.path) from error
            self.fold(tx, inode)

    def freeze(self, tx: Tx, inode: Inode, low: int, high: int) -> None:
        """Pages [low, high) stay as they are from now on, whatever is stored; fold them as they are. Saves the inode.

        Raises OneCopyError (ETIMEDOUT), naming the process, when one that maps the file does not answer.
        """
        index, pages = self.of(inode), self.pages(inode)
        if low < min(high, pages):
            frozen = self.engine.freeze(index, low, min(high, pages), _PATIENCE)
            if isinstance(frozen, int):
                pids = [user.pid for user in slots.users(self.runtime) if user.slot == frozen]
                raise OneCopyError(
                    f"process {pids[0] if pids else '?'} maps the file and does not answer; is it stopped?",
                    path=tx.pool.path, code=errno.ETIMEDOUT,
                )  # fmt: skip
            self.fold(tx, inode, low, np.frombuffer(frozen, np.uint64))
            self._frozen.setdefault(index, []).append((low, min(high, pages)))

    def keep(self, tx: Tx, inode: Inode, low: int, high: int) -> None:
        """`freeze`, for pages whose content moves: a store that comes all the same makes `commit` raise Conflict."""
        self.freeze(tx, inode, low, high)
        if self.pages(inode):
            self._kept.setdefault(self.of(inode), []).append((low, high))

    # -------------------------------------------------------- changing

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While extents change that the entries don't show: what was stored gets into the trees, holes get unwritten frames."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def touch(self, inode: Inode, low: int, high: int) -> None:
        """Pages [low, high) of the file get other extents."""
        if not self._quiet and (index := self.of(inode)) >= 0:
            self._touched.setdefault(index, []).append((low, high))

    def saved(self, inode: Inode) -> None:
        """The inode was saved: its size may have changed."""
        index = self.of(inode)
        before = self._sizes.get(index)
        if index >= 0 and before is not None and before != inode.size:
            ends = sorted((pages_of(before), pages_of(inode.size)))
            if ends[0] < ends[1]:
                self.touch(inode, ends[0], ends[1])
            self._sizes[index] = inode.size

    def zero(self, tx: Tx, inode: Inode, offset: int, end: int) -> bool:
        """Zero bytes [offset, end) of a page once the transaction is published; False when stores can't come to the page."""
        page = offset // PAGE
        if page >= min(self.pages(inode), pages_of(inode.size)):
            return False
        if not extents.written(extents.load(tx, inode, page, page + 1)):
            return True  # a hole: zeros already
        self.own(tx, inode, page, page + 1)
        for _, pfn, _, _ in extents.clip(extents.load(tx, inode, page, page + 1), page, page + 1):
            zeros = self._zeroed.setdefault(self.of(inode), [])
            zeros.append((page, pfn, offset - page * PAGE, end - page * PAGE))
        return True

    def gone(self, tx: Tx, inode: Inode) -> None:
        """The inode is about to be deleted: what maps it keeps its frames."""
        index = self.of(inode)
        if index < 0:
            return
        if self.spaces.is_mapped(index):
            have, length = self.spaces.pages(index), self.spaces.length(index)
            if have < length:
                self.spaces.enter(index, have, entry_words(tx, inode, length)[have:])
            self.spaces.pin(index)
        self._touched.pop(index, None)
        self._gone.append(index)

    def gone_subvolume(self, tx: Tx, subvolume: int) -> None:
        """A subvolume is about to be deleted with all its files."""
        for index in self.spaces.of_subvolume(subvolume):
            self.gone(tx, inodes.change(tx, *self.spaces.key(index)))

    def freeze_subvolume(self, tx: Tx, subvolume: int) -> None:
        """Freeze all files of a subvolume."""
        for index in self.spaces.of_subvolume(subvolume):
            if self.spaces.pages(index):
                self.freeze(tx, inodes.change(tx, *self.spaces.key(index)), 0, _END)

    def fold_all(self, tx: Tx) -> None:
        """Fold everything; what has lost its inode in a death becomes an orphan."""
        for index in self.spaces.dirty():
            key = self.spaces.key(index)
            if inodes.exists(tx, *key):
                inodes.change(tx, *key)  # which folds it
            else:
                self._gone.append(index)

    # ----------------------------------------------------------- ending

    def write_log(self, tx: Tx) -> bool:
        """Write the entry log of the transaction; False when it has none to write. NoSpace when /dev/shm is full."""
        pieces = [self._log_of(tx, index) for index in sorted({*self._touched, *self._folded, *self._zeroed})]
        moved = [runs for index, runs in self._handed.items() if index in self._touched or len(runs) > 1]
        if moved:  # by the same transaction: whatever it did with them, these frames are no fault's any more
            rows = np.concatenate([each for runs in moved for each in runs])
            flags = np.full(len(rows), HAND | SPACES, np.uint64)
            pieces.append(np.stack([flags, np.zeros(len(rows), np.uint64), rows[:, 2], rows[:, 1]], 1))
        rows = np.concatenate(pieces) if pieces else np.zeros((0, 4), np.uint64)
        if not len(rows):
            return False
        runtime, words = self.runtime, self.runtime.words
        if len(rows) > runtime.layout.log_capacity:
            raise NoSpace("the entry log has no room for a transaction of this many runs", path=runtime.path)
        runtime.reserve(_LOG_ROOM, runtime.layout.log, len(rows) * RUN.size)
        first = runtime.layout.log // 8
        np.frombuffer(words, np.uint64)[first : first + rows.size] = rows.reshape(-1)
        words[_LOG_GENERATION] = tx.generation
        words[_LOG_COUNT] = len(rows)
        return True

    def _log_of(self, tx: Tx, index: int) -> npt.NDArray[np.uint64]:
        limit = max(self.spaces.pages(index), self.spaces.length(index))
        touched, kept = union(self._touched.get(index, ())), union(self._kept.get(index, ()))
        rows: list[tuple[int, int, int, int]] = []
        if touched:
            inode = inodes.load(tx, *self.spaces.key(index))
            for low, high in touched:
                for a, b, flag in _split(low, min(high, limit), kept):
                    rows += [(index | flag, *row) for row in _places(tx, inode, a, b)]
        folded = runs_of_words(self._folded[index], 0) if index in self._folded else np.zeros((0, 3), np.uint64)
        zeros = self._zeroed.get(index, [])
        cuts = union([*touched, *((page, page + 1) for page, *_ in zeros)])
        for page, pfn, count in folded.tolist() if cuts else ():
            rows += [(index | FOLD, a, b - a, pfn + a - page) for a, b in _outside(page, page + count, touched, cuts)]
        if rows or zeros:
            rows = [piece for row in rows for piece in _cut_at(row, {page for page, *_ in zeros})]
            rows += [
                (index | ZERO, page, first << 16 | end, pfn) for page, pfn, first, end in zeros if not _within(page, touched)
            ]
            rows.sort(key=lambda row: (row[1], row[0] & ZERO))
        found = np.array(rows, np.uint64).reshape(-1, 4)
        if cuts or not len(folded):
            return found
        space = np.full(len(folded), index | FOLD, np.uint64)
        return np.stack([space, folded[:, 0], folded[:, 2], folded[:, 1]], 1)

    def published(self) -> None:
        """The transaction has been published and its entry log applied."""
        for index in {*self._folded, *self._looked}:
            self.spaces.folded(index)
        for index in self._gone:
            self.spaces.orphan(index)
        if self._gone:
            self.spaces.end_unmapped()


def union(ranges: Iterable[Range]) -> list[Range]:
    """Return what `ranges` cover, as ascending ranges that don't touch."""
    found: list[Range] = []
    for low, high in sorted(r for r in ranges if r[0] < r[1]):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found


def _within(page: int, ranges: list[Range]) -> bool:
    return any(low <= page < high for low, high in ranges)


def _split(low: int, high: int, kept: list[Range]) -> list[tuple[int, int, int]]:
    """Return [low, high) in pieces (first, end, KEEP or 0)."""
    found = []
    for a, b in kept:
        a, b = max(a, low), min(b, high)
        if a < b:
            if low < a:
                found.append((low, a, 0))
            found.append((a, b, KEEP))
            low = b
    if low < high:
        found.append((low, high, 0))
    return found


def _outside(low: int, high: int, touched: list[Range], cuts: list[Range]) -> list[Range]:
    """Return [low, high) without what was touched; `cuts` only speeds up the usual case."""
    if not any(a < high and low < b for a, b in cuts):
        return [(low, high)]
    found = []
    for a, b in touched:
        if a < high and low < b:
            if low < a:
                found.append((low, a))
            low = max(low, b)
    if low < high:
        found.append((low, high))
    return found


def _cut_at(row: tuple[int, int, int, int], pages: set[int]) -> list[tuple[int, int, int, int]]:
    """Return a log run with the pages in `pages` as runs of their own."""
    space, page, count, word = row
    edges = sorted({page, page + count, *(e for p in pages if page <= p < page + count for e in (p, p + 1))})
    counts = bool(word & PFN_MASK)
    return [(space, a, b - a, word + a - page if counts else word) for a, b in pairwise(edges)]


def _places(tx: Tx, inode: Inode, low: int, high: int) -> list[tuple[int, int, int]]:
    """Return where pages [low, high) are after the transaction, as (page, pages, word)."""
    end = max(low, min(high, pages_of(inode.size)))
    found, at = [], low
    for page, pfn, count, _ in extents.clip(extents.written(extents.load(tx, inode, low, end)), low, end):
        if at < page:
            found.append((at, page - at, 0))
        found.append((page, count, pfn))
        at = page + count
    if at < end:
        found.append((at, end - at, 0))
    if end < high:
        found.append((end, high - end, BEYOND))
    return found
