"""A pool's life: format, open, also as a raw device, check, remove; and sweeping up run-time files whose pool is gone."""

import contextlib
import errno
import os
from collections.abc import Iterable

from onecopy.blkcache.cache import DEFAULT_CACHE, MIN_FRAMES, cache_paths
from onecopy.blkcache.device import BlockDevice
from onecopy.blkcache.options import CacheOptions
from onecopy.daxemu import pool as pools
from onecopy.daxemu import runtime, slots
from onecopy.daxemu.errors import NotAPool, OneCopyError, PoolBusy, invalid
from onecopy.daxemu.locks import RankedLock, open_private, try_mount
from onecopy.daxemu.pool import POLICIES, Pool
from onecopy.daxemu.raw import BUSY, RawDevice
from onecopy.daxemu.units import PAGE, parse_size
from onecopy.fs.check import CheckReport, check_pool
from onecopy.fs.filesystem import FileSystem, PoolInfo
from onecopy.fs.rebuild import make_trees

_ATTEMPTS = 8  # at a raw device, while others use the file system in between


def format(
    path: str | os.PathLike[str], size: int | str = "8G", *, force: bool = False, mode: int = 0o600,
    device: str | None = None, cache_size: int | str | None = None, policy: str | None = None,
) -> PoolInfo:  # fmt: skip
    """Make an empty pool of `size` (bytes, or text such as "8G") at `path`; its storage grows with what it holds.

    `device`: "direct" (the default), its pages are memory; "cached", it lies on what can only be read and written, and
    `cache_size` of it may be in memory (64 MiB when left out), by `policy` "shared" (the default then) or "per-inode":
    as `open` has it unless told otherwise.

    Raises FileExistsError unless `force`; PoolBusy when the pool there is in use; NoSpace; OneCopyError (EINVAL).
    """
    path = os.path.abspath(os.fspath(path))
    sweep()
    with _Exclusive(path) if force and os.path.isfile(path) else _Nothing() as old:
        kind, pages = _cache_of(device, cache_size, policy)
        pools.create(path, parse_size(size), mode, make_trees, force=force, policy=kind, cache=pages)
        old.forget_runtime()
    with open(path) as fs:
        return fs.info()


def _cache_of(device: str | None, cache_size: int | str | None, policy: str | None) -> tuple[str, int]:
    """Return the policy and the pages of cache that a pool's header is to name."""
    if device is None:
        device = "direct" if cache_size is None and policy in (None, "dax") else "cached"
    if device not in ("direct", "cached"):
        raise invalid(f"device {device!r}: say 'direct' or 'cached'")
    policy = policy or ("dax" if device == "direct" else "shared")
    if policy not in POLICIES or (policy == "dax") != (device == "direct"):
        raise invalid(f"policy {policy!r} for a {device} device: 'dax' is direct, 'shared' and 'per-inode' are cached")
    if device == "direct":
        return policy, 0
    pages = _pages(cache_size)
    if pages is not None and pages < MIN_FRAMES:
        raise invalid(f"a cache of {pages} pages: it must have at least {MIN_FRAMES}")
    return policy, pages or DEFAULT_CACHE


def _pages(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size) // PAGE


def open(
    path: str | os.PathLike[str], mode: str = "r+", *, policy: str | None = None, cache_size: int | str | None = None,
    cache: str | None = None, device: BlockDevice | None = None,
) -> FileSystem:  # fmt: skip
    """Open a pool: "r+" to read and change it, "r" to read only.

    `policy`: "dax", the pool's pages are memory; "shared", they are read into a buffer cache that keeps each block once;
    "per-inode", into one that keeps each file's pages for itself, as kernels do. All who have a pool open have the same;
    None: as it is in use, or else as it was formatted. `cache_size` (bytes, or text) limits the memory; `cache` names one
    that several pools share. `device`: what to read and write in place of the file at `path`, the same in all processes.

    Raises FileNotFoundError, PermissionError, NotAPool, PoolVersionError, CorruptRecord, PoolBusy, RuntimeLost.
    """
    return FileSystem(path, mode, cache=CacheOptions(policy, _pages(cache_size), cache, device))


