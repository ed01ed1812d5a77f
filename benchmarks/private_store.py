"""Are stores to pages that are private already as fast as stores to plain memory?

All pages of a mapped clone are stored to; from then on the hardware does everything. `a += 1` over such a clone stands next
to the same over a numpy array, for which the kernel takes pages of 2 MiB where it may, and over a shared mapping of a file
on tmpfs; and once more right after a sync, which need not make the pages read-only.
"""

from __future__ import annotations

import mmap
from functools import partial

import numpy as np

from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Reach, Row
from onecopy.benchmarks.stores import Words

REACH = Reach("ratio", "at least", 0.95)


def measure(quick: bool) -> list[Row]:
    size, rounds = (32 * MiB, 2) if quick else (256 * MiB, 20)
    with harness.open_pool(3 * size + 64 * MiB) as fs, harness.folder() as host:
        harness.write_random(host / "file", size)
        fs.put(host / "file", "/base")
        fs.clone("/base", "/clone")
        plain = np.fromfile(host / "file", np.uint64)
        with (
            fs.map("/clone", mode="r+") as clone,
            open(host / "file", "r+b", buffering=0) as file,
            mmap.mmap(file.fileno(), 0) as mapped,
        ):

            def after_sync() -> list[int]:
                clone.sync()
                return of_buffer(memoryview(clone))

            for buffer in (memoryview(clone), memoryview(mapped)):  # here are the faults, and the copies
                of_buffer(buffer)
                buffer.release()
            ours, array, shared, synced = harness.alternate(
                rounds,
                lambda: of_buffer(memoryview(clone)),
                partial(add, plain),
                lambda: of_buffer(memoryview(mapped)),
                after_sync,
            )
    return [
        harness.row(
            f"a += 1 over private pages{when}",
            peer,
            harness.speed(size, times),
            harness.speed(size, against),
            "GB/s",
            reach=reach,
            note=harness.spread(1e-6, ours_ms=times, against_ms=against),
        )
        for when, times, peer, against, reach in (
            ("", ours, "numpy array", array, REACH),
            ("", ours, "shared mapping of a tmpfs file", shared, None),
            (", right after a sync", synced, "numpy array", array, None),
        )
    ]


def of_buffer(buffer: memoryview) -> list[int]:
    """Add one to every word; return how long that took."""
    return add(np.frombuffer(buffer, np.uint64))


def add(words: Words) -> list[int]:
    """Add one to every word; return how long that took."""
    return [harness.nanoseconds(partial(np.add, words, np.uint64(1), out=words))]


if __name__ == "__main__":
    harness.main(measure)
