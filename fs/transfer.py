"""Between host and pool: `put` and `get`, of files and whole trees. Sparse files stay sparse in both directions.

A file or tree appears under its name complete or not at all. A tree is copied file by file under a temporary name beside its
own; when that fails or is interrupted, what was copied is removed again.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onecopy.daxemu.errors import SpecialFile, invalid, posix
from onecopy.daxemu.units import PAGE, pages_of
from onecopy.fs import content, extents, namei
from onecopy.fs import inode as inodes
from onecopy.fs.filesystem import FileSystem
from onecopy.fs.format import INLINE
from onecopy.fs.names import join

if TYPE_CHECKING:
    from onecopy.fs.inode import Inode
    from onecopy.fs.names import Progress
    from onecopy.fs.tx import Tx

_PIECE = 1 << 20  # bytes moved at once
_TRANSACTION = 1 << 26  # bytes stored in one transaction: others wait no longer than that takes


class _Meter:
    """Adds up what several files have moved."""

    def __init__(self, progress: "Progress | None", total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, size: int) -> None:
        """Note that `size` more bytes have been moved."""
        self.done += size
        if self.progress:
            self.progress(self.done, max(self.total, self.done), "bytes")


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges [first, end) of a host file that hold data."""
    at = 0
    while at < size:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
            yield at, size  # a file system that doesn't tell
            return
        at = min(os.lseek(fd, first, os.SEEK_HOLE), size)
        yield first, at


# ------------------------------------------------------------------- put


def put(fs: FileSystem, src: str, dst: str, *, progress: "Progress | None") -> None:
    """See FileSystem.put."""
    status = os.lstat(src)
    if stat.S_ISLNK(status.st_mode) and not src.endswith("/"):
        status = os.stat(src)  # a link named on purpose means what it leads to; links inside a tree stay links
    if os.path.exists(fs.path) and os.path.samestat(status, os.stat(fs.path)):
        raise invalid("a pool can't be put into itself", src)
    if stat.S_ISDIR(status.st_mode):
        _put_tree(fs, src, dst, progress)
        return
    _check_kind(src, status)
    _put_file(fs, src, dst, _Meter(progress, status.st_size))


def _check_kind(path: str, status: os.stat_result) -> None:
    mode = status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise SpecialFile("a device, socket or pipe; a pool holds files, directories and symbolic links", path=path)


def _put_tree(fs: FileSystem, src: str, dst: str, progress: "Progress | None") -> None:
    total, pool = 0, os.stat(fs.path)
    for folder, _, files in os.walk(src, onerror=_raise):
        for name in files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            _check_kind(path, status)
            if os.path.samestat(status, pool):
                raise invalid("the source holds the pool itself", src)
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    meter = _Meter(progress, total)
    linked: dict[tuple[int, int], str] = {}
    with fs._mount.reading() as view:
        if namei.walk(view, dst).exists:
            raise posix(errno.EEXIST, dst)
    top = _temporary(dst)
    try:
        fs.mkdir(top)
        for folder, folders, files in os.walk(src):
            below = os.path.relpath(folder, src)
            inside = top if below == "." else join(top, *below.split("/"))
            for name in folders + files:
                path, target = os.path.join(folder, name), join(inside, name)
                status = os.lstat(path)
                if stat.S_ISLNK(status.st_mode):
                    fs.symlink(os.readlink(path), target)
                elif stat.S_ISDIR(status.st_mode):
                    fs.mkdir(target, 0o700)
                elif status.st_nlink > 1 and (known := linked.get((status.st_dev, status.st_ino))):
                    fs.link(known, target)
                else:
                    _put_file(fs, path, target, meter)
                    linked[status.st_dev, status.st_ino] = target
        for folder, _, _ in os.walk(src, topdown=False):  # times and modes last: filling a directory changes them
            below = os.path.relpath(folder, src)
            _finish(fs, os.stat(folder), top if below == "." else join(top, *below.split("/")))
        fs.rename(top, dst)
    except BaseException:
        if fs.exists(top):
            fs.rmtree(top)
        raise


def _temporary(path: str) -> str:
    """Return a name beside `path` for what is not complete yet."""
    return f"{path.rstrip('/').rpartition('/')[0]}/.{secrets.token_hex(6)}.put"


def _raise(error: OSError) -> None:
    raise error


def _finish(fs: FileSystem, status: os.stat_result, path: str) -> None:
    def work(tx: "Tx") -> None:
        place = namei.existing(tx, path)
        inode = inodes.change(tx, place.subvolume, place.number)
        _take_status(inode, status)
        inodes.save(tx, inode)

    fs._mount.run(work)


def _take_status(inode: "Inode", status: os.stat_result) -> None:
    inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(status.st_mode)
    inode.uid, inode.gid = status.st_uid, status.st_gid
    inode.accessed, inode.modified = max(0, status.st_atime_ns), max(0, status.st_mtime_ns)  # a host knows older ones


