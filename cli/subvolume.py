"""The verbs `subvolume create`, `subvolume list` and `subvolume delete`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from onecopy.cli import show
from onecopy.cli.args import Inner, Json, Pool

subvolume = typer.Typer(help="Make, list and delete subvolumes: trees that are cloned whole.")
verbs = typer.Typer()
verbs.add_typer(subvolume, name="subvolume")


@subvolume.command(epilog="Example: onecopy subvolume create /dev/shm/p.pool /images")
def create(pool: Pool, path: Inner, *, as_json: Json = False) -> None:
    """Make an empty subvolume."""
    import onecopy

    with onecopy.open(pool) as fs:
        fs.create_subvolume(path)
    if as_json:
        show.json_object(verb="subvolume create", path=path)


@subvolume.command("list", epilog="Example: onecopy subvolume list /dev/shm/p.pool")
def list_all(pool: Pool, *, as_json: Json = False) -> None:
    """List the subvolumes of a pool."""
    import onecopy

    with onecopy.open(pool, "r") as fs:
        found = fs.list_subvolumes()
    if as_json:
        show.json_object(verb="subvolume list", subvolumes=[asdict(one) for one in found])
    else:
        rows = [(one.id, one.parent, one.origin or "-", one.inodes, show.when(one.created), one.path) for one in found]
        show.table((">id", ">parent", ">origin", ">inodes", "created", "path"), rows)


@subvolume.command(epilog="Example: onecopy subvolume delete /dev/shm/p.pool /images-before")
def delete(pool: Pool, path: Inner, *, as_json: Json = False) -> None:
    """Delete a subvolume with all that is in it. Clones and snapshots of it stay whole."""
    import onecopy

    with onecopy.open(pool) as fs:
        fs.delete_subvolume(path)
    if as_json:
        show.json_object(verb="subvolume delete", path=path)
