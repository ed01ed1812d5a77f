"""What grows with the number of clones of a file?

So many clones of a small file are made. Then one more is made, mapped and read whole, and removed, some times over. At
last one process maps and reads all the clones at once, and the memory below is counted, each frame once.
"""

from __future__ import annotations

import onecopy
from onecopy.benchmarks import comparison, growth
from onecopy.benchmarks.comparison import Comparison
from onecopy.benchmarks.files import BASE
from onecopy.benchmarks.growth import Found
from onecopy.benchmarks.harness import MiB, Row
from onecopy.benchmarks.ways import Way

SIZE = 4 * MiB


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    return growth.compare(
        "by_clones",
        "What grows with the number of clones of a file?",
        "clones",
        growth.steps_of(quick, (1, 4), (1, 4, 16, 64, 256)),
        step,
        3 if quick else 20,
        f"a file of {onecopy.format_size(SIZE)}",
        quick,
        room=lambda clones: int(clones + 3) * SIZE,
        base=lambda _: SIZE,
    )


def step(way: Way, clones: float, rounds: int) -> Found:
    """Measure with so many clones there."""
    names = [f"clone-{number}" for number in range(int(clones))]
    with way.open() as files:
        for name in names:
            files.clone(BASE, name)
        files.sync()
        found = growth.cycles(files, BASE, rounds)
        return growth.together(found, {"memory": [growth.memory_of(files, names)]})


if __name__ == "__main__":
    comparison.main(compare)
