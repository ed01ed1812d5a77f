"""Sharing: clones, ranges, dedupe, snapshots. Where the same frames come to be reached from two places.

A clone of a file takes one reference on the root of its extents; a snapshot takes one on the root of an inode tree. Neither
looks at what is below: counts move down when one side changes something (see `counts`).
"""

import errno
import time
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from onecopy.daxemu.errors import invalid, posix
from onecopy.daxemu.units import PAGE, WORDS, pages_of
from onecopy.fs import content, counts, extents
from onecopy.fs import directory as directories
from onecopy.fs import inode as inodes
from onecopy.fs.btree import INODES, MAX_KEY
from onecopy.fs.directory import DIRECTORY, FILE, SUBVOLUME
from onecopy.fs.format import INLINE_EXTENTS, ROOT_INODE
from onecopy.fs.inode import Inode
from onecopy.fs.namei import PHANTOM, Place, parent_of
from onecopy.fs.tx import Subvolume, Tx

_COMPARE = 64  # pages compared at once
_FEW = 16  # pages: with no more than that, a clone shares extents that lie in the inode one by one


def clone_inode(tx: Tx, source: Inode, subvolume: int, parent: int = 0) -> Inode:
    """Make an inode in `subvolume` that shares all content of `source`, a file or symbolic link; O(1)."""
    if tx.changes is not None and tx.changes.pages(source):
        source = inodes.change(tx, source.subvolume, source.number)
        tx.changes.freeze(tx, source, 0, MAX_KEY)
    if source.flags & INLINE_EXTENTS:
        if source.pages <= _FEW:
            counts.add_runs(tx, inodes.references(source)[1], 1)
        else:  # counting pages, or the fragments that others made of them, would not be O(1): give them a root to share
            source = inodes.change(tx, source.subvolume, source.number)
            extents.to_tree(tx, source)
            inodes.save(tx, source)
    if source.root:
        counts.add(tx, source.root, 1, 1)
    new = inodes.make(tx, subvolume, source.mode, parent=parent, like=source)
    new.root, new.flags, new.inline, new.inline_used = source.root, source.flags, source.inline, source.inline_used
    new.size, new.pages, new.modified = source.size, source.pages, source.modified
    if source.attributes:
        new.attributes = clone_inode(tx, inodes.holder(inodes.load(tx, source.subvolume, source.attributes)), subvolume).number
    inodes.save(tx, new)
    return new


def clone_file(tx: Tx, source: Inode, place: Place) -> Inode:
    """Clone `source` under the new name `place`."""
    new = clone_inode(tx, source, place.parent_subvolume)
    directories.insert(tx, parent_of(tx, place), place.name, new.number, FILE)
    return new


def clone_range(tx: Tx, source: Inode, source_offset: int, target: Inode, target_offset: int, length: int) -> None:
    """Make `target` share `length` bytes of `source` (0: up to its end); the rules are FICLONERANGE's. Saves `target`.

    Page-aligned, but the last page may be ragged where it ends both files. Within one file the ranges must not
    overlap. EINVAL otherwise. Both inodes come from `inode.change`; of one file, they are the same object.
    """
    length = _checked(source, source_offset, target, target_offset, length)
    if not length:
        return
    if (target_offset + length) % PAGE and target_offset + length < target.size:
        raise invalid("a ragged last page may only be shared as the target's last page, too")
    content.to_pages(tx, source)
    content.to_pages(tx, target)
    low, pages, by = source_offset // PAGE, pages_of(length), (target_offset - source_offset) // PAGE
    if tx.changes is not None:
        tx.changes.freeze(tx, source, low, low + pages)
    content.clear_tail(tx, target, target_offset)
    extents.own(tx, source, low, low + pages)
    shared = extents.written(extents.clip(extents.load(tx, source, low, low + pages), low, low + pages))
    counts.add_runs(tx, [(pfn, count) for _, pfn, count, _ in shared], 1)
    new = [(page + by, pfn, count, flags) for page, pfn, count, flags in shared]
    extents.replace(tx, target, low + by, low + by + pages, new)
    target.size = max(target.size, target_offset + length)
    target.touch()
    inodes.save(tx, target)
    if source is not target:
        inodes.save(tx, source)


