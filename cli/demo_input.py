"""What the demo copies: a tree of files and one large array, by default from what every machine with Python has."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onecopy.cli.measure import PAGE

ARRAY = "array"
TREE = "tree"
# Installed packages aren't the standard library, and byte code comes and goes while Python runs.
LEFT_OUT = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class File:
    """One file of the input: its name below a clone's directory, its original, its size in bytes, its SHA-256."""

    name: str
    original: str
    size: int
    digest: bytes

    @property
    def pages(self) -> int:
        """How many pages hold the file."""
        return -(-self.size // PAGE)


@dataclass(frozen=True)
class Input:
    """An array file, a tree, or both; and every file's hash, taken from the originals before anything is cloned."""

    origin: str  # what the user would call it
    array: str | None
    tree: str | None
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """The files' bytes."""
        return sum(file.size for file in self.files)

    @property
    def footprint(self) -> int:
        """Bytes of memory that hold the files' pages once."""
        return sum(file.pages for file in self.files) * PAGE


def default_input(scratch: Path, array_size: int) -> Input:
    """Copy the running Python's standard library into `scratch`, and derive an array of `array_size` bytes from it.

    Raises FileNotFoundError when Python has no library folder (an embedded one), and what reading and writing raise.
    """
    library = sysconfig.get_path("stdlib")
    tree, array = scratch / TREE, scratch / f"{ARRAY}.npy"
    shutil.copytree(library, tree, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    _derive_array(array, array_size, str(tree))
    return _taken(library, str(array), str(tree))


def named_input(path: str) -> Input:
    """Take what the user names: a file as the array, a directory as the tree.

    Raises FileNotFoundError, PermissionError, and OSError (ENODATA) when it holds no byte.
    """
    is_tree = os.path.isdir(path)
    taken = _taken(path, None if is_tree else path, path if is_tree else None)
    if not taken.size:
        raise OSError(errno.ENODATA, "there is no byte in it to clone; name another file or tree", path)
    return taken


def _taken(origin: str, array: str | None, tree: str | None) -> Input:
    files = []
    if array is not None:
        files.append(_file(ARRAY, array))
    if tree is not None:
        files += [_file(f"{TREE}/{os.path.relpath(path, tree)}", path) for path in _regular_files(tree)]
    return Input(origin, array, tree, tuple(files))


def _file(name: str, path: str) -> File:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return File(name, path, file.tell(), digest)


def _regular_files(directory: str) -> Iterator[str]:
    """Yield the regular files below a directory, in a fixed order; symbolic links are not followed."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _regular_files(entry.path)
        elif entry.is_file(follow_symlinks=False):
            yield entry.path


def _derive_array(path: Path, size: int, library: str) -> None:
    """Write an array of 32-bit integers: the running total, modulo 2**32, of the bytes of real files.

    The total makes pages differ even where the files repeat; nothing is random, so each run gives the same array.
    """
    count = -(-size // 4)
    total = np.uint32(0)
    with open(path, "wb") as array:
        np.lib.format.write_array_header_1_0(array, {"descr": "<u4", "fortran_order": False, "shape": (count,)})
        for source in itertools.cycle(_byte_sources(library)):
            content = np.fromfile(source, np.uint8, count)
            totals = np.cumsum(content, dtype="<u4") + total
            array.write(totals.data)
            total = totals[-1] if totals.size else total
            count -= totals.size
            if not count:
                break


def _byte_sources(library: str) -> Iterator[str]:
    """Yield the standard library's files, then the shared libraries installed beside them."""
    yield from _regular_files(library)
    for prefix in sorted({sys.base_prefix, sys.prefix}):
        yield from map(str, sorted(path for path in Path(prefix).rglob("*.so*") if path.is_file()))
