"""Verbs that do in a pool what their namesakes do on the host: ls, stat, mkdir, mv, rm, ln."""

from __future__ import annotations

import stat as modes
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onecopy.cli import show
from onecopy.cli.args import Inner, Inners, InnerSource, InnerTarget, Json, Pool, Recursive, into

if TYPE_CHECKING:
    import onecopy

verbs = typer.Typer()

KINDS = {modes.S_IFREG: "file", modes.S_IFDIR: "dir", modes.S_IFLNK: "symlink"}
NUMBERS = ("ino", "dev", "mode", "nlink", "uid", "gid", "size", "blocks", "blksize", "atime_ns", "mtime_ns", "ctime_ns")


@verbs.command(epilog="Example: onecopy ls -l /dev/shm/p.pool /models")
def ls(
    pool: Pool,
    path: Inner = "/",
    *,
    long: Annotated[bool, typer.Option("--long", "-l", help="Also mode, links, owner, size and time.")] = False,
    as_json: Json = False,
) -> None:
    """List a directory, or one file."""
    import onecopy

    with onecopy.open(pool, "r") as fs:
        listed = list(_listed(fs, path, long=long))
    if as_json:
        show.json_object(verb="ls", path=path, entries=listed)
    elif long:
        show.table(("mode", ">links", ">uid", ">gid", ">size", "modified", "name"), map(_long_row, listed))
    else:
        for entry in listed:
            print(show.printable(entry["name"]))


def _listed(fs: onecopy.FileSystem, path: str, *, long: bool) -> Iterator[dict[str, Any]]:
    if not (fs.exists(path) and modes.S_ISDIR(fs.stat(path).st_mode)):
        yield {"name": path, **_described(fs, path)}
        return
    for entry in fs.scandir(path):
        found = {"name": entry.name, "kind": entry.kind, "ino": entry.ino}
        with suppress(FileNotFoundError):  # somebody may remove it while we list
            yield _described(fs, f"{path.rstrip('/')}/{entry.name}") | found if long else found


def _described(fs: onecopy.FileSystem, path: str) -> dict[str, Any]:
    status = fs.lstat(path)
    kind = KINDS[modes.S_IFMT(status.st_mode)]
    numbers = {name: getattr(status, f"st_{name}") for name in NUMBERS}
    return {"kind": kind, **numbers} | ({"target": fs.readlink(path)} if kind == "symlink" else {})


def _long_row(entry: dict[str, Any]) -> tuple[object, ...]:
    name = entry["name"] + (f" -> {entry['target']}" if "target" in entry else "")
    when = show.when(entry["mtime_ns"])
    return (modes.filemode(entry["mode"]), *(entry[key] for key in ("nlink", "uid", "gid", "size")), when, name)


@verbs.command(epilog="Example: onecopy stat /dev/shm/p.pool /notes")
def stat(pool: Pool, path: Inner, *, as_json: Json = False) -> None:
    """Show the inode of a name. A symbolic link is not followed."""
    import onecopy

    with onecopy.open(pool, "r") as fs:
        found = _described(fs, path)
    if as_json:
        show.json_object(verb="stat", path=path, **found)
        return
    mode = found["mode"]
    times = {key.removesuffix("_ns"): show.when(found.pop(key)) for key in ("atime_ns", "mtime_ns", "ctime_ns")}
    show.facts([("path", path), *(found | {"mode": f"{modes.S_IMODE(mode):04o} {modes.filemode(mode)}"} | times).items()])


@verbs.command(epilog="Example: onecopy mkdir -p /dev/shm/p.pool /models/2026")
def mkdir(
    pool: Pool,
    paths: Inners,
    *,
    parents: Annotated[
        bool, typer.Option("--parents", "-p", help="Make missing parents, and accept what is there already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make directories."""
    import onecopy

    with onecopy.open(pool) as fs:
        for path in paths:
            fs.mkdir(path, parents=parents, exist_ok=parents)
    if as_json:
        show.json_object(verb="mkdir", paths=paths)


@verbs.command(epilog="Example: onecopy mv /dev/shm/p.pool /notes /models")
def mv(pool: Pool, src: InnerSource, dst: InnerTarget, *, as_json: Json = False) -> None:
    """Rename, or move into an existing directory. A file that is there is replaced, in one step."""
    import onecopy

    with onecopy.open(pool) as fs:
        dst = into(fs, src, dst)
        fs.rename(src, dst)
    if as_json:
        show.json_object(verb="mv", src=src, dst=dst)


@verbs.command(epilog="Example: onecopy rm -r /dev/shm/p.pool /models/2025")
def rm(pool: Pool, paths: Inners, *, recursive: Recursive = False, as_json: Json = False) -> None:
    """Remove names. Pages that a clone still has stay with the clone."""
    import onecopy

    with onecopy.open(pool) as fs:
        for path in paths:
            if recursive and modes.S_ISDIR(fs.lstat(path).st_mode):
                with show.progress("rm") as progress:
                    fs.rmtree(path, progress=progress)
            else:
                fs.unlink(path)
    if as_json:
        show.json_object(verb="rm", paths=paths)


@verbs.command(epilog="Example: onecopy ln -s /dev/shm/p.pool ../base.npy /models/base.npy")
def ln(
    pool: Pool,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="What the new name leads to.")],
    link: InnerTarget,
    *,
    symbolic: Annotated[bool, typer.Option("--symbolic", "-s", help="Make a symbolic link to TARGET, as written.")] = False,
    as_json: Json = False,
) -> None:
    """Give a file one more name, or make a symbolic link."""
    import onecopy

    with onecopy.open(pool) as fs:
        link = into(fs, target, link)
        if symbolic:
            fs.symlink(target, link)
        else:
            fs.link(target, link)
    if as_json:
        show.json_object(verb="ln", target=target, link=link, symbolic=symbolic)
