"""The verb `bench`: the project's comparisons, run one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onecopy.cli import draw, show
from onecopy.cli.args import Json

if TYPE_CHECKING:
    from types import ModuleType

    from onecopy.benchmarks.harness import Row


def register(app: typer.Typer) -> None:
    """Add the verb to the program."""
    app.command(epilog="Example: onecopy bench clone put --quick")(bench)


def _complete(incomplete: str) -> Iterator[str]:
    from onecopy.benchmarks import NAMES

    yield from (name for name in NAMES if name.startswith(incomplete))


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", autocompletion=_complete, help="Which to run; all when left out."),
    ] = None,
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="Less work and fewer runs: shows that all of it works, no more.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Say which there are, and run none.")] = False,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FOLDER", help="Draw the comparisons of many ways there (needs matplotlib)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure onecopy against the kernel's own ways, side by side on this machine.

    Every figure is the median of several runs in both orders. What a comparison needs and this machine doesn't have
    (root, to mount XFS and Btrfs; memory; duperemove) is skipped, and said so. Pools and file systems are made in
    /dev/shm and removed afterwards. All of it takes about forty minutes.
    """
    from onecopy.benchmarks import COMPARISONS, NAMES, comparison
    from onecopy.benchmarks.harness import ended_by_sigterm

    if unknown := [name for name in names or () if name not in NAMES]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(NAMES)}", param_hint="NAME")
    modules = {name: import_module(f"onecopy.benchmarks.{name}") for name in names or NAMES}
    if listing:
        _list(modules, as_json=as_json)
        return
    if png:
        draw.require()
    machine = comparison.machine()
    rows: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    with ended_by_sigterm():
        for name, module in modules.items():
            with show.progress(f"measure: {name}"):
                compared = module.compare(quick) if name in COMPARISONS else None
                found = compared.rows if compared else module.measure(quick)
            rows += [{"benchmark": name, **asdict(row)} for row in found]
            if compared:
                comparisons.append(asdict(compared))
            if compared and png:
                from onecopy.benchmarks import pictures

                pictures.draw(compared, png)
            if compared and not as_json:
                comparison.show(compared)
                print()
            elif not as_json:
                _print(name, module, found)
    if as_json:
        show.json_object(verb="bench", quick=quick, machine=machine, rows=rows, comparisons=comparisons)


def _list(modules: dict[str, ModuleType], *, as_json: bool) -> None:
    if as_json:
        questions = [{"name": name, "question": _question(module)} for name, module in modules.items()]
        show.json_object(verb="bench", benchmarks=questions)
    else:
        show.facts((name, _question(module)) for name, module in modules.items())


def _question(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def _print(name: str, module: ModuleType, rows: list[Row]) -> None:
    from onecopy.benchmarks.harness import figure, verdict

    print(f"{name}: {_question(module)}")
    cells = [
        (row.question, figure(row.ours), row.peer, figure(row.against), row.unit, figure(row.ratio), row.reach, verdict(row))
        for row in rows
    ]
    show.table(("onecopy", ">figure", "peer", ">figure", "unit", ">ratio", "aim", "outcome"), cells)
    for reason in dict.fromkeys(row.skipped for row in rows if row.skipped):
        print(f"skipped: {show.printable(reason)}")
    print(flush=True)
