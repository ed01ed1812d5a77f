"""What do stores into clones cost, at random and in turn, and the sync that follows?

A fresh clone is mapped and read; then a word is stored to random pages of it, or to every page in turn, and the mapping
is synced. Stores and sync are timed apart, per page that was stored to. All origins are in memory. The kernel's file
systems do the same through a shared mapping of a reflinked file, and msync.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter_ns

import numpy as np

import onecopy
from onecopy import PAGE
from onecopy.benchmarks import comparison, ways
from onecopy.benchmarks.comparison import Comparison, Panel, times
from onecopy.benchmarks.files import BASE, KERNEL, Files, touch
from onecopy.benchmarks.harness import MiB, Row
from onecopy.benchmarks.stores import Indexes, random_pages, store

NAMES = (*ways.POLICIES, *KERNEL)
PARTS = {"stores": "Stores alone", "sync": "The sync", "both": "Stores and sync"}


def measure(quick: bool) -> list[Row]:
    return list(compare(quick).rows)


def compare(quick: bool) -> Comparison:
    size, rounds = (8 * MiB, 2) if quick else (128 * MiB, 10)
    pages = size // PAGE
    machine = comparison.machine()
    stored = {
        f"random, {pages // 64:,} pages": random_pages(pages, pages // 64),
        f"random, {pages // 8:,} pages": random_pages(pages, pages // 8),
        f"in turn, {pages:,} pages": np.arange(pages),
    }
    with ways.side_by_side(NAMES, 4 * size, size, 4 * size) as found, ways.opened(found) as opened:
        samples = comparison.in_turn(rounds, {name: partial(all_cases, files, stored) for name, files in opened.items()})
    gone = ways.missing(found)
    panels = [
        Panel(
            title,
            "us per page",
            list(stored),
            [
                comparison.line(
                    name,
                    list(stored),
                    {case: samples.get(name, {}).get(f"{part}: {case}", []) for case in stored},
                    times(1e-3),
                    gone[name],
                )
                for name in NAMES
            ],
        )
        for part, title in PARTS.items()
    ]
    return Comparison(
        "clone_stores",
        "What do stores into a clone cost, and the sync that follows?",
        _answer(panels[-1]),
        f"a file of {onecopy.format_size(size)}, a word stored to each page, {rounds} rounds in both orders",
        panels,
        quick=quick,
        machine=machine,
    )


def _answer(panel: Panel) -> str:
    said = []
    for case in (panel.cases[0], panel.cases[-1]):
        parts = [
            f"{line.way} {comparison.figure(panel.value(line.way, case))}"
            for line in panel.lines
            if panel.value(line.way, case) is not None
        ]
        said.append(f"{case}: {', '.join(parts)}")
    return f"Stores and sync, in us per page. {'; '.join(said)}."


def all_cases(files: Files, stored: dict[str, Indexes]) -> dict[str, float]:
    """Store to a fresh clone in each case; return how long a page took, in nanoseconds."""
    found: dict[str, float] = {}
    for case, pages in stored.items():
        for part, took in of_clone(files, pages).items():
            found[f"{part}: {case}"] = took / len(pages)
    return found


def of_clone(files: Files, pages: Indexes) -> dict[str, int]:
    """Clone, map and read, store and sync; return how long the last two took."""
    files.clone(BASE, "clone")
    files.sync()
    with files.map("clone", writable=True) as mapped:
        touch(mapped.words)
        start = perf_counter_ns()
        store(pages, mapped.words)
        stored = perf_counter_ns()
        mapped.sync()
        end = perf_counter_ns()
    files.unlink("clone")
    files.sync()
    return {"stores": stored - start, "sync": end - stored, "both": end - start}


if __name__ == "__main__":
    comparison.main(compare)
