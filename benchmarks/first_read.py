"""How fast is the first read through a mapping of a fresh clone?

A clone is made, mapped and read once; the limit is a fresh shared mapping of a file of the same size on tmpfs. The
content is in memory in both cases, so the time goes into page faults: of one word in each page, or of every byte.
Mapping is part of the time, cloning and unmapping are not.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Reach, Row

REACH = Reach("ratio", "at least", 0.9)

Words = NDArray[np.uint64]
Read = Callable[[Words], object]


def measure(quick: bool) -> list[Row]:
    size = (16 if quick else 256) * MiB
    rows = []
    with harness.open_pool(2 * size + 64 * MiB) as fs, harness.folder() as host:
        harness.write_random(host / "file", size)
        fs.put(host / "file", "/base")
        for question, read in (
            ("first mapped read of a fresh clone, a word in each page", touch),
            ("first mapped read of a fresh clone, every byte", np.add.reduce),
        ):
            ours, theirs = harness.alternate(
                4 if quick else 30,
                partial(of_clone, fs, read),
                partial(of_file, host / "file", read),
            )
            rows.append(
                harness.row(
                    question,
                    "first read of a shared mapping of a tmpfs file",
                    harness.speed(size, ours),
                    harness.speed(size, theirs),
                    "GB/s",
                    reach=REACH,
                    note=harness.spread(1e-6, ours_ms=ours, against_ms=theirs),
                )
            )
    return rows


def touch(words: Words) -> object:
    """Read the first word of each page."""
    return np.add.reduce(words[:: PAGE // 8])


def of_clone(fs: FileSystem, read: Read) -> list[int]:
    """Clone, map and read; return how long the last two took."""
    fs.clone("/base", "/clone")
    start = perf_counter_ns()
    with fs.map("/clone") as mapping:
        read(np.frombuffer(memoryview(mapping), np.uint64))
        took = perf_counter_ns() - start
    fs.unlink("/clone")
    return [took]


def of_file(path: Path, read: Read) -> list[int]:
    """Map and read a file; return how long that took."""
    with open(path, "r+b", buffering=0) as file:
        start = perf_counter_ns()
        with mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            read(np.frombuffer(mapping, np.uint64))
            return [perf_counter_ns() - start]


if __name__ == "__main__":
    harness.main(measure)
