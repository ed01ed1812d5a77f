"""Files of a pool or of the kernel's, with the few operations that comparisons need, the same for all."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.clone import FICLONE
from onecopy.benchmarks.harness import KiB
from onecopy.benchmarks.memory import run_time_bytes

XFS, BTRFS = KERNEL = ("XFS", "Btrfs")
COPIES = "tmpfs copies"
MEMMAP = "numpy.memmap"
BASE = "base"

Words = NDArray[np.uint64]
Reader = Callable[[memoryview, int], int]
"""Fill a buffer from an offset of the file; return how many bytes there were."""


class Mapped:
    """A file, mapped. Whoever took `words` gives them up before this is closed."""

    def __init__(self, buffer: Any, sync: Callable[[], object], close: Callable[[], object]) -> None:
        self.buffer, self.sync, self._close = buffer, sync, close

    @property
    def words(self) -> Words:
        """The file as 64-bit words."""
        return np.frombuffer(self.buffer, np.uint64)

    @property
    def range(self) -> tuple[int, int]:
        """First address and length, in bytes."""
        words = self.words
        return words.ctypes.data, words.nbytes

    def expect_random(self) -> None:
        """Tell the kernel, where it is its mapping, that reading around what is asked for does no good."""
        if isinstance(self.buffer, mmap.mmap):
            self.buffer.madvise(mmap.MADV_RANDOM)

    def close(self) -> None:
        """Unmap."""
        self.buffer = None
        self._close()


class Files(ABC):
    """The files of one way; names are those of a single directory."""

    @abstractmethod
    def put(self, source: Path, name: str) -> None:
        """Take a file in."""

    @abstractmethod
    def clone(self, source: str, name: str) -> None:
        """Make another file of the same content, as this way does."""

    @abstractmethod
    def unlink(self, name: str) -> None:
        """Remove a file."""

    @abstractmethod
    def write(self, name: str, data: bytes, offset: int) -> None:
        """Write part of a file."""

    @abstractmethod
    def sync(self) -> None:
        """Make all durable."""

    @abstractmethod
    def mapped(self, name: str, *, writable: bool = False) -> Mapped:
        """Map a file, shared."""

    @abstractmethod
    def reader(self, name: str) -> closing[Any]:
        """Give what reads a file without mapping it: a context of an object whose `read` is a Reader."""

    @abstractmethod
    def held(self, names: Sequence[str]) -> int:
        """Return how many bytes of memory hold the content of these files."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """Drop what the page cache holds of a file where that is only a copy of what a device holds."""

    @contextmanager
    def map(self, name: str, *, writable: bool = False) -> Iterator[Mapped]:
        """Map a file for as long as the context lasts."""
        with closing(self.mapped(name, writable=writable)) as found:
            yield found


@dataclass(frozen=True)
class _Reader:
    read: Reader
    close: Callable[[], None] = lambda: None


class PoolFiles(Files):
    """The files of a pool."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs

    def put(self, source: Path, name: str) -> None:  # noqa: D102
        self.fs.put(source, f"/{name}")

    def clone(self, source: str, name: str) -> None:  # noqa: D102
        self.fs.clone(f"/{source}", f"/{name}")

    def unlink(self, name: str) -> None:  # noqa: D102
        self.fs.unlink(f"/{name}")

    def write(self, name: str, data: bytes, offset: int) -> None:  # noqa: D102
        self.fs.write(f"/{name}", data, offset)

    def sync(self) -> None:  # noqa: D102
        self.fs.sync()

    def mapped(self, name: str, *, writable: bool = False) -> Mapped:  # noqa: D102
        mapping = self.fs.map(f"/{name}", "r+" if writable else "r")
        return Mapped(memoryview(mapping), mapping.sync, mapping.close)

    def reader(self, name: str) -> closing[Any]:  # noqa: D102
        return closing(_Reader(lambda buffer, offset: self.fs.readinto(f"/{name}", buffer, offset)))

    def forget(self, name: str) -> None:
        """Do nothing: a pool's file is the memory, and a buffer cache keeps within its limit by itself."""

    def held(self, names: Sequence[str]) -> int:
        """Return what the pool and its run-time file occupy; with a cache, what that holds, whoever's pages they are."""
        info = self.fs.info()
        found = getattr(info, "cache", None)
        ours = run_time_bytes(info.uuid)
        if found is None:
            return info.backed_bytes + ours
        resident = int(found.resident) * PAGE
        return ours if ours >= resident else ours + resident  # the cache's file may be one of those already counted


class HostFiles(Files):
    """Files of a directory of the kernel's."""

    def __init__(self, root: Path, way: str) -> None:
        self.root, self.way = root, way

    def put(self, source: Path, name: str) -> None:  # noqa: D102
        shutil.copyfile(source, self._path(name))
        self.sync()

    def clone(self, source: str, name: str) -> None:  # noqa: D102
        if self.way == MEMMAP:
            return  # one file, for all
        if self.way == COPIES:
            shutil.copyfile(self._path(source), self._path(name))
            return
        with open(self._path(source), "rb") as origin, open(self._path(name), "wb") as target:
            fcntl.ioctl(target, FICLONE, origin.fileno())

    def unlink(self, name: str) -> None:  # noqa: D102
        if self.way != MEMMAP:
            os.unlink(self._path(name))

    def write(self, name: str, data: bytes, offset: int) -> None:  # noqa: D102
        with open(self._path(name), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, offset)

    def sync(self) -> None:  # noqa: D102
        if self.way in KERNEL:
            harness.sync(self.root)

    def mapped(self, name: str, *, writable: bool = False) -> Mapped:  # noqa: D102
        if self.way == MEMMAP:
            array = np.memmap(self._path(name), np.uint64, "r+" if writable else "r")
            return Mapped(array, array.flush, lambda: None)
        with open(self._path(name), "r+b", buffering=0) as file:
            found = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        return Mapped(found, found.flush, found.close)

    def reader(self, name: str) -> closing[Any]:  # noqa: D102
        fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        return closing(_Reader(lambda buffer, offset: os.preadv(fd, [buffer], offset), lambda: os.close(fd)))

    def held(self, names: Sequence[str]) -> int:
        """Return what the page cache holds of the files; tmpfs lies there whole."""
        return sum(map(_cached, {self._path(name) for name in names}))

    def forget(self, name: str) -> None:  # noqa: D102
        if self.way in KERNEL:
            self.sync()
            with open(self._path(name), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _path(self, name: str) -> Path:
        return self.root / (BASE if self.way == MEMMAP else name)


def _cached(path: Path) -> int:
    """Return how many bytes of a file the page cache holds."""
    array = np.memmap(path, np.uint8, "r")
    found = np.empty(-(-array.nbytes // PAGE), np.uint8)
    if ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), ctypes.c_void_p(found.ctypes.data)
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return int(np.count_nonzero(found & 1)) * PAGE


def read_all(words: Words) -> None:
    """Read every byte."""
    np.add.reduce(words)


def touch(words: Words) -> None:
    """Read a word in each page."""
    np.add.reduce(words[:: PAGE // 8])


def buffer_of(size: int = 1024 * KiB) -> NDArray[np.uint8]:
    """Return memory to read into, touched already."""
    return np.ones(size, np.uint8)
