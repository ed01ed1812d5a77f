"""Extents: which frames hold which pages of a file. Up to seven lie in the inode itself, more in a tree of their own.

All changes go through `replace`: it cuts what is in a range, lets its frames go, puts other runs there and merges them with
neighbours that continue them. Its caller has the inode from `inode.change`.
"""

import struct
from itertools import pairwise

from onecopy.blkcache.frames import FRESH, MAX_RUN, PINNED, SHARED
from onecopy.daxemu.errors import CorruptRecord
from onecopy.fs import counts
from onecopy.fs.btree import EXTENTS, INODES, MAX_KEY, Tree
from onecopy.fs.format import EXTENT, INLINE_DATA, INLINE_EXTENTS, MAX_INLINE_EXTENTS, UNWRITTEN
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx, View

Extent = tuple[int, int, int, int]  # (file page, PFN, pages, flags)

_INLINE = struct.Struct("<Q" + EXTENT.struct.format[1:])  # the key, then the value
_STEP = _INLINE.size


def inline_extents(inode: Inode) -> list[Extent]:
    """Return the extents in the inode's record."""
    used = min(inode.inline_used, MAX_INLINE_EXTENTS) * _STEP
    return list(_INLINE.iter_unpack(inode.inline[:used]))


def load(view: View, inode: Inode, low: int = 0, high: int = MAX_KEY) -> list[Extent]:
    """Return the extents that overlap pages [low, high), whole, ascending; of a mapped file, what its entries say."""
    if view.seen is not None:
        found = view.seen.extents(view, inode, low, high)
        if found is not None:
            return found
    return stored(view, inode, low, high)


def stored(view: View, inode: Inode, low: int = 0, high: int = MAX_KEY) -> list[Extent]:
    """Return the extents in the trees that overlap pages [low, high), whole, ascending."""
    frames = len(view.table)
    if inode.flags & INLINE_EXTENTS:
        found = [e for e in inline_extents(inode) if e[0] < high and e[0] + e[2] > low]
        for extent in found:
            if extent[1] + extent[2] > frames:
                raise _outside(extent, frames)
        return found
    if not inode.root:
        return []
    before = EXTENTS.floor(view.words, inode.root, low)
    start = low if before is None else before[0]
    found = []
    for base, i, j in EXTENTS.slices(view.words, inode.root, start, high):
        keys = view.words[base + 4 + i : base + 4 + j].tolist()
        first = base + EXTENTS.values
        values = view.words[first + 2 * i : first + 2 * j].tolist()
        for n, key in enumerate(keys):
            word = values[2 * n + 1]
            extent = (key, values[2 * n], word & 0xFFFFFFFF, word >> 32)
            if extent[1] + extent[2] > frames:
                raise _outside(extent, frames)
            found.append(extent)
    if found and found[0][0] + found[0][2] <= low:
        del found[0]
    return found


def _outside(extent: Extent, frames: int) -> CorruptRecord:
    page, pfn, pages, _ = extent
    return CorruptRecord("extent", pfn, f"file page {page}", expected=f"below {frames}", actual=f"{pfn} and {pages} pages")


def clip(extents: list[Extent], low: int, high: int) -> list[Extent]:
    """Return the parts of `extents` within pages [low, high)."""
    found = []
    for page, pfn, pages, flags in extents:
        first, last = max(page, low), min(page + pages, high)
        if first < last:
            found.append((first, pfn + first - page, last - first, flags))
    return found


def holes(extents: list[Extent], low: int, high: int) -> list[tuple[int, int]]:
    """Return the ranges [first, end) of pages in [low, high) that no extent covers."""
    edges = [low, *(edge for e in clip(extents, low, high) for edge in (e[0], e[0] + e[2])), high]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def merge(extents: list[Extent]) -> list[Extent]:
    """Return ascending `extents` with neighbours that continue each other made one."""
    merged: list[Extent] = []
    for page, pfn, pages, flags in extents:
        if merged:
            a, b, n, f = merged[-1]
            if a + n == page and b + n == pfn and f == flags and n + pages <= MAX_RUN:
                merged[-1] = (a, b, n + pages, f)
                continue
        merged.append((page, pfn, pages, flags))
    return merged


def own(tx: Tx, inode: Inode, low: int, high: int) -> None:
    """Make the nodes over pages [low, high) the transaction's own where any is shared: counts below are exact then."""
    if inode.root:
        before = EXTENTS.floor(tx.words, inode.root, low)
        if before is not None:
            low = before[0]  # an extent may reach over pages that its right neighbour in the tree is looked up for
        if _path_shared(tx, inode.root, low, high):
            inode.root = EXTENTS.own_path(tx, inode.root, low, high)


def _path_shared(view: View, root: int, low: int, high: int) -> bool:
    if view.table[root] & SHARED:
        return True
    level = view.words[root << 9] >> 16 & 0xFF
    if level == 0:
        return False
    nodes = [root]
    while level:
        below: list[int] = []
        for pfn in nodes:
            base = EXTENTS.enter(view.words, pfn, level)
            keys = view.words[base + 4 : base + 4 + (view.words[base] & 0xFFFF)].tolist()
            children = EXTENTS.children(view.words, base)
            for (key, child), following in pairwise([*zip(keys, children, strict=True), (MAX_KEY, 0)]):
                if key < high and following[0] > low:
                    below.append(child)
        if any(view.table[pfn] & SHARED for pfn in below):
            return True
        nodes, level = below, level - 1
    return False


