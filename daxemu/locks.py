"""Locks between processes: portalocker over flock, each with a rank that acquisition checks.

A lock belongs to one open file description, so every process opens its own (a forked child opens anew), and the
kernel releases it when its holder dies. flock has no deadlock detection; the order below takes its place:

    A thread that *waits* for a lock holds only locks that stand earlier in `RANKS`.

Non-blocking attempts are exempt: who doesn't wait can't wait in a circle. CONCURRENCY.md's table is made from `RANKS`.
"""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import IO

from portalocker import AlreadyLocked, LockFlags
from portalocker.portalocker import BaseLocker

from onecopy.daxemu.errors import InvariantError, posix

# (name, the file it is on, what it protects, how it is held)
RANKS = (
    ("mount", "the pool file", "the pool against format, repair and a second run-time file",
     "shared by every user while open; exclusive, never waited for, to format, repair, build the run-time file or store raw"),
    ("transaction", "the lock file beside the run-time file", "the live root, frame table, limbo, slots and address spaces",
     "exclusive for one transaction, for opening and closing, and around fork"),
)  # fmt: skip
RANK = {row[0]: rank for rank, row in enumerate(RANKS)}

_held = threading.local()  # .ranks: the ranks this thread holds by waiting, ascending


class Flock(BaseLocker):
    """portalocker's locking by plain flock(2): blocking in the kernel, no polling, no per-call set-up."""

    def lock(self, file_obj: int | IO[str] | IO[bytes] | object, flags: LockFlags) -> None:
        """Lock `file_obj` (a descriptor). Raises AlreadyLocked when NON_BLOCKING and held elsewhere."""
        try:
            fcntl.flock(file_obj, int(flags))  # type: ignore[arg-type]
        except BlockingIOError as error:
            raise AlreadyLocked(str(error)) from error

    def unlock(self, file_obj: int | IO[str] | IO[bytes] | object) -> None:
        """Unlock `file_obj`."""
        fcntl.flock(file_obj, fcntl.LOCK_UN)  # type: ignore[arg-type]


_FLOCK = Flock()


class RankedLock:
    """One of `RANKS` on one descriptor, exclusive between processes and between threads; re-entrant in a thread."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd = name, fd
        self._rank = RANK[name]
        self._threads = threading.RLock()
        self._depth = 0
        self._holder = 0  # thread
        self.on_last_release: Callable[[], None] | None = None  # run once, after unlocking; may close the descriptor

    def acquire(self, *, ranked: bool = True) -> None:
        """Wait for the lock. InvariantError when this thread holds one that comes later in `RANKS`.

        `ranked=False` skips the check, for who has an order of its own among locks of one rank (fork).
        """
        ranks: list[int] = _held.__dict__.setdefault("ranks", [])
        here = threading.get_ident()
        try:
            self._threads.acquire()
            if self._depth == 0:
                if ranked and ranks and ranks[-1] >= self._rank:
                    held = RANKS[ranks[-1]][0]
                    ranks = []  # not ours to take back
                    raise InvariantError("lock order", f"{self.name} wanted while holding {held}")
                if self.fd < 0:
                    raise posix(errno.EBADF, detail="closed while this thread waited")
                _FLOCK.lock(self.fd, LockFlags.EXCLUSIVE)
                ranks.append(self._rank)
                self._holder = here
            self._depth += 1  # last: no interrupt can come between this and our return
        except BaseException:
            self._take_back(ranks)
            raise

    def release(self) -> None:
        """Give one acquisition back; the last one unlocks."""
        self._depth -= 1
        try:
            if self._depth == 0:
                try:
                    _held.ranks.remove(self._rank)
                finally:
                    fcntl.flock(self.fd, fcntl.LOCK_UN)  # one instruction: an interrupt comes before or after
                after, self.on_last_release = self.on_last_release, None
                if after is not None:
                    after()
        finally:
            self._let_threads_in()

    def try_idle(self) -> bool:
        """Take the lock if that needs no waiting and this thread holds no lock at all; True when taken."""
        ranks: list[int] = _held.__dict__.setdefault("ranks", [])
        here = threading.get_ident()
        try:
            if ranks or not self._threads.acquire(blocking=False):
                return False
            _FLOCK.lock(self.fd, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
            ranks.append(self._rank)
            self._holder = here
            self._depth = 1
            return True
        except BaseException as error:
            self._take_back(ranks)
            if isinstance(error, AlreadyLocked):
                return False
            raise

    def _take_back(self, ranks: list[int]) -> None:
        """After an exception, an interrupt too, that came before `_depth` said that we have the lock."""
        if not self._threads._is_owned():  # type: ignore[attr-defined]
            return  # it came while another thread had it
        if self._depth == 0 and self.fd >= 0:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            if ranks and ranks[-1] == self._rank:
                ranks.pop()
        self._let_threads_in()

    def _let_threads_in(self) -> None:
        """Give up one hold on the threads' lock; all with the last: an interrupt may have come before one was noted."""
        if self._depth:
            self._threads.release()
        while not self._depth and self._threads._is_owned():  # type: ignore[attr-defined]
            self._threads.release()

    def __enter__(self) -> "RankedLock":
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    @property
    def held_here(self) -> bool:
        """True when this thread holds it."""
        return self._depth > 0 and self._holder == threading.get_ident()


def forget_held() -> None:
    """In a forked child: the parent's locks are not ours."""
    _held.__dict__.clear()


def try_mount(fd: int, *, exclusive: bool) -> bool:
    """Try the mount lock on the pool's descriptor, without waiting; True when got.

    Replaces what the descriptor held; when the attempt fails it holds nothing.
    """
    try:
        _FLOCK.lock(fd, (LockFlags.EXCLUSIVE if exclusive else LockFlags.SHARED) | LockFlags.NON_BLOCKING)
    except AlreadyLocked:
        return False
    return True


_FLOCK_STRUCT = struct.Struct("hhqqi4x")


def range_lock(fd: int, command: int, first: int, count: int = 1, kind: int = fcntl.F_WRLCK) -> int:
    """Run F_OFD_SETLK or F_OFD_GETLK on bytes, which need not exist; return the lock type found. OSError (EAGAIN)."""
    request = _FLOCK_STRUCT.pack(kind, os.SEEK_SET, first, count, 0)
    return int(_FLOCK_STRUCT.unpack(fcntl.fcntl(fd, command, request))[0])


_RAW = 1 << 62  # byte of the pool that raw readers hold: the mount lock alone would not tell them from users


def mark_raw(fd: int) -> None:
    """Say that who holds the mount lock shared on this descriptor of the pool is a raw reader."""
    range_lock(fd, fcntl.F_OFD_SETLK, _RAW, kind=fcntl.F_RDLCK)


def has_raw_readers(fd: int) -> bool:
    """True while somebody else is a raw reader of the pool."""
    return range_lock(fd, fcntl.F_OFD_GETLK, _RAW) != fcntl.F_UNLCK


def reopen(fd: int, flags: int = os.O_RDWR) -> int:
    """Return a descriptor of the same file with an open file description, hence locks, of its own."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def open_private(path: str, flags: int, mode: int = 0o600) -> int:
    """Open `path`, not inherited over exec, never following a link planted in a shared folder."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
