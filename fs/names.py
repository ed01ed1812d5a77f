"""Names in an open pool: directories, links, status and attributes. The part of the public API that knows no content."""

import errno
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onecopy.daxemu.errors import CorruptRecord, CrossSubvolume, invalid, posix
from onecopy.fs import attributes, content, namei, sharing
from onecopy.fs import directory as directories
from onecopy.fs import inode as inodes
from onecopy.fs.btree import ROOTS
from onecopy.fs.directory import DIRECTORY, KIND_NAMES, SUBVOLUME, SYMLINK
from onecopy.fs.format import ROOT_INODE, TOP
from onecopy.fs.inode import Inode
from onecopy.fs.mount import Mount
from onecopy.fs.namei import PHANTOM, Place
from onecopy.fs.tx import Subvolume, Tx

Progress = Callable[[int, int, str], None]  # (done, total, "bytes" | "files" | "pages")

_REMOVE_BATCH = 256  # names that `rmtree` removes in one transaction


@dataclass(frozen=True)
class DirEntry:
    """A name in a directory; `kind` is "file", "dir", "symlink" or "subvolume"."""

    name: str
    ino: int
    kind: str


@dataclass(frozen=True)
class SubvolumeInfo:
    """A subvolume: its number, path, the number of the one it is in and of its origin (0: none), inodes in it."""

    id: int
    path: str
    parent: int
    origin: int
    inodes: int
    created: int


