"""The verb `stress`: processes that store, clone, cut, map, fork and die on the same files, and every page they see checked."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from onecopy.cli import errors
from onecopy.cli.args import Json

if TYPE_CHECKING:
    from onecopy.cli.stress_end import Report
    from onecopy.cli.stress_work import Job

_SECONDS = 10.0  # where neither time nor operations are given


def register(app: typer.Typer) -> None:
    """Add the verb to the program."""
    app.command(epilog="Example: onecopy stress --seconds 60 --processes 8 --kill")(stress)


def stress(
    pool: Annotated[
        str | None, typer.Argument(metavar="POOL", help="The pool file; one is made in /dev/shm, and removed, when left out.")
    ] = None,
    *,
    processes: Annotated[int, typer.Option(min=1, max=32, help="How many processes work at the same time.")] = 4,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="How long; 10 when --operations isn't given either.")] = None,
    operations: Annotated[int | None, typer.Option(min=1, help="How many operations, of all processes together.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="What is done follows from it; random, and printed, when left out.")
    ] = None,
    size: Annotated[str, typer.Option(metavar="SIZE", help="Of the pool that is made.")] = "256M",
    kill: Annotated[bool, typer.Option("--kill", help="Kill processes all the time, anywhere, and start others.")] = False,
    mapped: Annotated[bool, typer.Option(help="Store and load through mappings, too; without, by calls alone.")] = True,
    only: Annotated[str | None, typer.Option(metavar="KIND,...", help="Only these operations, such as store,clone.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY", help="Of the pool that is made: 'dax', or, through a buffer cache, 'shared' or 'per-inode'."
        ),
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="How much of the pool that is made may be in memory; 64M when left out.")
    ] = None,
    patience: Annotated[float, typer.Option(min=1, help="Seconds without progress after which a process counts as hung.")] = 60,
    as_json: Json = False,
) -> None:
    """Let many processes work on the same few files, and check every page that any of them sees.

    They store through mappings and by calls, clone files and ranges, deduplicate, truncate, punch, rename over each
    other's files, fork. Every page says who stored it, and memory that all share says what each page may hold at any
    moment. A store that is lost, a page that is torn, a byte that gets from one file into another is found where it is
    first seen, and the rule (S1 to S8) is named, with the last operations on that page. At the end all is verified.

    In POOL the work goes on in a new directory, which is removed at the end.
    """
    from onecopy.benchmarks.harness import ended_by_sigterm
    from onecopy.cli import stress_work

    kinds = _kinds(only, mapped=mapped)
    seed = secrets.randbits(32) if seed is None else seed
    seconds = _SECONDS if seconds is operations is None else seconds
    with ended_by_sigterm(), _pool(pool, size, policy, cache_size) as path:
        directory = f"/stress-{secrets.token_hex(4)}"
        job = stress_work.Job(path, directory, seed, processes, operations, kill, kinds)
        report = _run(job, seconds, patience)
        if as_json:
            report.print_json()
        else:
            report.print_text()
    if not report.ok:
        raise typer.Exit(errors.FINDINGS)


def _kinds(only: str | None, *, mapped: bool) -> frozenset[str]:
    """Return the kinds of operation that are asked for."""
    from onecopy.cli.stress_ops import MAPPED, WEIGHTS

    kinds = frozenset(WEIGHTS if only is None else only.split(","))
    if unknown := sorted(kinds.difference(WEIGHTS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(WEIGHTS)}", param_hint="--only")
    return kinds if mapped else kinds.difference(MAPPED)


@contextmanager
def _pool(pool: str | None, size: str, policy: str | None, cache_size: str | None) -> Iterator[str]:
    """Make a pool where none is named; of one that is, the policy and the cache are as it was formatted."""
    import onecopy
    from onecopy.benchmarks.harness import new_pool

    if pool is not None:
        for value, option in ((policy, "--policy"), (cache_size, "--cache-size")):
            if value is not None:
                raise typer.BadParameter("only of a pool that is made here; this one has been formatted", param_hint=option)
        yield pool
        return
    device = "direct" if policy in (None, "dax") and cache_size is None else "cached"
    with new_pool(onecopy.parse_size(size), device=device, cache_size=cache_size, policy=policy) as path:
        yield path


def _run(job: Job, seconds: float | None, patience: float) -> Report:
    """Do all of it on a pool, in a directory that is gone afterwards."""
    from onecopy.cli.stress_board import Board
    from onecopy.cli.stress_end import make_report
    from onecopy.cli.stress_hands import FILES, PAGES, lay_out
    from onecopy.cli.stress_team import Team

    with Board(2 * job.processes + 1, FILES + job.processes // 2, PAGES) as board:
        with Team(board, job, patience) as team:
            lay_out(board, job.pool, job.directory, job.seed)
            started = time.monotonic()
            team.run(seconds)
            elapsed = time.monotonic() - started
            info = team.end()
        return make_report(board, job, elapsed, info, team.found)
