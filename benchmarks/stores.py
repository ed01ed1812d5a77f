"""What do stores to a mapped clone cost, made durable, next to the kernel's own reflinks?

A clone of 256 MiB is made, mapped and read; then one word is stored to each of so many random pages, and the mapping is
synced. On XFS and Btrfs the same is done through a shared mapping of a reflinked file, and msync. Only stores and sync
are timed, with all content in memory. Pool and peers lie in /dev/shm. The two counts differ in how many stores find that the
granule around their page has been copied already.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from functools import partial
from pathlib import Path
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

import onecopy
from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.clone import FICLONE
from onecopy.benchmarks.harness import GiB, MiB, Reach, Row

REACH = Reach("ratio", "at most", 0.5)
STORED = 0x5EED_5EED_5EED_5EED

Words = NDArray[np.uint64]
Indexes = NDArray[np.intp]


def measure(quick: bool) -> list[Row]:
    size, rounds = (32 * MiB, 2) if quick else (256 * MiB, 10)
    with (
        harness.open_pool(4 * size + 64 * MiB) as fs,
        harness.kernel_filesystem("xfs", GiB) as xfs,
        harness.kernel_filesystem("btrfs", GiB) as btrfs,
        harness.folder() as host,
    ):
        harness.write_random(host / "file", size)
        fs.put(host / "file", "/base")
        for root in filter(None, (xfs.root, btrfs.root)):
            (root / "base").write_bytes((host / "file").read_bytes())
            harness.sync(root)
        rows = []
        for share in (64, 8):
            pages = random_pages(size // PAGE, size // PAGE // share)
            parts: list[list[int]] = [[] for _ in range(4)]
            ours, *theirs = harness.alternate(
                rounds,
                partial(of_pool, fs, pages, parts[0], parts[3]),
                partial(of_kernel, xfs.root, pages, parts[1]) if xfs.root else None,
                partial(of_kernel, btrfs.root, pages, parts[2]) if btrfs.root else None,
            )
            each = 1e-3 / len(pages)
            copied = f"{(harness.median(parts[3]) or 0) / len(pages):.3g} pages copied for each"
            for kind, kernel, times, stores in (("XFS", xfs, theirs[0], parts[1]), ("Btrfs", btrfs, theirs[1], parts[2])):
                rows.append(
                    harness.row(
                        f"store to {len(pages):,} random pages of a clone of {onecopy.format_size(size)}, then sync, per page",
                        f"reflink on {kind}, mapped, and msync",
                        harness.scaled(harness.median(ours), each),
                        harness.scaled(harness.median(times), each),
                        "us",
                        reach=REACH,
                        note=f"{copied}; {split(each, ours=parts[0], against=stores)}; "
                        + harness.spread(each, ours=ours, against=times),
                        skipped=kernel.missing,
                    )
                )
    return rows


def split(factor: float, **stores: list[int]) -> str:
    """Return how much of the times the stores alone took, for a row's note."""
    medians = {name: harness.median(times) for name, times in stores.items()}
    return "stores alone: " + ", ".join(f"{name} {found * factor:.3g}" for name, found in medians.items() if found)


def random_pages(pages: int, count: int) -> Indexes:
    """Return so many different pages, in random order; the same at each call."""
    return np.random.default_rng(0).permutation(pages)[:count]


def store(pages: Indexes, words: Words) -> None:
    """Store one word to each of the pages, in that order."""
    words[pages * (PAGE // 8)] = STORED


def read(words: Words) -> None:
    """Read a word in each page."""
    np.add.reduce(words[:: PAGE // 8])


def of_pool(fs: FileSystem, pages: Indexes, stores: list[int], copied: list[int]) -> list[int]:
    """Clone, map and read, store and sync; return how long the last two took, add how long the first of them and its copies."""
    fs.clone("/base", "/clone")
    fs.sync()
    with fs.map("/clone", mode="r+") as mapping:
        before = mapping.pfns
        read(np.frombuffer(memoryview(mapping), np.uint64))
        start = perf_counter_ns()
        store(pages, np.frombuffer(memoryview(mapping), np.uint64))
        stored = perf_counter_ns()
        mapping.sync()
        took = perf_counter_ns() - start
        stores.append(stored - start)
        copied.append(int(np.count_nonzero(before != mapping.pfns)))
        if copied[-1] < len(pages):
            raise ValueError("pages that were stored to are still the origin's")
    fs.unlink("/clone")
    fs.sync()
    return [took]


def of_kernel(root: Path, pages: Indexes, stores: list[int]) -> list[int]:
    """Do the same on a kernel file system."""
    with open(root / "base", "rb") as source, open(root / "clone", "w+b", buffering=0) as target:
        fcntl.ioctl(target, FICLONE, source.fileno())
        harness.sync(root)
        with mmap.mmap(target.fileno(), 0) as mapping:
            read(np.frombuffer(mapping, np.uint64))
            start = perf_counter_ns()
            store(pages, np.frombuffer(mapping, np.uint64))
            stored = perf_counter_ns()
            mapping.flush()
            took = perf_counter_ns() - start
            stores.append(stored - start)
    os.unlink(root / "clone")
    harness.sync(root)
    return [took]


if __name__ == "__main__":
    harness.main(measure)
