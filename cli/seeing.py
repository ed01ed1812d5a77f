"""Verbs that show where pages are and who shares them: du, extents."""

from __future__ import annotations

from dataclasses import asdict
from stat import S_ISDIR
from typing import TYPE_CHECKING, Annotated

import typer

from onecopy.cli import show
from onecopy.cli.args import Inner, Json, Pool

if TYPE_CHECKING:
    import onecopy

verbs = typer.Typer()


@verbs.command(epilog="Example: onecopy du /dev/shm/p.pool /models")
def du(
    pool: Pool,
    path: Inner = "/",
    *,
    raw: Annotated[bool, typer.Option("--bytes", help="Write sizes as plain numbers of bytes.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each direct child of a directory takes up, largest first, and the whole.

    Logical is what the files claim to hold. Unique is what removing the path would free, shared is what others have
    too, and total counts each page once, however many files have it.
    """
    import onecopy

    with onecopy.open(pool, "r") as fs:
        whole = fs.du(path)
        children = fs.du_each(path) if S_ISDIR(fs.stat(path).st_mode) else []
    children.sort(key=lambda usage: usage.total, reverse=True)
    if as_json:
        show.json_object(verb="du", **_usage(whole), children=[_usage(child) for child in children])
        return
    rows = [
        (*(show.size(count, raw=raw) for count in (usage.logical, usage.unique, usage.shared, usage.total)), usage.path)
        for usage in (*children, whole)
    ]
    show.table((">logical", ">unique", ">shared", ">total", "path"), rows)


def _usage(usage: onecopy.Usage) -> dict[str, object]:
    return asdict(usage) | {"total": usage.total}


@verbs.command(epilog="Example: onecopy extents /dev/shm/p.pool /base.npy --png base.png")
def extents(
    pool: Pool,
    path: Inner,
    *,
    png: Annotated[str | None, typer.Option("--png", metavar="FILE", help="Also draw the runs into this picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show each run of a file: its page in the file, its PFN, how many pages, how many share it, and its state."""
    import onecopy

    with onecopy.open(pool, "r") as fs:
        runs = fs.extents(path)
    if png:
        from onecopy.cli.draw import draw_extents

        draw_extents(runs, path, png)
    if as_json:
        show.json_object(verb="extents", path=path, png=png, extents=[asdict(run) for run in runs])
    else:
        rows = [(run.file_page, run.pfn if run.pfn else "-", run.pages, run.sharers, run.state) for run in runs]
        show.table((">file page", ">pfn", ">pages", ">sharers", "state"), rows)