class Names:
    """What `FileSystem` does with names. Uses its `_mount` and `_device`."""

    _mount: Mount
    _device: int  # st_dev of the pool; a subvolume adds its number

    def stat(self, path: str) -> os.stat_result:
        """Return the status of what `path` leads to; st_dev tells subvolumes apart."""
        return self._stat(path, follow=True)

    def lstat(self, path: str) -> os.stat_result:
        """`stat`, but of a symbolic link itself."""
        return self._stat(path, follow=False)

    def _stat(self, path: str, *, follow: bool) -> os.stat_result:
        with self._mount.reading() as view:
            place = namei.existing(view, path, follow=follow)
            if place.number == PHANTOM:
                now = inodes.load(view, place.parent_subvolume, place.parent)
                fields = (stat.S_IFDIR | 0o555, 2, now.uid, now.gid, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b"")
                return Inode(place.subvolume, PHANTOM, fields).status(self._device)
            return inodes.load(view, place.subvolume, place.number).status(self._device)

    def exists(self, path: str) -> bool:
        """Return whether `path` leads to anything."""
        try:
            with self._mount.reading() as view:
                return namei.walk(view, path).exists
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                return False
            raise

    def scandir(self, path: str = "/") -> list[DirEntry]:
        """Return a directory's entries by name."""
        with self._mount.reading() as view:
            directory = namei.directory_at(view, path)
            found = directories.entries(view, directory) if directory is not None else []
        return sorted((DirEntry(os.fsdecode(e.name), e.target, KIND_NAMES[e.kind]) for e in found), key=lambda e: e.name)

    def listdir(self, path: str = "/") -> list[str]:
        """Return the sorted names in a directory."""
        with self._mount.reading() as view:
            directory = namei.directory_at(view, path)
            found = directories.entries(view, directory) if directory is not None else []
        return sorted(os.fsdecode(entry.name) for entry in found)

    def walk(self, path: str = "/") -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield (directory, names of directories in it, other names) top down, as os.walk; the lists may be pruned."""
        stack: list[tuple[str, tuple[int, ...]]] = [(path, (self.stat(path).st_ino,))]
        while stack:
            here, above = stack.pop()  # with the inode numbers of the directories on the way, within the subvolume
            entries = self.scandir(here)
            inner = {e.name: (*above, e.ino) if e.kind == "dir" else () for e in entries if e.kind in ("dir", "subvolume")}
            folders = list(inner)
            yield here, folders, [entry.name for entry in entries if entry.name not in inner]
            for name in folders[::-1]:
                way = inner.get(name, ())
                if way[-1:] and way[-1] in way[:-1]:
                    raise CorruptRecord(
                        "directory entry", 0, join(here, name), expected="another directory", actual="one above"
                    )
                stack.append((join(here, name), way))

    def mkdir(self, path: str, mode: int = 0o755, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory. `parents`: those that are missing, too. `exist_ok`: it may be there already."""

        def work(tx: Tx) -> None:
            names = namei.split(path)
            for depth in range(1 if parents else len(names), len(names) + 1):
                here = "/" + os.fsdecode(b"/".join(names[:depth]))
                place = namei.walk(tx, here, follow=depth < len(names))
                if place.exists:
                    is_directory = place.kind in (DIRECTORY, SUBVOLUME)
                    if not is_directory and depth < len(names):
                        raise posix(errno.ENOTDIR, here)
                    if not is_directory or (depth == len(names) and not exist_ok):
                        raise posix(errno.EEXIST, path)
                    continue
                namei.writable_parent(place)
                new = inodes.make(tx, place.parent_subvolume, stat.S_IFDIR | (mode & 0o7777), parent=place.parent)
                new.links = 2
                inodes.save(tx, new)
                directories.insert(tx, namei.parent_of(tx, place), place.name, new.number, DIRECTORY)
            if not names and not exist_ok:
                raise posix(errno.EEXIST, path)

        self._mount.run(work)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""

        def work(tx: Tx) -> None:
            place = namei.existing(tx, path, follow=False)
            if place.kind not in (DIRECTORY, SUBVOLUME):
                raise posix(errno.ENOTDIR, path)
            self._remove_directory(tx, place)

        self._mount.run(work, reserve=True)

    @staticmethod
    def _remove_directory(tx: Tx, place: Place) -> None:
        if not place.name:
            raise posix(errno.EBUSY, place.path, "the top of the pool")
        namei.writable_parent(place)
        if place.number != PHANTOM:
            if inodes.load(tx, place.subvolume, place.number).size:
                raise posix(errno.ENOTEMPTY, place.path)
            if place.kind == SUBVOLUME:
                sharing.delete_subvolume(tx, place)
                return
            inodes.remove(tx, inodes.change(tx, place.subvolume, place.number))
        directories.remove(tx, namei.parent_of(tx, place), place.name)

    def unlink(self, path: str) -> None:
        """Remove a name of a file or symbolic link; the last one takes the content. Mappings of it stay valid."""

        def work(tx: Tx) -> None:
            place = namei.existing(tx, path, follow=False)
            if place.kind in (DIRECTORY, SUBVOLUME):
                raise posix(errno.EISDIR, path)
            self._unlink(tx, place)

        self._mount.run(work, reserve=True)

    @staticmethod
    def _unlink(tx: Tx, place: Place) -> None:
        namei.writable_parent(place)
        directories.remove(tx, namei.parent_of(tx, place), place.name)
        drop_link(tx, place.subvolume, place.number)

    def rmtree(self, path: str, *, progress: Progress | None = None) -> None:
        """Remove a directory with all that is in it; a subvolume at once. Others may see it half removed."""
        with self._mount.reading() as view:
            place = namei.existing(view, path, follow=False)
        if place.kind == SUBVOLUME and place.number != PHANTOM:
            for inner in [s.path for s in self.list_subvolumes() if s.path.startswith(path.rstrip("/") + "/")][::-1]:
                self.delete_subvolume(inner)
            self.delete_subvolume(path)
            return
        if place.kind not in (DIRECTORY, SUBVOLUME):
            raise posix(errno.ENOTDIR, path)
        nested = {one.path for one in self.list_subvolumes()}
        tree = list(self.walk(path))[::-1]
        done, total = 0, sum(len(files) for _, _, files in tree)
        for folder, _, files in tree:
            for at in range(0, len(files), _REMOVE_BATCH):
                batch = files[at : at + _REMOVE_BATCH]
                self._mount.run(functools.partial(self._unlink_all, folder=folder, names=batch), reserve=True)
                done += len(batch)
                if progress:
                    progress(done, total, "files")
            if folder in nested:
                self.delete_subvolume(folder)
            elif folder != "/":
                self.rmdir(folder)

    def _unlink_all(self, tx: Tx, folder: str, names: list[str]) -> None:
        for name in names:
            self._unlink(tx, namei.existing(tx, join(folder, name), follow=False))

    def delete_subvolume(self, path: str) -> None:
        """Delete a subvolume with all that is in it; EBUSY while another one lies in it."""
        self._mount.run(lambda tx: sharing.delete_subvolume(tx, namei.existing(tx, path, follow=False)), reserve=True)

    def list_subvolumes(self) -> list[SubvolumeInfo]:
        """Return the pool's subvolumes by path, the top ("/") included."""
        with self._mount.reading() as view:
            found = [one for number, _ in ROOTS.items(view.words, view.roots) if (one := view.subvolume(number))]

            def path_of(one: Subvolume) -> str:
                names: list[str] = []
                child, kind = one.id, SUBVOLUME
                for subvolume, above in namei.above(view, one.parent, one.directory) if one.id != TOP else ():
                    entries = directories.entries(view, inodes.load(view, subvolume, above))
                    names += [os.fsdecode(e.name) for e in entries if (e.target, e.kind) == (child, kind)]
                    child, kind = (subvolume, SUBVOLUME) if above == ROOT_INODE else (above, DIRECTORY)
                return "/" + "/".join(names[::-1])

            result = [SubvolumeInfo(one.id, path_of(one), one.parent, one.origin, one.inodes, one.created) for one in found]
        return sorted(result, key=lambda one: one.path)

    def rename(self, src: str, dst: str) -> None:
        """Rename, replacing a file or an empty directory at `dst`, atomically. EXDEV between subvolumes."""

        def work(tx: Tx) -> None:
            source = namei.existing(tx, src, follow=False)
            target = namei.walk(tx, dst, follow=False)
            self._check_rename(tx, source, target)
            if source.parent == target.parent and source.name == target.name:
                return
            if target.exists:
                if source.number != PHANTOM and (target.subvolume, target.number) == (source.subvolume, source.number):
                    return  # two names of one file: rename(2) does nothing
                if target.kind in (DIRECTORY, SUBVOLUME):
                    self._remove_directory(tx, target)
                else:
                    self._unlink(tx, target)
            moved = directories.remove(tx, namei.parent_of(tx, source), source.name)
            directories.insert(tx, namei.parent_of(tx, target), target.name, moved.target, moved.kind)
            if source.kind == SUBVOLUME:
                home = tx.subvolume(moved.target)
                if home is not None and source.number != PHANTOM:
                    tx.change(home).directory = target.parent
                return
            inode = inodes.change(tx, source.subvolume, source.number)
            inode.changed = time.time_ns()
            if inode.is_directory:
                inode.parent = target.parent
            inodes.save(tx, inode)

        self._mount.run(work)

    @staticmethod
    def _check_rename(tx: Tx, source: Place, target: Place) -> None:
        for place in (source, target):
            if not place.name:
                raise posix(errno.EBUSY, place.path, "the top of the pool")
            namei.writable_parent(place)
        if source.parent_subvolume != target.parent_subvolume:
            raise CrossSubvolume("rename stays within one subvolume; clone, then remove", path=target.path)
        source_is_directory = source.kind in (DIRECTORY, SUBVOLUME)
        if target.exists and source_is_directory != (target.kind in (DIRECTORY, SUBVOLUME)):
            raise posix(errno.ENOTDIR if source_is_directory else errno.EISDIR, target.path)
        above = namei.above(tx, target.parent_subvolume, target.parent)
        if source.kind == DIRECTORY and (source.subvolume, source.number) in above:
            raise invalid("a directory can't become part of itself", target.path)

    def link(self, src: str, dst: str) -> None:
        """Give the file at `src` a second name. EXDEV between subvolumes, EPERM for a directory."""

        def work(tx: Tx) -> None:
            source = namei.existing(tx, src, follow=False)
            if source.kind in (DIRECTORY, SUBVOLUME):
                raise posix(errno.EPERM, src, "a directory has one name")
            place = namei.new_name(tx, dst)
            if source.subvolume != place.parent_subvolume:
                raise CrossSubvolume("a hard link stays within one subvolume; clone instead", path=dst)
            inode = inodes.change(tx, source.subvolume, source.number)
            inode.links += 1
            inode.changed = time.time_ns()
            inodes.save(tx, inode)
            directories.insert(tx, namei.parent_of(tx, place), place.name, inode.number, source.kind)

        self._mount.run(work)

    def symlink(self, target: str, path: str) -> None:
        """Make a symbolic link at `path` to `target`, which need not exist."""
        raw = os.fsencode(target)
        if not raw or b"\0" in raw:
            raise invalid("a symbolic link needs a target without zero bytes", path)
        if len(raw) > namei.PATH_MAX:
            raise posix(errno.ENAMETOOLONG, path)

        def work(tx: Tx) -> None:
            place = namei.new_name(tx, path)
            inode = inodes.make(tx, place.parent_subvolume, stat.S_IFLNK | 0o777)
            content.write(tx, inode, 0, memoryview(raw))
            directories.insert(tx, namei.parent_of(tx, place), place.name, inode.number, SYMLINK)

        self._mount.run(work)

    def readlink(self, path: str) -> str:
        """Return a symbolic link's target; EINVAL for anything else."""
        with self._mount.reading() as view:
            place = namei.existing(view, path, follow=False)
            if place.kind != SYMLINK:
                raise invalid("not a symbolic link", path)
            return os.fsdecode(content.read(view, inodes.load(view, place.subvolume, place.number), 0, None))

    # --------------------------------------------------------- attributes

    def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits. The pool itself does not check them: who may open the pool file may do everything."""
        self._set(path, lambda inode: setattr(inode, "mode", stat.S_IFMT(inode.mode) | (mode & 0o7777)))

    def chown(self, path: str, uid: int, gid: int) -> None:
        """Set owner and group; -1 leaves one as it is."""
        if not (-1 <= uid < 1 << 32 and -1 <= gid < 1 << 32):
            raise invalid(f"user {uid} and group {gid}: they have 32 bits", path)

        def work(inode: Inode) -> None:
            inode.uid, inode.gid = inode.uid if uid == -1 else uid, inode.gid if gid == -1 else gid

        self._set(path, work)

    def utime(self, path: str, ns: tuple[int, int] | None = None) -> None:
        """Set access and modification time in nanoseconds; None: now."""
        accessed, modified = ns if ns is not None else (time.time_ns(),) * 2
        if not (0 <= accessed < 1 << 64 and 0 <= modified < 1 << 64):
            raise invalid(f"times {accessed} and {modified}: they are nanoseconds since 1970 of 64 bits", path)

        def work(inode: Inode) -> None:
            inode.accessed, inode.modified = accessed, modified

        self._set(path, work)

    def _set(self, path: str, work: Callable[[Inode], None], *, follow: bool = True) -> None:
        def change(tx: Tx) -> None:
            inode = self._change(tx, path, follow=follow)
            work(inode)
            inode.changed = time.time_ns()
            inodes.save(tx, inode)

        self._mount.run(change)

    @staticmethod
    def _change(tx: Tx, path: str, *, follow: bool = True) -> Inode:
        place = namei.existing(tx, path, follow=follow)
        if place.number == PHANTOM:
            raise posix(errno.EPERM, path, "an empty directory standing for a subvolume of the origin")
        return inodes.change(tx, place.subvolume, place.number)

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        """Set an extended attribute of up to 64 KiB."""
        self._mount.run(lambda tx: attributes.change(tx, self._change(tx, path), name, bytes(value)))

    def removexattr(self, path: str, name: str) -> None:
        """Remove an extended attribute; ENODATA when there is none."""
        self._mount.run(lambda tx: attributes.change(tx, self._change(tx, path), name, None), reserve=True)

    def getxattr(self, path: str, name: str) -> bytes:
        """Return an extended attribute; ENODATA when there is none."""
        found = self._attributes(path)
        if name not in found:
            raise posix(errno.ENODATA, path)
        return found[name]

    def listxattr(self, path: str) -> list[str]:
        """Return the names of the extended attributes."""
        return sorted(self._attributes(path))

    def _attributes(self, path: str) -> dict[str, bytes]:
        with self._mount.reading() as view:
            place = namei.existing(view, path)
            if place.number == PHANTOM:
                return {}
            return attributes.load(view, inodes.load(view, place.subvolume, place.number))


def join(path: str, *names: str) -> str:
    """Return the path of names below `path`."""
    return "/".join([path.rstrip("/"), *names])


def drop_link(tx: Tx, subvolume: int, number: int) -> None:
    """Take one name from an inode; without any it goes, with its content."""
    inode = inodes.change(tx, subvolume, number)
    inode.links -= 1
    if inode.links:
        inode.changed = time.time_ns()
        inodes.save(tx, inode)
    else:
        inodes.remove(tx, inode)
