"""How fast does a large file come into a pool?

`put` of a file of 1 GiB, next to `cp` of the same into a file system in memory. Source, pool and copy all lie in
/dev/shm; each run fills memory that was given back before it, as the command does.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from onecopy import FileSystem, format_size
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import GiB, MiB, Reach, Row

REACH = Reach("ratio", "at least", 0.7)


def measure(quick: bool) -> list[Row]:
    size = 32 * MiB if quick else GiB
    question, peer = f"put of {format_size(size)}", "cp into tmpfs"
    try:
        harness.require_memory(3 * size)
    except harness.SkippedError as reason:
        return [harness.row(question, peer, None, None, "GB/s", reach=REACH, skipped=str(reason))]
    with harness.open_pool(2 * size + 64 * MiB) as fs, harness.folder() as host:
        source = host / "source"
        harness.write_random(source, size)
        ours, theirs = harness.alternate(2 if quick else 8, lambda: [put(fs, source)], lambda: [copy(source)])
    note = harness.spread(1e-6, ours_ms=ours, against_ms=theirs)
    return [harness.row(question, peer, harness.speed(size, ours), harness.speed(size, theirs), "GB/s", reach=REACH, note=note)]


def put(fs: FileSystem, source: Path) -> int:
    """Put the file into the pool and remove it; return how long the first took."""
    took = harness.nanoseconds(fs.put, source, "/file")
    fs.unlink("/file")
    fs.sync()
    return took


def copy(source: Path) -> int:
    """Copy the file beside itself and remove the copy; return how long the first took."""
    target = source.with_name("copy")
    took = harness.nanoseconds(lambda: subprocess.run(["cp", source, target], check=True))
    target.unlink()
    return took


if __name__ == "__main__":
    harness.main(measure)
