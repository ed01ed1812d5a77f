"""Who pays for what: extents with their sharers, and du with logical, unique and shared bytes.

A page reached from a tree over several paths is counted once in it. "Unique" is what deleting the tree would free: frames
all of whose references lie within it; "shared" is the rest of what it reaches.
"""

import stat
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import SHARED, Run
from onecopy.daxemu.errors import CorruptRecord
from onecopy.daxemu.units import PAGE, pages_of
from onecopy.fs import counts, extents, namei
from onecopy.fs import directory as directories
from onecopy.fs import inode as inodes
from onecopy.fs.btree import EXTENTS, INODES, ROOTS, Tree
from onecopy.fs.directory import SUBVOLUME
from onecopy.fs.format import INODE, ROOT_INODE, UNWRITTEN
from onecopy.fs.inode import Inode
from onecopy.fs.namei import PHANTOM
from onecopy.fs.tx import View


@dataclass(frozen=True)
class Extent:
    """A run of a file: pages, first PFN (0: hole), sharers (how many places reach it), "data", "unwritten" or "hole"."""

    file_page: int
    pfn: int
    pages: int
    sharers: int
    state: str


@dataclass(frozen=True)
class Usage:
    """What a path holds, in bytes. logical: file sizes; unique: frames only it reaches; shared: frames others reach, too.

    `total` is unique and shared: the frames that it reaches, each once. Content in inodes takes no frame.
    """

    path: str
    logical: int
    unique: int
    shared: int
    files: int

    @property
    def total(self) -> int:
        """Bytes of frames reached, each once."""
        return self.unique + self.shared


class References:
    """How many places reach each frame of a view: the truth behind the lazily moved counts.

    A frame of an extent tree is reached once per path from the superblock; along a path the counts multiply. We walk each
    node once, in an order that has all parents before a node, and add the parents' numbers up.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.places: npt.NDArray[np.int64] = np.zeros(len(view.table), np.int64)
        self._count_all()

    def _count_all(self) -> None:
        view = self.view
        # Levels from the top: root tree leaves, inode trees by level, extent trees by level. A node's level within its
        # tree is fixed, so all its parents come in an earlier round.
        rounds: dict[tuple[int, int], set[int]] = {}
        self.places[view.roots] = 1
        rounds[0, -self._level(view.roots)] = {view.roots}
        trees: tuple[Tree, ...] = (ROOTS, INODES, EXTENTS)
        while rounds:
            key = min(rounds)
            for pfn in rounds.pop(key):
                tree = trees[key[0]]
                base = tree.enter(view.words, pfn, -key[1])
                times = self.places[pfn]
                children = tree.children(view.words, base)
                if children:
                    _add(self.places, [(child, 1) for child in children], times)
                    rounds.setdefault((key[0], key[1] + 1), set()).update(children)
                elif tree is EXTENTS:
                    _add(self.places, counts.leaf_runs(view, base), times)
                else:
                    for root, runs in self._below(tree, base):
                        _add(self.places, runs, times)
                        if root:
                            _add(self.places, [(root, 1)], times)
                            rounds.setdefault((key[0] + 1, -self._level(root)), set()).add(root)

    def _level(self, pfn: int) -> int:
        return self.view.words[pfn << 9] >> 16 & 0xFF

    def _below(self, tree: Tree, base: int) -> list[tuple[int, list[Run]]]:
        view = self.view
        if tree is ROOTS:
            return [(view.words[offset >> 3], []) for _, offset in tree.leaf_items(view.words, base)]
        found = []
        for _, offset in tree.leaf_items(view.words, base):
            if not stat.S_ISDIR(INODE.unpack_from(view.bytes, offset)[0]):
                found.append(counts.inode_references(view, offset))
        return found


def _add(places: npt.NDArray[np.int64], runs: list[Run], times: int) -> None:
    """Add `times` to the places of every frame of `runs`, which may repeat."""
    singles = [pfn for pfn, pages in runs if pages == 1]
    try:
        if singles:
            np.add.at(places, singles, times)
    except (IndexError, OverflowError) as error:  # damage since the cold open, which looked at all pointers
        raise CorruptRecord("pointer", max(singles), "PFN", expected=f"below {len(places)}", actual=max(singles)) from error
    if len(singles) < len(runs):
        for pfn, pages in runs:
            if pages > 1:
                places[pfn : pfn + pages] += times


def file_extents(view: View, inode: Inode) -> list[Extent]:
    """Return all runs of a file up to its end, holes included, cut where the number of sharers changes."""
    high = pages_of(inode.size)
    have = extents.load(view, inode)
    shared = any((view.array[pfn : pfn + pages] & SHARED).any() for _, pfn, pages, _ in have)
    places = References(view).places if shared or extents.path_may_share(view, inode) else None
    found = []
    for first, last in extents.holes(have, 0, max(high, 0)) if high else []:
        if inode.content is None:
            found.append(Extent(first, 0, last - first, 0, "hole"))
    for page, pfn, pages, flags in have:
        state = "unwritten" if flags & UNWRITTEN else "data"
        if places is None or pages == 1:
            found.append(Extent(page, pfn, pages, 1 if places is None else int(places[pfn]), state))
            continue
        run = places[pfn : pfn + pages]
        cuts = [0, *(np.flatnonzero(np.diff(run)) + 1).tolist(), pages]
        for a, b in pairwise(cuts):
            found.append(Extent(page + a, pfn + a, b - a, int(run[a]), state))
    return sorted(found, key=lambda e: e.file_page)


def measure(view: View, path: str) -> Usage:
    """Return the usage of the tree at `path`, subvolumes in it included."""
    place = namei.existing(view, path, follow=False)
    logical, files = 0, 0
    inside: npt.NDArray[np.int64] = np.zeros(len(view.table), np.int64)  # places within the tree that reach a frame
    seen: set[tuple[int, int]] = set()
    hidden: set[tuple[int, int]] = set()  # what holds attributes: takes frames but is no file
    stack = [(place.subvolume, place.number)] if place.number != PHANTOM else []
    while stack:
        subvolume, number = stack.pop()
        if (subvolume, number) in seen:
            continue
        seen.add((subvolume, number))
        inode = inodes.load(view, subvolume, number)
        if inode.attributes:
            stack.append((subvolume, inode.attributes))
            hidden.add((subvolume, inode.attributes))
        if inode.is_directory:
            stack += inner_inodes(view, inode)
            continue
        if (subvolume, number) not in hidden:
            files += 1
            logical += inode.size
        _add(inside, [(pfn, pages) for _, pfn, pages, _ in extents.load(view, inode)], 1)
    reached = inside > 0
    everywhere = References(view).places
    unique = int(np.count_nonzero(reached & (inside >= everywhere)))
    return Usage(path, logical, unique * PAGE, (int(np.count_nonzero(reached)) - unique) * PAGE, files)


def inner_inodes(view: View, directory: Inode) -> list[tuple[int, int]]:
    """Return (subvolume, inode number) of what a directory names; not of subvolumes that aren't there."""
    found = []
    for entry in directories.entries(view, directory):
        if entry.kind == SUBVOLUME:
            inner = view.subvolume(entry.target)
            if inner is not None and inner.parent == directory.subvolume:
                found.append((entry.target, ROOT_INODE))
        else:
            found.append((directory.subvolume, entry.target))
    return found
