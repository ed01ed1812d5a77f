"""How long does cloning a file take, next to the kernel's own reflink?

Both make a new name and let it share a file of one extent; both are called from Python, with two paths. The peer is
FICLONE on XFS: all that it takes (open the source, make the target, the ioctl, close), and the ioctl alone.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from time import perf_counter_ns

from onecopy import FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Reach, Row

FICLONE = 0x40049409
SIZE = 4 * MiB
BATCH = 100  # clones in a run; they are removed after it
REACH = Reach("ratio", "at most", 3)


def measure(quick: bool) -> list[Row]:
    data = os.urandom(SIZE)
    alone: list[int] = []
    with harness.open_pool(64 * MiB) as fs, harness.kernel_filesystem("xfs", 512 * MiB) as xfs:
        fs.write("/base", data)
        if root := xfs.root:
            (root / "base").write_bytes(data)
            harness.sync(root)
        ours, whole = harness.alternate(
            4 if quick else 60, lambda: clones(fs, "/base"), (lambda: reflinks(root / "base", alone)) if root else None
        )
    return [
        harness.row(
            "clone of a file of one extent, the Python call",
            peer,
            harness.scaled(harness.median(ours), 1e-3),
            harness.scaled(harness.median(theirs), 1e-3),
            "us",
            reach=REACH,
            note=harness.spread(1e-3, ours=ours, against=theirs),
            skipped=xfs.missing,
        )
        for peer, theirs in (
            ("FICLONE on XFS into a new file, from Python", whole),
            ("FICLONE on XFS, the ioctl alone", alone),
        )
    ]


def clones(fs: FileSystem, base: str, batch: int = BATCH) -> list[int]:
    """Make clones of a file and remove them; return how long each took to make."""
    times = []
    for number in range(batch):
        start = perf_counter_ns()
        fs.clone(base, f"/clone-{number}")
        times.append(perf_counter_ns() - start)
    for number in range(batch):
        fs.unlink(f"/clone-{number}")
    return times


def reflinks(path: Path, alone: list[int], batch: int = BATCH) -> list[int]:
    """Do the same with the kernel's; the times of the ioctls alone go into `alone`."""
    base, folder, times = str(path), str(path.parent), []
    for number in range(batch):
        start = perf_counter_ns()
        source = os.open(base, os.O_RDONLY)
        target = os.open(f"{folder}/clone-{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        ready = perf_counter_ns()
        fcntl.ioctl(target, FICLONE, source)
        done = perf_counter_ns()
        os.close(target)
        os.close(source)
        times.append(perf_counter_ns() - start)
        alone.append(done - ready)
    for number in range(batch):
        os.unlink(f"{folder}/clone-{number}")
    return times


if __name__ == "__main__":
    harness.main(measure)
