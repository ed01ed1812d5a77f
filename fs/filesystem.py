"""The public API of an open pool. Each call is one reader's section or one transaction over the layers below."""

import errno
import os
import stat
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from onecopy.blkcache.cache import CachedPool, CacheInfo
from onecopy.blkcache.frames import PINNED, USED
from onecopy.blkcache.options import NO_OPTIONS, CacheOptions
from onecopy.daxemu import slots
from onecopy.daxemu.errors import OneCopyError, ReadOnly, invalid, posix
from onecopy.daxemu.mapping import Mapping
from onecopy.daxemu.slots import User
from onecopy.daxemu.units import PAGE
from onecopy.fs import content, namei, sharing
from onecopy.fs import directory as directories
from onecopy.fs import fork as _fork  # noqa: F401 - registers what happens at fork
from onecopy.fs import inode as inodes
from onecopy.fs.btree import ROOTS
from onecopy.fs.directory import FILE, SUBVOLUME
from onecopy.fs.format import MAX_SIZE
from onecopy.fs.inode import Inode
from onecopy.fs.mount import Mount
from onecopy.fs.namei import PHANTOM, Place
from onecopy.fs.names import Names, Progress, join
from onecopy.fs.policy import settle_policy
from onecopy.fs.tx import Tx, View

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from onecopy.fs.check import CheckReport
    from onecopy.fs.dedupe import DedupeReport
    from onecopy.fs.usage import Extent, Usage


T = TypeVar("T")

_TRIES = 64  # of a read that commits to the same file come into


@dataclass(frozen=True)
class PoolInfo:
    """A pool: sizes in bytes or pages of 4,096 bytes, generations, and who has it open.

    huge_pages: its host stores large runs as pages of 2 MiB, so mappings of large files take translations of 2 MiB.

    Counted since the run-time file was made: faults (stores to shared pages), and shootdowns that had another process
    to tell, with their median and 99th percentile in microseconds (to a quarter of a power of two; None without any).
    """

    path: str
    uuid: str
    size: int
    page_size: int
    pages: int
    used_pages: int
    free_pages: int
    waiting_pages: int
    pinned_pages: int
    backed_bytes: int
    huge_pages: bool
    generation: int
    durable_generation: int
    subvolumes: int
    faults: int
    dirty_pages: int
    shootdowns: int
    shootdown_median_us: float | None
    shootdown_p99_us: float | None
    users: list[User]
    policy: str
    cache: CacheInfo | None


