"""Conditions of a block device, for tests and benchmarks: how slow it is, whether it answers, what fails, what it counts.

They lie in shared memory, which daxemu/_device.c looks at with every request: whoever changes them changes them for all
processes that use the device through them. Forked children share them; others attach by a path.
"""

import errno
import mmap
import os
from typing import NamedTuple

from onecopy.daxemu._fault import Words, stall
from onecopy.daxemu.errors import OneCopyError, invalid
from onecopy.daxemu.locks import open_private
from onecopy.daxemu.record import Record
from onecopy.daxemu.units import PAGE

FAIL_READ, FAIL_WRITE, FAIL_FLUSH = 1, 2, 4
_TAKEN = 1 << 63  # in a failing run: being filled in
FAILINGS = 64

MAGIC = int.from_bytes(b"copycond", "little")
LAYOUT = 1

FAILING = Record(
    "failing run",
    24,
    "Requests that touch these blocks fail with EIO.",
    [
        ("first", "u64", "blocks", "the first one"),
        ("end", "u64", "blocks", "behind the last one"),
        ("what", "u64", "", f"{FAIL_READ} read, {FAIL_WRITE} write and discard, {FAIL_FLUSH} flush, of any blocks; 0: nothing"),
    ],
)
CONDITIONS = Record(
    "conditions",
    112 + FAILINGS * FAILING.size,
    "Of an emulated block device, in memory shared by all who use it. All zero: sound and fast.",
    [
        ("magic", "u64", "", "the bytes 'copycond'"),
        ("layout", "u64", "", str(LAYOUT)),
        ("latency", "u64", "ns", "added to each request"),
        ("bandwidth", "u64", "bytes/s", "for all requests together; 0: unlimited"),
        ("next", "u64", "ns", "when the device has moved all it has been asked to, CLOCK_MONOTONIC"),
        ("stalled", "u64", "", "futex: requests wait while it is not 0"),
        ("lose_flush", "u64", "", "not 0: a flush says yes and does nothing"),
        ("sequence", "u64", "", "of the last request in the journal"),
        ("reads", "u64", "", "requests that arrived"),
        ("writes", "u64", "", "requests that arrived"),
        ("read_blocks", "u64", "blocks", "of them"),
        ("written_blocks", "u64", "blocks", "of them"),
        ("flushes", "u64", "", "requests that arrived"),
        ("discards", "u64", "", "requests that arrived"),
        ("failing", f"bytes[{FAILINGS * FAILING.size}]", "", f"{FAILINGS} failing runs"),
    ],
)
_W = {name: offset // 8 for name, offset in CONDITIONS.offset.items()}


class Counters(NamedTuple):
    """Requests and blocks since the conditions were made, counted when a request arrives: before it waits, or fails."""

    reads: int
    writes: int
    read_blocks: int
    written_blocks: int
    flushes: int
    discards: int


class Conditions:
    """One device's conditions. Without `path` they are this process's and its children's; with it, of all who name it.

    A file at `path` (in /dev/shm) is made when missing, and stays. OneCopyError (EINVAL) when it is something else, OSError.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else os.path.abspath(path)
        if self.path is None:
            fd = os.memfd_create("onecopy-conditions", os.MFD_CLOEXEC)
        else:
            fd = open_private(self.path, os.O_RDWR | os.O_CREAT)
        try:
            size = os.fstat(fd).st_size
            if size not in (0, PAGE):
                raise invalid(f"not a device's conditions: expected {PAGE} bytes, found {size}", self.path)
            os.ftruncate(fd, PAGE)  # zeros: valid conditions, and all that a new file has until the next lines are through
            self.memory = mmap.mmap(fd, PAGE)
        finally:
            os.close(fd)
        self._words = Words(self.memory)
        found = self._get("magic"), self._get("layout")
        if found not in ((0, 0), (MAGIC, 0), (MAGIC, LAYOUT)):
            raise invalid(f"not a device's conditions: expected {(MAGIC, LAYOUT)}, found {found}", self.path)
        self._set("magic", MAGIC)
        self._set("layout", LAYOUT)

    def _get(self, name: str) -> int:
        return self._words.load(_W[name])

    def _set(self, name: str, value: int) -> None:
        self._words.store(_W[name], value)

    @property
    def latency(self) -> float:
        """Seconds added to each request."""
        return self._get("latency") / 1e9

    @latency.setter
    def latency(self, seconds: float) -> None:
        """Set it, in seconds. OneCopyError (EINVAL)."""
        if not 0 <= seconds < 1e9:
            raise invalid(f"a latency of {seconds} seconds: it must be 0 or more")
        self._set("latency", round(seconds * 1e9))

    @property
    def bandwidth(self) -> int:
        """Bytes a second for all requests of all processes together; 0: unlimited."""
        return self._get("bandwidth")

    @bandwidth.setter
    def bandwidth(self, rate: int) -> None:
        """Set it, in bytes a second. OneCopyError (EINVAL)."""
        if not 0 <= rate < 1 << 63:
            raise invalid(f"a bandwidth of {rate} bytes a second: it must be 0 (unlimited) or more")
        self._set("next", 0)
        self._set("bandwidth", rate)

    @property
    def lose_flushes(self) -> bool:
        """True when a flush says yes and does nothing."""
        return self._get("lose_flush") != 0

    @lose_flushes.setter
    def lose_flushes(self, on: bool) -> None:
        """Set it."""
        self._set("lose_flush", int(on))

    @property
    def stalled(self) -> bool:
        """True while requests wait."""
        return self._get("stalled") != 0

    def stall(self) -> None:
        """Make all requests that come wait, in every process, until `resume`. They can't be interrupted, but killed."""
        stall(self.memory, True)

    def resume(self) -> None:
        """Let waiting requests go on."""
        stall(self.memory, False)

    def fail(self, first: int = 0, end: int = 1 << 62, *, read: bool = False, write: bool = False, flush: bool = False) -> None:
        """From now on requests that touch blocks [first, end) fail with EIO: reads, writes (and discards), or any flush.

        OneCopyError: EINVAL for an empty range or nothing that fails, ENOSPC when 64 ranges fail already.
        """
        what = FAIL_READ * read | FAIL_WRITE * write | FAIL_FLUSH * flush
        if not 0 <= first < end < 1 << 63 or not what:
            raise invalid(f"blocks {first} to {end}, read={read}, write={write}, flush={flush}: nothing that could fail")
        for at in range(_W["failing"], _W["failing"] + 3 * FAILINGS, 3):
            if self._words.swap_if(at + 2, 0, _TAKEN):
                self._words.store(at, first)
                self._words.store(at + 1, end)
                self._words.store(at + 2, what)
                return
        raise OneCopyError(f"{FAILINGS} ranges fail already; heal() first", code=errno.ENOSPC)

    def heal(self) -> None:
        """Nothing fails any more. (What waits, or is lost, still does: see `resume`, `lose_flushes`.)"""
        for at in range(_W["failing"], _W["failing"] + 3 * FAILINGS, 3):
            self._words.store(at + 2, 0)

    @property
    def counters(self) -> Counters:
        """Requests so far, by all processes; each number for itself."""
        return Counters(*map(self._get, Counters._fields))