def open_device(path: str | os.PathLike[str], mode: str = "r+") -> RawDevice:
    """Open a pool as a raw device, past the file system: its frames by PFN, none of them hidden. See `RawDevice`.

    "r+" waits for nobody and keeps everybody out (PoolBusy, here and there). What processes that died left unsynced is synced
    first; then the run-time file is deleted, so that the next `open` believes nothing but the pool. "r" looks at a pool that
    may be in use; when there is no run-time file, the first `open` must wait for its end (PoolBusy).

    Raises what `open` raises; CorruptRecord also when what was not synced can't be: deleting the run-time file gives it up.
    """
    if mode not in ("r", "r+"):
        raise invalid(f"mode {mode!r}: it must be 'r' or 'r+'")
    for _ in range(_ATTEMPTS):
        device = RawDevice(path, writable=mode == "r+")
        try:
            if mode == "r" or device.forget_runtime():
                return device
        except BaseException:
            device.close()
            raise
        device.close()
        open(path).close()
    raise PoolBusy("processes that end without a sync keep coming; try again", path=os.fspath(path))


def check(path: str | os.PathLike[str]) -> CheckReport:
    """Check the durable state of a pool, in use or not, also when it is too damaged to be opened."""
    path = os.fspath(path)
    pool = Pool(path, writable=False)
    lock_path = runtime.runtime_paths(pool)[1]
    pool.close()
    try:
        fd = open_private(lock_path, os.O_RDWR)
    except (FileNotFoundError, PermissionError):
        return check_pool(path)  # nobody uses it, or nobody we could ask to wait
    try:
        with RankedLock("transaction", fd):  # what the durable root names is not handed out again meanwhile
            return check_pool(path)
    finally:
        os.close(fd)


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a pool with its run-time files. PoolBusy while somebody uses it; NotAPool for any other file."""
    path = os.path.abspath(os.fspath(path))
    with _Exclusive(path) as old:
        if old.paths is None:
            raise NotAPool("not a pool; this deletes pools only", path=path)
        os.unlink(path)
        old.forget_runtime()


class _Nothing:
    """What `_Exclusive` is when there is no pool to exclude others from."""

    paths: tuple[str, ...] | None = None

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def forget_runtime(self) -> None:
        """Do nothing."""


class _Exclusive(_Nothing):
    """The mount lock on an existing file, held exclusively; PoolBusy when that can't be had at once."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not try_mount(self.fd, exclusive=True):
            os.close(self.fd)
            raise PoolBusy(BUSY, path=path)
        try:
            pool = Pool(path, writable=False)
        except OneCopyError:
            return  # damaged, or no pool at all: no run-time file can be found through it
        self.paths = (*runtime.runtime_paths(pool), *cache_paths(pool))
        pool.close()

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def forget_runtime(self) -> None:
        """Delete the run-time file and the lock file of the pool that was there."""
        _delete(self.paths or ())


def _delete(paths: Iterable[str]) -> None:
    """Delete files, which another process may be sweeping up at the same time."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sweep() -> list[str]:
    """Delete run-time files of ours whose pool is gone and which nobody uses; return their paths."""
    swept = []
    for name in os.listdir(runtime.FOLDER):
        path = os.path.join(runtime.FOLDER, name)
        if not name.startswith("onecopy-") or name.endswith((".lock", ".cache", ".frames")):
            continue
        try:
            fd = open_private(path, os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EISDIR, errno.ENXIO):
                continue
            raise
        try:
            data = os.pread(fd, runtime.HEADER.size, 0)
            if len(data) < runtime.HEADER.size:
                continue
            header = runtime.HEADER.unpack(data)
            if (header["magic"], header["layout"]) != (runtime.MAGIC, runtime.LAYOUT):
                continue  # half-built, or another version's
            where = os.fsdecode(bytes(header["path"]).rstrip(b"\0"))
            if not where or "\0" in where or slots.in_use(fd):
                continue
            try:
                status = os.stat(where)
                if (status.st_dev, status.st_ino) == (header["device"], header["inode"]):
                    continue
            except FileNotFoundError:
                pass
            except OSError:
                continue
            _delete((path, path + ".lock", path + ".cache", path + ".frames"))
            swept.append(path)
        finally:
            os.close(fd)
    return swept
