"""Pictures: what the ways of copying cost, and where the runs of a file lie. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onecopy.cli.show import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    import onecopy

INK = "#22262b"
FAINT = "#8a929b"
OTHERS = "#b9c0c7"
OURS = "#1f7a8c"
LIMIT = "#c8553d"

# Runs by the number of files that share them: the last step stands for all higher counts.
SHARERS = {
    1: ("one owner", "#e09f3e"),
    2: ("2 sharers", "#7fb7be"),
    3: ("3 to 7 sharers", "#1f7a8c"),
    8: ("8 and more", "#0b3c49"),
}
UNWRITTEN = ("unwritten", "#b9c0c7")
HOLE = ("hole", "#eceff1")


@dataclass(frozen=True)
class Bar:
    """One bar of a panel: its name, its length in bytes, and a remark that follows its figure."""

    label: str
    bytes: int
    remark: str
    ours: bool = False
    measured: bool = True


@dataclass(frozen=True)
class Panel:
    """Bars on one scale, with a line at `limit` bytes."""

    title: str
    limit: int
    limit_label: str
    bars: Sequence[Bar]


def available() -> bool:
    """Say whether pictures can be drawn here."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def require() -> None:
    """Raise OSError (ENOPKG) unless pictures can be drawn here."""
    if not available():
        raise OSError(errno.ENOPKG, "drawing needs matplotlib; install it with: pip install 'onecopy[plot]'")


def draw_panels(title: str, footnote: str, panels: Sequence[Panel], path: str) -> None:
    """Draw groups of horizontal bars one above the other into the PNG file `path`.

    Raises OSError: ENOPKG without matplotlib, and what writing the file raises.
    """
    rows = sum(len(panel.bars) for panel in panels)
    figure = new_figure(10, 1.1 + 0.9 * len(panels) + 0.42 * rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[len(panel.bars) + 1 for panel in panels])
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        _draw_panel(panel, axis)
    figure.supxlabel(footnote, x=0.01, ha="left", fontsize=8.5, color=FAINT)
    figure.savefig(path, format="png")


def _draw_panel(panel: Panel, axis: Axes) -> None:
    from onecopy import format_size

    longest = max(panel.limit, *(bar.bytes for bar in panel.bars))
    for row, bar in enumerate(panel.bars):
        axis.barh(
            row,
            bar.bytes,
            height=0.66,
            color=OURS if bar.ours else OTHERS,
            hatch=None if bar.measured else "///",
            edgecolor="white",
        )
        figure = f"{format_size(bar.bytes)}   {bar.remark}"
        axis.text(bar.bytes + longest * 0.012, row, figure, va="center", fontsize=10, color=INK)
    axis.axvline(panel.limit, color=LIMIT, linestyle=(0, (4, 2)), linewidth=1.4)
    axis.text(panel.limit, -0.62, f" {panel.limit_label}: {format_size(panel.limit)}", va="bottom", fontsize=9, color=LIMIT)
    axis.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars], fontsize=10, color=INK)
    axis.set_ylim(len(panel.bars) - 0.5, -1.0)
    axis.set_xlim(0, longest * 1.42)  # room for the figures behind the longest bar
    axis.set_xticks([])
    axis.set_title(panel.title, loc="left", fontsize=11, color=INK)
    axis.tick_params(left=False)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def draw_extents(extents: Sequence[onecopy.Extent], title: str, path: str) -> None:
    """Draw where the runs of a file lie in the pool into the PNG file `path`: file pages across, PFNs up.

    A run is a rising line, coloured by how many files share it; a hole has no place in the pool and is a band.
    Raises OSError: ENOPKG without matplotlib, and what writing the file raises.
    """
    figure = new_figure(10, 6)
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    axis = figure.subplots()
    holes = [(run.file_page, run.pages) for run in extents if run.state == "hole"]
    axis.broken_barh(holes, (0, 1), transform=axis.get_xaxis_transform(), color=HOLE[1], linewidth=0)
    lines: dict[tuple[str, str], list[list[tuple[int, int]]]] = {}
    for run in extents:
        if run.state != "hole":
            ends = [(run.file_page, run.pfn), (run.file_page + run.pages, run.pfn + run.pages)]
            lines.setdefault(_kind(run), []).append(ends)
    for (_, colour), segments in lines.items():
        axis.add_collection(LineCollection(segments, colors=colour, linewidths=3, capstyle="projecting"))
    axis.autoscale()
    kinds = [kind for kind in (*SHARERS.values(), UNWRITTEN) if kind in lines]
    key = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in kinds]
    if holes:
        key.append(Line2D([], [], color=HOLE[1], linewidth=10, label=HOLE[0]))
    if key:
        figure.legend(handles=key, loc="outside lower left", ncols=len(key), frameon=False)
    pages = sum(run.pages for run in extents)
    heading = f"{printable(title)}: {len(extents):,} runs, {pages:,} pages"
    axis.set_title(heading, loc="left", fontsize=12, color=INK, parse_math=False)  # a name may hold dollar signs
    axis.set_xlabel("page of the file (4,096 bytes each)")
    axis.set_ylabel("PFN: page of the pool")
    axis.ticklabel_format(style="plain", useOffset=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, format="png")


def _kind(run: onecopy.Extent) -> tuple[str, str]:
    if run.state == "unwritten":
        return UNWRITTEN
    return SHARERS[max(step for step in SHARERS if step <= max(run.sharers, 1))]


def new_figure(width: float, height: float) -> Figure:
    """Make an empty picture, sized in inches; it needs no display."""
    require()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
