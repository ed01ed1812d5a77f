"""The verb `demo`, the main job: clones of real data, mapped by many processes, and what they cost in memory."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecopy.cli import errors, show
from onecopy.cli.args import Json

if TYPE_CHECKING:
    from onecopy.cli.demo_report import Report

SHARED_MEMORY = "/dev/shm"


def register(app: typer.Typer) -> None:
    """Add the verb to the program."""
    app.command(epilog="Example: onecopy demo --input weights.npy --clones 16 --png weights.png")(demo)


def demo(
    *,
    source: Annotated[
        str | None,
        typer.Option("--input", metavar="PATH", help="Clone this file or tree, not Python's own library and an array."),
    ] = None,
    size: Annotated[str, typer.Option(metavar="SIZE", help="Of the array that is made without --input.")] = "256M",
    processes: Annotated[int, typer.Option(min=1, help="How many processes map clones.")] = 8,
    clones: Annotated[int, typer.Option(min=1, help="How many clones; at least one for each process.")] = 8,
    pool: Annotated[
        str | None, typer.Option(metavar="POOL", help=f"Where to make the pool; by default in {SHARED_MEMORY}.")
    ] = None,
    png: Annotated[str, typer.Option(metavar="FILE", help="Where the picture goes; '' for none.")] = "onecopy-demo.png",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the pool, for a look at what is in it.")] = False,
    as_json: Json = False,
) -> None:
    """Clone real data, map the clones in many processes, and measure: one copy in memory, whoever reads.

    Each process maps clones of its own, hashes what it reads, and rewrites one page in a hundred; every byte of every
    clone is then verified. Plain copies do the same beside it and, where root can mount an XFS, the kernel's reflinks.
    All that was made is removed at the end, but for the picture.
    """
    if clones < processes:
        raise typer.BadParameter(f"{processes} processes need a clone each; there are {clones}", param_hint="--clones")
    if png and not os.access(os.path.dirname(os.path.abspath(png)), os.W_OK):
        raise typer.BadParameter(f"a picture can't be written to {png}", param_hint="--png")
    with _ended_by_sigterm():
        report = _compare(source, size, clones, processes, pool, keep=keep)
        if png:
            report.draw_png(png)
    if as_json:
        report.print_json()
    else:
        report.print_text()
    if not report.ok:
        raise typer.Exit(errors.FINDINGS)


def _compare(source: str | None, size: str, clones: int, processes: int, pool: str | None, *, keep: bool) -> Report:
    """Take the input and try the three ways, one after the other; what they made is gone at the end."""
    import onecopy
    from onecopy.cli import demo_input, demo_ways
    from onecopy.cli.demo_report import Report
    from onecopy.cli.demo_work import Clone, check_mappable

    start = time.monotonic()
    numbered = [Clone(f"clone-{number}", number) for number in range(1, clones + 1)]
    directory = os.path.dirname(os.path.abspath(pool)) if pool else SHARED_MEMORY
    with _scratch(directory) as scratch, _removed(pool or f"{scratch}.pool", keep=keep) as place:
        if source and scratch.resolve().is_relative_to(Path(source).resolve()):
            raise typer.BadParameter(f"the pool can't lie below {source}, which it is to hold", param_hint="--pool")
        with show.progress("read the input and hash it"):
            if source is None:
                array_size = onecopy.parse_size(size)
                demo_ways.require_memory(array_size, scratch)
                data = demo_input.default_input(scratch, array_size)
            else:
                data = demo_input.named_input(source)
        check_mappable(len(data.files) * -(-clones // processes))
        demo_ways.require_memory(demo_ways.pool_need(data, clones), scratch)
        job = (data, numbered, processes)
        ways = [
            demo_ways.plain_copies(*job, scratch, show.progress),
            demo_ways.kernel_clones(*job, scratch, show.progress),
            demo_ways.pool_clones(*job, place, show.progress),
        ]
    return Report(data, ways, clones, processes, place if keep else None, time.monotonic() - start)


@contextmanager
def _scratch(directory: str) -> Iterator[Path]:
    """Make a directory for as long as the context lasts."""
    from onecopy.cli.demo_ways import uninterrupted

    path = Path(tempfile.mkdtemp(prefix="onecopy_demo_", dir=directory))
    try:
        yield path
    finally:
        with uninterrupted():
            shutil.rmtree(path)


@contextmanager
def _removed(pool: str, *, keep: bool) -> Iterator[str]:
    """Remove the pool that the context makes, unless it is to be kept.

    Raises FileExistsError when there is something of that name already; that stays.
    """
    import onecopy
    from onecopy.cli.demo_ways import uninterrupted

    if os.path.lexists(pool):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), pool)
    try:
        yield pool
    finally:
        if os.path.exists(pool) and not keep:
            with uninterrupted():
                onecopy.remove(pool)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the program by way of an exception, as Ctrl-C does, so that what was made is removed."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
