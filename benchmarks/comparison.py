"""Many ways side by side: panels of lines, their tables, and the aims that are judged from them.

A benchmark that compares more than two things offers `compare(quick)` beside `measure(quick)`: one Comparison, which
becomes a table, a JSON object and a picture. Its rows are the aims, as those of every benchmark.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import KiB, Reach, Row

Samples = Mapping[str, Sequence[float]]
"""What was found for each case, several times."""


@dataclass(frozen=True)
class Line:
    """One way's figures, one for each case of the panel; None where there is none."""

    way: str
    values: Sequence[float | None]
    low: Sequence[float | None] = ()  # the middle half of the samples; empty where each figure is a single one
    high: Sequence[float | None] = ()
    note: str = ""
    skipped: str = ""  # why figures are missing; "" when none is


@dataclass(frozen=True)
class Panel:
    """Figures of one kind in one unit. Cases are counted along `axis`; or, where that is "", have names."""

    title: str
    unit: str
    cases: Sequence[float | str]
    lines: Sequence[Line]
    axis: str = ""
    better: str = "less"  # or "more"
    log: bool = True  # the figures span orders of magnitude

    def value(self, way: str, case: float | str) -> float | None:
        """Return a way's figure in a case; None where there is none."""
        for line in self.lines:
            if line.way == way:
                return line.values[list(self.cases).index(case)]
        return None


@dataclass(frozen=True)
class Comparison:
    """All that answers one question."""

    name: str
    question: str
    answer: str
    setting: str  # sizes, counts and how often, as they were in this run
    panels: Sequence[Panel]
    rows: Sequence[Row] = ()
    quick: bool = False
    machine: Mapping[str, str] = field(default_factory=dict)

    def skipped(self) -> list[str]:
        """Return what is missing and why, each once."""
        every = [f"{line.way}: {line.skipped}" for panel in self.panels for line in panel.lines if line.skipped]
        return list(dict.fromkeys(every))


def restored(found: Mapping[str, Any]) -> Comparison:
    """Make a Comparison again of what `dataclasses.asdict` and JSON made of it."""
    panels = [Panel(**panel | {"lines": [Line(**line) for line in panel["lines"]]}) for panel in found["panels"]]
    return Comparison(**{**found, "panels": panels, "rows": [Row(**row) for row in found["rows"]]})


# -------------------------------------------------------------- measuring


