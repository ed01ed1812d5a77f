"""What does the first store to a page of a mapped clone cost, next to the kernel's private copy-on-write?

A fresh clone is mapped and stored to, without a sync. The peer does the same to a private mapping of a file on tmpfs,
whose pages the kernel copies one by one, for this process alone and until it ends. Both origins are in memory; cloning and
mapping are not part of the time. One page is copied at a store (granule=1), or the 16 around it: this pays as soon as the
neighbours are stored to as well.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import KiB, MiB, Reach, Row
from onecopy.benchmarks.stores import STORED, Indexes, Words, random_pages, store

GRANULE = 16
ALONE = Reach("ratio", "at most", 5)
TOGETHER = Reach("ratio", "at most", 1)

Store = Callable[[Words], object]


def measure(quick: bool) -> list[Row]:
    size, rounds = (32 * MiB, 2) if quick else (256 * MiB, 10)
    pages = size // PAGE
    scattered, blocks, all_pages = random_pages(pages, pages // 16), random_blocks(pages, pages // 8), np.arange(pages)
    rows = []
    with harness.open_pool(4 * size + 64 * MiB) as fs, harness.folder() as host:
        harness.write_random(host / "file", size)
        fs.put(host / "file", "/base")
        for work, stored, granule, run, reach in (
            ("random pages, granule=1", scattered, 1, store, ALONE),
            ("random pages", scattered, None, store, None),
            (f"random blocks of {GRANULE * PAGE // KiB} KiB, all their pages", blocks, GRANULE, store, TOGETHER),
            ("all pages in turn, a word in each", all_pages, None, store, TOGETHER),
            ("all pages in turn, every byte", all_pages, None, fill, TOGETHER),
        ):
            copied: list[int] = []
            ours, theirs = harness.alternate(
                rounds,
                partial(of_clone, fs, partial(run, stored), granule, copied),
                partial(of_file, host / "file", partial(run, stored)),
            )
            each = 1e-3 / len(stored)
            rows.append(
                harness.row(
                    f"first store to {work}: per page",
                    "the kernel's copy-on-write of a private mapping",
                    harness.scaled(harness.median(ours), each),
                    harness.scaled(harness.median(theirs), each),
                    "us",
                    reach=reach,
                    note=f"{len(stored):,} pages, {(harness.median(copied) or 0) / len(stored):.3g} copied for each; "
                    + harness.spread(each, ours=ours, against=theirs),
                )
            )
    return rows


def random_blocks(pages: int, count: int) -> Indexes:
    """Return so many different pages: whole granules in random order, their pages in turn."""
    return (random_pages(pages // GRANULE, count // GRANULE)[:, np.newaxis] * GRANULE + np.arange(GRANULE)).ravel()


def fill(_: Indexes, words: Words) -> None:
    """Store to every byte."""
    words.fill(STORED)


def of_clone(fs: FileSystem, run: Store, granule: int | None, copied: list[int]) -> list[int]:
    """Clone, map and store; return how long the last took."""
    fs.clone("/base", "/clone")
    with fs.map("/clone", mode="r+", granule=granule) as mapping:
        before = mapping.pfns
        start = perf_counter_ns()
        run(np.frombuffer(memoryview(mapping), np.uint64))
        took = perf_counter_ns() - start
        copied.append(int(np.count_nonzero(before != mapping.pfns)))
    fs.unlink("/clone")
    fs.sync()
    return [took]


def of_file(path: Path, run: Store) -> list[int]:
    """Map a file privately and store; return how long the latter took."""
    with open(path, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        start = perf_counter_ns()
        run(np.frombuffer(mapping, np.uint64))
        return [perf_counter_ns() - start]


if __name__ == "__main__":
    harness.main(measure)
