"""Block devices: what can be read and written in blocks of a page, and nothing else; and one that is memory, too.

`native` is the device as native code uses it, also within a signal handler; the methods here are the same requests with
errors that say where. What an implementation must keep is in `conformance`; requests may come from any thread and process.
"""

import errno
import mmap
import os
import stat
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from onecopy.blkcache.conditions import Conditions, Counters
from onecopy.daxemu._fault import Device
from onecopy.daxemu.errors import DeviceError, NoSpace, ReadOnly, invalid, posix
from onecopy.daxemu.pool import MAX_FRAMES, release
from onecopy.daxemu.units import PAGE

if TYPE_CHECKING:
    from typing_extensions import Buffer


class BlockDevice(Protocol):
    """Blocks, numbered from 0. Buffers are whole blocks long, at any address; what a buffer holds after an error is undefined.

    Every request raises OneCopyError (EINVAL) for a negative block or a part of one, DeviceError (EIO) beyond the end or when
    the device fails, OSError (EBADF) when it is closed.
    """

    @property
    def block_size(self) -> int:
        """Bytes: always a page."""

    @property
    def blocks(self) -> int:
        """Size, in blocks."""

    @property
    def writable(self) -> bool:
        """False: write and discard raise ReadOnly."""

    @property
    def direct_access(self) -> bool:
        """True when the blocks are memory, `memory`, that needs no reading."""

    @property
    def native(self) -> Device:
        """The device for native code. It lives as long as this object is not closed."""

    def read(self, block: int, buffer: "Buffer") -> None:
        """Fill `buffer` from `block` on."""

    def write(self, block: int, buffer: "Buffer") -> None:
        """Write `buffer` from `block` on. Readers see it at once, media after a `flush`. NoSpace when the host is full."""

    def flush(self) -> None:
        """Return when all writes that had returned are on media."""

    def discard(self, block: int, count: int) -> None:
        """Say that the content of `count` blocks is of no interest: they read as zeros or as before."""

    def close(self) -> None:
        """Close, without a flush; closing twice is nothing. No request may be under way."""


class _Native:
    """The requests over `native`, with errors that say where."""

    block_size = PAGE
    direct_access = False

    def __init__(self, name: str, native: Device, *, writable: bool) -> None:
        self.name, self.native, self.writable = name, native, writable
        self.blocks = native.blocks

    def read(self, block: int, buffer: "Buffer") -> None:
        """Fill `buffer` from `block` on."""
        try:
            self.native.read(block, buffer)
        except OSError as error:
            raise self._failed(error, "read", block, memoryview(buffer).nbytes) from error

    def write(self, block: int, buffer: "Buffer") -> None:
        """Write `buffer` from `block` on. ReadOnly, NoSpace."""
        self._check_writable()
        try:
            self.native.write(block, buffer)
        except OSError as error:
            raise self._failed(error, "write", block, memoryview(buffer).nbytes) from error

    def flush(self) -> None:
        """Return when all writes that had returned are on media."""
        try:
            self.native.flush()
        except OSError as error:
            raise self._failed(error, "flush", 0, 0) from error

    def discard(self, block: int, count: int) -> None:
        """Say that the content of `count` blocks is of no interest. ReadOnly."""
        self._check_writable()
        try:
            self.native.discard(block, count)
        except OSError as error:
            raise self._failed(error, "discard", block, count * PAGE) from error

    def _check_writable(self) -> None:
        if not self.writable:
            raise ReadOnly("the device is open for reading only", path=self.name)

    def _failed(self, error: OSError, what: str, block: int, size: int) -> OSError:
        if self.native.fd < 0:
            return posix(errno.EBADF, self.name, "this device has been closed")
        where = f"{what} of {size} bytes at block {block} of {self.blocks}"
        if block < 0 or size < 0 or size % PAGE:
            return invalid(f"{where}: requests are for whole blocks of {PAGE} bytes, from 0 on", self.name)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return NoSpace(f"{where}: no room behind the device", path=self.name)
        why = "beyond the end" if block + size // PAGE > self.blocks else error.strerror
        return DeviceError(f"{where}: {why}", path=self.name, code=error.errno)

    def close(self) -> None:
        """Close, without a flush; closing twice is nothing. No request may be under way."""
        fd = self.native.fd
        self.native.forget()
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _size(fd: int, path: str) -> int:
    """Return the blocks of a regular file or block device, at least one. OneCopyError (EINVAL) for anything else."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise invalid("neither a regular file nor a block device", path)
    blocks = os.lseek(fd, 0, os.SEEK_END) // PAGE
    if not 1 <= blocks <= MAX_FRAMES:
        raise invalid(f"a device of {blocks} blocks: it must have 1 to {MAX_FRAMES}", path)
    return blocks


class FileDevice(_Native):
    """A regular file or a real block device, read and written past the page cache where that can be: then `direct` is True.

    Bytes behind the last whole block are left alone. OneCopyError (EINVAL) for other files, OSError.
    """

    def __init__(self, path: str | os.PathLike[str], writable: bool = True) -> None:
        name = os.path.abspath(path)
        # Non-blocking: a pipe by that name is refused, not waited for.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        self.direct = True
        try:
            fd = os.open(name, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False
            fd = os.open(name, flags)
        try:
            native = Device(fd, _size(fd, name))
            if self.direct and not _reads(native):
                os.close(fd)
                self.direct = False
                fd = os.open(name, flags)
                native = Device(fd, _size(fd, name))
        except BaseException:
            os.close(fd)
            raise
        super().__init__(name, native, writable=writable)


def _reads(native: Device) -> bool:
    """Return False when the file system has larger blocks than ours, so that they can't be read directly one by one."""
    with mmap.mmap(-1, PAGE) as page:
        try:
            native.read(0, page)
        except OSError as error:
            return error.errno != errno.EINVAL
    return True