class FileSystem(Names):
    """An open pool. Thread-safe; a context manager; a forked child may go on using it.

    Paths are absolute within the pool. Offsets and lengths are bytes. A call that changes something happens for others at
    one moment, and not at all when it raises; only bytes stored over a file's own, unmapped pages may be seen coming by a
    reader, as in any file system. `put`, `rmtree` and `dedupe` are many such calls. Errors are OSErrors with kernel errnos.
    """

    def __init__(self, path: str | os.PathLike[str], mode: str = "r+", *, cache: CacheOptions = NO_OPTIONS) -> None:
        if mode not in ("r", "r+"):
            raise invalid(f"mode {mode!r}: say 'r' or 'r+'", os.fspath(path))
        self.path, self.mode = os.path.abspath(os.fspath(path)), mode
        settle_policy(self.path, cache)
        self._mount = Mount(self.path, writable=mode == "r+", cache=cache)
        self._device = zlib.crc32(self._mount.pool.uuid.bytes) << 20

    # ------------------------------------------------------------- handle

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._mount.closed

    def close(self) -> None:
        """Make everything durable and let go of the pool. Mappings and arrays stay valid."""
        self._mount.close()

    def __enter__(self) -> "FileSystem":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        mount: Mount | None = getattr(self, "_mount", None)
        if mount is not None and not mount.closed and not sys.is_finalizing():
            warnings.warn(f"unclosed pool {self.path}", ResourceWarning, stacklevel=2, source=self)
            mount.abandon()

    def __reduce__(self) -> tuple[object, ...]:
        return FileSystem, (self.path, self.mode)  # another process opens the pool anew, as it is in use

    def __repr__(self) -> str:
        return f"<onecopy.FileSystem {self.path!r} {'closed' if self.closed else self.mode}>"

    def sync(self) -> None:
        """Make everything done so far survive a power cut (as far as the pool file's own storage does)."""
        self._mount.sync()

    def info(self) -> PoolInfo:
        """Return sizes, generations and users of the pool."""
        mount = self._mount
        mount.check_open()
        with mount.lock:
            mount.settle()
            view, array = mount.live_view(), mount.frames.array
            free = mount.frames.count_free()
            return PoolInfo(
                path=self.path,
                uuid=str(mount.pool.uuid),
                size=mount.pool.frames * PAGE,
                page_size=PAGE,
                pages=mount.pool.frames,
                used_pages=int(np.count_nonzero(array & USED)),
                free_pages=free,
                waiting_pages=mount.limbo.waiting(view.limbo_tail),
                pinned_pages=int(np.count_nonzero(array & PINNED)),
                backed_bytes=os.fstat(mount.pool.fd).st_blocks * 512,
                huge_pages=mount.pool.huge_pages,
                generation=view.generation,
                durable_generation=mount.runtime.get("durable_generation"),
                subvolumes=sum(1 for _ in ROOTS.items(view.words, view.roots)),
                faults=mount.runtime.counter("faults"),
                dirty_pages=mount.runtime.counter("dirty"),
                shootdowns=mount.runtime.counter("shootdowns"),
                shootdown_median_us=mount.runtime.shootdown_time(0.5),
                shootdown_p99_us=mount.runtime.shootdown_time(0.99),
                users=slots.users(mount.runtime),
                policy=mount.pool.policy,
                cache=mount.pool.info() if isinstance(mount.pool, CachedPool) else None,
            )

    # ------------------------------------------------------------ content

    def create(self, path: str, mode: int = 0o644, *, exist_ok: bool = True) -> None:
        """Make an empty file; one that is there is left alone, or EEXIST."""
        self._mount.run(lambda tx: inodes.save(tx, self._created(tx, path, mode, exist_ok=exist_ok)))

    @staticmethod
    def _created(tx: Tx, path: str, mode: int = 0o644, *, exist_ok: bool = True) -> Inode:
        """Return the file at `path` to change and save, made when missing."""
        place = namei.walk(tx, path)
        if place.exists:
            if not exist_ok:
                raise posix(errno.EEXIST, path)
            if place.kind != FILE:
                raise posix(errno.EISDIR, path)
            return inodes.change(tx, place.subvolume, place.number)
        if path.endswith("/"):
            raise posix(errno.EISDIR, path)
        namei.writable_parent(place)
        inode = inodes.make(tx, place.parent_subvolume, stat.S_IFREG | (mode & 0o7777))
        directories.insert(tx, namei.parent_of(tx, place), place.name, inode.number, FILE)
        return inode

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return up to `size` bytes (all: None) from `offset` on."""
        return self._read(path, lambda view, inode: content.read(view, inode, offset, size))

    def readinto(self, path: str, buffer: "Buffer", offset: int = 0) -> int:
        """Fill `buffer` from `offset` on; return how many bytes there were."""
        to = memoryview(buffer).cast("B")
        return self._read(path, lambda view, inode: content.read_into(view, inode, offset, to))

    def _read(self, path: str, work: Callable[[View, Inode], T]) -> T:
        """Run `work` on the file as it is at one moment; after many attempts that commits came into, as it is."""
        seen, tries = self._mount.seen, 0
        while True:
            with self._mount.reading() as view:
                inode = namei.file_at(view, path)
                version = seen.version(view, inode)
                if version >= 0 or tries > _TRIES:
                    result = work(view, inode)
                    if seen.is_still(inode, version) or tries > _TRIES:
                        return result
            tries += 1
            if tries % 16 == 0:  # somebody may have died in a commit: who has the lock finishes it
                with self._mount.lock:
                    self._mount.settle()

    def write(self, path: str, data: "Buffer", offset: int = 0) -> int:
        """Store `data` at `offset` of the file, made when missing; return its length."""
        view = memoryview(data).cast("B")
        self._mount.run(lambda tx: content.write(tx, self._created(tx, path), offset, view))
        return len(view)

    def _on_file(self, path: str, work: Callable[..., None], *arguments: int, reserve: bool = False) -> None:
        self._mount.run(lambda tx: work(tx, namei.change_file(tx, path), *arguments), reserve=reserve)

    def truncate(self, path: str, size: int) -> None:
        """Make the file `size` bytes long; what is new is a hole."""
        self._on_file(path, content.truncate, size, reserve=True)

    def allocate(self, path: str, offset: int, length: int) -> None:
        """Reserve frames for the range, so that writing there can't fail for want of space; grows the file."""
        self._on_file(path, content.allocate, offset, length)

    def punch(self, path: str, offset: int, length: int) -> None:
        """Make the range a hole that reads as zeros."""
        self._on_file(path, content.punch, offset, length, reserve=True)

    def zero(self, path: str, offset: int, length: int) -> None:
        """Make the range read as zeros and keep it allocated; grows the file."""
        self._on_file(path, content.zero, offset, length)

    def collapse(self, path: str, offset: int, length: int) -> None:
        """Cut whole pages out of the middle."""
        self._on_file(path, content.collapse, offset, length, reserve=True)

    def insert(self, path: str, offset: int, length: int) -> None:
        """Insert whole pages of hole in the middle."""
        self._on_file(path, content.insert, offset, length)

    def unshare(self, path: str, offset: int = 0, length: int | None = None) -> None:
        """Give the file frames of its own wherever the range (all: None) is shared."""
        self._on_file(path, content.unshare, offset, MAX_SIZE - offset if length is None else length)

    def seek(self, path: str, offset: int, whence: str) -> int:
        """Return the first offset from `offset` on that is in "data", or in a "hole" (the end is one). ENXIO past it."""
        with self._mount.reading() as view:
            return content.seek(view, namei.file_at(view, path), offset, whence)

    # ------------------------------------------------------------ sharing

    def clone(self, src: str, dst: str) -> None:
        """Make `dst` a new file that shares all of `src`; takes the same time for any size."""
        self._mount.run(lambda tx: sharing.clone_file(tx, namei.file_at(tx, src), namei.new_name(tx, dst)) and None)

    def clone_tree(self, src: str, dst: str, *, progress: Progress | None = None) -> None:
        """Clone a directory tree: a subvolume at once (`snapshot`), others file by file, all or nothing."""

        def work(tx: Tx) -> int:
            source = namei.existing(tx, src)
            if source.kind == SUBVOLUME and source.number != PHANTOM:
                sharing.snapshot(tx, source, namei.new_name(tx, dst, directory=True))
                return 0
            directory = namei.directory_at(tx, src)
            if directory is None:
                raise invalid("an empty directory standing for a subvolume of the origin", src)
            place = namei.new_name(tx, dst, directory=True)
            self._check_outside(tx, directory, place)
            return sharing.clone_directory(tx, directory, place)

        files = self._mount.run(work)
        if progress:
            progress(files, files, "files")

    @staticmethod
    def _check_outside(tx: Tx, directory: Inode, place: Place) -> None:
        if (directory.subvolume, directory.number) in namei.above(tx, place.parent_subvolume, place.parent):
            raise invalid("the destination lies inside its own source", place.path)

    def clone_range(self, src: str, src_offset: int, dst: str, dst_offset: int, length: int) -> None:
        """Make `length` bytes of `dst` (0: up to the end of `src`) share those of `src`; as ioctl FICLONERANGE."""
        self._mount.run(lambda tx: sharing.clone_range(tx, *self._pair(tx, src, src_offset, dst, dst_offset), length))

    def dedupe_range(self, a: str, a_offset: int, b: str, b_offset: int, length: int) -> bool:
        """Share two ranges if their bytes are equal, compared under the lock; return whether they are, and now shared."""
        try:
            return self._mount.run(lambda tx: sharing.dedupe_range(tx, *self._pair(tx, a, a_offset, b, b_offset), length))
        except OneCopyError as error:
            if error.errno == errno.EBUSY:
                return False  # stores keep coming: what was equal is so no more
            raise

    @staticmethod
    def _pair(tx: Tx, a: str, a_offset: int, b: str, b_offset: int) -> tuple[Inode, int, Inode, int]:
        first = namei.change_file(tx, a)
        other = namei.file_at(tx, b)
        if (first.subvolume, first.number) == (other.subvolume, other.number):
            return first, a_offset, first, b_offset
        return first, a_offset, inodes.change(tx, other.subvolume, other.number), b_offset

    def dedupe(
        self, paths: tuple[str, ...] | list[str] = ("/",), *, apply: bool = False, progress: Progress | None = None
    ) -> "DedupeReport":
        """Find equal pages below `paths`; report what sharing them frees, or (`apply`) share them."""
        from onecopy.fs import dedupe

        self._fold()
        return dedupe.dedupe(self, paths, apply=apply, progress=progress)

    def create_subvolume(self, path: str, mode: int = 0o755) -> None:
        """Make an empty subvolume: a directory tree that `snapshot` clones whole."""
        self._mount.run(
            lambda tx: sharing.create_subvolume(tx, namei.new_name(tx, path, directory=True), stat.S_IFDIR | mode) and None
        )

    def snapshot(self, src: str, dst: str) -> None:
        """Clone the subvolume `src` as `dst`; takes the same time for any number of files."""
        self._mount.run(
            lambda tx: sharing.snapshot(tx, namei.existing(tx, src), namei.new_name(tx, dst, directory=True)) and None
        )

    # ------------------------------------------------------------- seeing

    def _fold(self) -> None:
        """Have what was stored through mappings in the trees, before these are looked at as a whole."""
        self._mount.check_open()
        if self.mode == "r+":
            self._mount.maps.fold()

    def extents(self, path: str) -> "list[Extent]":
        """Return the file's runs: page, PFN, pages, how many files reach them, and state."""
        from onecopy.fs import usage

        self._fold()
        with self._mount.reading() as view:
            return usage.file_extents(view, namei.file_at(view, path))

    def shadows(self, pfn: int) -> list[tuple[int, int, int]]:
        """Return (subvolume, inode number, page) of each page of a file mapped by its entries that shows frame `pfn`."""
        with self._mount.lock:
            self._mount.check_open()
            return self._mount.spaces.shadows(pfn)

    def du(self, path: str = "/") -> "Usage":
        """Return what the tree at `path` holds: logical bytes, bytes only it reaches, bytes it shares with others."""
        from onecopy.fs import usage

        self._fold()
        with self._mount.reading() as view:
            return usage.measure(view, path)

    def du_each(self, path: str = "/") -> "list[Usage]":
        """Return `du` of each direct child of a directory."""
        return [self.du(join(path, name)) for name in self.listdir(path)]

    def check(self) -> "CheckReport":
        """Recount everything from the trees, while nobody changes them; return what does not agree."""
        from onecopy.fs import check_live

        return check_live.check_mounted(self._mount)

    # ------------------------------------------------------ host and pool

    def put(self, src: str | os.PathLike[str], dst: str, *, progress: Progress | None = None) -> None:
        """Copy a file or a whole tree from the host into the pool; a file at `dst` is replaced, a tree must be new."""
        from onecopy.fs import transfer

        transfer.put(self, os.fspath(src), dst, progress=progress)

    def get(self, src: str, dst: str | os.PathLike[str], *, progress: Progress | None = None) -> None:
        """Copy a file or a whole tree from the pool to the host; a file at `dst` is replaced, a tree must be new."""
        from onecopy.fs import transfer

        transfer.get(self, src, os.fspath(dst), progress=progress)

    # ------------------------------------------------------------ mapping

    def map(self, path: str, mode: str = "r", *, reserve: bool = False, granule: int | None = None) -> Mapping:
        """Map a file into memory: one contiguous buffer over the pool's own pages, paid for once by all.

        It is live: it shows what any process stores or writes. To have the file stand still, map a clone of it. With
        mode "r+" it takes stores; one to a shared page gives the file `granule` pages of its own first (a power of two up to
        512; None: as it suits). `reserve`: all pages at once, so that no store can fail for want of space: NoSpace now,
        instead of a SIGBUS then. Behind the end of a file that is truncated, a touch is a SIGBUS.
        """
        if mode not in ("r", "r+"):
            raise invalid(f"mode {mode!r}: say 'r' or 'r+'", path)
        if granule is not None and granule not in (1 << n for n in range(10)):
            raise invalid(f"granule {granule}: a power of two from 1 to 512 pages", path)
        if mode == "r+" and self.mode == "r":
            raise ReadOnly("the pool is open for reading only: open it with mode 'r+'", path=self.path)
        mapping = self._mount.map(lambda view: namei.file_at(view, path), path, writable=mode == "r+", granule=granule or 0)
        if reserve and mode == "r+":
            try:
                mapping.make_writable()
            except BaseException:
                mapping.close()
                raise
        return mapping

    def array(
        self,
        path: str,
        mode: str = "r",
        *,
        dtype: Any = None,
        shape: int | tuple[int, ...] | None = None,
        offset: int = 0,
        order: str = "C",
    ) -> "np.ndarray[Any, Any]":
        """Map a file as a numpy array: a .npy file as it says, anything else by `dtype`, `shape` (default: all), `offset`."""
        from onecopy.fs import arrays

        return arrays.array(self, path, mode, dtype=dtype, shape=shape, offset=offset, order=order)
