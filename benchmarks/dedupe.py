"""How fast are equal pages found and shared, and how much does it free?

1 GiB in 16 files, of which 8 are copies of the other 8: `dedupe` of the pool that holds them, and a sync, next to
`duperemove -d` of the same files on XFS. Both compare all bytes before they share them, and read them from memory.
What was freed is what the file system says it has more of.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import onecopy
from onecopy import FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import GiB, MiB, Reach, Row

FILES = 16
FASTER = Reach("ratio", "at least", 5)
FREED = Reach("ratio", "at least", 1)
PEER = "duperemove -d on XFS"


def measure(quick: bool) -> list[Row]:
    size = 64 * MiB if quick else GiB
    work = f"dedupe of {onecopy.format_size(size)}, half of it equal"
    freed_ours: list[int] = []
    freed_theirs: list[int] = []
    try:
        harness.require_memory(3 * size)
    except harness.SkippedError as reason:
        return [harness.row(work, PEER, None, None, "GB/s", reach=FASTER, skipped=str(reason))]
    with (
        harness.open_pool(size + 256 * MiB) as fs,
        harness.kernel_filesystem("xfs", size + 512 * MiB) as xfs,
        harness.folder() as host,
    ):
        make_files(host / "files", size)
        program, root = harness.program("duperemove"), xfs.root
        missing = xfs.missing or ("" if program else "duperemove is not installed")
        ours, theirs = harness.alternate(
            1 if quick else 4,
            lambda: [dedupe(fs, host / "files", freed_ours)],
            (lambda: [duperemove(program, host / "files", root, freed_theirs)]) if program and root else None,
        )
    note = harness.spread(1e-9, ours_s=ours, against_s=theirs)
    speeds = harness.speed(size, ours), harness.speed(size, theirs)
    freed = [harness.scaled(harness.median(found), 1 / MiB) for found in (freed_ours, freed_theirs)]
    return [
        harness.row(work, PEER, *speeds, "GB/s", reach=FASTER, note=note, skipped=missing),
        harness.row(f"{work}: freed", PEER, *freed, "MiB", reach=FREED, skipped=missing),
    ]


def make_files(folder: Path, size: int) -> None:
    """Make the files: each with random bytes, and a copy of it."""
    folder.mkdir()
    for number in range(FILES // 2):
        harness.write_random(folder / f"{number}", size // FILES)
        shutil.copyfile(folder / f"{number}", folder / f"{number}-copy")


def dedupe(fs: FileSystem, files: Path, freed: list[int]) -> int:
    """Put the files into the pool, dedupe them and remove them; return how long the second took."""

    def work() -> None:
        fs.dedupe(apply=True)
        fs.sync()

    fs.put(files, "/files")
    fs.sync()
    before = fs.info().free_pages
    took = harness.nanoseconds(work)
    freed.append((fs.info().free_pages - before) * onecopy.PAGE)
    fs.rmtree("/files")
    fs.sync()
    return took


def duperemove(program: str, files: Path, root: Path, freed: list[int]) -> int:
    """Do the same on a kernel file system with `duperemove`."""
    shutil.copytree(files, root / "files")
    os.sync()
    before = os.statvfs(root)
    command = [program, "-r", "-d", str(root / "files")]
    took = harness.nanoseconds(lambda: subprocess.run(command, check=True, capture_output=True))
    os.sync()
    freed.append((os.statvfs(root).f_bfree - before.f_bfree) * before.f_frsize)
    shutil.rmtree(root / "files")
    return took


if __name__ == "__main__":
    harness.main(measure)
