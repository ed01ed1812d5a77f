"""Persistence: store, flush, fence — what makes bytes of the pool survive a power cut, behind one narrow interface.

The rules are those of persistent memory: a store is volatile until its page has been flushed *and* a fence followed.
Nothing may be assumed of stores that were not flushed: any subset of them, each aligned 8-byte word whole, may be
on media. A simulator of power cuts is one more `Persistence`.
"""

import os
from typing import Protocol

_TMPFS_MAGIC = 0x01021994
_HUGETLBFS_MAGIC = 0x958458F6


class Persistence(Protocol):
    """How pages become durable. PFNs and page counts; never a lock."""

    def flush(self, pfn: int, pages: int) -> None:
        """Start writing pages [pfn, pfn + pages) back; they are durable after the next fence."""

    def fence(self) -> None:
        """Return when everything flushed before is durable. OSError (EIO) when media failed."""


class Volatile:
    """A pool in memory (tmpfs): nothing survives a power cut whatever one does, so both are free."""

    def flush(self, pfn: int, pages: int) -> None:
        """Do nothing: there is no media behind the pages."""

    def fence(self) -> None:
        """Do nothing."""


class FileBacked:
    """A pool on a disk file system or fsdax: one fdatasync a fence writes back all that was flushed before it.

    fdatasync covers stores made through any mapping of the file, as msync does (the kernel write-protects a page
    when it cleans it), and, unlike msync, needs no address. It also makes the block allocation durable.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = False

    def flush(self, pfn: int, pages: int) -> None:
        """Note that there is something to write back."""
        self._pending = self._pending or pages > 0

    def fence(self) -> None:
        """Write back, wait for the media."""
        if self._pending:
            os.fdatasync(self._fd)
            self._pending = False


def persistence_of(fd: int) -> Persistence:
    """Return the persistence that the file system below `fd` offers."""
    return Volatile() if _file_system_magic(fd) in (_TMPFS_MAGIC, _HUGETLBFS_MAGIC) else FileBacked(fd)


def _file_system_magic(fd: int) -> int:
    import ctypes

    # Python's os.fstatvfs leaves f_type out; struct statfs starts with it on every 64-bit Linux.
    buffer = (ctypes.c_long * 32)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fstatfs(fd, buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(buffer[0])
