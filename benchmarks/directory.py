"""Do names cost more when there are more of them?

Two pools hold 10,000 and 1,000,000 small files, in as many directories as each directory has files (100 and 1,000).
The same operations run in both in turn, on names chosen at random: create (and remove) a file, stat one, look one up
that is there or is not, and list a directory, per name in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from onecopy import FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import GiB, MiB, Reach, Row

SMALL, LARGE = 100, 1_000  # directories, and files in each
BATCH = 200  # operations in a run
REACH = Reach("ratio", "at most", 2)

Operation = Callable[["Tree"], list[int]]


class Tree:
    """A tree of files in a pool: so many directories, with so many files in each."""

    def __init__(self, fs: FileSystem, width: int) -> None:
        self.fs, self.width = fs, width
        self.random = random.Random(0)

    def fill(self) -> None:
        """Make all directories and files."""
        for folder in range(self.width):
            self.fs.mkdir(f"/{folder}")
            for number in range(self.width):
                self.fs.create(f"/{folder}/{number}")

    def folder(self) -> str:
        """Return one of the directories."""
        return f"/{self.random.randrange(self.width)}"

    def file(self) -> str:
        """Return one of the files."""
        return f"{self.folder()}/{self.random.randrange(self.width)}"


def create(tree: Tree) -> list[int]:
    """Create new files in directories anywhere, then remove them."""
    fs, paths = tree.fs, [f"{tree.folder()}/new-{number}" for number in range(BATCH)]
    times = [harness.nanoseconds(fs.create, path) for path in paths]
    for path in paths:
        fs.unlink(path)
    return times


def stat(tree: Tree) -> list[int]:
    """Read the status of files anywhere."""
    fs = tree.fs
    return [harness.nanoseconds(fs.stat, tree.file()) for _ in range(BATCH)]


def look_up(tree: Tree) -> list[int]:
    """Ask for names anywhere, of which every other one is there."""
    fs, ends = tree.fs, ("", "-missing")
    paths = [tree.file() + ends[number % 2] for number in range(BATCH)]
    return [harness.nanoseconds(fs.exists, path) for path in paths]


def listing(tree: Tree) -> list[int]:
    """List a directory; per name in it."""
    fs, path = tree.fs, tree.folder()
    return [harness.nanoseconds(fs.listdir, path) // tree.width]


def measure(quick: bool) -> list[Row]:
    widths = (10, 32) if quick else (SMALL, LARGE)
    rounds = 4 if quick else 40
    size = 64 * MiB if quick else 4 * GiB
    with harness.open_pool(size) as first, harness.open_pool(size) as second:
        small, large = Tree(first, widths[0]), Tree(second, widths[1])
        small.fill()
        large.fill()
        found = {
            name: harness.alternate(rounds, partial(work, large), partial(work, small))
            for name, work in (("create", create), ("stat", stat), ("look up", look_up), ("list, per name", listing))
        }
    return [
        harness.row(
            f"{name} in a tree of {widths[1] ** 2:,} files",
            f"the same in a tree of {widths[0] ** 2:,}",
            harness.scaled(harness.median(ours), 1e-3),
            harness.scaled(harness.median(theirs), 1e-3),
            "us",
            reach=REACH,
            note=harness.spread(1e-3, ours=ours, against=theirs),
        )
        for name, (ours, theirs) in found.items()
    ]


if __name__ == "__main__":
    harness.main(measure)
