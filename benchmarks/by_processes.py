"""What grows with the number of processes that work on clones of a file?

Each process maps a clone of its own, reads all of it, and holds it; all at the same time, some times over, with fresh
clones. The times are those of one process, mapping and reading beside the others. The clones are made while the processes
hold those of the round before. At last the memory below all mappings is counted, each frame once. The machine's cores are
what limits the first reads, once there are more processes than cores.
"""

from __future__ import annotations

from contextlib import ExitStack
from time import perf_counter_ns

import onecopy
from onecopy.benchmarks import comparison, growth
from onecopy.benchmarks.comparison import Comparison
from onecopy.benchmarks.files import BASE, read_all
from onecopy.benchmarks.growth import Found
from onecopy.benchmarks.harness import MiB, Row
from onecopy.benchmarks.ways import Way
from onecopy.benchmarks.workers import Pipe, ask, workers
from onecopy.cli import measure as memory

SIZE = 16 * MiB


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    return growth.compare(
        "by_processes",
        "What grows with the number of processes that work on clones of a file?",
        "processes",
        growth.steps_of(quick, (1, 2), (1, 2, 4, 8, 16, 32)),
        step,
        2 if quick else 7,
        f"a file of {onecopy.format_size(SIZE)}, one clone for each process",
        quick,
        room=lambda processes: int(2 * processes + 2) * SIZE,
        base=lambda _: SIZE,
    )


def step(way: Way, processes: float, rounds: int) -> Found:
    """Measure with so many processes."""
    found: Found = {"clone": [], "map": [], "read": []}
    with way.open() as files, workers(working, [(way,)] * int(processes)) as pipes:
        before: list[str] = []
        for turn in range(rounds + 1):
            names = [f"clone-{turn}-{number}" for number in range(len(pipes))]
            for name in names:
                start = perf_counter_ns()
                files.clone(BASE, name)
                found["clone"].append(perf_counter_ns() - start)
            files.sync()
            ask(pipes, "let go")
            for mapped, read in ask(pipes, *names):
                found["map"].append(mapped)
                found["read"].append(read)
            for name in before:
                files.unlink(name)
            before = names
        last = growth.taken(ask(pipes, "measure"))
    unmeasured = len(pipes)
    return growth.together({part: took[unmeasured:] for part, took in found.items()}, {"memory": [last]})


def working(pipe: Pipe, way: Way) -> None:
    """Be one of the processes: map and read what is named, hold it until told to let go; measure when told."""
    with way.open("r") as files, ExitStack() as held:
        ranges: list[memory.Range] = []
        while True:
            told = pipe.recv()
            if told == "let go":
                held.close()
                pipe.send("let go")
            elif told == "measure":
                pipe.send(memory.measure(ranges))
            else:
                start = perf_counter_ns()
                one = held.enter_context(files.map(told))
                mapped = perf_counter_ns()
                read_all(one.words)
                pipe.send((mapped - start, perf_counter_ns() - mapped))
                ranges = [one.range]


if __name__ == "__main__":
    comparison.main(compare)
