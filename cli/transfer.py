"""Verbs that move bytes between the host and a pool: put, get, cat."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from onecopy.cli import show
from onecopy.cli.args import Inners, InnerSource, InnerTarget, Json, Pool, into

CHUNK = 1 << 20

verbs = typer.Typer()


@verbs.command(epilog="Example: onecopy put /dev/shm/p.pool weights.npy /base.npy")
def put(
    pool: Pool,
    src: Annotated[str, typer.Argument(metavar="SRC", help="A file or directory of the host.")],
    dst: InnerTarget,
    *,
    as_json: Json = False,
) -> None:
    """Copy a file or a whole tree into the pool; holes stay holes."""
    import onecopy

    with onecopy.open(pool) as fs, show.progress("put") as progress:
        dst = into(fs, os.path.abspath(src), dst)
        fs.put(src, dst, progress=progress)
    if as_json:
        show.json_object(verb="put", src=src, dst=dst)


@verbs.command(epilog="Example: onecopy get /dev/shm/p.pool /base.npy copy.npy")
def get(
    pool: Pool,
    src: InnerSource,
    dst: Annotated[str, typer.Argument(metavar="DST", help="Where it goes on the host.")],
    *,
    as_json: Json = False,
) -> None:
    """Copy a file or a whole tree out of the pool; holes stay holes."""
    import onecopy

    name = src.rstrip("/").rpartition("/")[2]
    if Path(dst).is_dir():
        dst = os.path.join(dst, name)
    with onecopy.open(pool, "r") as fs, show.progress("get") as progress:
        fs.get(src, dst, progress=progress)
    if as_json:
        show.json_object(verb="get", src=src, dst=dst)


@verbs.command(epilog="Example: onecopy cat /dev/shm/p.pool /notes | less")
def cat(pool: Pool, paths: Inners, *, as_json: Json = False) -> None:
    """Write the bytes of files to stdout, one file after the other; with --json as base64."""
    import base64

    import onecopy

    with onecopy.open(pool, "r") as fs:
        if as_json:
            files = [{"path": path, "base64": base64.b64encode(fs.read(path)).decode()} for path in paths]
            show.json_object(verb="cat", files=files)
            return
        for path in paths:
            offset = 0
            while chunk := fs.read(path, offset, CHUNK):
                sys.stdout.buffer.write(chunk)
                offset += len(chunk)
