"""How long does opening a pool take?

A pool that holds a million extents and an empty one of the same size: opened while the run-time file of the last use
is there, and opened when it is gone, as after a reboot, so that it is rebuilt from the trees.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter_ns

import onecopy
from onecopy import PAGE
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Row

FILES, EXTENTS = 100, 10_000  # in each file


def measure(quick: bool) -> list[Row]:
    files, rounds = (2, 2) if quick else (FILES, 6)
    work = f"open of a pool with {files * EXTENTS:,} extents"
    peer = "open of an empty pool"
    size = files * EXTENTS * PAGE + 256 * MiB
    try:
        harness.require_memory(size)
    except harness.SkippedError as reason:
        return [harness.row(work, peer, None, None, "ms", skipped=str(reason))]
    with harness.new_pool(size) as full, harness.new_pool(size) as empty:
        fill(full, files)
        clean = harness.alternate(rounds, lambda: [opened(full)], lambda: [opened(empty)])
        rebuilt = harness.alternate(rounds, lambda: [opened_anew(full)], lambda: [opened_anew(empty)])
    return [
        harness.row(
            f"{work}, {state}",
            peer,
            harness.scaled(harness.median(ours), 1e-6),
            harness.scaled(harness.median(theirs), 1e-6),
            "ms",
            note=harness.spread(1e-6, ours=ours, against=theirs),
        )
        for state, (ours, theirs) in (("clean", clean), ("its run-time file rebuilt", rebuilt))
    ]


def fill(pool: str, files: int) -> None:
    """Put files into the pool that have data in every other page."""
    with harness.folder() as host, onecopy.open(pool) as fs:
        with open(host / "sparse", "wb", buffering=0) as file:
            page = os.urandom(PAGE)
            for number in range(EXTENTS):
                os.pwrite(file.fileno(), page, 2 * number * PAGE)
        for number in range(files):
            fs.put(host / "sparse", f"/{number}")


def opened(pool: str) -> int:
    """Open and close a pool; return how long the first took."""
    start = perf_counter_ns()
    fs = onecopy.open(pool)
    took = perf_counter_ns() - start
    fs.close()
    return took


def opened_anew(pool: str) -> int:
    """Do the same after the run-time file has been lost."""
    with onecopy.open(pool, "r") as fs:
        uuid = fs.info().uuid
    for file in Path(harness.SHM).glob(f"onecopy-{uuid}-*"):
        file.unlink()
    return opened(pool)


if __name__ == "__main__":
    harness.main(measure)
