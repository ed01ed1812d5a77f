"""What grows with the size of a file?

A clone of a file of that size is made, mapped and read whole, and removed, some times over. At last one process maps and
reads the origin and a clone, and the memory below is counted, each frame once.
"""

from __future__ import annotations

from onecopy.benchmarks import comparison, growth
from onecopy.benchmarks.comparison import Comparison
from onecopy.benchmarks.files import BASE
from onecopy.benchmarks.growth import Found
from onecopy.benchmarks.harness import MiB, Row
from onecopy.benchmarks.ways import Way


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    return growth.compare(
        "by_size",
        "What grows with the size of a file?",
        "MiB",
        growth.steps_of(quick, (1, 4), (1, 4, 16, 64, 256)),
        step,
        3 if quick else 20,
        "a file of random bytes, in one extent where it fits",
        quick,
        room=lambda size: int(size + 1) * 3 * MiB,
        base=lambda size: int(size) * MiB,
    )


def step(way: Way, _: float, rounds: int) -> Found:
    """Measure with the file that is there."""
    with way.open() as files:
        found = growth.cycles(files, BASE, rounds)
        files.clone(BASE, "clone")
        return growth.together(found, {"memory": [growth.memory_of(files, [BASE, "clone"])]})


if __name__ == "__main__":
    comparison.main(compare)
