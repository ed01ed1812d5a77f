"""What grows with the fragmentation of a file?

A clone has every so-manieth page rewritten, which leaves twice as many extents as pages were rewritten. It is cloned,
mapped and read whole, and removed, some times over. At last one process maps and reads the origin, the fragmented file
and its clone, and the memory below is counted, each frame once.
"""

from __future__ import annotations

import os

import onecopy
from onecopy import PAGE
from onecopy.benchmarks import comparison, growth
from onecopy.benchmarks.comparison import Comparison
from onecopy.benchmarks.files import BASE
from onecopy.benchmarks.growth import Found
from onecopy.benchmarks.harness import MiB, Row
from onecopy.benchmarks.ways import Way


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    size = (4 if quick else 32) * MiB
    return growth.compare(
        "by_extents",
        "What grows with the fragmentation of a file?",
        "extents",
        growth.steps_of(quick, (2, 64), (2, 16, 128, 1024, 8192)),
        step,
        3 if quick else 20,
        f"a file of {onecopy.format_size(size)}",
        quick,
        room=lambda _: 4 * size,
        base=lambda _: size,
    )


def step(way: Way, extents: float, rounds: int) -> Found:
    """Measure with a file of so many extents."""
    with way.open() as files:
        with files.map(BASE) as mapped:
            pages = mapped.words.nbytes // PAGE
        files.clone(BASE, "many")
        for page in range(0, pages, 2 * pages // int(extents)):
            files.write("many", os.urandom(PAGE), page * PAGE)
        files.sync()
        found = growth.cycles(files, "many", rounds)
        files.clone("many", "clone")
        return growth.together(found, {"memory": [growth.memory_of(files, [BASE, "many", "clone"])]})


if __name__ == "__main__":
    comparison.main(compare)
