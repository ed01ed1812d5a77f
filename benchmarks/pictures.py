"""Draws comparisons: one picture each, which says the question and the answer. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onecopy.benchmarks import ways
from onecopy.benchmarks.comparison import Comparison, Line, Panel, figure
from onecopy.benchmarks.files import BTRFS, COPIES, MEMMAP, XFS
from onecopy.cli.draw import FAINT, INK, LIMIT, OTHERS, OURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


@dataclass(frozen=True)
class Style:
    """How a way is called and drawn. Lines get thinner in the order of drawing, so that none hides another."""

    label: str
    colour: str
    mark: str
    dash: tuple[int, tuple[int, ...] | None] = (0, None)


STYLES = {
    ways.DAX: Style("onecopy, dax", "#0b3c49", "o"),
    ways.SHARED: Style("onecopy, shared cache", OURS, "s", (0, (6, 2))),
    ways.PER_INODE: Style("onecopy, cache per inode", "#e09f3e", "D"),
    XFS: Style("XFS reflink", LIMIT, "^", (0, (5, 3))),
    BTRFS: Style("Btrfs reflink", "#8d5a97", "v", (0, (3, 3))),
    COPIES: Style("copies on tmpfs", FAINT, "P", (0, (1, 3))),
    MEMMAP: Style("numpy.memmap, one file", "#6a994e", "X", (0, (2, 4))),
}
WIDEST = 4.2  # of lines, in points; each further one is 0.5 thinner
KEY = "Description"  # of a PNG: the fingerprint of what was drawn
PNG = b"\x89PNG\r\n\x1a\n"
APART = 0.052  # least distance of two labels, in heights of a panel


def fingerprint(found: Comparison) -> str:
    """Return a short text that differs when anything that is drawn does."""
    return hashlib.sha256(json.dumps(asdict(found), sort_keys=True).encode()).hexdigest()[:16]


def draw(found: Comparison, folder: str | os.PathLike[str]) -> Path:
    """Draw a comparison into `folder` as NAME.png; return the file's path.

    Raises OSError: ENOPKG without matplotlib, and what writing the file raises.
    """
    columns = 2 if len(found.panels) % 2 == 0 else len(found.panels)
    lines = -(-len(found.panels) // columns)
    bars = max(_bars(panel) for panel in found.panels)
    panel_height = 4.1 if found.panels[0].axis else 1.0 + 0.2 * bars
    answer = textwrap.fill(found.answer, 128)
    foot = textwrap.fill(_footnote(found), 175)
    picture = new_figure(12.5, lines * panel_height + 1.1 + 0.2 * (answer.count("\n") + foot.count("\n")))
    picture.suptitle(found.question, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK, parse_math=False)
    body = picture.subfigures(1, 1, squeeze=False)[0, 0]  # a figure lays out one heading; its part lays out the next
    body.suptitle(answer, x=0.01, ha="left", fontsize=10.5, color=OURS, parse_math=False)
    axes = body.subplots(lines, columns, squeeze=False).ravel()
    log = any(panel.log and _wide(panel) for panel in found.panels)
    for panel, axis in zip(found.panels, axes, strict=False):
        if panel.axis:
            _draw_lines(panel, axis)
        else:
            _draw_bars(panel, axis, log=log, behind=0.4 * columns)
            axis.label_outer()  # the cases are the same in all panels
        axis.set_title(f"{panel.title}\n{panel.unit}, {panel.better} is better", loc="left", fontsize=10.5, color=INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    body.supxlabel(foot, x=0.01, ha="left", fontsize=8, color=FAINT, parse_math=False)
    path = Path(folder, f"{found.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, format="png", metadata={KEY: fingerprint(found), "Software": "onecopy"})
    return path


def drawn_from(path: Path) -> str | None:
    """Return the fingerprint in a picture; None where there is no picture, or none of ours."""
    data = path.read_bytes() if path.exists() else b""
    at = len(PNG)
    while data.startswith(PNG) and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        key, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == KEY.encode():
            return text.decode("latin-1")
        at += 12 + length  # with the length itself, the kind and a checksum
    return None


def _footnote(found: Comparison) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in found.machine.items())
    growth = ["n^p: grows as the p-th power of n, fitted"] if any(line.note for line in found.panels[0].lines) else []
    parts = [found.setting, facts, *growth, *(f"not measured: {reason}" for reason in found.skipped())]
    return ("A QUICK RUN, NO MORE THAN A TRIAL. " if found.quick else "") + ". ".join(parts) + "."


def _bars(panel: Panel) -> int:
    return len(panel.cases) * (len(_shown(panel)) + 1)


def _shown(panel: Panel) -> list[Line]:
    return [line for line in panel.lines if any(value is not None for value in line.values)]


def _mark(axis: Axis, low: float, high: float) -> None:
    """Put plain numbers on a logarithmic axis, closer where it spans little."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_minor_formatter(NullFormatter())


