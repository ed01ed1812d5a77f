"""The pool file: an emulated NVDIMM, addressed by page frame number.

PFN 0 is the pool's header; every other page belongs to whoever sits above. Frames that hold nothing have no storage
(the file is sparse); `back` gives a run storage before it is stored to, `punch` gives it back to the host.
"""

import errno
import fcntl
import mmap
import os
import secrets
import stat
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from onecopy.daxemu._fault import Engine
from onecopy.daxemu.errors import CorruptRecord, NoSpace, NotAPool, PoolVersionError, ReadOnly, invalid, posix
from onecopy.daxemu.persist import Persistence, Volatile, persistence_of
from onecopy.daxemu.record import Record, checksum
from onecopy.daxemu.units import HUGE, PAGE, format_size

MAGIC = int.from_bytes(b"onecopy\0", "little")
VERSION = 2
POLICIES = ("dax", "shared", "per-inode")
MIN_FRAMES = 256
MAX_FRAMES = 1 << 40

HEADER = Record(
    "pool header",
    80,
    "At the start of PFN 0. Written once, by format; the rest of the page is zero.",
    [
        ("magic", "u64", "", "the bytes 'onecopy' and a zero"),
        ("version", "u32", "", f"{VERSION}; another number means another format"),
        ("page_size", "u32", "bytes", str(PAGE)),
        ("frames", "u64", "pages", "size of the pool, this page included"),
        ("uuid", "bytes[16]", "", "identity of the pool; names its run-time file"),
        ("created", "u64", "ns since 1970", "when it was formatted"),
        ("pfn", "u64", "PFN", "0"),
        ("policy", "u64", "", "how it is opened unless told otherwise: 0 dax, 1 shared, 2 per-inode"),
        ("cache", "u64", "pages", "of that cache"),
        ("checksum", "u64", "", "CRC-32 of this record with this word zero"),
    ],
)

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2


@cache
def _fallocate() -> tuple[Callable[[int, int, int, int], int], Callable[[], int]]:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call, ctypes.get_errno


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python offers without modes. OSError."""
    call, get_errno = _fallocate()
    while call(fd, mode, offset, length):
        code = get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class Pool:
    """An open pool file, mapped whole: its pages are the frames.

    `words` (64-bit) and `bytes` view the same memory; index = PFN times 512 or 4,096.

    `huge_pages`: the host stores aligned runs of 512 frames as one page, which mappings that are congruent translate at once.

    Readers and writers of frames above this class keep the rules about which frames they may touch; this class
    keeps only the bounds. Not shared over fork: a child opens its own.
    """

    policy = "dax"
    cached = False  # whether frames may be absent, see blkcache.cache

    def __init__(self, path: str, *, writable: bool, mapped: bool = True) -> None:
        self.path, self.writable = os.path.abspath(path), writable
        try:
            # Non-blocking: a pipe by that name is refused below, not waited for.
            self.fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC)
        except IsADirectoryError as error:
            raise NotAPool("a directory, not a pool file", path=path) from error
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            raise ReadOnly("the file system holding the pool is read-only; open it with mode='r'", path=path) from error
        try:
            self.status = os.fstat(self.fd)
            header = self._read_header()
            self.frames: int = header["frames"]
            self.uuid = uuids.UUID(bytes=header["uuid"])
            self.created: int = header["created"]
            self.wanted: tuple[str, int] = (
                POLICIES[header["policy"] % len(POLICIES)],
                header["cache"],
            )  # policy, pages of cache
            if mapped:
                protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
                self.memory = mmap.mmap(self.fd, self.frames * PAGE, mmap.MAP_SHARED, protection)
        except BaseException:
            os.close(self.fd)
            raise
        if mapped:
            self.bytes = memoryview(self.memory)
            self.words = self.bytes.cast("Q")
        self.persistence: Persistence = persistence_of(self.fd)
        # tmpfs says so: mounted with huge=always, or huge=within_size.
        self.huge_pages = self.status.st_blksize >= HUGE * PAGE and isinstance(self.persistence, Volatile)

    def connect(self, *, empty: bool) -> None:
        """Make the pool whole, once the run-time file is there; `empty`: it is new. The caller holds the transaction lock."""

    @property
    def frames_fd(self) -> int:
        """The file whose pages are the frames."""
        return self.fd

    def use(self, engine: Engine) -> None:
        """Let the engine's faults find their frames: at their PFNs."""

    def ready(self, pfn: int, pages: int) -> None:
        """Before frames that have storage are stored to through the mapping."""

    def fetch(self, pfn: int, pages: int) -> None:
        """Before frames are read through the mapping: they are there."""

    def losses(self) -> int:
        """Before the mapping is read: for `raise_lost`."""
        return 0

    def raise_lost(self, since: int) -> None:
        """Raise what has gone wrong in reading the mapping since `losses` gave that number: nothing can."""

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, the mapping is read: `raise_lost`, also in place of what follows from zeros that were shown."""
        losses = self.losses()
        try:
            yield
        finally:
            self.raise_lost(losses)

    def read_media(self, pfn: int) -> bytes:
        """Return a page as a power cut would leave it, as far as that can be told."""
        return bytes(self.bytes[pfn * PAGE : (pfn + 1) * PAGE])

    def give_copies(self, space: int, pages: int) -> None:
        """Before an inode's address space is mapped, up to `pages`: it shows the pool's frames."""

    def end_copies(self, space: int) -> None:
        """An address space has ended."""

    def rest(self) -> None:
        """The last user is about to close the pool."""

    def expect_child(self) -> None:
        """Before a fork."""

    def become_child(self, fd: int) -> None:
        """In the forked child: `fd` is the pool file on a description of its own."""
        self.fd = fd
        self.persistence = persistence_of(fd)

    def _read_header(self) -> dict[str, Any]:
        if not (stat.S_ISREG(self.status.st_mode) or stat.S_ISBLK(self.status.st_mode)):
            raise NotAPool("neither a regular file nor a block device, so not a pool", path=self.path)
        page = os.pread(self.fd, PAGE, 0)
        if len(page) < PAGE or int.from_bytes(page[:8], "little") != MAGIC:
            raise NotAPool(
                "not an onecopy pool (its first bytes are something else); 'onecopy format' makes one", path=self.path
            )
        header = HEADER.unpack(page)
        if header["version"] != VERSION:
            raise PoolVersionError(
                f"pool format {header['version']}; this onecopy reads format {VERSION}: use the version that made it",
                path=self.path,
            )
        found = checksum(page[: HEADER.size], HEADER.offset["checksum"])
        if header["checksum"] != found:
            raise CorruptRecord("pool header", 0, "checksum", expected=header["checksum"], actual=found)
        if header["page_size"] != PAGE:
            raise CorruptRecord("pool header", 0, "page size", expected=PAGE, actual=header["page_size"])
        if not MIN_FRAMES <= header["frames"] <= MAX_FRAMES:
            raise CorruptRecord("pool header", 0, "frames", expected=f"{MIN_FRAMES} to {MAX_FRAMES}", actual=header["frames"])
        size = header["frames"] * PAGE
        have = os.lseek(self.fd, 0, os.SEEK_END)
        if have < size:
            raise NotAPool(
                f"truncated pool: {have} bytes, its header says {size}; restore it from a copy",
                path=self.path,
            )
        return header

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at byte `offset`. By system call: a frame without storage gets it, or NoSpace is raised.

        A store through the mapping would kill the process (SIGBUS) when the host has no page left to give.
        """
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self.fd, view, offset)
                offset, view = offset + done, view[done:]
        except OSError as error:
            raise self._host_full(error) from error

    def store_from(self, offset: int, fd: int, at: int, size: int) -> int:
        """Store up to `size` bytes of the host file `fd` from byte `at` on at byte `offset`, copied by the kernel.

        Returns how many there were: fewer where the file ends. The caller holds the transaction lock (the pool's
        descriptor has one position). NoSpace, OSError.
        """
        done = 0
        try:
            os.lseek(self.fd, offset, os.SEEK_SET)
            while done < size and (count := os.sendfile(self.fd, fd, at + done, size - done)):
                done += count
        except OSError as error:
            raise self._host_full(error) from error
        return done

    def back(self, pfn: int, pages: int) -> None:
        """Give frames [pfn, pfn + pages) storage, so that stores through the mapping can't fail. NoSpace when full."""
        try:
            fallocate(self.fd, 0, pfn * PAGE, pages * PAGE)
        except OSError as error:
            raise self._host_full(error) from error

    def forget(self, pfn: int, pages: int) -> None:
        """Let go of what frames take up in memory beside the device: nothing, where the device is the memory."""

    def punch(self, pfn: int, pages: int) -> None:
        """Give the storage of frames [pfn, pfn + pages) back to the host; they read as zeros."""
        fallocate(self.fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, pfn * PAGE, pages * PAGE)

    def _host_full(self, error: OSError) -> OSError:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM):
            return error
        return NoSpace(f"the file system that holds the pool gave no more room ({error.strerror})", path=self.path)

    def close(self) -> None:
        """Unmap and close; releases the mount lock, which lives on this descriptor."""
        release(self.words, self.bytes, self.memory)
        # Closing alone would leave the lock to what still maps the file: an array over a frame, a forked child.
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        os.close(self.fd)


