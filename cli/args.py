"""The arguments and flags that several verbs share, and how their text is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    import onecopy


class Span(NamedTuple):
    """Part of a file to clone, in bytes: where it starts, how long it is, and where it goes."""

    src_offset: int
    length: int
    dst_offset: int


def span(text: str) -> Span:
    """Read `SRC_OFF:LENGTH[@DST_OFF]`; without DST_OFF the part keeps its offset."""
    from onecopy import parse_size

    source, colon, rest = text.partition(":")
    length, at, destination = rest.partition("@")
    if not colon:
        raise typer.BadParameter(f"{text!r} is not a range; write SRC_OFF:LENGTH[@DST_OFF], such as 0:1M or 4K:1M@64K")
    return Span(parse_size(source), parse_size(length), parse_size(destination if at else source))


def inner(text: str) -> str:
    """Read a path inside the pool, which starts at the pool's root."""
    if not text.startswith("/"):
        raise typer.BadParameter(f"{text!r} is not a path inside the pool; it has to start with '/'")
    return text


def complete_inner(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Offer the names inside the pool that go on from `incomplete`; a pool that can't be read offers none."""
    import onecopy

    parent = incomplete[: incomplete.rfind("/") + 1] or "/"
    try:
        with onecopy.open(ctx.params["pool"], "r") as fs:
            for entry in filter(lambda entry: entry.name.isprintable(), fs.scandir(parent)):
                yield parent + entry.name + ("/" if entry.kind in ("dir", "subvolume") else "")
    except OSError:
        return


def into(fs: onecopy.FileSystem, src: str, dst: str) -> str:
    """Return where `src` goes inside the pool: an existing directory takes it in under its own name, as with mv."""
    import stat

    try:
        mode = fs.stat(dst).st_mode
    except FileNotFoundError:
        return dst
    name = src.rstrip("/").rpartition("/")[2]
    return f"{dst.rstrip('/')}/{name}" if stat.S_ISDIR(mode) and name else dst


def _inside(metavar: str, help_text: str) -> Any:
    return typer.Argument(metavar=metavar, parser=inner, autocompletion=complete_inner, help=help_text)


Pool = Annotated[str, typer.Argument(metavar="POOL", help="The pool file.")]
Inner = Annotated[str, _inside("PATH", "A path inside the pool.")]
Inners = Annotated[list[str], _inside("PATH", "Paths inside the pool.")]
InnersOrAll = Annotated[list[str] | None, _inside("PATH", "Paths inside the pool; everything when left out.")]
InnerSource = Annotated[str, _inside("SRC", "The source inside the pool.")]
InnerTarget = Annotated[str, _inside("DST", "The destination inside the pool.")]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Take directories with all that is in them.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
