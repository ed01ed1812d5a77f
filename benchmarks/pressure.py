"""What throughput is left when the working set is twice the cache?

A process reads whole pages of a file twice as large as the memory it may cache it in: in sequence and over again (scan),
by popularity (zipf: page of rank r with weight 1/r, ranks shuffled), and both by turns, 64 pages at a time (mixed); through a
mapping, and through `read`. Each round reads as many pages as the file has, other ones by the same rule; the first round is
not measured, so that the cache is in its steady state. Nothing is written.

A pool's buffer cache has that limit of its own (`cache_size`). On the kernel's file systems the process is put into a
control group whose memory, page cache included, is limited to as much (memory.max) beyond what it has when it starts, and
says MADV_RANDOM for zipf and mixed, which spares it reads of what is not asked for. The policy dax has no cache: the pool is
the memory, so that its figures show what no limit costs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter_ns

import numpy as np

import onecopy
from onecopy import PAGE
from onecopy.benchmarks import comparison, limits, ways
from onecopy.benchmarks.comparison import Comparison, Line, Panel
from onecopy.benchmarks.files import BASE, KERNEL, buffer_of
from onecopy.benchmarks.harness import MiB, Row, SkippedError
from onecopy.benchmarks.stores import Indexes
from onecopy.benchmarks.ways import Way
from onecopy.benchmarks.workers import Pipe, ask, workers

NAMES = (*ways.POLICIES, *KERNEL)
CASES = ("scan", "zipf", "mixed")
DOORS = {"mapping": "Reads through a mapping", "read": "Reads through read()"}
BATCH = 64  # pages


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    cache, rounds = (4 * MiB, 2) if quick else (32 * MiB, 5)
    size, machine = 2 * cache, comparison.machine()
    lines: dict[str, list[Line]] = {door: [] for door in DOORS}
    for name in NAMES:
        for door, line in _of_way(name, cache, size, rounds).items():
            lines[door].append(line)
    panels = [Panel(title, "GB/s", CASES, lines[door], better="more") for door, title in DOORS.items()]
    return Comparison(
        "pressure",
        "What throughput is left when the working set is twice the cache?",
        _answer(panels[0]),
        f"a file of {onecopy.format_size(size)}, a limit of {onecopy.format_size(cache)}, "
        f"{onecopy.format_size(size)} read in each of {rounds} rounds",
        panels,
        quick=quick,
        machine=machine,
    )


def _answer(panel: Panel) -> str:
    said = [
        f"{case}: " + ", ".join(f"{line.way} {comparison.figure(line.values[at])}" for line in panel.lines if line.values[at])
        for at, case in enumerate(CASES)
    ]
    return f"Through a mapping, in GB/s. {'; '.join(said)}."


def _of_way(name: str, cache: int, size: int, rounds: int) -> dict[str, Line]:
    """Return a way's line for each door, measured in a process of its own."""
    try:
        with ExitStack() as made:
            group = made.enter_context(limits.group()) if name in KERNEL else None
            way = made.enter_context(ways.side_by_side([name], size, size, cache))[name]
            if way.missing:
                raise SkippedError(way.missing)
            return {door: _of_door(way, door, group, cache, rounds) for door in DOORS}
    except SkippedError as reason:
        return {door: comparison.line(name, CASES, {}, float, str(reason)) for door in DOORS}


def _of_door(way: Way, door: str, group: limits.Group | None, cache: int, rounds: int) -> Line:
    samples: comparison.Samples | str = {}
    skipped = ""
    try:
        with workers(reading, [(way, door, group, cache, rounds)]) as pipes:
            samples = ask(pipes, "go")[0]
    except ChildProcessError:  # out of memory, or a mapping that the cache has no room for
        skipped = f"{door}: the process that read did not survive the limit"
    if isinstance(samples, str):
        samples, skipped = {}, f"{door}: {samples}"
    return comparison.line(way.name, CASES, samples, float, skipped)


def reading(pipe: Pipe, way: Way, door: str, group: limits.Group | None, cache: int, rounds: int) -> None:
    """Be the process that reads; tells its speeds in GB/s, or in a word why there are none."""
    pipe.recv()
    if group:
        group.join()
    try:
        with way.open("r") as files, ExitStack() as held:
            mapped = held.enter_context(files.map(BASE))
            pages = len(mapped.words) * 8 // PAGE
            orders = {case: [order(case, pages, turn) for turn in range(rounds + 1)] for case in CASES}
            room = buffer_of(BATCH * PAGE)
            if door == "mapping":

                def work(some: Indexes) -> None:
                    np.take(mapped.words.reshape(pages, -1), some, axis=0, out=into, mode="clip")

                into = room.view(np.uint64).reshape(BATCH, -1)
            else:
                file, buffer = held.enter_context(files.reader(BASE)), room.data[:PAGE]

                def work(some: Indexes) -> None:
                    for page in some.tolist():
                        file.read(buffer, page * PAGE)

            if group:
                group.limit(cache)
            found = {}
            for case, some in orders.items():
                if case != "scan":
                    mapped.expect_random()
                found[case] = [speed(work, one) for one in some][1:]
    except OSError as error:
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send(found)


def speed(work: Callable[[Indexes], None], pages: Indexes) -> float:
    """Read these pages; return how fast that was, in GB/s."""
    start = perf_counter_ns()
    for at in range(0, len(pages), BATCH):
        work(pages[at : at + BATCH])
    return len(pages) * PAGE / (perf_counter_ns() - start)


def order(case: str, pages: int, turn: int) -> Indexes:
    """Return which pages are read, in order: as many reads as there are pages, in whole batches; others at each turn."""
    random = np.random.default_rng(turn)
    scan = np.arange(pages)
    if case == "scan":
        return scan
    weights = 1 / np.arange(1, pages + 1)
    zipf = np.random.default_rng(pages).permutation(pages)[random.choice(pages, pages, p=weights / weights.sum())]
    if case == "zipf":
        return zipf
    mixed = np.stack([scan[: pages // 2].reshape(-1, BATCH), zipf[: pages // 2].reshape(-1, BATCH)], axis=1)
    return mixed.ravel()


if __name__ == "__main__":
    comparison.main(compare)