def _put_file(fs: FileSystem, src: str, dst: str, meter: _Meter) -> None:
    with open(src, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        _check_kind(src, status)
        with fs._mount.reading() as view:
            place = namei.walk(view, dst)
        if place.exists and fs.stat(dst).st_mode & 0o170000 == stat.S_IFDIR:
            raise posix(errno.EISDIR, dst, "name the file in it")
        replaces, large = place.exists, status.st_size > _TRANSACTION
        path = dst if not (replaces or large) else _temporary(dst)
        try:
            _fill(fs, file.fileno(), status, path, meter)
            if path != dst:
                fs.rename(path, dst)
        except BaseException:
            if path != dst and fs.exists(path):
                fs.unlink(path)
            raise


def _fill(fs: FileSystem, fd: int, status: os.stat_result, path: str, meter: _Meter) -> None:
    """Make the file `path` with the content of `fd`: small ones in one transaction, large ones in several."""
    batch: list[tuple[int, int]] = []
    room, made = _TRANSACTION, False

    def store(tx: "Tx") -> None:
        inode = FileSystem._created(tx, path)
        if status.st_size <= INLINE:
            data = os.pread(fd, status.st_size, 0).ljust(status.st_size, b"\0")  # it may have shrunk meanwhile
            content.write(tx, inode, 0, memoryview(data))
        for first, last in batch:
            content.append_from(tx, inode, first, last, fd)
        inode.size = status.st_size
        _take_status(inode, status)
        inodes.save(tx, inode)

    end = 0
    for first, last in data_ranges(fd, status.st_size) if status.st_size > INLINE else ():
        first = max(first - first % PAGE, end)  # whole pages: what a hole adds to one is zeros
        while first < last:
            end = min(-(-last // PAGE) * PAGE, first + room)
            batch.append((first, min(end, status.st_size)))
            first, room = end, room - (end - first)
            if not room:
                fs._mount.run(store)
                meter.add(_TRANSACTION)
                batch, room, made = [], _TRANSACTION, True
    if batch or not made:
        fs._mount.run(store)
        meter.add(min(status.st_size, _TRANSACTION - room))


# ------------------------------------------------------------------- get


def get(fs: FileSystem, src: str, dst: str, *, progress: "Progress | None") -> None:
    """See FileSystem.get."""
    status = fs.stat(src)
    if os.path.exists(dst) and os.path.samestat(os.stat(dst), os.stat(fs.path)):
        raise invalid("a pool can't be written out over itself", dst)
    if not stat.S_ISDIR(status.st_mode):
        if os.path.isdir(dst):
            raise posix(errno.EISDIR, dst, "name the file in it")
        _get_file(fs, src, dst, _Meter(progress, status.st_size))
        return
    total = sum(fs.lstat(join(folder, name)).st_size for folder, _, files in fs.walk(src) for name in files)
    meter = _Meter(progress, total)
    linked: dict[tuple[int, int], str] = {}
    os.mkdir(dst, 0o700)
    try:
        for folder, folders, files in fs.walk(src):
            inside = dst + folder[len(src.rstrip("/")) :]
            for name in folders:
                os.mkdir(os.path.join(inside, name), 0o700)
            for name in files:
                path, target = join(folder, name), os.path.join(inside, name)
                inner = fs.lstat(path)
                if stat.S_ISLNK(inner.st_mode):
                    os.symlink(fs.readlink(path), target)
                elif inner.st_nlink > 1 and (known := linked.get((inner.st_dev, inner.st_ino))):
                    os.link(known, target)
                else:
                    _get_file(fs, path, target, meter)
                    linked[inner.st_dev, inner.st_ino] = target
        for folder, _, _ in list(fs.walk(src))[::-1]:
            _restore(dst + folder[len(src.rstrip("/")) :], fs.stat(folder))
    except BaseException:
        import shutil

        shutil.rmtree(dst, ignore_errors=True)
        raise


def _restore(path: str, status: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(path, status.st_uid, status.st_gid)
    os.chmod(path, stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _get_file(fs: FileSystem, src: str, dst: str, meter: _Meter) -> None:
    temporary = f"{dst}.{secrets.token_hex(6)}.get"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            with fs._mount.reading() as view:  # the file as it is at one moment
                inode = namei.file_at(view, src)
                status = inode.status(0)
                if inode.content:
                    os.pwrite(fd, inode.content, 0)
                for page, pfn, pages, _ in extents.written(extents.load(view, inode)):
                    last = min((page + pages) * PAGE, inode.size)
                    for at in range(page * PAGE, last, _PIECE):
                        size, source = min(_PIECE, last - at), pfn * PAGE + at - page * PAGE
                        piece: bytes | memoryview = view.bytes[source : source + size]
                        if view.cached:  # the kernel can't fetch what is absent, we can
                            view.fetch(source // PAGE, pages_of(size))
                            piece = bytes(piece)
                        _write_all(fd, piece, at)
                        meter.add(size)
                os.ftruncate(fd, inode.size)
        finally:
            os.close(fd)
        _restore(temporary, status)
        os.replace(temporary, dst)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        at, data = at + done, data[done:]
