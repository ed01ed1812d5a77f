"""How long does cloning a whole tree of files take?

A subvolume holds 5,000 small files. Its snapshot stands against `cp -a --reflink=always` of the same tree on XFS, the
command's own start included, and against a snapshot of the same by Btrfs, the ioctl alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

from onecopy import FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Reach, Row, Timed

FILES, FOLDERS, SIZE = 5_000, 50, 6_000
REACH = Reach("ours", "under", 1)

# <linux/btrfs.h>: number of the ioctl, then what its argument looks like
SUBVOL_CREATE, SNAP_DESTROY, NAME = 0x5000940E, 0x5000940F, struct.Struct("=q4088s")
SNAP_CREATE_V2, SNAPSHOT = 0x50009417, struct.Struct("=q48x4040s")


def measure(quick: bool) -> list[Row]:
    files = FILES // 10 if quick else FILES
    with (
        harness.open_pool(256 * MiB) as fs,
        harness.kernel_filesystem("xfs", 512 * MiB) as xfs,
        harness.kernel_filesystem("btrfs", 512 * MiB) as btrfs,
        harness.folder() as host,
    ):
        tree = host / "tree"
        make_tree(tree, files)
        ours, copied, snapped = harness.alternate(
            2 if quick else 10,
            of_pool(fs, tree),
            of_xfs(xfs.root, tree) if xfs.root else None,
            of_btrfs(btrfs.root, tree) if btrfs.root else None,
        )
    return [
        harness.row(
            f"snapshot of a tree of {files:,} files",
            peer,
            harness.scaled(harness.median(ours), 1e-6),
            harness.scaled(harness.median(theirs), 1e-6),
            "ms",
            reach=REACH,
            note=harness.spread(1e-6, ours=ours, against=theirs),
            skipped=skipped,
        )
        for peer, theirs, skipped in (
            ("cp -a --reflink=always on XFS", copied, xfs.missing),
            ("snapshot on Btrfs", snapped, btrfs.missing),
        )
    ]


def make_tree(root: Path, files: int) -> None:
    """Make so many files of random bytes, in 50 directories."""
    for number in range(FOLDERS):
        (root / str(number)).mkdir(parents=True)
    for number in range(files):
        (root / str(number % FOLDERS) / str(number)).write_bytes(os.urandom(SIZE))


def of_pool(fs: FileSystem, tree: Path) -> Timed:
    """Put the tree into a subvolume; return what snapshots that."""
    fs.create_subvolume("/image")
    fs.put(tree, "/image/tree")

    def run() -> list[int]:
        times = []
        for _ in range(10):
            times.append(harness.nanoseconds(fs.snapshot, "/image", "/copy"))
            fs.delete_subvolume("/copy")
        return times

    return run


def of_xfs(root: Path, tree: Path) -> Timed:
    """Copy the tree to an XFS; return what clones it there."""
    shutil.copytree(tree, root / "tree")
    harness.sync(root)
    command = ["cp", "-a", "--reflink=always", str(root / "tree"), str(root / "copy")]

    def run() -> list[int]:
        took = harness.nanoseconds(lambda: subprocess.run(command, check=True))
        shutil.rmtree(root / "copy")
        return [took]

    return run


def of_btrfs(root: Path, tree: Path) -> Timed:
    """Copy the tree to a subvolume of a Btrfs; return what snapshots that."""

    def run() -> list[int]:
        top, image = (os.open(path, os.O_RDONLY) for path in (root, root / "image"))
        took = harness.nanoseconds(fcntl.ioctl, top, SNAP_CREATE_V2, argument(SNAPSHOT, image, b"copy"))
        fcntl.ioctl(top, SNAP_DESTROY, argument(NAME, 0, b"copy"))
        os.close(image)
        os.close(top)
        return [took]

    top = os.open(root, os.O_RDONLY)
    fcntl.ioctl(top, SUBVOL_CREATE, argument(NAME, 0, b"image"))
    os.close(top)
    shutil.copytree(tree, root / "image" / "tree")
    harness.sync(root)
    return run


def argument(layout: struct.Struct, descriptor: int, name: bytes) -> bytearray:
    """Return an ioctl's argument; mutable, or fcntl takes no more than 1,024 bytes."""
    return bytearray(layout.pack(descriptor, name))


if __name__ == "__main__":
    harness.main(measure)