def release(*buffers: memoryview | mmap.mmap) -> None:
    """Let go of views, then of what they look into; what an array still looks into goes when that does."""
    for buffer in buffers:
        try:
            buffer.release() if isinstance(buffer, memoryview) else buffer.close()
        except BufferError:
            pass


def create(
    path: str, size: int, mode: int, fill: Callable[[Pool], None], *, force: bool, policy: str = "dax", cache: int = 0
) -> None:
    """Make a pool of `size` bytes at `path`: header, then `fill(pool)`; it appears under its name complete or not at all.

    Raises FileExistsError without `force`; NoSpace; OneCopyError (EINVAL) for an impossible size.
    """
    frames = size // PAGE
    if not MIN_FRAMES <= frames <= MAX_FRAMES:
        raise invalid(
            f"a pool of {format_size(size)}: the size must be between {format_size(MIN_FRAMES * PAGE)} and "
            f"{format_size(MAX_FRAMES * PAGE)}",
            path,
        )
    if os.path.isdir(path):
        raise posix(errno.EISDIR, path)
    if not force and os.path.lexists(path):
        raise posix(errno.EEXIST, path, "format with force to replace it")
    temporary = f"{path}.{secrets.token_hex(6)}.new"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(fd, mode)
            os.ftruncate(fd, frames * PAGE)
            fields = [MAGIC, VERSION, PAGE, frames, uuids.uuid4().bytes, time.time_ns(), 0, POLICIES.index(policy), cache, 0]
            fields[-1] = checksum(HEADER.pack(*fields), HEADER.offset["checksum"])
            os.pwrite(fd, HEADER.pack(*fields).ljust(PAGE, b"\0"), 0)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise NoSpace(f"no room for a pool of {format_size(size)} ({error.strerror})", path=path) from error
            raise
        finally:
            os.close(fd)
        pool = Pool(temporary, writable=True)
        try:
            fill(pool)
            pool.persistence.flush(0, 1)
            pool.persistence.fence()
        finally:
            pool.close()
        if force:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike rename, fails when somebody else was faster
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)