def _checked(source: Inode, source_offset: int, target: Inode, target_offset: int, length: int) -> int:
    """Check a pair of ranges; return the length, 0 resolved to the rest of the source."""
    content.check_range(source_offset, length)
    content.check_range(target_offset, length)
    if source_offset % PAGE or target_offset % PAGE:
        raise invalid(f"offsets {source_offset} and {target_offset} must be multiples of the page, {PAGE} bytes")
    if source_offset + length > source.size or source_offset > source.size:
        raise invalid(f"the source ends at {source.size}; the range {source_offset}+{length} does not lie in it")
    if length == 0:
        length = source.size - source_offset
    if length % PAGE and source_offset + length != source.size:
        raise invalid(f"length {length} must be a multiple of the page, {PAGE} bytes, or reach the source's end")
    content.check_range(target_offset, length)
    if source is target and abs(source_offset - target_offset) < pages_of(length) * PAGE:
        raise invalid("the ranges overlap in one file")
    return length


def dedupe_range(tx: Tx, source: Inode, source_offset: int, target: Inode, target_offset: int, length: int) -> bool:
    """Share two ranges if they hold the same bytes, compared here, under the lock; False when they don't.

    The rules are FIDEDUPERANGE's: page-aligned; a ragged end only where it ends both files. Times don't change.
    """
    length = _checked(source, source_offset, target, target_offset, length)
    if target_offset + length > target.size:
        raise invalid(f"the target ends at {target.size}; the range {target_offset}+{length} does not lie in it")
    if (target_offset + length) % PAGE and target_offset + length != target.size:
        raise invalid("a ragged last page may only be shared as the target's last page, too")
    if not length:
        return True
    content.to_pages(tx, source)
    content.to_pages(tx, target)
    return share_pages(tx, source, source_offset // PAGE, target, target_offset // PAGE, pages_of(length))


def share_pages(tx: Tx, source: Inode, page: int, target: Inode, target_page: int, pages: int) -> bool:
    """Make pages of `target` share the equal pages of `source`; False, with nothing changed, when they aren't equal.

    Whole pages are compared, the zeros beyond a file's end included. Saves both inodes.
    """
    if tx.changes is not None:  # what is compared now must be what is shared then
        tx.changes.freeze(tx, source, page, page + pages)
        tx.changes.keep(tx, target, target_page, target_page + pages)
    here = _page_map(tx, source, page, page + pages)
    there = _page_map(tx, target, target_page, target_page + pages)
    differing = np.flatnonzero(here != there)
    if not _same_bytes(tx, here[differing], there[differing]):
        return False
    for first, last in _runs(differing):
        _share(tx, source, page + first, target, target_page + first, last - first)
    inodes.save(tx, target)
    if source is not target:
        inodes.save(tx, source)
    return True


def _share(tx: Tx, source: Inode, page: int, target: Inode, target_page: int, pages: int) -> None:
    extents.own(tx, source, page, page + pages)
    shared = extents.written(extents.clip(extents.load(tx, source, page, page + pages), page, page + pages))
    counts.add_runs(tx, [(pfn, count) for _, pfn, count, _ in shared], 1)
    new = [(at + target_page - page, pfn, count, flags) for at, pfn, count, flags in shared]
    extents.replace(tx, target, target_page, target_page + pages, new)


def _page_map(tx: Tx, inode: Inode, low: int, high: int) -> npt.NDArray[np.int64]:
    """Return the PFN of each page; 0 for what reads as zeros."""
    table = np.zeros(high - low, np.int64)
    for page, pfn, pages, _ in extents.written(extents.clip(extents.load(tx, inode, low, high), low, high)):
        table[page - low : page - low + pages] = np.arange(pfn, pfn + pages)
    return table


def _same_bytes(tx: Tx, here: npt.NDArray[np.int64], there: npt.NDArray[np.int64]) -> bool:
    """Compare frames pairwise; 0 stands for a page of zeros."""
    words = np.frombuffer(tx.words, np.uint64)
    holes = (here == 0) | (there == 0)
    for pfn in np.maximum(here, there)[holes].tolist():
        if pfn and words[pfn * WORDS : (pfn + 1) * WORDS].any():
            return False
    here, there = here[~holes], there[~holes]
    # Runs that go on on both sides are compared in one go, in pieces that stay in the cache.
    breaks = np.flatnonzero((np.diff(here) != 1) | (np.diff(there) != 1)) + 1
    for start, end in pairwise([0, *breaks.tolist(), len(here)]):
        for at in range(start, end, _COMPARE):
            size = min(_COMPARE, end - at) * WORDS
            a, b = int(here[at]) * WORDS, int(there[at]) * WORDS
            if not np.array_equal(words[a : a + size], words[b : b + size]):
                return False
    return True


def _runs(indexes: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return ascending indexes as ranges [first, end)."""
    if not len(indexes):
        return []
    cuts = np.flatnonzero(np.diff(indexes) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(indexes, cuts)]


# ----------------------------------------------------------------- trees


def create_subvolume(tx: Tx, place: Place, mode: int) -> Subvolume:
    """Make an empty subvolume under the new name `place`."""
    new = _new_subvolume(tx, place)
    tx.add_subvolume(new)
    root = inodes.make(tx, new.id, mode, parent=ROOT_INODE)
    root.links = 2
    inodes.save(tx, root)
    directories.insert(tx, parent_of(tx, place), place.name, new.id, SUBVOLUME)
    return new


def _new_subvolume(tx: Tx, place: Place) -> Subvolume:
    number = tx.next_subvolume
    tx.next_subvolume += 1
    return Subvolume(number, 0, ROOT_INODE, place.parent_subvolume, place.parent, time.time_ns(), 0, 0, 0)


def snapshot(tx: Tx, source: Place, place: Place) -> Subvolume:
    """Clone a whole subvolume under the new name `place`: one reference on its root. EINVAL unless `source` is one."""
    origin = tx.subvolume(source.subvolume)
    if source.number != ROOT_INODE or origin is None:
        raise invalid("only a subvolume can be snapshotted; 'clone -r' copies any directory tree", source.path)
    if tx.changes is not None:
        tx.changes.freeze_subvolume(tx, origin.id)
        origin = tx.subvolume(origin.id) or origin
    new = _new_subvolume(tx, place)
    new.root, new.next_inode, new.inodes, new.origin = origin.root, origin.next_inode, origin.inodes, origin.id
    counts.add(tx, origin.root, 1, 1)
    tx.add_subvolume(new)
    directories.insert(tx, parent_of(tx, place), place.name, new.id, SUBVOLUME)
    return new


def delete_subvolume(tx: Tx, place: Place) -> None:
    """Delete a subvolume with all that is in it. EBUSY while another one lies in it, or for the top."""
    if place.kind != SUBVOLUME or place.number == PHANTOM:
        raise invalid("not a subvolume", place.path)
    inner = [other for other in subvolumes(tx) if other.parent == place.subvolume]
    if inner:
        raise posix(errno.EBUSY, place.path, f"{len(inner)} other subvolumes lie in it: delete these first")
    gone = tx.subvolume(place.subvolume)
    if gone is None:
        raise posix(errno.ENOENT, place.path)
    if tx.changes is not None:
        tx.changes.gone_subvolume(tx, gone.id)
        gone = tx.subvolume(gone.id) or gone
    counts.drop(tx, INODES, gone.root)
    tx.remove_subvolume(gone.id)
    directories.remove(tx, parent_of(tx, place), place.name)


def subvolumes(tx: Tx) -> list[Subvolume]:
    """Return all subvolumes, the transaction's own changes included."""
    from onecopy.fs.btree import ROOTS

    found = [tx.subvolume(number) for number, _ in list(ROOTS.items(tx.words, tx.roots))]
    return [one for one in found if one is not None]


def clone_directory(tx: Tx, source: Inode, place: Place) -> int:
    """Clone a directory tree, file by file, under the new name `place`; return how many files.

    Hard links within the tree become hard links of the copy; subvolumes in it become empty directories.
    """
    files = 0
    linked: dict[int, int] = {}  # inode numbers of files with several names -> the clone's
    stack = [(source, place)]
    while stack:
        directory, where = stack.pop()
        new = inodes.make(tx, where.parent_subvolume, directory.mode, parent=where.parent, like=directory)
        new.links, new.modified = 2, directory.modified
        if directory.attributes:
            holder = inodes.load(tx, directory.subvolume, directory.attributes)
            new.attributes = clone_inode(tx, holder, where.parent_subvolume).number
        inodes.save(tx, new)
        directories.insert(tx, parent_of(tx, where), where.name, new.number, DIRECTORY)
        for entry in directories.entries(tx, directory):
            inner = Place(where.parent_subvolume, -1, entry.kind, where.parent_subvolume, new.number, entry.name, where.path)
            if entry.kind == SUBVOLUME:
                empty = inodes.make(tx, where.parent_subvolume, directory.mode, parent=new.number, like=directory)
                empty.links = 2
                inodes.save(tx, empty)
                directories.insert(tx, parent_of(tx, inner), entry.name, empty.number, DIRECTORY)
                continue
            child = inodes.load(tx, directory.subvolume, entry.target)
            if entry.kind == DIRECTORY:
                stack.append((child, inner))
                continue
            number = linked.get(entry.target)
            if number is None:
                number = clone_inode(tx, child, where.parent_subvolume).number
                if child.links > 1:
                    linked[entry.target] = number
            else:
                again = inodes.change(tx, where.parent_subvolume, number)
                again.links += 1
                inodes.save(tx, again)
            directories.insert(tx, parent_of(tx, inner), entry.name, number, entry.kind)
            files += 1
    return files
