"""What does it cost to map a file in many extents?

Each run of frames is a mapping of its own in the kernel (a VMA), so the time grows with the runs; reported per VMA.
Unmapping is measured apart.
"""

from __future__ import annotations

import os
from time import perf_counter_ns

import numpy as np

from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Row

EXTENTS = 10_000


def measure(quick: bool) -> list[Row]:
    extents = EXTENTS // 10 if quick else EXTENTS
    data = os.urandom(extents * PAGE)
    with harness.open_pool(256 * MiB) as fs:
        fs.write("/one", data)
        fs.write("/origin", data)
        fs.clone("/origin", "/many")
        for page in range(0, extents, 2):
            fs.write("/many", os.urandom(PAGE), page * PAGE)
        unmapping: list[int] = []
        many, one = harness.alternate(
            4 if quick else 30, lambda: [mapped(fs, "/many", unmapping)], lambda: [mapped(fs, "/one", [])]
        )
        with fs.map("/many") as mapping:
            areas = 1 + int((np.diff(mapping.pfns.astype(np.int64)) != 1).sum())
    each = [((harness.median(times) or 0) * 1e-3 / areas) for times in (many, unmapping)]
    return [
        harness.row(
            f"mapping of a file of {areas:,} extents",
            "mapping of a file of one extent",
            harness.scaled(harness.median(many), 1e-3),
            harness.scaled(harness.median(one), 1e-3),
            "us",
            note=harness.spread(1e-3, ours=many, against=one),
        ),
        harness.row("the same for each VMA", "", each[0], None, "us", note=f"{each[1]:.3g} us to unmap it"),
    ]


def mapped(fs: FileSystem, path: str, unmapping: list[int]) -> int:
    """Map a file; return how long that took, and add how long unmapping did."""
    start = perf_counter_ns()
    mapping = fs.map(path)
    ready = perf_counter_ns()
    mapping.close()
    unmapping.append(perf_counter_ns() - ready)
    return ready - start


if __name__ == "__main__":
    harness.main(measure)
