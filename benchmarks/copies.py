"""How much memory do clones take that as many processes map and read?

Every process maps one clone and reads every byte of it; more and more of them hold what they have mapped. Counted are
the frames of physical memory below all these mappings, one that several processes map counted once (/proc/self/pagemap;
where that is hidden, Pss), and what holds the content, mapped or not: of a pool all that it and its run-time file
occupy; of a buffer cache what it holds, the origin's pages included; of the kernel's file systems the clones' pages in
the page cache (mincore). The unit is one copy of the file. What trees and a run-time file take, about a MiB, shows in
the second figure because the file is small. Page tables are left out: each process has its own, whatever it maps.

Next to onecopy's policies stand the kernel's reflinks (FICLONE) on XFS and Btrfs, plain copies on tmpfs, and what costs
least because it can't be changed apart: all processes map the same tmpfs file with numpy.memmap.
"""

from __future__ import annotations

from dataclasses import replace

import onecopy
from onecopy.benchmarks import comparison, harness, ways
from onecopy.benchmarks.comparison import Comparison, Line, Panel
from onecopy.benchmarks.files import BASE, COPIES, KERNEL, MEMMAP
from onecopy.benchmarks.harness import MiB, Reach, Row
from onecopy.benchmarks.memory import checksum
from onecopy.benchmarks.ways import Way
from onecopy.benchmarks.workers import Pipe, ask, workers
from onecopy.cli import measure as memory

NAMES = (*ways.POLICIES, *KERNEL, COPIES, MEMMAP)
REACH = Reach("ours", "at most", 1.02)
PROCESS = 64 * MiB  # what a process takes beside its mappings


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    size, counts = (4 * MiB, [1, 2]) if quick else (16 * MiB, [1, 2, 4, 8, 16, 32, 64])
    machine = comparison.machine()
    lines: dict[str, list[Line]] = {"mapped": [], "held": []}
    for name in NAMES:
        line, held = _of_way(name, size, counts)
        lines["mapped"].append(line)
        lines["held"].append(held)
    panels = [
        Panel(title, "copies of the file", counts, lines[key], "clones", log=True)
        for key, title in (("mapped", "Memory below all mappings"), ("held", "Memory that holds the clones' content"))
    ]
    gone = {line.way: line.skipped for line in lines["mapped"]}
    return Comparison(
        "copies",
        f"How much memory do {counts[-1]} clones take that {counts[-1]} processes map and read?",
        _answer(panels[0]),
        f"a file of {onecopy.format_size(size)} of random bytes; each clone is mapped and read whole by a process of its own",
        panels,
        [comparison.aim(panels[0], counts[-1], way, None, REACH, gone) for way in (ways.DAX, ways.SHARED)],
        quick,
        machine,
    )


def _answer(panel: Panel) -> str:
    last = panel.cases[-1]
    parts = [
        f"{line.way} {comparison.figure(line.values[-1])}"
        for line in panel.lines
        if line.values and line.values[-1] is not None
    ]
    return f"In copies of the file, at {last:g} clones: {', '.join(parts)}."


def _of_way(name: str, size: int, counts: list[int]) -> tuple[Line, Line]:
    """Return the two lines of a way: memory mapped, memory held."""
    most = counts[-1]
    room = size * (1 if name in (ways.DAX, MEMMAP) else most + 1)
    none: list[float | None] = [None] * len(counts)
    try:
        harness.require_memory(most * PROCESS + room)
    except harness.SkippedError as reason:
        gone = Line(name, none, skipped=str(reason))
        return gone, gone
    with ways.side_by_side([name], 2 * size if name in KERNEL else room, size) as found:
        way = found[name]
        if way.missing:
            gone = Line(name, none, skipped=way.missing)
            return gone, gone
        return _measured(way, size, counts)


def _measured(way: Way, size: int, counts: list[int]) -> tuple[Line, Line]:
    names = [f"clone-{number}" for number in range(counts[-1])]
    mapped: list[float | None] = []
    held: list[float | None] = []
    with way.open() as files:
        with files.map(BASE) as base:
            total = checksum(base.words.data)
        files.forget(BASE)
        for name in names:
            files.clone(BASE, name)
        files.sync()
        for name in names if way.name in KERNEL else ():
            files.forget(name)
        with workers(hold, [(way, name, total) for name in names]) as pipes:
            before = 0
            for count in counts:
                ask(pipes[before:count], "map and read")
                before = count
                taken = ask(pipes[:count], "measure")
                frames = memory.distinct_bytes(taken)
                mapped.append((sum(one.pss + one.pss_rounding for one in taken) if frames is None else frames) / size)
                held.append(files.held(names[:count]) / size)
    first, second = (Line(way.name, values, note=comparison.growth(counts, values)) for values in (mapped, held))
    return first, second


def hold(pipe: Pipe, way: Way, name: str, total: int) -> None:
    """Be one of the processes: map and read; measure when told; hold it all until the other end is closed."""
    pipe.recv()
    with way.open("r") as files, files.map(name) as mapped:
        if checksum(mapped.words.data) != total:
            raise ValueError("a clone does not read as its origin")
        pipe.send("ready")
        while True:
            pipe.recv()
            pipe.send(replace(memory.measure([mapped.range]), page_tables=0))


if __name__ == "__main__":
    comparison.main(compare)
