"""The raw door: a pool's frames by PFN, past every file, as device-dax gives a real NVDIMM's.

What it shows and changes is the pool itself, header, superblocks and trees included. Nobody checks what is stored there.
"""

import errno
import mmap
import os
from types import TracebackType

from onecopy.daxemu.errors import PoolBusy, ReadOnly, invalid, posix
from onecopy.daxemu.locks import mark_raw, try_mount
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.runtime import is_settled, runtime_paths
from onecopy.daxemu.units import PAGE

BUSY = "processes have the pool open; 'onecopy info' lists them"


class RawDevice:
    """A pool as an array of `frames` frames of `page_size` bytes. Made by `open_device`; a context manager.

    It holds the mount lock, writable exclusively, else shared, until it is closed and the last buffer that it gave is gone,
    also in forked children: so long no file system handle can be where frames change under it.
    """

    page_size = PAGE

    def __init__(self, path: str | os.PathLike[str], *, writable: bool) -> None:
        pool = Pool(os.fspath(path), writable=writable)
        try:
            if not try_mount(pool.fd, exclusive=writable):
                raise PoolBusy(BUSY if writable else "the pool is being formatted, repaired or stored to", path=pool.path)
            if not writable:
                mark_raw(pool.fd)
            status = os.stat(pool.path)
            if (status.st_dev, status.st_ino) != (pool.status.st_dev, pool.status.st_ino):
                raise PoolBusy("the pool was replaced while it was being opened; try again", path=pool.path)
        except BaseException:
            pool.close()
            raise
        self._pool, self.path, self.writable, self.closed = pool, pool.path, writable, False
        self.frames: int = pool.frames

    def forget_runtime(self) -> bool:
        """Delete the run-time file, which knows nothing of raw stores; False when what is in it must be synced before.

        The lock file beside it stays: who opened that a moment ago would lock a file that nobody else finds.
        """
        if not is_settled(self._pool):
            return False
        try:
            os.unlink(runtime_paths(self._pool)[0])
        except FileNotFoundError:
            pass
        return True

    def map(self, pfn: int, pages: int, mode: str = "r") -> mmap.mmap:
        """Map frames [pfn, pfn + pages) and return the memory. Mode "r+": stores to it go to the pool.

        For storing, all these frames are given storage first. OneCopyError (EINVAL) for frames that are not there,
        ReadOnly, NoSpace, OSError (EBADF) when closed.
        """
        self._check(pfn, pages)
        if mode not in ("r", "r+"):
            raise invalid(f"mode {mode!r}: it must be 'r' or 'r+'")
        if mode == "r":
            return mmap.mmap(self._pool.fd, pages * PAGE, mmap.MAP_SHARED, mmap.PROT_READ, offset=pfn * PAGE)
        if not self.writable:
            raise ReadOnly("the raw device is open for reading only", path=self.path)
        self._pool.back(pfn, pages)  # a store to a frame without storage would be a SIGBUS where the host has none left
        return mmap.mmap(self._pool.fd, pages * PAGE, offset=pfn * PAGE)

    def flush(self, pfn: int, pages: int) -> None:
        """Return when what was stored to frames [pfn, pfn + pages) is durable. OneCopyError (EINVAL), OSError (EIO, EBADF)."""
        self._check(pfn, pages)
        self._pool.persistence.flush(pfn, pages)
        self._pool.persistence.fence()

    def _check(self, pfn: int, pages: int) -> None:
        if self.closed:
            raise posix(errno.EBADF, self.path, "this raw device has been closed")
        if pfn < 0 or pages < 1 or pages > self.frames - pfn:
            raise invalid(f"frames {pfn} to {pfn + pages} of a pool of {self.frames}", self.path)

    def close(self) -> None:
        """Close, without a flush; closing twice is nothing. Buffers stay valid, the lock held, until the last one is gone."""
        if not self.closed:
            self.closed = True
            self._pool.close(unlock=False)

    def __enter__(self) -> "RawDevice":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
