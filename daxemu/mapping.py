"""Mappings: a contiguous range of addresses over scattered frames of the pool.

The hardware translates: each run of consecutive PFNs is one MAP_FIXED mapping (a VMA) of the pool file, so the result is
a plain array at memory speed. Holes read as zeros and cost nothing. A mapping is live: it shows what any process stores
to the file or writes into it. Mapped for storing ("r+"), it takes stores by any means: numpy, memoryview, C. A store to a
page that others share gives the file pages of its own first (see _fault.h).
"""

import errno
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onecopy.daxemu._fault import Region
from onecopy.daxemu.errors import OneCopyError, ReadOnly, posix
from onecopy.daxemu.units import HUGE, PAGE, pages_of

Run = tuple[int, int, int]  # (page of the mapping, PFN, pages)


def merge_runs(runs: Sequence[Run]) -> list[Run]:
    """Return `runs`, ascending by page, with neighbours that continue each other in both respects made one (one VMA)."""
    merged: list[Run] = []
    for page, pfn, pages in runs:
        if merged:
            last_page, last_pfn, last_pages = merged[-1]
            if last_page + last_pages == page and last_pfn + last_pages == pfn:
                merged[-1] = (last_page, last_pfn, last_pages + pages)
                continue
        merged.append((page, pfn, pages))
    return merged


class Owner(Protocol):
    """Who makes mappings, and is told when they end."""

    def pfns(self, mapping: "Mapping", /) -> npt.NDArray[np.uint64]:
        """Return the PFN of each page."""

    def make_writable(self, mapping: "Mapping", low: int, high: int, /) -> None:
        """Make pages private."""

    def is_beyond(self, mapping: "Mapping", page: int, /) -> bool:
        """Return whether the file ends before `page`."""

    def sync(self) -> None:
        """Make what was stored durable."""

    def ended(self, space: int, /) -> None:
        """A mapping has ended."""

    def reduce(self, mapping: "Mapping", /) -> tuple[Any, ...]:
        """Return what pickle needs to map it anew."""


class Mapping(Region):
    """A file in memory: buffer protocol, `len`, slices, `pfns`; with "r+" also item assignment.

    Stays valid after the pool's handle is closed. `close` raises BufferError while arrays or views look into it. Pickled, it is
    mapped anew in the process that unpickles it.
    """

    path: str
    writable: bool
    space: int
    key: tuple[int, int]  # (subvolume, inode number)
    _owner: Owner | None = None

    def __new__(cls, length: int, path: str) -> "Mapping":
        """Reserve addresses for `length` bytes; zeros until something is mapped there."""
        # Congruent addresses and PFNs let the kernel use 2 MiB translations where the pool has huge pages.
        self = super().__new__(cls, length, PAGE * HUGE if length >= PAGE * HUGE else PAGE)
        self.path, self.writable, self.space, self.key, self._owner = path, False, -1, (0, 0), None
        return self

    def __init__(self, *_: object) -> None:
        pass

    def attached(self, owner: Owner, space: int, subvolume: int, inode: int, *, writable: bool) -> None:
        """The engine knows the region now; `owner` is told once when the mapping ends."""
        self._owner, self.space, self.key, self.writable = owner, space, (subvolume, inode), writable

    def forget(self) -> None:
        """Unmap without telling the owner: making the mapping failed."""
        self._owner = None
        self.unmap()

    def show(self, fd: int, runs: Sequence[Run]) -> None:
        """Map `runs` of the pool file. OSError (ENOMEM) past the kernel's limit of mappings."""
        self.map(fd, np.array(merge_runs(runs), np.uint64).tobytes())

    @property
    def pfns(self) -> npt.NDArray[np.uint64]:
        """The PFN of each page, as it is now; 0 = hole."""
        if self._owner is None:
            return np.zeros(pages_of(len(self)), np.uint64)
        return self._owner.pfns(self)

    def make_writable(self, low: int = 0, high: int | None = None) -> None:
        """Do for bytes [low, high) what a store to each page would do: pages of the file's own, mapped writable.

        A system call that stores (`readinto`, `recv_into`, `preadv`) into a shared page fails with EFAULT: the kernel raises no
        fault that a process could handle. After this it works, until the file is cloned again. ReadOnly, NoSpace;
        OneCopyError (ENXIO) where the file has been cut off.
        """
        high = len(self) if high is None else high
        if not 0 <= low <= high <= len(self):
            raise OneCopyError(f"bytes {low} to {high} of a mapping of {len(self)}", path=self.path, code=errno.EINVAL)
        self._check_writable()
        if low < high and self._owner is not None:
            self._check_end(high - 1)
            self._owner.make_writable(self, low // PAGE, pages_of(high))

    def fetch(self, low: int = 0, high: int | None = None) -> None:
        """Touch every page of bytes [low, high), so that what is not in memory is read: on a pool with a cache.

        A system call that reads a page which is not there (`write`, `send`) fails with EFAULT, for the reason that is given at
        `make_writable`. After this it works, as long as the cache has room for the range. OneCopyError (ENXIO) where the file
        has been cut off.
        """
        high = len(self) if high is None else high
        if not 0 <= low <= high <= len(self):
            raise OneCopyError(f"bytes {low} to {high} of a mapping of {len(self)}", path=self.path, code=errno.EINVAL)
        if low < high:
            self._check_end(high - 1)
            with memoryview(self) as view:
                np.frombuffer(view, np.uint8)[low // PAGE * PAGE : high : PAGE].max()

    def sync(self) -> None:
        """Make what was stored survive a power cut, as `FileSystem.sync` does."""
        if self._owner is not None:
            self._owner.sync()

    def _check_writable(self) -> None:
        if not self.writable and len(self):
            raise ReadOnly("mapped for reading only; map it with mode 'r+'", path=self.path)

    def _check_end(self, last: int) -> None:
        if self._owner is not None and self._owner.is_beyond(self, last // PAGE):
            raise posix(errno.ENXIO, self.path, "the file has been cut off before this page of the mapping")

    def __getitem__(self, key: int | slice) -> int | bytes:
        with memoryview(self) as view:
            self._check_key(key)
            return bytes(view[key]) if isinstance(key, slice) else view[key]

    def __setitem__(self, key: int | slice, value: Any) -> None:
        self._check_writable()
        with memoryview(self) as view:
            self._check_key(key)
            view[key] = value

    def _check_key(self, key: int | slice) -> None:
        """A touch behind the end would be a SIGBUS: say it in words where the touch is ours."""
        places = range(*key.indices(len(self))) if isinstance(key, slice) else [key if key >= 0 else key + len(self)]
        if len(places) and 0 <= max(places[0], places[-1]) < len(self):
            self._check_end(max(places[0], places[-1]))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._owner is None:
            raise TypeError("a mapping that is closed, or of a file without pages, can't be pickled")
        return self._owner.reduce(self)

    def close(self) -> None:
        """Unmap. BufferError while arrays or views look into the mapping; closing twice is nothing."""
        self.unmap()
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.ended(self.space)

    def __enter__(self) -> "Mapping":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._owner is not None and not sys.is_finalizing():
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} bytes, mode {'r+' if self.writable else 'r'}"
        return f"<onecopy.Mapping of {self.path!r}: {state}>"
