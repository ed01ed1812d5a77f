"""How fast are equal pages found and shared, and how much does it free?

1 GiB in 16 files, half of it equal: 8 files are copies of the other 8, or consist of their 64 KiB pieces in another
order. `dedupe` of the pool that holds them, and a sync, stand next to `duperemove -d` of the same files on XFS, as it
comes and with blocks of one page, which is what `dedupe` compares. All compare the bytes before they share them, and
read them from memory. Freed is what the file system says it has more of; for the pool, what `dedupe` reports, with the
pool's own word in the note, since the trees may grow.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter_ns

import onecopy
from onecopy import PAGE, FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import GiB, KiB, MiB, Reach, Row, Timed

FILES, PIECE = 16, 64 * KiB
FASTER = Reach("ratio", "at least", 5)
FREED = Reach("ratio", "at least", 1)
AS_IT_COMES: list[str] = []
BY_PAGE = ["-b", "4096", "--dedupe-options=partial"]
BY_PAGE_ANYWHERE = ["-b", "4096", "--dedupe-options=partial,nofiemap"]


def measure(quick: bool) -> list[Row]:
    size = 64 * MiB if quick else GiB
    rows = []
    for equal, make, options, rounds in (
        ("copies of files", make_copies, (AS_IT_COMES, BY_PAGE), 4),
        ("pieces of 64 KiB in another order", make_pieces, (AS_IT_COMES, BY_PAGE_ANYWHERE), 2),
    ):
        work = f"dedupe of {onecopy.format_size(size)}, half of it {equal}"
        try:
            harness.require_memory(3 * size)
            rows += compare(work, make, size, options, 1 if quick else rounds)
        except harness.SkippedError as reason:
            rows.append(harness.row(work, "duperemove", None, None, "GB/s", reach=FASTER, skipped=str(reason)))
    return rows


def compare(work: str, make: Callable[[Path, int], None], size: int, options: tuple[list[str], ...], rounds: int) -> list[Row]:
    """Measure one input; return rows of speed and of what was freed for each way to call the peer."""
    reported: list[int] = []
    net: list[int] = []
    freed: list[list[int]] = [[] for _ in options]
    with (
        harness.open_pool(size + 256 * MiB) as fs,
        harness.kernel_filesystem("xfs", size + 512 * MiB) as xfs,
        harness.folder() as host,
    ):
        files = host / "files"
        files.mkdir()
        make(files, size)
        program, root = harness.program("duperemove"), xfs.root
        missing = xfs.missing or ("" if program else "duperemove is not installed")
        peers: list[Timed | None] = [
            partial(duperemove, [program, "-r", "-d", *some], files, root, found) if program and root else None
            for some, found in zip(options, freed, strict=True)
        ]
        ours, *theirs = harness.alternate(rounds, partial(dedupe, fs, files, reported, net), *peers)
    rows = []
    for some, times, found in zip(options, theirs, freed, strict=True):
        peer = " ".join(["duperemove -d", *some, "on XFS"])
        speeds = [harness.speed(size, each) for each in (ours, times)]
        note = harness.spread(1e-9, ours_s=ours, against_s=times)
        row = harness.row(work, peer, speeds[0], speeds[1], "GB/s", reach=FASTER, note=note, skipped=missing)
        rows.append(row)
        sizes, note = (in_mib(reported), in_mib(found)), f"the pool has {in_mib(net)} MiB more free"
        row = harness.row(f"{work}: freed", peer, *sizes, "MiB", reach=FREED, note=note, skipped=missing)
        rows.append(row)
    return rows


def in_mib(sizes: list[int]) -> float | None:
    """Return the median size."""
    return harness.scaled(harness.median(sizes), 1 / MiB)


def make_copies(folder: Path, size: int) -> None:
    """Make files with random bytes, and a copy of each."""
    for number in range(FILES // 2):
        harness.write_random(folder / f"{number}", size // FILES)
        shutil.copyfile(folder / f"{number}", folder / f"{number}-copy")


def make_pieces(folder: Path, size: int) -> None:
    """Make files with random bytes, and as many of their pieces, each once, in random order."""
    make_copies(folder, size)
    length = size // FILES
    pieces = [(number, at) for number in range(FILES // 2) for at in range(0, length, PIECE)]
    random.Random(0).shuffle(pieces)
    sources = [(folder / f"{number}").read_bytes() for number in range(FILES // 2)]
    for number in range(FILES // 2):
        with open(folder / f"{number}-copy", "wb") as file:
            for source, at in pieces[number :: FILES // 2]:
                file.write(sources[source][at : at + PIECE])


def dedupe(fs: FileSystem, files: Path, reported: list[int], net: list[int]) -> list[int]:
    """Put the files into the pool, dedupe them and remove them; return how long the second took."""
    fs.put(files, "/files")
    fs.sync()
    before = fs.info().free_pages
    start = perf_counter_ns()
    report = fs.dedupe(apply=True)
    fs.sync()
    took = perf_counter_ns() - start
    reported.append(report.freed_bytes)
    net.append((fs.info().free_pages - before) * PAGE)
    fs.rmtree("/files")
    fs.sync()
    return [took]


def duperemove(words: list[str], files: Path, root: Path, freed: list[int]) -> list[int]:
    """Do the same on a kernel file system with a command."""
    shutil.copytree(files, root / "files")
    harness.sync(root)
    before = os.statvfs(root)
    command = [*words, str(root / "files")]
    took = harness.nanoseconds(partial(subprocess.run, command, check=True, capture_output=True))
    harness.sync(root)
    freed.append((os.statvfs(root).f_bfree - before.f_bfree) * before.f_frsize)
    shutil.rmtree(root / "files")
    return [took]


if __name__ == "__main__":
    harness.main(measure)
