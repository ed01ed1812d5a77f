"""Many runs put into a file's extents at once: what thousands of `extents.replace` would do, in a few passes with numpy."""

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import MAX_RUN, SHARED
from onecopy.daxemu.errors import CorruptRecord
from onecopy.fs import batch, counts, extents
from onecopy.fs.btree import EXTENTS
from onecopy.fs.format import INLINE_DATA, INLINE_EXTENTS, MAX_INLINE_EXTENTS
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx

_FEW = 16  # runs up to which `extents.replace` is faster

_Extents = npt.NDArray[np.int64]  # rows of (file page, PFN, pages, flags)


def replace_many(tx: Tx, inode: Inode, new: npt.NDArray[np.uint64]) -> None:
    """Make `new`, ascending and disjoint rows of (file page, PFN, pages), what covers these pages: data, not unwritten.

    As `extents.replace` for each, whose frames lose a reference where they are cut away; but pages that have the very
    frame already keep it. References on the frames of `new` are the caller's to have taken, or to have had.
    """
    runs = new.astype(np.int64)
    if len(runs) <= _FEW and not _has_some(tx, inode, runs):
        for page, pfn, pages in runs.tolist():
            extents.replace(tx, inode, page, page + pages, [(page, pfn, pages, 0)])
        return
    first, end = new[:, 0], new[:, 0] + new[:, 2]
    # With the neighbours that touch; the path first, as the counts below it are exact then.
    touched = first - np.minimum(first, np.uint64(1)), end + np.uint64(1)
    entries = batch.Entries(*_entries(np.empty((0, 4), np.int64)))
    if inode.root:
        inode.root, entries = batch.own_over(EXTENTS, tx, inode.root, *touched)
        words = entries.values[:, 1]
        columns = entries.keys, entries.values[:, 0], words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
        old = np.stack(columns, 1).astype(np.int64)
    else:
        old = np.array(extents.load(tx, inode), np.int64).reshape(-1, 4)
    wrong = (old[:, :2] < 0).any(1) | (old[:, 2] < 1) | (old[:, 2] > len(tx.array) - old[:, 1])
    if wrong.any():
        page, pfn, pages, _ = old[wrong][0].tolist()
        raise CorruptRecord(
            "extent", pfn, f"file page {page}", expected="frames of the pool", actual=f"{pfn} and {pages} pages"
        )
    wanted, cut, more = _put(old, runs)
    _release(tx, cut)
    inode.pages += more
    if not inode.root:
        inode.flags &= ~(INLINE_EXTENTS | INLINE_DATA)
        inode.inline, inode.inline_used = b"", 0
        if len(wanted) <= MAX_INLINE_EXTENTS:
            extents.write(tx, inode, [], [(page, pfn, pages, flags) for page, pfn, pages, flags in wanted.tolist()])
            return
    inode.root = batch.replace(EXTENTS, tx, inode.root, entries, *_entries(wanted))


def _has_some(tx: Tx, inode: Inode, runs: npt.NDArray[np.int64]) -> bool:
    """Return whether any page of `runs` has the frame already that it is to get."""
    return any(
        page - pfn == run[0] - run[1]
        for run in runs.tolist()
        for page, pfn, _, _ in extents.load(tx, inode, run[0], run[0] + run[2])
    )


def _entries(rows: _Extents) -> tuple[batch.Words, batch.Words]:
    """Return keys and values of the tree for extents."""
    return rows[:, 0].astype(np.uint64), np.stack((rows[:, 1], rows[:, 2] | rows[:, 3] << 32), 1).astype(np.uint64)


def _put(old: _Extents, runs: npt.NDArray[np.int64]) -> tuple[_Extents, npt.NDArray[np.int64], int]:
    """Return `old` with `runs` put over it, the (PFN, pages) that are cut away, and how many more pages are covered."""
    old_end, runs_end = old[:, 0] + old[:, 2], runs[:, 0] + runs[:, 2]
    edges = np.unique(np.concatenate((old[:, 0], old_end, runs[:, 0], runs_end)))
    page, pages = edges[:-1], np.diff(edges)
    # Of each piece between two edges: which extent covers it, which run, and with which frame.
    had, has = batch.over(old[:, 0], old_end, page), batch.over(runs[:, 0], runs_end, page)
    had_pfn = page + np.append(old[:, 1] - old[:, 0], 0)[had]
    pfn = np.where(has >= 0, page + (runs[:, 1] - runs[:, 0])[has], had_pfn)
    flags = np.where(has >= 0, 0, np.append(old[:, 3], 0)[had])
    cut = (had >= 0) & (has >= 0)
    lost = cut & (had_pfn != pfn)
    more = int(pages[has >= 0].sum() - pages[cut].sum())
    covered = (had >= 0) | (has >= 0)
    rows = np.stack((page, pfn, pages, flags), 1)[covered]
    follows = ((rows[1:, :2] - rows[:-1, :2]) == rows[:-1, 2:3]).all(1) & (rows[1:, 3] == rows[:-1, 3])
    return _join(rows, follows), np.stack((had_pfn, pages), 1)[lost], more


def _join(rows: _Extents, follows: npt.NDArray[np.bool_]) -> _Extents:
    """Return extents with those that follow the one before made one with it."""
    first, last = batch.groups(~follows, len(rows))
    found = rows[first]
    found[:, 2] = rows[last, 0] + rows[last, 2] - rows[first, 0]
    if found[:, 2].max(initial=0) <= MAX_RUN:
        return found
    return np.array(extents.merge([(a, b, c, d) for a, b, c, d in rows.tolist()]), np.int64)


def _release(tx: Tx, runs: npt.NDArray[np.int64]) -> None:
    """Give up one reference on each of `runs`, (PFN, pages), as `counts.release`."""
    if not len(runs):
        return
    runs = runs[runs[:, 0].argsort(kind="stable")]
    start, end = runs[:, 0], runs.sum(1)
    table = tx.array if end[-1] < len(tx.array) else np.append(tx.array, np.uint8(0))
    shared = (np.bitwise_or.reduceat(table, np.stack((start, end), 1).ravel())[::2] & SHARED) != 0
    tx.freed += [(low, high - low) for low, high in batch.joined(start[~shared], end[~shared])]
    if shared.any():
        tx.freed += counts.change_many(tx, runs[shared], -1)