def _style(way: str) -> Style:
    return STYLES.get(way, Style(way, OTHERS, "."))


def _span(panel: Panel) -> tuple[float, float]:
    """Return the least and the greatest figure; something drawable where there is none."""
    every = [value for line in _shown(panel) for value in line.values if value]
    return (min(every), max(every)) if every else (0.5, 1.0)


def _wide(panel: Panel) -> bool:
    low, high = _span(panel)
    return high > 30 * low


def _draw_lines(panel: Panel, axis: Axes) -> None:
    """Draw a line for each way, named at its end, with its last figure."""
    from matplotlib.ticker import NullFormatter

    steps = [float(case) for case in panel.cases]
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [f"{step:,g}" for step in steps])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"n = {panel.axis}", color=INK)
    axis.set_xlim(steps[0] / 1.15, steps[-1] * 1.15)
    low, high = _span(panel)
    if panel.log:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.6, high * 1.6)
        _mark(axis.yaxis, low, high)
    else:
        axis.set_ylim(0, high * 1.1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.grid(axis="y", color="#eceff1")
    ends = []
    for number, line in enumerate(_shown(panel)):
        style = _style(line.way)
        points = [(step, value) for step, value in zip(steps, line.values, strict=True) if value is not None]
        axis.plot(
            *zip(*points, strict=True),
            color=style.colour,
            marker=style.mark,
            markersize=8 - 0.7 * number,
            linewidth=WIDEST - 0.5 * number,
            linestyle=style.dash,
        )
        spread = [
            (step, below, above)
            for step, below, above in zip(steps, line.low, line.high, strict=False)
            if below is not None and above is not None
        ]
        if spread:
            across, least, most = zip(*spread, strict=True)
            axis.fill_between(across, least, most, color=style.colour, alpha=0.12, linewidth=0)
        last = points[-1][1]
        growth = f"   {line.note}" if line.note else ""
        ends.append((_height(axis, last), f"{style.label}: {figure(last)}{growth}", style.colour))
    for at, text, colour in _spread(ends):
        axis.annotate(text, (1.015, at), xycoords="axes fraction", va="center", fontsize=9, color=colour)


def _height(axis: Axes, value: float) -> float:
    """Return where a value lies between the bottom of a panel, 0, and its top, 1."""
    low, high = axis.get_ylim()
    if axis.get_yscale() == "log":
        low, high, value = math.log(low), math.log(high), math.log(value) if value > 0 else math.log(low)
    return (value - low) / (high - low)


def _spread(ends: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Move labels apart so that none covers another: upwards from the lowest, then down where the top is passed."""
    ordered = sorted(ends)
    places: list[float] = []
    for at, _, _ in ordered:
        places.append(max(at, places[-1] + APART) if places else at)
    ceiling = 1.03
    for number in reversed(range(len(places))):
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - APART
    return [(at, text, colour) for at, (_, text, colour) in zip(places, ordered, strict=True)]


def _draw_bars(panel: Panel, axis: Axes, *, log: bool, behind: float) -> None:
    """Draw a group of horizontal bars for each case, each with its way and figure, for which there is room `behind` it."""
    shown = _shown(panel)
    low, high = _span(panel)
    left = low / 2 if log else 0.0
    row = 0.0
    ticks = []
    for at in range(len(panel.cases)):
        ticks.append(row + (len(shown) - 1) / 2)
        for line in shown:
            style, value = _style(line.way), line.values[at]
            if value is not None:
                axis.barh(row, value - left, left=left, height=0.84, color=style.colour, alpha=0.9)
            text = f" {style.label}: {'not measured' if value is None else figure(value)}"
            axis.text(left if value is None else value, row, text, va="center", fontsize=8.5, color=INK)
            row += 1
        row += 0.9
    if log:
        axis.set_xscale("log")
        axis.set_xlim(left, high * (high / left) ** behind)
    else:
        axis.set_xlim(0, high * (1 + behind))
    axis.set_ylim(row - 0.9, -0.9)
    axis.set_yticks(ticks, [str(case) for case in panel.cases], fontsize=9.5, color=INK)
    axis.tick_params(left=False)
    axis.set_xticks([])
    axis.set_xticks([], minor=True)  # every bar has its figure
    axis.set_xlabel("logarithmic scale" if log else "", fontsize=9, color=FAINT)
