"""Does cloning a file in many extents take longer than cloning one in a single extent?

The file was made as such files come about: cloned, and every other page of the clone rewritten. It is cloned beside
one that has a single extent and shares nothing. Reported as well: its origin, a single extent whose pages are shared
by halves now, and the kernel's reflink of the same file on XFS.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from onecopy import PAGE
from onecopy.benchmarks import harness
from onecopy.benchmarks.clone import FICLONE, clones, reflinks
from onecopy.benchmarks.harness import MiB, Reach, Row

EXTENTS = 10_000
REACH = Reach("ratio", "at most", 1.3)


def measure(quick: bool) -> list[Row]:
    extents = EXTENTS // 10 if quick else EXTENTS
    rounds = 4 if quick else 40
    data = os.urandom(extents * PAGE)
    with harness.open_pool(256 * MiB) as fs, harness.kernel_filesystem("xfs", 512 * MiB) as xfs:
        fs.write("/one", data)
        fs.write("/origin", data)
        fs.clone("/origin", "/many")
        for page in range(0, extents, 2):
            fs.write("/many", os.urandom(PAGE), page * PAGE)
        many, one = harness.alternate(rounds, lambda: clones(fs, "/many"), lambda: clones(fs, "/one"))
        [origin] = harness.alternate(4, lambda: clones(fs, "/origin", 3))
        runs = len(fs.extents("/many"))
        kernel: list[int] = []
        if root := xfs.root:
            fragment(root, data)
            [kernel] = harness.alternate(4, lambda: reflinks(root / "many", [], 5))
    return [
        harness.row(
            question,
            peer,
            harness.scaled(harness.median(ours), 1e-3),
            harness.scaled(harness.median(theirs), 1e-3),
            "us",
            reach=reach,
            note=harness.spread(1e-3, ours=ours, against=theirs),
            skipped=skipped,
        )
        for question, peer, ours, theirs, reach, skipped in (
            (f"clone of a file of {runs:,} extents", "clone of a file of one extent", many, one, REACH, ""),
            (f"clone of a file of {runs:,} extents", "FICLONE of the same on XFS", many, kernel, None, xfs.missing),
            ("clone of the origin of such a file", "clone of a file of one extent", origin, one, REACH, ""),
        )
    ]


def fragment(root: Path, data: bytes) -> None:
    """Make the same file on a kernel file system."""
    (root / "one").write_bytes(data)
    with open(root / "one", "rb") as source, open(root / "many", "wb", buffering=0) as target:
        fcntl.ioctl(target, FICLONE, source.fileno())
        for page in range(0, len(data) // PAGE, 2):
            os.pwrite(target.fileno(), os.urandom(PAGE), page * PAGE)
    harness.sync(root)


if __name__ == "__main__":
    harness.main(measure)
