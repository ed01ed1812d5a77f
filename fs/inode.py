"""Inodes: fixed-size records in a subvolume's inode tree, identified by (subvolume, number).

`change` is how every writer gets one: it makes the path to the record the transaction's own *first*, so that the counts
of shared nodes have been handed down before anything the inode refers to is looked at.
"""

import errno
import os
import stat
import struct
import time

from onecopy.daxemu.errors import CorruptRecord, posix
from onecopy.daxemu.units import PAGE
from onecopy.fs import counts
from onecopy.fs.btree import ENTRIES, EXTENTS, INODES
from onecopy.fs.format import INLINE, INLINE_DATA, INLINE_EXTENTS, INODE, MAX_SIZE
from onecopy.fs.tx import Subvolume, Tx, View

_FIELDS = tuple(INODE.offset)
_UNKNOWN, _NEW = -1, -2  # instead of a place: somewhere in the tree; not in the tree yet


class Inode:
    """A decoded inode (see format.INODE) with its identity; `content` is the used part of the inline area."""

    __slots__ = ("number", "place", "subvolume", *_FIELDS)

    place: tuple[int, int]  # where the record is: (the transaction's inode_moves then, byte offset)

    mode: int
    links: int
    uid: int
    gid: int
    size: int
    accessed: int
    modified: int
    changed: int
    root: int
    pages: int
    parent: int
    attributes: int
    flags: int
    inline_used: int
    inline: bytes

    def __init__(self, subvolume: int, number: int, fields: tuple[int | bytes, ...]) -> None:
        self.subvolume, self.number, self.place = subvolume, number, (_UNKNOWN, 0)
        (
            self.mode, self.links, self.uid, self.gid, self.size, self.accessed, self.modified, self.changed, self.root,
            self.pages, self.parent, self.attributes, self.flags, self.inline_used, self.inline,
        ) = fields  # type: ignore[assignment]  # fmt: skip

    def pack(self) -> bytes:
        """Return the record."""
        try:
            return INODE.pack(
                self.mode, self.links, self.uid, self.gid, self.size, self.accessed, self.modified, self.changed, self.root,
                self.pages, self.parent, self.attributes, self.flags, self.inline_used, self.inline,
            )  # fmt: skip
        except struct.error as error:  # something was less than what was taken from it
            where = f"{self.subvolume}:{self.number}"
            raise CorruptRecord("inode", self.root, where, expected="counts of what there is", actual=error) from error

    @property
    def is_directory(self) -> bool:
        """True for a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """True for a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def content(self) -> bytes | None:
        """The whole content when the record holds it, else None."""
        return self.inline[: self.inline_used] if self.flags & INLINE_DATA else None

    def set_content(self, data: bytes) -> None:
        """Make `data`, of at most INLINE bytes, the content; the inode has no extents."""
        self.flags = (self.flags & ~INLINE_EXTENTS) | INLINE_DATA
        self.inline, self.inline_used, self.size = data, len(data), len(data)

    def touch(self) -> None:
        """Set the times of a change of content."""
        self.modified = self.changed = time.time_ns()

    def status(self, device: int) -> os.stat_result:
        """Return what os.stat would; `device` stands for the pool, st_dev for the subvolume."""
        seconds = [t // 1_000_000_000 for t in (self.accessed, self.modified, self.changed)]
        exact = {
            "st_atime": self.accessed / 1e9, "st_mtime": self.modified / 1e9, "st_ctime": self.changed / 1e9,
            "st_atime_ns": self.accessed, "st_mtime_ns": self.modified, "st_ctime_ns": self.changed,
            "st_blksize": PAGE, "st_blocks": self.pages * (PAGE // 512), "st_rdev": 0,
        }  # fmt: skip
        basic = (self.mode, self.number, device + self.subvolume, self.links, self.uid, self.gid, self.size, *seconds)
        return os.stat_result(basic, exact)


def load(view: View, subvolume: int, number: int) -> Inode:
    """Return inode `number`. CorruptRecord when a name leads to none."""
    home = view.subvolume(subvolume)
    offset = INODES.find(view.words, home.root, number) if home is not None else -1
    if offset < 0:
        raise CorruptRecord("inode", home.root if home else 0, "number", expected=f"{subvolume}:{number}", actual="none")
    return _decode(view, subvolume, number, offset)


def exists(view: View, subvolume: int, number: int) -> bool:
    """Return whether there is an inode `number` in the subvolume."""
    home = view.subvolume(subvolume)
    return home is not None and INODES.find(view.words, home.root, number) >= 0


def _decode(view: View, subvolume: int, number: int, offset: int) -> Inode:
    inode = Inode(subvolume, number, INODE.unpack_from(view.bytes, offset))
    if inode.size > MAX_SIZE or (inode.flags & INLINE_DATA and not inode.size == inode.inline_used <= INLINE):
        actual = (inode.size, inode.flags, inode.inline_used)
        raise CorruptRecord("inode", offset // PAGE, f"{subvolume}:{number}", expected="a size that can be", actual=actual)
    return inode


def change(tx: Tx, subvolume: int, number: int) -> Inode:
    """Return inode `number` to change: its path is the transaction's own, so its references are exact. `save` it after."""
    home = tx.change(_home(tx, subvolume))
    home.root, offset = INODES.own_value(tx, home.root, number)
    inode = _decode(tx, subvolume, number, offset)
    inode.place = (tx.inode_moves, offset)
    if tx.changes is not None:
        tx.changes.begin(tx, inode)
    return inode


def save(tx: Tx, inode: Inode) -> None:
    """Write the record back, or for the first time."""
    moves, offset = inode.place
    if tx.changes is not None:
        tx.changes.saved(inode)
    if moves == tx.inode_moves:
        tx.bytes[offset : offset + INODE.size] = inode.pack()
        return
    home = tx.change(_home(tx, inode.subvolume))
    if moves == _NEW:
        tx.inode_moves += 1
        home.root = INODES.insert(tx, home.root, inode.number, inode.pack())
        inode.place = (0, 0)
    else:
        home.root = INODES.update(tx, home.root, inode.number, inode.pack())


def make(tx: Tx, subvolume: int, mode: int, *, parent: int = 0, like: Inode | None = None) -> Inode:
    """Return a new inode with no content and one link, to `save`; owner and times are `like`'s or ours and now."""
    home = tx.change(_home(tx, subvolume))
    number = home.next_inode
    home.next_inode += 1
    home.inodes += 1
    now = time.time_ns()
    uid, gid = (like.uid, like.gid) if like is not None else (os.geteuid(), os.getegid())
    inode = Inode(subvolume, number, (mode, 1, uid, gid, 0, now, now, now, 0, 0, parent, 0, 0, 0, b""))
    inode.place = (_NEW, 0)
    return inode


def holder(inode: Inode) -> Inode:
    """Return `inode`, which another one names as the holder of its attributes; CorruptRecord when it can't be."""
    if inode.attributes or not inode.is_file:
        raise CorruptRecord("inode", inode.root, f"{inode.number}", expected="a holder of attributes", actual=oct(inode.mode))
    return inode


def remove(tx: Tx, inode: Inode) -> None:
    """Delete the record, which `change` returned, and let go of everything it refers to."""
    if inode.attributes:
        remove(tx, holder(change(tx, inode.subvolume, inode.attributes)))
    if tx.changes is not None:
        tx.changes.gone(tx, inode)
    root, runs = references(inode)
    counts.release(tx, runs)
    counts.drop(tx, ENTRIES if inode.is_directory else EXTENTS, root)
    home = tx.change(_home(tx, inode.subvolume))
    tx.inode_moves += 1
    home.root = INODES.delete(tx, home.root, inode.number)
    home.inodes -= 1


def references(inode: Inode) -> tuple[int, list[tuple[int, int]]]:
    """Return what the inode refers to: (root PFN or 0, runs of inline extents)."""
    if inode.flags & INLINE_EXTENTS:
        from onecopy.fs.extents import inline_extents

        return 0, [(pfn, pages) for _, pfn, pages, _ in inline_extents(inode)]
    return inode.root, []


def _home(tx: Tx, number: int) -> Subvolume:
    home = tx.subvolume(number)
    if home is None:
        raise posix(errno.ESTALE, detail=f"subvolume {number} has been deleted")
    return home
