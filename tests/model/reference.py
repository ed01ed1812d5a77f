"""What a pool should do, said with dictionaries and bytearrays: names, contents, attributes, and every errno."""

import copy
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PAGE = 4096
LINKS = 40  # symbolic links followed in one walk

Outcome = tuple[str, Any]  # ("ok", result) or ("error", errno)


class Node:
    """What a name leads to; two names of one file lead to one node."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.attributes: dict[str, bytes] = {}


class File(Node):
    """A regular file."""

    def __init__(self) -> None:
        super().__init__(0o644)
        self.data = bytearray()


class Link(Node):
    """A symbolic link."""

    def __init__(self, target: str) -> None:
        super().__init__(0o777)
        self.target = target


class Directory(Node):
    """A directory. `volume` is the root of the subvolume that it belongs to: itself, for a root."""

    def __init__(self, parent: "Directory | None", volume: "Directory | None" = None) -> None:
        super().__init__(0o755)
        self.entries: dict[str, Node] = {}
        self.parent, self.volume = parent, volume or self

    @property
    def is_volume(self) -> bool:
        return self.volume is self


class Phantom(Node):
    """The empty directory that stands, in a snapshot, for a subvolume that was in the origin."""

    def __init__(self) -> None:
        super().__init__(0o555)


class Spot(NamedTuple):
    """Where a path leads: a name (empty: the top) in a directory, and what is there."""

    parent: Directory | Phantom
    name: str
    node: Node | None


def refuse(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def is_directory(node: Node | None) -> bool:
    return isinstance(node, Directory | Phantom)


class Model:
    """A pool. Methods have the names, arguments and errors of `FileSystem`."""

    def __init__(self) -> None:
        self.top = Directory(None)

    def attempt(self, method: str, *arguments: Any) -> Outcome:
        """Do something; return how it went. What fails changes nothing."""
        try:
            return "ok", getattr(self, method)(*arguments)
        except OSError as error:
            return "error", error.errno

    # -------------------------------------------------------------- looking

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Yield every name with what it leads to; directories before what is in them."""
        stack: list[tuple[str, Node]] = [("", self.top)]
        while stack:
            path, node = stack.pop()
            yield path or "/", node
            if isinstance(node, Directory):
                stack += [(f"{path}/{name}", inner) for name, inner in node.entries.items()]

    def names(self, node: Node) -> int:
        """Return st_nlink."""
        if isinstance(node, Directory):
            return 2 + sum(isinstance(inner, Directory) and not inner.is_volume for inner in node.entries.values())
        return 2 if isinstance(node, Phantom) else sum(found is node for _, found in self.walk())

    def volumes(self) -> list[str]:
        return sorted(path for path, node in self.walk() if isinstance(node, Directory) and node.is_volume)

    def spot(self, path: str, *, follow: bool = True) -> Spot:
        """Return where a path leads; only its last name may be missing."""
        names = [name for name in path.split("/") if name][::-1]
        trail: list[tuple[Directory | Phantom, str, Node]] = [(self.top, "", self.top)]
        links = 0
        while names:
            here, name = trail[-1][2], names.pop()
            if not is_directory(here):
                raise refuse(errno.ENOTDIR)
            if name == "..":
                del trail[max(1, len(trail) - 1) :]
                continue
            found = here.entries.get(name) if isinstance(here, Directory) else None
            if found is None:
                if names:
                    raise refuse(errno.ENOENT)
                return Spot(here, name, None)
            if isinstance(found, Link) and (names or follow):
                links += 1
                if links > LINKS:
                    raise refuse(errno.ELOOP)
                if found.target.startswith("/"):
                    del trail[1:]
                names += [part for part in found.target.split("/") if part][::-1]
                continue
            trail.append((here, name, found))
        return Spot(*trail[-1])

    def existing(self, path: str, *, follow: bool = True) -> Spot:
        spot = self.spot(path, follow=follow)
        if spot.node is None:
            raise refuse(errno.ENOENT)
        return spot

    def file(self, path: str) -> File:
        node = self.existing(path).node
        if not isinstance(node, File):
            raise refuse(errno.EISDIR)
        return node

    def new(self, path: str) -> tuple[Directory, str]:
        """Return where a name is to be made."""
        spot = self.spot(path, follow=False)
        if spot.node is not None:
            raise refuse(errno.EEXIST)
        if isinstance(spot.parent, Phantom):
            raise refuse(errno.EPERM)
        return spot.parent, spot.name

    # ---------------------------------------------------------------- names

    def mkdir(self, path: str) -> None:
        parent, name = self.new(path)
        parent.entries[name] = Directory(parent, parent.volume)

    def create_subvolume(self, path: str) -> None:
        parent, name = self.new(path)
        parent.entries[name] = Directory(parent)

    def symlink(self, target: str, path: str) -> None:
        parent, name = self.new(path)
        parent.entries[name] = Link(target)

    def link(self, src: str, dst: str) -> None:
        source = self.existing(src, follow=False)
        if is_directory(source.node):
            raise refuse(errno.EPERM)
        parent, name = self.new(dst)
        if parent.volume is not source.parent.volume:
            raise refuse(errno.EXDEV)
        parent.entries[name] = source.node

    def unlink(self, path: str) -> None:
        spot = self.existing(path, follow=False)
        if is_directory(spot.node):
            raise refuse(errno.EISDIR)
        del spot.parent.entries[spot.name]

    def rmdir(self, path: str) -> None:
        spot = self.existing(path, follow=False)
        if not is_directory(spot.node):
            raise refuse(errno.ENOTDIR)
        if not spot.name:
            raise refuse(errno.EBUSY)
        if isinstance(spot.node, Directory) and spot.node.entries:
            raise refuse(errno.ENOTEMPTY)
        del spot.parent.entries[spot.name]

    def rename(self, src: str, dst: str) -> None:
        source, target = self.existing(src, follow=False), self.spot(dst, follow=False)
        if not source.name or not target.name:
            raise refuse(errno.EBUSY)
        if isinstance(target.parent, Phantom):
            raise refuse(errno.EPERM)
        if source.parent.volume is not target.parent.volume:
            raise refuse(errno.EXDEV)
        if target.node is not None and is_directory(source.node) != is_directory(target.node):
            raise refuse(errno.ENOTDIR if is_directory(source.node) else errno.EISDIR)
        above: Directory | None = target.parent
        while above is not None:
            if above is source.node:
                raise refuse(errno.EINVAL)
            above = above.parent
        if target.node is source.node:
            return
        if isinstance(target.node, Directory) and target.node.entries:
            raise refuse(errno.ENOTEMPTY)
        del source.parent.entries[source.name]
        target.parent.entries[target.name] = source.node
        if isinstance(source.node, Directory):
            source.node.parent = target.parent

    # ----------------------------------------------------------- attributes

    def _inode(self, path: str) -> Node:
        node = self.existing(path).node
        if isinstance(node, Phantom):
            raise refuse(errno.EPERM)
        return node

    def chmod(self, path: str, mode: int) -> None:
        self._inode(path).mode = mode

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        self._inode(path).attributes[name] = value

    def removexattr(self, path: str, name: str) -> None:
        node = self._inode(path)
        if name not in node.attributes:
            raise refuse(errno.ENODATA)
        del node.attributes[name]

    # -------------------------------------------------------------- content

    def create(self, path: str) -> None:
        self._made(path)

    def _made(self, path: str) -> File:
        spot = self.spot(path)
        if spot.node is None:
            if isinstance(spot.parent, Phantom):
                raise refuse(errno.EPERM)
            spot.parent.entries[spot.name] = File()
        elif not isinstance(spot.node, File):
            raise refuse(errno.EISDIR)
        return self.file(path)

    def write(self, path: str, data: bytes, offset: int) -> int:
        file = self._made(path)
        if data:
            _grow(file.data, offset + len(data))
            file.data[offset : offset + len(data)] = data
        return len(data)

    def truncate(self, path: str, size: int) -> None:
        data = self.file(path).data
        _grow(data, size)
        del data[size:]

    def allocate(self, path: str, offset: int, length: int) -> None:
        data = self.file(path).data
        _demand(length > 0)
        _grow(data, offset + length)

    def punch(self, path: str, offset: int, length: int) -> None:
        data = self.file(path).data
        _demand(length > 0)
        _clear(data, offset, length)

    def zero(self, path: str, offset: int, length: int) -> None:
        data = self.file(path).data
        _demand(length > 0)
        _grow(data, offset + length)
        _clear(data, offset, length)

    def collapse(self, path: str, offset: int, length: int) -> None:
        data = self.file(path).data
        _demand(length > 0 and not offset % PAGE and not length % PAGE and offset + length < len(data))
        del data[offset : offset + length]

    def insert(self, path: str, offset: int, length: int) -> None:
        data = self.file(path).data
        _demand(length > 0 and not offset % PAGE and not length % PAGE and offset < len(data))
        data[offset:offset] = bytes(length)

    def unshare(self, path: str, offset: int, length: int) -> None:
        self.file(path)

    # -------------------------------------------------------------- sharing

    def clone(self, src: str, dst: str) -> None:
        source = self.file(src)
        parent, name = self.new(dst)
        parent.entries[name] = copy.deepcopy(source)

    def clone_tree(self, src: str, dst: str) -> None:
        source = self.existing(src).node
        if not is_directory(source):
            raise refuse(errno.ENOTDIR)
        _demand(isinstance(source, Directory))
        parent, name = self.new(dst)
        if source.is_volume and source is not self.top:
            parent.entries[name] = _copied(source, parent, None, lambda _: Phantom())
            return
        above: Directory | None = parent
        while above is not None:
            _demand(above is not source)
            above = above.parent
        parent.entries[name] = _copied(source, parent, parent.volume, _empty_in)

    def snapshot(self, src: str, dst: str) -> None:
        source = self.existing(src).node
        parent, name = self.new(dst)
        _demand(isinstance(source, Directory) and source.is_volume)
        parent.entries[name] = _copied(source, parent, None, lambda _: Phantom())

    def delete_subvolume(self, path: str) -> None:
        spot = self.existing(path, follow=False)
        _demand(isinstance(spot.node, Directory) and spot.node.is_volume and spot.node is not self.top)
        for _, node in self.walk():
            if isinstance(node, Directory) and node.is_volume and node.parent and node.parent.volume is spot.node:
                raise refuse(errno.EBUSY)
        del spot.parent.entries[spot.name]

    def clone_range(self, src: str, src_offset: int, dst: str, dst_offset: int, length: int) -> None:
        source, target = self.file(src), self.file(dst)
        length = _checked(source, src_offset, target, dst_offset, length)
        piece = source.data[src_offset : src_offset + length]
        _demand((dst_offset + length) % PAGE == 0 or dst_offset + length >= len(target.data) or not length)
        if length:
            _grow(target.data, dst_offset + length)
            target.data[dst_offset : dst_offset + length] = piece

    def dedupe_range(self, a: str, a_offset: int, b: str, b_offset: int, length: int) -> bool:
        source, target = self.file(a), self.file(b)
        length = _checked(source, a_offset, target, b_offset, length)
        _demand(b_offset + length <= len(target.data))
        _demand((b_offset + length) % PAGE == 0 or b_offset + length == len(target.data))
        return source.data[a_offset : a_offset + length] == target.data[b_offset : b_offset + length]

    def dedupe(self, paths: tuple[str, ...]) -> None:
        for path in paths:
            self.existing(path)

    def sync(self) -> None:
        pass