def in_turn(rounds: int, works: Mapping[str, Callable[[], Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Run each way's piece of work in turn, in both orders; return what each found for each case, all rounds."""
    found: dict[str, dict[str, list[float]]] = {way: {} for way in works}
    order = list(works.items())
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for way, work in order:
                for case, value in work().items():
                    found[way].setdefault(case, []).append(value)
            order.reverse()
    finally:
        gc.enable()
    return found


def line(way: str, cases: Sequence[float | str], samples: Samples, scale: Callable[[float], float], skipped: str = "") -> Line:
    """Make a line of samples: medians with their middle half, in the panel's unit."""
    values: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for case in cases:
        every = sorted(scale(one) for one in samples.get(str(case), ()))
        values.append(statistics.median(every) if every else None)
        quartiles = statistics.quantiles(every, method="inclusive") if len(every) > 1 else [None] * 3
        low.append(quartiles[0])
        high.append(quartiles[2])
    return Line(way, values, low, high, skipped=skipped)


def speed_of(size: int) -> Callable[[float], float]:
    """Return what makes GB/s of the nanoseconds in which `size` bytes were moved."""
    return lambda nanoseconds: size / nanoseconds if nanoseconds else math.inf


def times(factor: float) -> Callable[[float], float]:
    """Return what multiplies."""
    return lambda figure: figure * factor


def exponent(cases: Sequence[float | str], values: Sequence[float | None]) -> float | None:
    """Return p where values grow as the p-th power of the cases (least squares of the logarithms); None of too few."""
    points = [
        (math.log(case), math.log(value))
        for case, value in zip(cases, values, strict=True)
        if value and isinstance(case, int | float) and case > 0
    ]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def growth(cases: Sequence[float | str], values: Sequence[float | None]) -> str:
    """Return how values grow with the cases, for a line's note; "" of too few."""
    power = exponent(cases, values)
    return "" if power is None else f"n^{round(power, 2) + 0:.2f}"  # adding 0 makes 0 of -0


def aim(panel: Panel, case: float | str, way: str, peer: str | None, reach: Reach, missing: Mapping[str, str]) -> Row:
    """Judge a way's figure in one case of a panel: itself, or next to a peer's."""
    ours, theirs = panel.value(way, case), panel.value(peer, case) if peer else None
    where = f"{case:,g} {panel.axis}" if isinstance(case, int | float) else case
    skipped = "; ".join(f"{one}: {missing[one]}" for one in (way, peer) if one and missing.get(one))
    return harness.row(f"{way}: {panel.title}, {where}", peer or "", ours, theirs, panel.unit, reach=reach, skipped=skipped)


def machine() -> dict[str, str]:
    """Return what figures depend on, and say how busy the machine was: never who it is."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    kernel = re.match(r"\d+\.\d+", platform.release())
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "kernel": kernel[0] if kernel else "unknown",
        "processor": cpu[1].strip() if cpu else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory[1]) * KiB / harness.GiB:.0f} GiB" if memory else "unknown",
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "onecopy": version("onecopy"),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


# ---------------------------------------------------------------- telling


def figure(value: float | None) -> str:
    """Return a figure for a table: three digits that count."""
    if value is None:
        return "-"
    if not value or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def grid(panel: Panel) -> tuple[list[str], list[list[str]]]:
    """Return a panel as a table: the headers, then a row for each case."""
    headers = [panel.axis or "case", *(f">{line.way}" for line in panel.lines)]
    rows = [
        [f"{case:,g}" if isinstance(case, int | float) else case, *(figure(line.values[at]) for line in panel.lines)]
        for at, case in enumerate(panel.cases)
    ]
    if any(line.note for line in panel.lines):
        rows.append(["", *(line.note for line in panel.lines)])
    return headers, rows


def describe(found: Comparison) -> Iterator[str]:
    """Yield the lines that tell a comparison to people; its tables and rows are printed elsewhere."""
    yield found.answer
    yield f"({found.setting})"
    yield from (f"skipped: {reason}" for reason in found.skipped())


def show(found: Comparison) -> None:
    """Print a comparison."""
    from onecopy.cli import show as screen

    print(f"{found.name}: {found.question}")
    for panel in found.panels:
        print(f"\n{panel.title} ({panel.unit}; {panel.better} is better)")
        screen.table(*grid(panel))
    print()
    if found.rows:
        cells = [
            (row.question, figure(row.ours), row.unit, row.peer, figure(row.against), figure(row.ratio), row.reach,
             harness.verdict(row))
            for row in found.rows
        ]  # fmt: skip
        screen.table(("aims", ">figure", "unit", "peer", ">figure", ">ratio", "aim", "outcome"), cells)
    print("\n".join(screen.printable(text) for text in describe(found)), flush=True)


def main(compare: Callable[[bool], Comparison]) -> None:
    """Be the program that a comparison is when it runs alone."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quick", action="store_true", help="less work and fewer runs: shows that it works, no more")
    parser.add_argument("--png", metavar="FOLDER", help="draw the picture into this folder, too (needs matplotlib)")
    wanted = parser.parse_args()
    with harness.ended_by_sigterm():
        found = compare(wanted.quick)
    if wanted.png:
        from onecopy.benchmarks import pictures

        pictures.draw(found, wanted.png)
    if wanted.json:
        print(json.dumps({"schema": 1, "quick": wanted.quick, "machine": found.machine} | as_json([found])))
    else:
        show(found)


def as_json(found: Sequence[Comparison]) -> dict[str, object]:
    """Return comparisons as JSON has them: their rows among those of other benchmarks, and the whole of them."""
    rows = [{"benchmark": one.name, **asdict(row)} for one in found for row in one.rows]
    return {"rows": rows, "comparisons": [asdict(one) for one in found]}
