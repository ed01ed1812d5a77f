"""How fast are reads of a clone, the first and the later ones, through a mapping and through `read`?

A fresh clone of a file that has been read before is mapped and read whole, in sequence; then again; then 64 KiB and 4
KiB blocks are copied out of it in random order. With another fresh clone the same is done through `read` (of the
kernel: preadv), 1 MiB at a time in sequence, always into the same megabyte of memory. Mapping is part of the first
read, cloning is not. The random blocks cover a part of the file, all of it in memory by then.

What can be had at most is a tmpfs file, mapped by numpy.memmap: it has no clones, and is mapped anew each time. Pools
and peers lie on the same tmpfs, with pages of the same size. On a tmpfs with pages of 2 MiB (huge=always), dax and that
file alone are read through mappings in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from time import perf_counter_ns

import numpy as np

import onecopy
from onecopy.benchmarks import comparison, harness, ways
from onecopy.benchmarks.comparison import Comparison, Panel, speed_of
from onecopy.benchmarks.files import BASE, KERNEL, MEMMAP, Files, Reader, Words, buffer_of, read_all
from onecopy.benchmarks.harness import KiB, MiB, Reach, Row
from onecopy.benchmarks.stores import Indexes

NAMES = (*ways.POLICIES, *KERNEL, MEMMAP)
FIRST, AGAIN = "first, in sequence", "again, in sequence"
RANDOM = {f"random {size // KiB} KiB": size for size in (64 * KiB, 4 * KiB)}
CASES = (FIRST, AGAIN, *RANDOM)
OF_MEMMAP = Reach("ratio", "at least", 0.9)
OF_DAX = Reach("ratio", "at least", 0.85)
DOORS = ("mapping", "read")


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    size, rounds, count = (8 * MiB, 2, 1 << 6) if quick else (256 * MiB, 10, 1 << 13)
    machine = comparison.machine()
    orders = {case: _order(size, each, count) for case, each in RANDOM.items()}
    moved = {FIRST: size, AGAIN: size} | {case: len(orders[case]) * each for case, each in RANDOM.items()}
    with ways.side_by_side(NAMES, 2 * size, size, 3 * size) as found, ways.opened(found) as opened:
        for files in opened.values():  # the origin has been read
            with files.map(BASE) as mapped:
                read_all(mapped.words)
        samples = {
            door: comparison.in_turn(rounds, {name: partial(work, files, orders) for name, files in opened.items()})
            for door, work in (("mapping", by_mapping), ("read", by_read))
        }
    huge = huge_pages(size, rounds, orders)
    gone = ways.missing(found)
    panels = [
        Panel(
            title,
            "GB/s",
            CASES,
            [_line(name, samples[door].get(name, {}), moved, gone[name]) for name in NAMES],
            better="more",
        )
        for door, title in (("mapping", "Reads through a mapping"), ("read", "Reads through read()"))
    ]
    lines = [_line(name, some, moved, why) for name, (some, why) in huge.items()]
    panels.append(Panel("Through a mapping, pages of 2 MiB", "GB/s", CASES, lines, better="more"))
    return Comparison(
        "reads",
        "How fast are first and later reads of a clone?",
        _answer(panels[0]),
        f"a file of {onecopy.format_size(size)}, {rounds} rounds in both orders; "
        + ", ".join(f"{case}: {onecopy.format_size(moved[case])}" for case in RANDOM),
        panels,
        [
            comparison.aim(panels[0], FIRST, ways.DAX, MEMMAP, OF_MEMMAP, gone),
            comparison.aim(panels[2], FIRST, ways.DAX, MEMMAP, OF_MEMMAP, {name: why for name, (_, why) in huge.items()}),
            *(comparison.aim(panels[0], case, ways.SHARED, ways.DAX, OF_DAX, gone) for case in CASES),
            *(comparison.aim(panels[1], case, ways.SHARED, ways.DAX, OF_DAX, gone) for case in CASES[1:]),
        ],
        quick,
        machine,
    )


def huge_pages(size: int, rounds: int, orders: dict[str, Indexes]) -> dict[str, tuple[comparison.Samples, str]]:
    """Return the samples of dax and the tmpfs file with pages of 2 MiB, or why there are none."""
    names = (ways.DAX, MEMMAP)
    room = 2 * size
    with harness.huge_tmpfs(3 * size + 2 * ways.TREES) as huge:
        if huge.root is None:
            return {name: ({}, huge.missing) for name in names}
        with ways.side_by_side(names, room, size, inside=huge.root) as found, ways.opened(found) as opened:
            works = {name: partial(by_mapping, files, orders) for name, files in opened.items()}
            samples = comparison.in_turn(rounds, works)
        return {name: (samples.get(name, {}), found[name].missing) for name in names}


def _line(name: str, samples: comparison.Samples, moved: dict[str, int], skipped: str) -> comparison.Line:
    speeds = {case: [speed_of(moved[case])(one) for one in some] for case, some in samples.items()}
    return comparison.line(name, CASES, speeds, float, skipped)


def _answer(panel: Panel) -> str:
    parts = [f"{line.way} {comparison.figure(line.values[0])}" for line in panel.lines if line.values[0] is not None]
    return f"The first read through a mapping, in GB/s: {', '.join(parts)}."


def _order(size: int, each: int, count: int) -> Indexes:
    blocks = size // each
    return np.random.default_rng(each).permutation(blocks)[: max(1, min(count, blocks // 2))]


def by_mapping(files: Files, orders: dict[str, Indexes]) -> dict[str, float]:
    """Clone, map and read; return how long each part took, in nanoseconds."""
    files.clone(BASE, "clone")
    took: dict[str, float] = {}
    buffer = buffer_of(MiB).view(np.uint64)
    start = perf_counter_ns()
    with files.map("clone") as mapped:
        read_all(mapped.words)
        took[FIRST] = perf_counter_ns() - start
        took[AGAIN] = _timed(read_all, mapped.words)
        for case, order in orders.items():
            took[case] = _timed(gather, mapped.words, RANDOM[case], order, buffer)
    files.unlink("clone")
    files.sync()
    return took


def by_read(files: Files, orders: dict[str, Indexes]) -> dict[str, float]:
    """Clone and read without mapping; return how long each part took, in nanoseconds."""
    files.clone(BASE, "clone")
    took: dict[str, float] = {}
    buffer = buffer_of(MiB).data.cast("B")
    start = perf_counter_ns()
    with files.reader("clone") as file:
        size = in_sequence(file.read, buffer)
        took[FIRST] = perf_counter_ns() - start
        took[AGAIN] = _timed(in_sequence, file.read, buffer)
        for case, order in orders.items():
            offsets = (order * RANDOM[case]).tolist()
            took[case] = _timed(at_random, file.read, buffer[: RANDOM[case]], offsets)
    if not size:
        raise ValueError("a clone is empty")
    files.unlink("clone")
    files.sync()
    return took


def _timed(work: object, *arguments: object) -> int:
    start = perf_counter_ns()
    work(*arguments)  # type: ignore[operator]
    return perf_counter_ns() - start


def gather(words: Words, each: int, order: Indexes, buffer: Words) -> None:
    """Copy blocks of `each` bytes, in this order, into the same buffer over and over."""
    width = each // 8
    blocks, room = words.reshape(-1, width), buffer.reshape(-1, width)
    for at in range(0, len(order), len(room)):
        some = order[at : at + len(room)]
        np.take(blocks, some, axis=0, out=room[: len(some)], mode="clip")  # "raise" would copy twice


def in_sequence(read: Reader, buffer: memoryview) -> int:
    """Read a whole file; return its size."""
    offset = 0
    while got := read(buffer, offset):
        offset += got
    return offset


def at_random(read: Reader, buffer: memoryview, offsets: Sequence[int]) -> None:
    """Read blocks at these offsets."""
    for offset in offsets:
        if read(buffer, offset) != len(buffer):
            raise OSError(os.EX_IOERR, "a read within the file came up short")


if __name__ == "__main__":
    comparison.main(compare)
