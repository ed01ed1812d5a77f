"""Do processes that store to clones of their own hold each other up?

8 processes map a fresh clone each, and at a word store to every granule of it in random order: all of it first stores. They
stand next to one process that does so alone, in pages copied each millisecond and core, from the first one's start to the
last one's end. The kernel's private mappings of one file are reported as well, every page stored to in the same order, to
show what of the loss is the machine's.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns

import numpy as np

import onecopy
from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.first_store import GRANULE, random_blocks
from onecopy.benchmarks.harness import MiB, Reach, Row
from onecopy.benchmarks.stores import store
from onecopy.benchmarks.workers import Pipe, ask, workers

REACH = Reach("ratio", "at least", 0.8)


def measure(quick: bool) -> list[Row]:
    size, processes, rounds = (16 * MiB, 2, 2) if quick else (256 * MiB, 8, 10)
    cores = len(os.sched_getaffinity(0))
    rows = []
    with harness.new_pool(2 * (processes + 1) * size + 64 * MiB) as pool, harness.folder() as host:
        path = host / "file"
        harness.write_random(path, size)
        with onecopy.open(pool) as fs, workers(storing, [(pool,)] * processes) as pipes:
            fs.put(path, "/base")
            pool_all, pool_one, kernel_all, kernel_one = harness.alternate(
                rounds,
                partial(of_clones, fs, pipes),
                partial(of_clones, fs, pipes[:1]),
                partial(of_stores, pipes, (str(path), False)),
                partial(of_stores, pipes[:1], (str(path), False)),
            )
    share = processes / min(processes, cores)
    for what, together, alone, reach in (
        ("clones", pool_all, pool_one, REACH),
        ("private mappings of the kernel's", kernel_all, kernel_one, None),
    ):
        rows.append(
            harness.row(
                f"{processes} processes storing to {processes} {what}: pages copied per core of {cores}",
                "one process, one of them",
                harness.scaled(harness.speed(size // PAGE, together), share * 1e6),
                harness.scaled(harness.speed(size // PAGE, alone), 1e6),
                "/ms",
                reach=reach,
                note=harness.spread(1e-6, all_ms=together, one_ms=alone),
            )
        )
    return rows


def of_clones(fs: FileSystem, pipes: list[Pipe]) -> list[int]:
    """Have each worker store to a fresh clone; return how long all of it took."""
    paths = [f"/clone-{number}" for number in range(len(pipes))]
    for path in paths:
        fs.clone("/base", path)
    took = of_stores(pipes, *((path, True) for path in paths))
    for path in paths:
        fs.unlink(path)
    fs.sync()
    return took


def of_stores(pipes: list[Pipe], *files: tuple[str, bool]) -> list[int]:
    """Have each worker store to a file; return how long it took from the first one's start to the last one's end."""
    ask(pipes, *files)
    times = ask(pipes, "go")
    ask(pipes, "let go")
    return [max(end for _, end in times) - min(start for start, _ in times)]


def storing(pipe: Pipe, pool: str) -> None:
    """Be one of the processes: map what is named, say so, store when told, say when, let go; and again."""
    with onecopy.open(pool) as fs:
        while True:
            path, ours = pipe.recv()
            with of_pool(fs, path) if ours else privately(path) as view:
                pages = view.nbytes // PAGE
                order = random_blocks(pages, pages)[:: GRANULE if ours else 1]
                pipe.send("ready")
                pipe.recv()
                start = perf_counter_ns()
                store(order, np.frombuffer(view, np.uint64))
                pipe.send((start, perf_counter_ns()))
                pipe.recv()
            pipe.send("let go")


@contextmanager
def of_pool(fs: FileSystem, path: str) -> Iterator[memoryview]:
    """Map a file of the pool."""
    with fs.map(path, mode="r+", granule=GRANULE) as mapping, memoryview(mapping) as view:
        yield view


@contextmanager
def privately(path: str) -> Iterator[memoryview]:
    """Map a file of the kernel's, privately."""
    with (
        open(path, "r+b", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping,
        memoryview(mapping) as view,
    ):
        yield view


if __name__ == "__main__":
    harness.main(measure)
