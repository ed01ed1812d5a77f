"""Directories: a tree from the hash of a name to what it names. Names of up to 22 bytes take one record, longer ones more."""

import errno
import functools
import hashlib
import time
from typing import NamedTuple

from onecopy.daxemu.errors import CorruptRecord, posix
from onecopy.fs import inode as inodes
from onecopy.fs.btree import ENTRIES
from onecopy.fs.format import DIRENT
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx, View

FILE, DIRECTORY, SYMLINK, SUBVOLUME = 1, 2, 3, 4
KIND_NAMES = {FILE: "file", DIRECTORY: "dir", SYMLINK: "symlink", SUBVOLUME: "subvolume"}
NAME_MAX = 255

_FIRST, _NEXT = DIRENT.size - 10, DIRENT.size  # bytes of a name in its first record, in each further one
_RIVALS = 16  # names of one hash
_NO_NAMES = (b"", b".", b"..")


class Entry(NamedTuple):
    """A name in a directory: what it leads to (inode number; of a subvolume, its number) and of what kind."""

    name: bytes
    target: int
    kind: int


@functools.lru_cache(1 << 14)
def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little") << 8


def _records(name: bytes, target: int, kind: int) -> list[bytes]:
    if len(name) <= _FIRST:
        return [DIRENT.pack(target, kind, len(name), name)]
    rest = [name[at : at + _NEXT].ljust(_NEXT, b"\0") for at in range(_FIRST, len(name), _NEXT)]
    return [DIRENT.pack(target, kind, len(name), name[:_FIRST]), *rest]


def _find(view: View, root: int, name: bytes) -> tuple[int, Entry] | None:
    """Return (key of the first record, entry) of `name`. While a hash has any names, its first place is taken."""
    key, size = _hash(name), len(name)
    offset = ENTRIES.find(view.words, root, key)
    if offset < 0:
        return None
    target, kind, length, first = DIRENT.unpack_from(view.bytes, offset)
    if length == size <= _FIRST and first[:size] == name:  # by far the most
        return key, Entry(name, target, kind)
    for at, entry in _entries(view, root, key, key + 256):
        if entry.name == name:
            return at, entry
    return None


def _entries(view: View, root: int, low: int = 0, high: int = (1 << 64) - 1) -> list[tuple[int, Entry]]:
    found: list[tuple[int, Entry]] = []
    name, missing, head = b"", 0, (0, 0, 0)
    for key, offset in ENTRIES.items(view.words, root, low, high):
        if missing > 0:
            if key & 15 == 0:
                raise CorruptRecord("directory entry", root, "records", expected="more of a name", actual=f"key {key:#x}")
            name += bytes(view.bytes[offset : offset + min(missing, _NEXT)])
            missing -= _NEXT
        else:
            target, kind, length, first = DIRENT.unpack_from(view.bytes, offset)
            head, name, missing = (key, target, kind), first[: min(length, _FIRST)], length - _FIRST
        if missing <= 0:
            if head[2] not in KIND_NAMES or name in _NO_NAMES or b"/" in name or b"\0" in name:
                raise CorruptRecord(
                    "directory entry", root, "name and kind", expected="ones that can be", actual=(name, head[2])
                )
            found.append((head[0], Entry(name, head[1], head[2])))
    return found


def lookup(view: View, directory: Inode, name: bytes) -> Entry | None:
    """Return the entry `name` of `directory`, None when there is none."""
    found = _find(view, directory.root, name)
    return found[1] if found else None


def entries(view: View, directory: Inode) -> list[Entry]:
    """Return all entries, in no order that means anything."""
    return [entry for _, entry in _entries(view, directory.root)]


def insert(tx: Tx, directory: Inode, name: bytes, target: int, kind: int) -> None:
    """Add a name that `directory` (from `inode.change`) does not have, and save it."""
    key = _hash(name)
    if ENTRIES.find(tx.words, directory.root, key) >= 0:  # the first place is taken by another name of this hash
        key += 16 * len(_entries(tx, directory.root, key, key + 256))
        if key & 255 == 0:
            raise posix(errno.ENOSPC, detail=f"{_RIVALS} names of one hash in a directory")
    _write(tx, directory, key, _records(name, target, kind))
    directory.size += 1
    if kind == DIRECTORY:
        directory.links += 1
    _saved(tx, directory, name, target, kind)


def remove(tx: Tx, directory: Inode, name: bytes) -> Entry:
    """Remove a name that `directory` (from `inode.change`) has, and save it; return what it led to."""
    found = _find(tx, directory.root, name)
    if found is None:
        raise posix(errno.ENOENT)
    key, entry = found
    last = _entries(tx, directory.root, _hash(name), _hash(name) + 256)[-1]
    _erase(tx, directory, key, name)
    if last[0] != key:  # another name of this hash moves into the place, so that there are no gaps
        _erase(tx, directory, last[0], last[1].name)
        _write(tx, directory, key, _records(*last[1]))
    directory.size -= 1
    if entry.kind == DIRECTORY:
        directory.links -= 1
    _saved(tx, directory, name, 0, 0)
    return entry


def _write(tx: Tx, directory: Inode, key: int, records: list[bytes]) -> None:
    for n, record in enumerate(records):
        directory.root = ENTRIES.insert(tx, directory.root, key + n, record)


def _erase(tx: Tx, directory: Inode, key: int, name: bytes) -> None:
    for n in range(len(_records(name, 0, 0))):
        directory.root = ENTRIES.delete(tx, directory.root, key + n)


def _saved(tx: Tx, directory: Inode, name: bytes, target: int, kind: int) -> None:
    directory.modified = directory.changed = time.time_ns()
    inodes.save(tx, directory)
    tx.remember((directory.subvolume, directory.number, name), target, kind)