class RamDevice(_Native):
    """A device of `size` bytes in memory that is gone when it is closed. OneCopyError (EINVAL) for an impossible size."""

    def __init__(self, size: int) -> None:
        if size % PAGE or not PAGE <= size <= MAX_FRAMES * PAGE:
            raise invalid(f"a device of {size} bytes: it must be a multiple of {PAGE}")
        fd = os.memfd_create("onecopy-device", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            native = Device(fd, size // PAGE)
        except BaseException:
            os.close(fd)
            raise
        super().__init__("memory", native, writable=True)


class DaxDevice(_Native):
    """A file whose pages are memory: a pool on tmpfs or fsdax. `memory` is all of it, shared with all who map it.

    A store to a page that has no storage yet, when there is none left, ends the process (SIGBUS); `write` raises NoSpace.
    """

    direct_access = True

    def __init__(self, path: str | os.PathLike[str], writable: bool = True) -> None:
        name = os.path.abspath(path)
        fd = os.open(name, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            native = Device(fd, _size(fd, name))
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._map = mmap.mmap(fd, native.blocks * PAGE, mmap.MAP_SHARED, protection)
        except BaseException:
            os.close(fd)
            raise
        self.memory = memoryview(self._map)
        super().__init__(name, native, writable=writable)

    def close(self) -> None:
        """Close; what an array still looks into stays mapped until that goes."""
        release(self.memory, self._map)
        super().close()


class Conditioned(_Native):
    """Another device under `conditions`, which all processes share that use it so; see `Conditions` for what they are.

    `path`: where the conditions lie, for processes that are no children. `latency` (seconds) and `bandwidth` (bytes a second)
    are set when given. It closes the other device. It has no direct access: nothing could be slow, or fail, there.
    """

    def __init__(
        self,
        device: BlockDevice,
        *,
        latency: float | None = None,
        bandwidth: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.device = device
        self.conditions = Conditions(path)
        native = Device(device.native.fd, device.blocks, self.conditions.memory)
        super().__init__(getattr(device, "name", "device"), native, writable=device.writable)
        if latency is not None:
            self.conditions.latency = latency
        if bandwidth is not None:
            self.conditions.bandwidth = bandwidth

    @property
    def latency(self) -> float:
        """Seconds added to each request."""
        return self.conditions.latency

    @latency.setter
    def latency(self, seconds: float) -> None:
        """Set it, in seconds. OneCopyError (EINVAL)."""
        self.conditions.latency = seconds

    @property
    def bandwidth(self) -> int:
        """Bytes a second for all requests together; 0: unlimited."""
        return self.conditions.bandwidth

    @bandwidth.setter
    def bandwidth(self, rate: int) -> None:
        """Set it, in bytes a second. OneCopyError (EINVAL)."""
        self.conditions.bandwidth = rate

    @property
    def lose_flushes(self) -> bool:
        """True when a flush says yes and does nothing."""
        return self.conditions.lose_flushes

    @lose_flushes.setter
    def lose_flushes(self, on: bool) -> None:
        """Set it."""
        self.conditions.lose_flushes = on

    @property
    def counters(self) -> Counters:
        """Requests so far, by all processes."""
        return self.conditions.counters

    def fail(self, first: int = 0, end: int = 1 << 62, *, read: bool = False, write: bool = False, flush: bool = False) -> None:
        """Make requests that touch blocks [first, end) fail with EIO; see `Conditions.fail`."""
        self.conditions.fail(first, end, read=read, write=write, flush=flush)

    def heal(self) -> None:
        """Make nothing fail any more."""
        self.conditions.heal()

    def stall(self) -> None:
        """Make requests wait until `resume`."""
        self.conditions.stall()

    def resume(self) -> None:
        """Let waiting requests go on."""
        self.conditions.resume()

    def journal(self, path: str | os.PathLike[str] | None) -> None:
        """Record requests at the end of the file `path` from now on, or no longer (None); see `cuts`.

        No request may be under way. Each process that writes calls it with the same path, unless it is forked afterwards.
        """
        old = self.native.journal_fd
        fd = -1 if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.native.journal_fd = fd
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        """Close the other device and the journal; the conditions stay for others."""
        if self.native.fd >= 0:
            self.journal(None)
        self.native.forget()
        self.device.close()
