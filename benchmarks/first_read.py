"""How fast is the first read through a mapping of a fresh clone?

A clone is made, mapped and read once; the limit is a fresh shared mapping of a file of the same size on tmpfs. The
content is in memory in both cases, so the time goes into page faults: of one word in each page, or of every byte.
Mapping is part of the time, cloning and unmapping are not. All of it on pages of 4 KiB, as /dev/shm has them by default, and on
a tmpfs mounted with huge pages, where pool and peer take translations of 2 MiB.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Reach, Row

REACH, HUGE_REACH = Reach("ratio", "at least", 0.9), Reach("ratio", "at least", 2)

Words = NDArray[np.uint64]
Read = Callable[[Words], object]


def measure(quick: bool) -> list[Row]:
    size = (16 if quick else 256) * MiB
    rounds = 4 if quick else 30
    rows = []
    with ExitStack() as places:
        huge = places.enter_context(harness.huge_tmpfs(3 * size + 64 * MiB))
        small = Place(places, places.enter_context(harness.folder()), size)
        large = Place(places, huge.root, size) if huge.root else None
        for how, read in (("a word in each page", touch), ("every byte", np.add.reduce)):
            ours, theirs, ours_large, theirs_large = harness.alternate(
                rounds,
                partial(of_clone, small.fs, read),
                partial(of_file, small.file, read),
                partial(of_clone, large.fs, read) if large else None,
                partial(of_file, large.file, read) if large else None,
            )
            question = f"first mapped read of a fresh clone, {how}"
            peer = "first read of a shared mapping of a tmpfs file"
            for label, reach, mine, against, other, missing in (
                (question, REACH, ours, theirs, peer, ""),
                (f"{question}, 2 MiB pages", REACH, ours_large, theirs_large, f"{peer}, 2 MiB pages", huge.missing),
                (f"{question}, 2 MiB pages", HUGE_REACH, ours_large, ours, "the same, 4 KiB pages", huge.missing),
            ):
                rows.append(
                    harness.row(
                        label,
                        other,
                        harness.speed(size, mine),
                        harness.speed(size, against),
                        "GB/s",
                        reach=reach,
                        note=harness.spread(1e-6, ours_ms=mine, against_ms=against),
                        skipped=missing,
                    )
                )
    return rows


class Place:
    """A pool and a file of the host beside it, of the same content."""

    def __init__(self, places: ExitStack, folder: Path, size: int) -> None:
        self.file = folder / "file"
        harness.write_random(self.file, size)
        self.fs = places.enter_context(harness.open_pool(2 * size + 64 * MiB, folder))
        self.fs.put(self.file, "/base")


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
