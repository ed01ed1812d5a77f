"""Names to inodes: path walks. Paths are absolute; '..' above the top stays at the top, as everywhere."""

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from onecopy.daxemu.errors import CorruptRecord, invalid, posix
from onecopy.fs import content
from onecopy.fs import directory as directories
from onecopy.fs import inode as inodes
from onecopy.fs.directory import DIRECTORY, NAME_MAX, SUBVOLUME, SYMLINK
from onecopy.fs.format import ROOT_INODE, TOP
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx, View

PATH_MAX = 4096
_LINKS = 40  # symbolic links followed in one walk

PHANTOM = 0  # inode number of an entry whose subvolume isn't there: a nested one, seen in a snapshot


class Place(NamedTuple):
    """Where a path leads: (subvolume, inode number, kind), and the name by which the parent directory knows it.

    `number` is -1 when the last name does not exist, PHANTOM for an empty directory that stands for a subvolume.
    """

    subvolume: int
    number: int
    kind: int
    parent_subvolume: int
    parent: int
    name: bytes
    path: str

    @property
    def exists(self) -> bool:
        """True when there is something."""
        return self.number >= 0


def split(path: str) -> list[bytes]:
    """Return the names of `path`. Raises ENOENT for '', ENAMETOOLONG, EINVAL for a zero byte."""
    raw = os.fsencode(path)
    if not raw:
        raise posix(errno.ENOENT, path)
    if raw[0] != 47:
        raise invalid("paths in a pool are absolute: they start with '/'", path)
    return _names(raw, path)


def _names(raw: bytes, path: str) -> list[bytes]:
    """Return the names in a path, or in a link on it."""
    if b"\0" in raw:
        raise invalid("a zero byte in a path", path)
    names = [name for name in raw.split(b"/") if name and name != b"."]
    if len(raw) > NAME_MAX and (len(raw) > PATH_MAX or max(map(len, names), default=0) > NAME_MAX):
        raise posix(errno.ENAMETOOLONG, path)
    return names


def walk(view: View, path: str, *, follow: bool = True) -> Place:
    """Return where `path` leads; only the last name may be missing. `follow`: a symbolic link at the end is followed.

    Raises ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG, EINVAL.
    """
    names = split(path)[::-1]
    directory_only = path.endswith(("/", "/.", "/.."))
    trail = [Place(TOP, ROOT_INODE, DIRECTORY, TOP, ROOT_INODE, b"", path)]
    links = 0
    while names:
        here, name = trail[-1], names.pop()
        if here.kind not in (DIRECTORY, SUBVOLUME):
            raise posix(errno.ENOTDIR, path)
        if name == b"..":
            if len(trail) > 1:
                trail.pop()
            continue
        found = _step(view, here, name, path)
        if not found.exists:
            if names:
                raise posix(errno.ENOENT, path)
            return found
        if found.kind == SYMLINK and (names or follow or directory_only):
            links += 1
            if links > _LINKS:
                raise posix(errno.ELOOP, path)
            target = content.read(view, inodes.load(view, found.subvolume, found.number), 0, PATH_MAX + 1)
            if target.startswith(b"/"):
                del trail[1:]
            names += _names(target, path)[::-1]
            continue
        trail.append(found)
    if directory_only and trail[-1].kind not in (DIRECTORY, SUBVOLUME):
        raise posix(errno.ENOTDIR, path)
    return trail[-1]


def _step(view: View, here: Place, name: bytes, path: str) -> Place:
    key = (here.subvolume, here.number, name)
    known = view.names.get(key)
    if known is not None and known[2] <= view.generation:
        target, kind = known[0], known[1]
    elif here.number == PHANTOM:
        target, kind = 0, 0
    else:
        entry = directories.lookup(view, inodes.load(view, here.subvolume, here.number), name)
        target, kind = (entry.target, entry.kind) if entry else (0, 0)
        view.remember(key, target, kind)
    subvolume, number = here.subvolume, target or -1
    if kind == SUBVOLUME:
        inner = view.subvolume(target)
        if inner is not None and inner.parent == here.subvolume:
            subvolume, number = target, ROOT_INODE
        else:
            number = PHANTOM
    return Place(subvolume, number, kind, here.subvolume, here.number, name, path)


def above(view: View, subvolume: int, number: int) -> Iterator[tuple[int, int]]:
    """Yield (subvolume, inode number) of a directory and of all that it lies in. CorruptRecord when they go in a circle."""
    seen: set[tuple[int, int]] = set()
    while (subvolume, number) not in seen:
        seen.add((subvolume, number))
        yield subvolume, number
        if number != ROOT_INODE:
            number = inodes.load(view, subvolume, number).parent
            continue
        home = view.subvolume(subvolume)
        if home is None or home.id == TOP:
            return
        subvolume, number = home.parent, home.directory
    raise CorruptRecord("inode", 0, f"{subvolume}:{number}", expected="a directory within others", actual="one within itself")


def existing(view: View, path: str, *, follow: bool = True) -> Place:
    """`walk` to something that exists; ENOENT otherwise."""
    place = walk(view, path, follow=follow)
    if not place.exists:
        raise posix(errno.ENOENT, path)
    return place


def file_at(view: View, path: str) -> Inode:
    """Return the regular file at `path`; EISDIR for a directory."""
    place = existing(view, path)
    if place.kind != directories.FILE:
        raise posix(errno.EISDIR, path)
    return inodes.load(view, place.subvolume, place.number)


def change_file(tx: Tx, path: str) -> Inode:
    """Return the regular file at `path` to change it."""
    inode = file_at(tx, path)
    return inodes.change(tx, inode.subvolume, inode.number)


def directory_at(view: View, path: str) -> Inode | None:
    """Return the directory at `path`, None for a phantom; ENOTDIR for anything else."""
    place = existing(view, path)
    if place.kind not in (DIRECTORY, SUBVOLUME):
        raise posix(errno.ENOTDIR, path)
    return None if place.number == PHANTOM else inodes.load(view, place.subvolume, place.number)


def new_name(tx: Tx, path: str, *, directory: bool = False) -> Place:
    """Return the place of a name to be made: its parent exists, it doesn't. EEXIST, EPERM in a phantom."""
    place = walk(tx, path, follow=False)
    if place.exists:
        raise posix(errno.EEXIST, path)
    if path.endswith(("/", "/.")) and not directory:
        raise posix(errno.ENOENT, path, "a file's name does not end in '/'")
    writable_parent(place)
    return place


def writable_parent(place: Place) -> None:
    """Raise EPERM when the place's directory only stands for a subvolume that is not in this snapshot."""
    if place.parent == PHANTOM:
        raise posix(errno.EPERM, place.path, "an empty directory standing for a subvolume of the origin")


def parent_of(tx: Tx, place: Place) -> Inode:
    """Return the directory that names `place`, to change it."""
    return inodes.change(tx, place.parent_subvolume, place.parent)
