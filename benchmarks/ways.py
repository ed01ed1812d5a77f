"""The ways to keep a file and its clones that comparisons set side by side: onecopy's policies, and the kernel's.

Every way offers the same few operations, so that a comparison is written once. What this build of onecopy or this
machine can't do is a way as well: one whose `missing` says why.
"""

from __future__ import annotations

import ctypes
import fcntl
import inspect
import mmap
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

import onecopy
from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.clone import FICLONE
from onecopy.benchmarks.harness import KiB, MiB, SkippedError
from onecopy.benchmarks.memory import run_time_bytes

DAX, SHARED, PER_INODE = POLICIES = ("dax", "shared", "per-inode")
XFS, BTRFS = KERNEL = ("XFS", "Btrfs")
COPIES = "tmpfs copies"
MEMMAP = "numpy.memmap"
BASE = "base"
TREES = 64 * MiB  # of a pool, beside files' pages
KERNEL_TREES = 384 * MiB  # of a kernel file system; mkfs.xfs asks for 300 MiB at least

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


@dataclass(frozen=True)
class Way:
    """A place for files of one kind; it can be sent to other processes."""

    name: str
    place: str = ""
    missing: str = ""  # why this way can't be tried here; "" when it can

    @contextmanager
    def open(self, mode: Literal["r", "r+"] = "r+") -> Iterator[Files]:
        """Open it in this process."""
        if self.name not in POLICIES:
            yield HostFiles(Path(self.place), self.name)
            return
        with _open(self.place, self.name, mode) as fs:
            yield PoolFiles(fs)


def _open(place: str, policy: str, mode: str) -> FileSystem:
    if policy == DAX:
        return onecopy.open(place, mode)
    return cast(FileSystem, cast(Any, onecopy.open)(place, mode, policy=policy))


@cache
def policies() -> dict[str, str]:
    """Return each policy, and why this build of onecopy can't do it: "" when it can."""
    found = {DAX: ""}
    for policy in POLICIES[1:]:
        if "policy" not in inspect.signature(onecopy.open).parameters:
            found[policy] = f"this build of onecopy has no policy {policy!r}"
            continue
        try:
            with harness.new_pool(TREES, **_cached_pool(4 * MiB)) as path, _open(path, policy, "r+"):
                found[policy] = ""
        except (OSError, TypeError, ValueError) as error:
            found[policy] = f"this build of onecopy can't open a pool with policy {policy!r}: {error}"
    return found


def _cached_pool(limit: int) -> dict[str, object]:
    return {"device": "cached", "cache_size": limit}


@contextmanager
def place(name: str, room: int, cache_size: int | None = None) -> Iterator[Way]:
    """Make a place with `room` bytes for files, gone afterwards; a buffer cache has `cache_size`, or room for all."""
    with ExitStack() as made:
        if name in POLICIES:
            try:
                if missing := policies()[name]:
                    raise SkippedError(missing)
                harness.require_memory(room * (1 if name == DAX else 2))
                options = {} if name == DAX else _cached_pool(cache_size or room + TREES)
                yield Way(name, made.enter_context(harness.new_pool(room + TREES, **options)))
            except SkippedError as reason:
                yield Way(name, missing=str(reason))
        elif name in KERNEL:
            kind: Literal["xfs", "btrfs"] = "xfs" if name == XFS else "btrfs"
            kernel = made.enter_context(harness.kernel_filesystem(kind, room + KERNEL_TREES))
            yield Way(name, str(kernel.root or ""), kernel.missing)
        else:
            try:
                harness.require_memory(room)
                yield Way(name, str(made.enter_context(harness.folder())))
            except SkippedError as reason:
                yield Way(name, missing=str(reason))


@contextmanager
def side_by_side(names: Sequence[str], room: int, base: int, cache_size: int | None = None) -> Iterator[dict[str, Way]]:
    """Make places for several ways, each with a file `base` of so many random bytes, the same in all."""
    with ExitStack() as made:
        host = made.enter_context(harness.folder())
        harness.write_random(host / BASE, base)
        found = {name: made.enter_context(place(name, room, cache_size)) for name in names}
        for way in found.values():
            if not way.missing:
                with way.open() as files:
                    files.put(host / BASE, BASE)
                    files.forget(BASE)
        yield found


@contextmanager
def opened(found: dict[str, Way]) -> Iterator[dict[str, Files]]:
    """Open all ways that can be tried."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(way.open()) for name, way in found.items() if not way.missing}


def missing(found: dict[str, Way]) -> dict[str, str]:
    """Return each way's reason for not being tried, "" for the others."""
    return {name: way.missing for name, way in found.items()}


def read_all(words: Words) -> None:
    """Read every byte."""
    np.add.reduce(words)


def touch(words: Words) -> None:
    """Read a word in each page."""
    np.add.reduce(words[:: PAGE // 8])


def buffer_of(size: int = 1024 * KiB) -> NDArray[np.uint8]:
    """Return memory to read into, touched already."""
    return np.ones(size, np.uint8)
