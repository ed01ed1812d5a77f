"""What does a first store cost when other processes map the page, too?

Before a store to a shared page returns, every process that maps the file must map the copy. A fresh clone is mapped and
one word stored to each granule, in random order, every store timed alone, while so many idle processes map and have read
the same file. Processes that have the pool open and do not map the file are not to be woken.
"""

from __future__ import annotations

import statistics
from functools import partial
from time import perf_counter_ns

import numpy as np

import onecopy
from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.first_store import GRANULE
from onecopy.benchmarks.harness import MiB, Row
from onecopy.benchmarks.stores import STORED, random_pages
from onecopy.benchmarks.workers import Pipe, ask, workers


def measure(quick: bool) -> list[Row]:
    size, rounds = (4 * MiB, 2) if quick else (64 * MiB, 4)
    mapping = (0, 1, 2) if quick else (0, 1, 8, 64)
    bystanders = min(8, mapping[-1])
    with harness.new_pool(4 * size + 64 * MiB) as pool, harness.folder() as host:
        harness.write_random(host / "file", size)
        with onecopy.open(pool) as fs, workers(peer, [(pool,)] * mapping[-1]) as pipes:
            fs.put(host / "file", "/base")
            times = harness.alternate(
                rounds,
                *(partial(of_stores, fs, pipes[:count], "/clone") for count in mapping),
                partial(of_stores, fs, pipes[:bystanders], ""),
            )
            known = fs.info()
    settings = [f"{count} processes that map the page" for count in mapping]
    settings.append(f"{bystanders} processes that have the pool open and do not map the file")
    rows = []
    for figure in (median, late):
        rows += [
            harness.row(
                f"first store next to {setting}: {'median' if figure is median else '99th percentile'}",
                "" if found is times[0] else "the same next to no process",
                harness.scaled(figure(found), 1e-3),
                None if found is times[0] else harness.scaled(figure(times[0]), 1e-3),
                "us",
                note=harness.spread(1e-3, ours=found),
            )
            for setting, found in zip(settings, times, strict=True)
        ]
    rows.append(
        harness.row(
            "shootdowns of all these, by the pool's own count: median",
            "",
            known.shootdown_median_us,
            None,
            "us",
            note=f"99th percentile {harness.figure(known.shootdown_p99_us)} us of {known.shootdowns:,}",
        )
    )
    return rows


def median(times: list[int]) -> float:
    """Return the median."""
    return statistics.median(times)


def late(times: list[int]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(times, n=100, method="inclusive")[98]


def of_stores(fs: FileSystem, pipes: list[Pipe], path: str) -> list[int]:
    """Make a clone and have the others map `path`; return how long each first store to a granule took."""
    fs.clone("/base", "/clone")
    ask(pipes, path)
    times = []
    with fs.map("/clone", mode="r+", granule=GRANULE) as mapping, memoryview(mapping) as view, view.cast("Q") as words:
        step = GRANULE * PAGE // 8
        for granule in random_pages(len(words) // step, len(words) // step).tolist():
            start = perf_counter_ns()
            words[granule * step] = STORED
            times.append(perf_counter_ns() - start)
    if wrong := sum(ask(pipes, len(times))):
        raise ValueError(f"other processes do not see {wrong} stores that had returned")
    fs.unlink("/clone")
    fs.sync()
    return times


def peer(pipe: Pipe, pool: str) -> None:
    """Be another process: open the pool, map and read the file that is named, look at it again and let go when told."""
    while True:
        path = pipe.recv()
        with onecopy.open(pool, "r") as fs:
            missed = 0
            if path:
                with fs.map(path) as mapping:
                    read(mapping)
                    pipe.send("ready")
                    expected = pipe.recv()
                    missed = expected - read(mapping)
            else:
                pipe.send("ready")
                pipe.recv()
        pipe.send(missed)


def read(mapping: onecopy.Mapping) -> int:
    """Read a word in each page; return how many are what the benchmark stores."""
    return int(np.count_nonzero(np.frombuffer(memoryview(mapping), np.uint64)[:: PAGE // 8] == STORED))


if __name__ == "__main__":
    harness.main(measure)
