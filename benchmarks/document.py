"""Writes docs/benchmarks.md and its pictures from docs/benchmarks.json; a test fails when they say something else.

python -m onecopy.benchmarks.document [--redraw] [FOUND.json ...]

The arguments are what `onecopy bench --json` printed: their benchmarks are first put into docs/benchmarks.json, in the
place of what it had under the same names.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from onecopy.benchmarks import NAMES, comparison, pictures
from onecopy.benchmarks.comparison import Comparison, figure
from onecopy.benchmarks.harness import Row, verdict

FOLDER = Path("docs")
DATA, TEXT = "benchmarks.json", "benchmarks.md"
HEAD = """# Figures

Generated from `docs/benchmarks.json`, which is what `onecopy bench --json` printed, by `python -m onecopy.benchmarks.document`;
don't edit. What is in one table was measured in one run, side by side, on the machine named below it. Each benchmark is a
file of `benchmarks/` and runs alone, too: `onecopy bench NAME`.

The ways: **dax**, **shared** and **per-inode** are onecopy's policies (the pool file is the memory; a buffer cache keyed by
device and block; one keyed by inode and page, as kernels have it). **XFS** and **Btrfs** are the kernel's, with reflinks, on
loop devices; **tmpfs copies** are plain copies; **numpy.memmap** maps one tmpfs file. Pools and loop devices lie in /dev/shm.
"""

Found = dict[str, dict[str, Any]]
"""Of each benchmark: `quick`, `machine`, `rows`, and `comparison` where it has one."""


def merge(old: Found, printed: Mapping[str, Any]) -> Found:
    """Return `old` with what one `onecopy bench --json` printed, in the order of the benchmarks' list."""
    new: Found = {}
    for row in printed["rows"]:
        of = new.setdefault(row["benchmark"], {"quick": printed["quick"], "machine": printed["machine"], "rows": []})
        of["rows"].append({name: value for name, value in row.items() if name != "benchmark"})
    for one in printed["comparisons"]:
        new[one["name"]] = {"quick": one["quick"], "machine": one["machine"], "rows": one["rows"], "comparison": one}
    both = old | new
    return {name: both[name] for name in sorted(both, key=_rank)}


def _rank(name: str) -> tuple[int, str]:
    return (NAMES.index(name) if name in NAMES else len(NAMES), name)


def comparisons(found: Found) -> list[Comparison]:
    """Return the comparisons among the benchmarks, in the order of the document."""
    return [comparison.restored(one["comparison"]) for one in found.values() if "comparison" in one]


def document(found: Found) -> str:
    """Return docs/benchmarks.md."""
    lines = [HEAD]
    for one in comparisons(found):
        lines += _of_comparison(one)
    pairs = {name: one for name, one in found.items() if "comparison" not in one}
    if pairs:
        lines += ["## Two by two", "", "A figure of ours next to one of a peer's; medians of runs in both orders.", ""]
    for name, of in pairs.items():
        question, how = _docstring(name)
        lines += [f"### {question}", "", how, "", *_rows([Row(**row) for row in of["rows"]], notes=True)]
        lines += ["", *_conditions("", of["quick"], of["machine"]), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _of_comparison(one: Comparison) -> Iterator[str]:
    _, how = _docstring(one.name)
    yield from (f"## {one.question}", "", f"**{_cell(one.answer)}**", "", f"![{one.question}]({one.name}.png)", "")
    for panel in one.panels:
        headers, rows = comparison.grid(panel)
        yield from (f"{panel.title}, in {panel.unit} ({panel.better} is better):", "")
        yield from (*_table(headers, rows), "")
    if one.rows:
        yield from ("Aims:", "", *_rows(one.rows), "")
    yield from (how, "", *_conditions(one.setting, one.quick, one.machine), "")
    yield from (f"- not measured: {_cell(reason)}" for reason in one.skipped())
    yield ""


def _docstring(name: str) -> tuple[str, str]:
    """Return a benchmark's question and how it is measured, both as its file says."""
    text = inspect.cleandoc(import_module(f"onecopy.benchmarks.{name}").__doc__ or "")
    question, _, how = text.partition("\n")
    return question, how.strip()


def _conditions(setting: str, quick: bool, machine: Mapping[str, str]) -> Iterator[str]:
    if quick:
        yield "*A quick run, which shows that the benchmark works and no more: these figures are not to be quoted.*"
        yield ""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    yield f"In this run: {setting}; {facts}." if setting else f"In this run: {facts}."
    yield ""


def _rows(rows: Sequence[Row], *, notes: bool = False) -> list[str]:
    headers = ["onecopy", ">figure", "unit", "peer", ">figure", ">ratio", "aim", "outcome", *(["notes"] if notes else [])]
    cells = [
        [row.question, figure(row.ours), row.unit, row.peer, figure(row.against), figure(row.ratio), row.reach]
        + [verdict(row) + (f": {row.skipped}" if row.skipped and not notes else "")]
        + (["; ".join(filter(None, (row.skipped, row.note)))] if notes else [])
        for row in rows
    ]
    return _table(headers, cells)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    names = " | ".join(_cell(header.removeprefix(">")) for header in headers)
    rule = " | ".join("---:" if header.startswith(">") else "---" for header in headers)
    return [f"| {names} |", f"| {rule} |", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def load(folder: Path = FOLDER) -> Found:
    """Return what docs/benchmarks.json holds; nothing where there is none."""
    path = folder / DATA
    if not path.exists():
        return {}
    found: Found = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return found


def write(found: Found, folder: Path = FOLDER, *, redraw: bool = False) -> list[Path]:
    """Write the data, the document, and the pictures that were drawn from other data (or all); return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / DATA, folder / TEXT
    data.write_text(json.dumps({"schema": 1, "benchmarks": found}, indent=1) + "\n", encoding="utf-8")
    text.write_text(document(found), encoding="utf-8")
    stale = [
        one
        for one in comparisons(found)
        if redraw or pictures.drawn_from(folder / f"{one.name}.png") != pictures.fingerprint(one)
    ]
    return [data, text, *(pictures.draw(one, folder) for one in stale)]


def main() -> None:
    """Write all of it into the current folder's `docs`."""
    parser = argparse.ArgumentParser(
        prog="python -m onecopy.benchmarks.document", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("found", nargs="*", metavar="FOUND.json", help="what `onecopy bench --json` printed")
    parser.add_argument("--redraw", action="store_true", help="draw all pictures anew")
    wanted = parser.parse_args()
    found = load()
    for path in wanted.found:
        found = merge(found, json.loads(Path(path).read_text(encoding="utf-8")))
    for path in write(found, redraw=wanted.redraw):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
