"""Verbs about a pool as a whole: format, info, check."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from onecopy.cli import errors, show
from onecopy.cli.args import Json, Pool

if TYPE_CHECKING:
    import onecopy

verbs = typer.Typer()


@verbs.command("format", epilog="Example: onecopy format /dev/shm/p.pool --size 8G")
def format_pool(
    pool: Pool,
    *,
    size: Annotated[str, typer.Option(metavar="SIZE", help="Bytes, or a number with K, M, G or T.")] = "8G",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there, with all it holds.")] = False,
    device: Annotated[
        str,
        typer.Option(metavar="KIND", help="'direct': the pool's pages are memory; 'cached': it can only be read and written."),
    ] = "direct",
    cache_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="How much of a cached pool may be in memory; 64M when left out.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="Of the cache: 'shared', each block once; 'per-inode', each file's pages, as kernels do."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an empty pool. The file is sparse: a page takes up room once something is written to it."""
    import onecopy

    _show_info("format", onecopy.format(pool, size, force=force, device=device, cache_size=cache_size, policy=policy), as_json=as_json)


@verbs.command(epilog="Example: onecopy info /dev/shm/p.pool")
def info(pool: Pool, *, as_json: Json = False) -> None:
    """Show what a pool holds, how full it is, and who has it open."""
    import onecopy

    with onecopy.open(pool, "r") as fs:
        found = fs.info()
    _show_info("info", found, as_json=as_json)
    if not as_json:
        print()
        rows = [(user.pid, user.slot, show.when(user.opened), user.program) for user in found.users]
        show.table((">pid", ">slot", "opened", "program"), rows)


def _show_info(verb: str, info: onecopy.PoolInfo, *, as_json: bool) -> None:
    if as_json:
        show.json_object(verb=verb, pool=asdict(info))
        return

    def pages(count: int) -> str:
        return f"{count:,} pages, {show.size(count * info.page_size)}"

    show.facts(
        [
            ("pool", info.path),
            ("uuid", info.uuid),
            ("size", pages(info.pages)),
            ("used", pages(info.used_pages)),
            ("free", pages(info.free_pages)),
            ("freed, not yet reusable", pages(info.waiting_pages)),
            ("kept for mappings of deleted files", pages(info.pinned_pages)),
            ("stored through mappings, not folded", pages(info.dirty_pages)),
            ("backed by the host", show.size(info.backed_bytes)),
            ("generation", f"{info.generation}, on the device {info.durable_generation}"),
            ("subvolumes", info.subvolumes),
            ("stores to shared pages", f"{info.faults:,}"),
            ("shootdowns", _shootdowns(info)),
        ]
    )


def _shootdowns(info: onecopy.PoolInfo) -> str:
    if not info.shootdowns:
        return "0"
    return f"{info.shootdowns:,}, median {info.shootdown_median_us:g} us, 99 % within {info.shootdown_p99_us:g} us"


@verbs.command(epilog="Example: onecopy check /dev/shm/p.pool || echo damaged")
def check(pool: Pool, *, as_json: Json = False) -> None:
    """Recount everything in a pool; exit with status 1 when something is wrong with it.

    It also reads a damaged pool that the other verbs refuse to open.
    """
    import onecopy

    report = onecopy.check(pool)
    if as_json:
        findings = [asdict(finding) | {"message": finding.message} for finding in report.findings]
        show.json_object(verb="check", ok=report.ok, findings=findings, counted=report.counted)
    elif report.ok:
        print(f"{show.printable(pool)}: no findings")
        show.table(("counted", ">number"), report.counted.items())
    else:
        show.table(("code", ">pfn", "message"), [(found.code, found.pfn, found.message) for found in report.findings])
    if not report.ok:
        raise typer.Exit(errors.FINDINGS)