def _demand(right: bool) -> None:
    if not right:
        raise refuse(errno.EINVAL)


def _grow(data: bytearray, size: int) -> None:
    data.extend(bytes(max(0, size - len(data))))


def _clear(data: bytearray, offset: int, length: int) -> None:
    end = min(offset + length, len(data))
    data[offset:end] = bytes(max(0, end - offset))


def _checked(source: File, source_offset: int, target: File, target_offset: int, length: int) -> int:
    """Check a pair of ranges as FICLONERANGE does; return the length, 0 resolved."""
    _demand(source_offset % PAGE == 0 and target_offset % PAGE == 0)
    _demand(source_offset + length <= len(source.data))
    length = length or len(source.data) - source_offset
    _demand(length % PAGE == 0 or source_offset + length == len(source.data))
    _demand(source is not target or abs(source_offset - target_offset) >= -(-length // PAGE) * PAGE)
    return length


def _empty_in(parent: Directory) -> Directory:
    """Return what a clone has in the place of a subvolume that was in its source."""
    empty = Directory(parent, parent.volume)
    empty.mode = parent.mode
    return empty


def _copied(source: Directory, parent: Directory, volume: Directory | None, stand_in: Callable[[Directory], Node]) -> Directory:
    """Return a copy of a tree, hard links kept; what stands in for a subvolume in it is made by `stand_in(directory)`."""
    known: dict[int, Node] = {}

    def copied(node: Directory, parent: Directory, volume: Directory | None) -> Directory:
        new = Directory(parent, volume)
        new.mode, new.attributes = node.mode, dict(node.attributes)
        for name, inner in node.entries.items():
            if isinstance(inner, Phantom) or (isinstance(inner, Directory) and inner.is_volume):
                new.entries[name] = stand_in(new)
            elif isinstance(inner, Directory):
                new.entries[name] = copied(inner, new, new.volume)
            else:
                new.entries[name] = known.setdefault(id(inner), copy.deepcopy(inner))
        return new

    return copied(source, parent, volume)
