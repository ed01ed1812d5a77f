"""What grows with something, and how fast: the part that the four comparisons `by_...` have in common.

Each counts along something (clones, processes, bytes, extents), and finds the same four figures at each step, in every way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from time import perf_counter_ns

from onecopy.benchmarks import comparison, ways
from onecopy.benchmarks.comparison import Comparison, Line, Panel, times
from onecopy.benchmarks.files import KERNEL, Files, read_all, touch
from onecopy.benchmarks.harness import MiB
from onecopy.benchmarks.ways import Way
from onecopy.cli import measure as memory

NAMES = (*ways.POLICIES, *KERNEL)
PARTS = {
    "memory": ("Memory below the mappings", "MiB", 1 / MiB),
    "clone": ("Making one more clone", "us", 1e-3),
    "map": ("Mapping it", "us", 1e-3),
    "read": ("Its first read, every byte", "ms", 1e-6),
}

Found = dict[str, list[float]]
"""Samples of each part: nanoseconds, and bytes of memory."""

Step = Callable[[Way, float, int], Found]
"""Measure a way at one step, so many times."""


def compare(
    name: str, question: str, axis: str, steps: Sequence[float], step: Step, rounds: int, setting: str, quick: bool,
    room: Callable[[float], int], base: Callable[[float], int],
) -> Comparison:  # fmt: skip
    """Measure every way at every step, all ways side by side; the places are made anew for each step."""
    machine = comparison.machine()
    samples: dict[str, dict[str, Found]] = {way: {} for way in NAMES}
    gone: dict[str, str] = {}
    for at in steps:
        for way in NAMES:
            if gone.get(way):
                continue
            with ways.side_by_side([way], room(at), base(at)) as found:
                gone[way] = found[way].missing
                if not gone[way]:
                    samples[way][str(at)] = step(found[way], at, rounds)
    panels = []
    for part, (title, unit, factor) in PARTS.items():
        lines = []
        for way in NAMES:
            of_part = {at: some[part] for at, some in samples[way].items()}
            line = comparison.line(way, list(steps), of_part, times(factor), gone[way])
            lines.append(Line(line.way, line.values, line.low, line.high, comparison.growth(steps, line.values), line.skipped))
        panels.append(Panel(title, unit, list(steps), lines, axis))
    return Comparison(name, question, _answer(panels), f"{setting}; {rounds} rounds", panels, quick=quick, machine=machine)


def _answer(panels: Sequence[Panel]) -> str:
    """Say by how much each part is more at the last step than at the first."""
    said = []
    for name in NAMES:
        parts = []
        for panel, short in zip(panels, ("memory", "cloning", "mapping", "first read"), strict=True):
            first, last = panel.value(name, panel.cases[0]), panel.value(name, panel.cases[-1])
            if first and last:
                parts.append(f"{short} {comparison.figure(last / first)}")
        said += [f"{name}: {', '.join(parts)}"] if parts else []
    steps = panels[0].cases
    return f"From {steps[0]:,g} to {steps[-1]:,g} {panels[0].axis}, how many times as much? {'; '.join(said)}."


def cycle(files: Files, origin: str, name: str) -> dict[str, float]:
    """Clone, map and read once, and let all go; return how long each took, in nanoseconds."""
    start = perf_counter_ns()
    files.clone(origin, name)
    cloned = perf_counter_ns()
    with files.map(name) as mapped:
        at = perf_counter_ns()
        read_all(mapped.words)
        read = perf_counter_ns()
    files.unlink(name)
    files.sync()
    return {"clone": cloned - start, "map": at - cloned, "read": read - at}


def cycles(files: Files, origin: str, rounds: int) -> Found:
    """Do that so many times, after once unmeasured."""
    found: Found = {}
    for number in range(rounds + 1):
        for part, took in cycle(files, origin, f"next-{number}").items():
            found.setdefault(part, []).append(took)
    return {part: took[1:] for part, took in found.items()}


def memory_of(files: Files, names: Sequence[str]) -> float:
    """Map and read all these files at once; return the memory below, in bytes, a frame counted once."""
    with ExitStack() as held:
        mapped = [held.enter_context(files.map(name)) for name in names]
        for one in mapped:
            touch(one.words)
        return taken([memory.measure([one.range for one in mapped])])


def taken(found: Sequence[memory.Memory]) -> float:
    """Return the memory that was measured by some processes, in bytes, a frame counted once."""
    frames = memory.distinct_bytes(found)
    return sum(one.pss + one.pss_rounding for one in found) if frames is None else frames


def together(*found: Mapping[str, list[float]]) -> Found:
    """Return the samples of several measurements of one step."""
    return {part: [value for one in found for value in one.get(part, [])] for part in PARTS}


def steps_of(quick: bool, few: Sequence[int], many: Sequence[int]) -> list[float]:
    """Return the steps along the axis."""
    return [float(one) for one in (few if quick else many)]
