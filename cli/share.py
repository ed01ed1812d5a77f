"""Verbs that make files share pages: clone, snapshot, dedupe."""

from __future__ import annotations

import stat
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from onecopy.cli import show
from onecopy.cli.args import InnersOrAll, InnerSource, InnerTarget, Json, Pool, Recursive, Span, into, span

if TYPE_CHECKING:
    import onecopy

verbs = typer.Typer()


@verbs.command(epilog="Example: onecopy clone /dev/shm/p.pool /base.npy /run1.npy")
def clone(
    pool: Pool,
    src: InnerSource,
    dst: InnerTarget,
    *,
    recursive: Recursive = False,
    part: Annotated[
        Span | None,
        typer.Option(
            "--range",
            parser=span,
            metavar="SRC_OFF:LENGTH[@DST_OFF]",
            help="Only these bytes, into a file that may be there already; 0 is up to the end. Without @: to SRC_OFF.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Clone a file, or with -r a directory tree. No byte is copied: both sides share the pages until one writes.

    A whole file costs the same whatever its size and number of extents, and so does a subvolume. Part of a file:
    onecopy clone /dev/shm/p.pool /base.npy /run1.npy --range 4K:1M@64K
    """
    import onecopy

    if part and recursive:
        raise typer.BadParameter("--range takes part of one file; leave out -r")
    with onecopy.open(pool) as fs:
        dst = into(fs, src, dst)
        if part:
            _clone_part(fs, src, dst, part)
        elif recursive and stat.S_ISDIR(fs.lstat(src).st_mode):
            with show.progress("clone") as progress:
                fs.clone_tree(src, dst, progress=progress)
        else:
            fs.clone(src, dst)
    if as_json:
        show.json_object(verb="clone", src=src, dst=dst, range=part and part._asdict())


def _clone_part(fs: onecopy.FileSystem, src: str, dst: str, part: Span) -> None:
    made = not fs.exists(dst)
    fs.create(dst)
    try:
        fs.clone_range(src, part.src_offset, dst, part.dst_offset, part.length)
    except BaseException:
        if made:
            fs.unlink(dst)
        raise


@verbs.command(epilog="Example: onecopy snapshot /dev/shm/p.pool /images /images-before")
def snapshot(pool: Pool, src: InnerSource, dst: InnerTarget, *, as_json: Json = False) -> None:
    """Clone a subvolume whole, in one step, whatever it holds."""
    import onecopy

    with onecopy.open(pool) as fs:
        dst = into(fs, src, dst)
        fs.snapshot(src, dst)
    if as_json:
        show.json_object(verb="snapshot", src=src, dst=dst)


@verbs.command(epilog="Example: onecopy dedupe /dev/shm/p.pool /models --apply")
def dedupe(
    pool: Pool,
    paths: InnersOrAll = None,
    *,
    apply: Annotated[bool, typer.Option("--apply", help="Share equal pages, each pair compared under a lock first.")] = False,
    as_json: Json = False,
) -> None:
    """Find equal pages, and say exactly what sharing them would free. Nothing changes without --apply."""
    import onecopy

    with onecopy.open(pool, "r+" if apply else "r") as fs, show.progress("dedupe") as progress:
        report = fs.dedupe(paths or ["/"], apply=apply, progress=progress)
    if as_json:
        show.json_object(verb="dedupe", **asdict(report))
    else:
        _show_report(report)


def _show_report(report: onecopy.DedupeReport) -> None:
    if report.files:
        show.table((">duplicate", "file"), [(show.size(file.duplicate_bytes), file.path) for file in report.files])
        print()
    print(
        f"{report.duplicate_pages:,} of {report.scanned_pages:,} pages are duplicates, in {report.groups:,} groups; "
        f"{report.zero_pages:,} hold only zeros"
    )
    if report.skipped:
        print(f"{report.skipped:,} pairs changed meanwhile and were left alone")
    verb = "freed" if report.applied else "would free"
    print(f"{verb} {show.size(report.freed_bytes)} ({report.freed_bytes:,} bytes)")
    if report.freed_bytes and not report.applied:
        print("nothing was changed; add --apply to share them")