def path_may_share(view: View, inode: Inode) -> bool:
    """Return False when surely no node between the superblock and the file's extents has two references."""
    home = view.subvolume(inode.subvolume)
    stack: list[tuple[Tree, int]] = [(INODES, home.root)] if home is not None else []
    base = 0
    while stack:
        tree, pfn = stack.pop()
        if view.table[pfn] & SHARED:
            return True
        base = tree.enter(view.words, pfn)
        children = tree.children(view.words, base)
        if children:
            keys = view.words[base + 4 : base + 4 + len(children)].tolist()
            at = max((n for n, key in enumerate(keys) if key <= inode.number), default=0)
            stack.append((tree, children[at]))
    nodes = [inode.root] if inode.root else []
    while nodes:
        pfn = nodes.pop()
        if view.table[pfn] & SHARED:
            return True
        nodes += EXTENTS.children(view.words, EXTENTS.enter(view.words, pfn))
    return False


def pieces(tx: Tx, inode: Inode, low: int, high: int) -> list[tuple[int, int, int, int, bool]]:
    """Return what covers pages [low, high) as (page, PFN, pages, flags, private), cut where privacy changes.

    Private: nobody else refers to the frames, no deleted file's mapping shows them, and the durable root, if it names them,
    does so for this file alone; so they may be stored to in place (S2, S4, S9). The last is why a SHARED hint counts until the
    next sync, whatever the references are by now. Owns the path first. A stale hint costs a copy.
    """
    own(tx, inode, low, high)
    found = []
    for page, pfn, pages, flags in clip(load(tx, inode, low, high), low, high):
        if pages == 1 and not tx.table[pfn] & (SHARED | PINNED):
            found.append((page, pfn, 1, flags, True))
            continue
        for first, last, references in counts.split_by_references(tx, pfn, pages):
            states = tx.array[first:last]
            public = (states & PINNED) | ((states & (SHARED | FRESH)) == SHARED)
            found.append((page + first - pfn, first, last - first, flags, references == 1 and not public.any()))
    return found


def replace(tx: Tx, inode: Inode, low: int, high: int, new: list[Extent], *, keep: bool = False) -> None:
    """Make `new` what covers pages [low, high). The frames cut away lose a reference, unless `keep`: `new` reuses them.

    References on the frames of `new` are the caller's to have taken.
    """
    if low >= high:
        return
    if tx.changes is not None:
        tx.changes.touch(inode, low, high)
    own(tx, inode, max(low - 1, 0), high + 1)
    old = load(tx, inode, max(low - 1, 0), high + 1)
    around = [e for e in old if e[0] + e[2] <= low], [e for e in old if e[0] >= high]
    cut = clip(old, low, high)
    left = clip([e for e in old if e[0] < low < e[0] + e[2]], 0, low)
    right = clip([e for e in old if e[0] < high < e[0] + e[2]], high, MAX_KEY)
    if not keep:
        counts.release(tx, [(pfn, pages) for _, pfn, pages, _ in cut])
    inode.pages += sum(e[2] for e in new) - sum(e[2] for e in cut)
    write(tx, inode, old, merge([*around[0], *left, *new, *right, *around[1]]))


def write(tx: Tx, inode: Inode, old: list[Extent], new: list[Extent]) -> None:
    """Change the inode's extents by replacing the entries `old` by `new`."""
    if not inode.root:
        if inode.flags & INLINE_EXTENTS:
            gone = {e[0] for e in old}
            new = sorted([e for e in inline_extents(inode) if e[0] not in gone] + new)
        inode.flags &= ~(INLINE_EXTENTS | INLINE_DATA)
        inode.inline, inode.inline_used = b"", 0
        if 0 < len(new) <= MAX_INLINE_EXTENTS:
            inode.flags |= INLINE_EXTENTS
            inode.inline = b"".join(_INLINE.pack(*e) for e in new)
            inode.inline_used = len(new)
            return
        old = []
    root, known = inode.root, {e[0]: e for e in old}
    wanted = {e[0] for e in new}
    for page in known:
        if page not in wanted:
            root = EXTENTS.delete(tx, root, page)
    for extent in new:
        have = known.get(extent[0])
        if have is None:
            root = EXTENTS.insert(tx, root, extent[0], EXTENT.pack(*extent[1:]))
        elif have != extent:
            root = EXTENTS.update(tx, root, extent[0], EXTENT.pack(*extent[1:]))
    inode.root = root


def to_tree(tx: Tx, inode: Inode) -> None:
    """Move extents that lie in the inode into a tree, whose root a clone can share."""
    new = inline_extents(inode)
    inode.flags &= ~INLINE_EXTENTS
    inode.inline, inode.inline_used = b"", 0
    for extent in new:
        inode.root = EXTENTS.insert(tx, inode.root, extent[0], EXTENT.pack(*extent[1:]))


def shift(tx: Tx, inode: Inode, start: int, by: int) -> None:
    """Move all extents from page `start` on by `by` pages; none may straddle `start`, and the way must be free."""
    moved = clip(load(tx, inode, start), start, MAX_KEY)
    replace(tx, inode, start, MAX_KEY - 1, [], keep=True)
    if moved:
        target = [(page + by, pfn, pages, flags) for page, pfn, pages, flags in moved]
        replace(tx, inode, target[0][0], target[-1][0] + target[-1][2], target, keep=True)


def written(extents: list[Extent]) -> list[Extent]:
    """Return the extents that hold data."""
    return [e for e in extents if not e[3] & UNWRITTEN]
