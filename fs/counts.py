"""Fragment counts: how many tree nodes refer to a run of frames, kept only for what is referenced twice or more.

A fragment is a maximal run of frames with one reference count, split at the boundaries of what is shared or let go and
merged with equal neighbours, so a clone of a clone of a large extent stays one record. Tree nodes are frames, too:
a node's count says how many parents (or inodes, or subvolumes) refer to it, and `share_children` hands a count
down when a shared node is copied (Rodeh): references are counted where they are, one level below the sharing.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import SHARED, Run
from onecopy.daxemu.errors import CorruptRecord
from onecopy.fs import batch
from onecopy.fs.btree import COUNTS, ENTRIES, EXTENTS, INODES, Tree
from onecopy.fs.format import COUNT, INLINE_EXTENTS, INODE, MAX_INLINE_EXTENTS

if TYPE_CHECKING:
    from onecopy.fs.tx import Tx, View

_INLINE_WORD = INODE.word("inline")
_ROOT_WORD = INODE.word("root")
_FLAGS_WORD = INODE.word("flags")

Fragment = tuple[int, int, int]  # (first PFN, end PFN, references)


def references(view: "View", pfn: int) -> int:
    """Return how often frame `pfn`, which is in use, is referenced."""
    if not view.table[pfn] & SHARED:
        return 1
    found = COUNTS.floor(view.words, view.counts, pfn)
    if found is None:
        return 1
    first, offset = found
    pages, count = COUNT.unpack_from(view.bytes, offset)
    return int(count) if pfn < first + pages else 1


def fragments(view: "View", low: int, high: int) -> list[Fragment]:
    """Return the recorded fragments that overlap [low, high), whole, ascending."""
    found: list[Fragment] = []
    before = COUNTS.floor(view.words, view.counts, low)
    start = low
    if before is not None:
        start = before[0]
    for key, offset in COUNTS.items(view.words, view.counts, start, high):
        pages, count = COUNT.unpack_from(view.bytes, offset)
        if key + pages > low:
            found.append((key, key + pages, count))
    return found


def split_by_references(view: "View", pfn: int, pages: int) -> list[Fragment]:
    """Return [pfn, pfn + pages) cut where the count changes; frames without a record have one reference."""
    end = pfn + pages
    if not (view.table[pfn] & SHARED if pages == 1 else (view.array[pfn:end] & SHARED).any()):
        return [(pfn, end, 1)]
    pieces: list[Fragment] = []
    at = pfn
    for first, last, count in fragments(view, pfn, end):
        first, last = max(first, pfn), min(last, end)
        if at < first:
            pieces.append((at, first, 1))
        pieces.append((first, last, count))
        at = last
    if at < end:
        pieces.append((at, end, 1))
    return pieces


def add(tx: "Tx", pfn: int, pages: int, delta: int) -> list[Run]:
    """Change the references of frames [pfn, pfn + pages) by `delta`; return the runs that nobody refers to any more."""
    end = pfn + pages
    alone = COUNTS.alone(tx.words, tx.counts, pfn, pages)
    if alone >= 0 and tx.words[(alone >> 3) + 1] + delta >= 2:  # the usual case: one more or less of what is a record
        tx.counts, alone = COUNTS.own_value(tx, tx.counts, pfn)
        tx.words[(alone >> 3) + 1] += delta
        return []
    if delta > 0:
        if pages == 1:
            tx.table[pfn] |= SHARED
        else:
            tx.array[pfn:end] |= np.uint8(SHARED)
    elif not (tx.table[pfn] & SHARED if pages == 1 else (tx.array[pfn:end] & SHARED).any()):
        return [(pfn, pages)]
    old = fragments(tx, pfn - 1, end + 1)  # with the neighbours that touch
    pieces: list[Fragment] = []
    freed: list[Run] = []
    at = pfn
    for first, last, count in old:
        if first < pfn:
            pieces.append((first, min(last, pfn), count))
        if last > pfn and first < end:
            if at < first:
                pieces.append((at, first, 1 + delta))
            pieces.append((max(first, pfn), min(last, end), count + delta))
            at = min(last, end)
        if last > end:
            if at < end:
                pieces.append((at, end, 1 + delta))
                at = end
            pieces.append((max(first, end), last, count))
    if at < end:
        pieces.append((at, end, 1 + delta))
    new: dict[int, tuple[int, int]] = {}
    last_first, last_end, last_count = -1, -1, -1
    for first, last, count in pieces:
        if count <= 1:
            if count <= 0:
                freed.append((first, last - first))
            else:
                tx.runtime.set("stale_hints", 1)  # the durable root may still name it twice: the hint stays until a sync
            continue
        if first == last_end and count == last_count:
            first = last_first
        new[first] = (last - first, count)
        last_first, last_end, last_count = first, last, count
    _replace(tx, old, new)
    return freed


def _replace(tx: "Tx", old: list[Fragment], new: dict[int, tuple[int, int]]) -> None:
    root = tx.counts
    known = {first: (last - first, count) for first, last, count in old}
    for first in known:
        if first not in new:
            root = COUNTS.delete(tx, root, first)
    for first, value in new.items():
        have = known.get(first)
        if have is None:
            root = COUNTS.insert(tx, root, first, COUNT.pack(*value))
        elif have != value:
            root = COUNTS.update(tx, root, first, COUNT.pack(*value))
    tx.counts = root


def add_runs(tx: "Tx", runs: list[Run], delta: int) -> list[Run]:
    """`add` for many runs, which may repeat: in order, joined where they touch, repeats counted at once."""
    if len(runs) == 1:
        return add(tx, *runs[0], delta)
    freed: list[Run] = []
    pending: list[list[int]] = []  # [pfn, pages, times]
    for pfn, pages in sorted(runs):
        if pending:
            last = pending[-1]
            if last[0] == pfn and last[1] == pages:
                last[2] += 1
                continue
            if last[0] + last[1] == pfn and last[2] == 1:
                last[1] += pages
                continue
        pending.append([pfn, pages, 1])
    for pfn, pages, times in pending:
        if delta > 0:
            add(tx, pfn, pages, delta * times)
            continue
        while times:  # the last reference must be seen to go alone
            step = times if times == 1 else min(times, min(c for *_, c in split_by_references(tx, pfn, pages)) - 1) or 1
            freed += add(tx, pfn, pages, -step)
            times -= step
    return freed


def change_many(tx: "Tx", runs: npt.NDArray[np.int64], delta: int) -> list[Run]:
    """`add_runs` for an (n, 2) array of runs: one sweep over their edges, one pass over the counts tree."""
    runs = runs[runs[:, 0].argsort(kind="stable")]
    first, end = runs[:, 0], runs.sum(1)
    if not len(runs):
        return []
    if first[0] < 1 or first[-1] >= len(tx.array) or (first >= end).any() or end.max() > len(tx.array):
        raise CorruptRecord("run of frames", int(first[0]), "frames", expected="some of the pool", actual=runs.tolist()[-1])
    touched = (first - 1).astype(np.uint64), (end + 1).astype(np.uint64)  # with the neighbours that touch
    tx.counts, before = batch.own_over(COUNTS, tx, tx.counts, *touched)
    keys, values = before.keys, before.values
    old, pages, count = keys.astype(np.int64), values[:, 0].astype(np.int64), values[:, 1].astype(np.int64)
    wrong = (old < 0) | (pages < 1) | (pages > len(tx.array) - old) | (count < 2)
    if wrong.any():
        raise CorruptRecord("fragment", int(keys[wrong][0]), "frames", expected="some of the pool", actual=values[wrong][0])
    edges = np.unique(np.concatenate((first, end, old, old + pages)))
    low, high = edges[:-1], edges[1:]
    times = first.searchsorted(low, "right") - np.sort(end).searchsorted(low, "right")
    over = batch.over(old, old + pages, low)
    now = np.where(over >= 0, np.append(count, 1)[over], 1) + delta * times
    if delta > 0:
        _hint(tx, low[times > 0], high[times > 0])
    elif ((times > 0) & (now == 1)).any():
        tx.runtime.set("stale_hints", 1)  # as in `add`
    gone, kept = (times > 0) & (now < 1), now > 1
    freed = [(start, stop - start) for start, stop in batch.joined(low[gone], high[gone])]
    low, high, now = low[kept], high[kept], now[kept]
    starts, ends = batch.groups((low[1:] != high[:-1]) | (now[1:] != now[:-1]), len(low))
    new = np.stack((high[ends] - low[starts], now[starts]), 1).astype(np.uint64)
    tx.counts = batch.replace(COUNTS, tx, tx.counts, before, low[starts].astype(np.uint64), new)
    return freed


def inode_references(view: "View", offset: int) -> tuple[int, list[Run]]:
    """Return what the inode record at byte `offset` refers to: (root PFN or 0, runs of inline extents)."""
    words, base = view.words, offset >> 3
    flags_and_used = words[base + _FLAGS_WORD]
    if flags_and_used & INLINE_EXTENTS:
        used = min(flags_and_used >> 32, MAX_INLINE_EXTENTS)
        runs = []
        for n in range(used):
            at = base + _INLINE_WORD + 3 * n
            runs.append((words[at + 1], words[at + 2] & 0xFFFFFFFF))
        return 0, runs
    return words[base + _ROOT_WORD], []


def leaf_runs(view: "View", base: int) -> list[Run]:
    """Return the runs of frames that a leaf of an extent tree refers to."""
    count = view.words[base] & 0xFFFF
    values = view.words[base + EXTENTS.values : base + EXTENTS.values + 2 * count].tolist()
    return [(values[i], values[i + 1] & 0xFFFFFFFF) for i in range(0, 2 * count, 2)]


def _below(tx: "Tx", tree: Tree, base: int) -> list[Run]:
    """Return the runs of frames, nodes or data, that the node at word `base` refers to."""
    children = tree.children(tx.words, base)
    if children:
        return [(child, 1) for child in children]
    if tree is EXTENTS:
        return leaf_runs(tx, base)
    runs: list[Run] = []
    if tree is INODES:
        for _, offset in tree.leaf_items(tx.words, base):
            root, inline = inode_references(tx, offset)
            runs += [(root, 1)] if root else inline
    return runs


def share_children(tx: "Tx", tree: Tree, base: int) -> None:
    """Take one more reference on everything that the node at word `base` refers to: it has been copied."""
    add_runs(tx, _below(tx, tree, base), 1)


def hint_children(tx: "Tx", tree: Tree, base: int) -> None:
    """Set the SHARED hint of everything that the node at word `base` refers to."""
    for pfn, pages in _below(tx, tree, base):
        tx.array[pfn : pfn + pages] |= np.uint8(SHARED)
    tx.runtime.set("stale_hints", 1)


def share_many(tx: "Tx", tree: Tree, shared: list[tuple[int, int]], hinted: list[int]) -> None:
    """Hand down counts as `Tx.own` does, of many (node, copy of it) at once; and the hints of copies `hinted`."""
    if shared:
        change_many(tx, np.array([(node, 1) for node, _ in shared]), -1)
        change_many(tx, _refers(tx, tree, [copy for _, copy in shared]), 1)
    if hinted:
        runs = _refers(tx, tree, hinted)
        _hint(tx, runs[:, 0], runs.sum(1))
        tx.runtime.set("stale_hints", 1)


def _refers(tx: "Tx", tree: Tree, nodes: list[int]) -> npt.NDArray[np.int64]:
    """Return the runs of frames that nodes of one level of an extent tree refer to."""
    level = tx.words[nodes[0] << 9] >> 16 & 0xFF
    rest = batch.gather(tree, tx, level, np.array(nodes)).rest
    pages = np.ones(len(rest), np.uint64) if level else rest[:, 1] & np.uint64(0xFFFFFFFF)
    return np.stack((rest[:, 0], pages), 1).astype(np.int64)


def _hint(tx: "Tx", first: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> None:
    """Set the SHARED hint of many runs."""
    pages = end - first
    if pages.sum() > 64 * len(pages):
        for start, stop in zip(first.tolist(), end.tolist(), strict=True):
            tx.array[start:stop] |= np.uint8(SHARED)
    else:
        tx.array[np.repeat(first - pages.cumsum() + pages, pages) + np.arange(pages.sum())] |= np.uint8(SHARED)


def refresh_hints(view: "View") -> None:
    """Clear the SHARED hints that the counts of `view`, which has just become durable, do not back. Under the lock."""
    exact = np.zeros(len(view.array), bool)
    for first, offset in COUNTS.items(view.words, view.counts):
        exact[first : first + view.words[offset >> 3]] = True
    stale = ~exact & ((view.array & SHARED) != 0)  # and no free frame: a fault may be taking it
    view.array[stale] &= np.uint8(0xFF ^ SHARED)


def drop(tx: "Tx", tree: Tree, root: int) -> None:
    """Give up one reference on the tree at `root` (0: none); the last one frees what only it refers to."""
    stack: list[tuple[Tree, int, int | None]] = [(tree, root, None)] if root else []
    while stack:
        tree, pfn, level = stack.pop()
        base = tree.enter(tx.words, pfn, level)
        if references(tx, pfn) > 1:
            add(tx, pfn, 1, -1)
            continue
        children = tree.children(tx.words, base)
        if children:
            below = (tx.words[base] >> 16 & 0xFF) - 1
            stack += [(tree, child, below) for child in children]
        elif tree is EXTENTS:
            release(tx, leaf_runs(tx, base))
        elif tree is INODES:
            for _, offset in tree.leaf_items(tx.words, base):
                mode = INODE.unpack_from(tx.bytes, offset)[0]
                content, inline = inode_references(tx, offset)
                if content:
                    stack.append((ENTRIES if mode & 0o170000 == 0o040000 else EXTENTS, content, None))
                release(tx, inline)
        tx.free_node(pfn)


def release(tx: "Tx", runs: list[Run]) -> None:
    """Give up one reference on each of `runs`; what nobody refers to any more goes into limbo with this transaction."""
    array, table = tx.array, tx.table
    shared: list[Run] = []
    for pfn, pages in runs:
        if table[pfn] & SHARED if pages == 1 else (array[pfn : pfn + pages] & SHARED).any():
            shared.append((pfn, pages))
        else:
            tx.freed.append((pfn, pages))
    if shared:
        tx.freed += add_runs(tx, shared, -1)
