"""How much memory do many processes take that read many clones of one file?

8 processes map 8 clones each of a file of 256 MiB and read every byte. While all hold their mappings, two things are
counted, in copies of the file: the memory below all the mappings, a frame that several share counted once; and what the
pool and its run-time file occupy in /dev/shm, which is all there is of them. One copy is the least that can be. Page
tables come on top: each process has its own, as with any mapping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

import onecopy
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Reach, Row
from onecopy.benchmarks.workers import Pipe, ask, workers
from onecopy.cli import measure as memory

REACH = Reach("ours", "at most", 1.02)


def measure(quick: bool) -> list[Row]:
    processes, clones, size = (2, 2, 32 * MiB) if quick else (8, 8, 256 * MiB)
    with harness.new_pool(size + 64 * MiB) as pool, harness.folder() as host:
        harness.write_random(host / "file", size)
        total = checksum((host / "file").read_bytes())
        with onecopy.open(pool) as fs:
            fs.put(host / "file", "/base")
            for number in range(processes * clones):
                fs.clone("/base", f"/clone-{number}")
            with readers(pool, processes, clones, total) as found:
                occupied = fs.info().backed_bytes + run_time_bytes(fs.info().uuid)
    frames = memory.distinct_bytes(found)
    pss = sum(one.pss + one.pss_rounding for one in found)
    tables = sum(one.page_tables for one in found)
    work = f"{processes} processes x {clones} clones of {onecopy.format_size(size)}, mapped and read"
    return [
        harness.row(f"{work}: {what}", "one copy", taken / size, 1, "copies", reach=REACH, note=note)
        for what, taken, note in (
            (
                "memory below the mappings",
                pss if frames is None else frames,
                f"{'Pss, at most' if frames is None else 'frames, each once'}; page tables of all processes "
                f"{onecopy.format_size(tables)} more",
            ),
            ("pool and run-time file", occupied, "trees and counts included"),
        )
    ]


def run_time_bytes(uuid: str) -> int:
    """Return the memory that a pool's run-time file occupies."""
    return sum(file.stat().st_blocks * 512 for file in Path(harness.SHM).glob(f"onecopy-{uuid}-*"))


@contextmanager
def readers(pool: str, processes: int, clones: int, total: int) -> Iterator[list[memory.Memory]]:
    """Start processes that map and read clones and hold them while the context lasts; give what each of them takes."""
    names = [[f"/clone-{one}" for one in range(number * clones, (number + 1) * clones)] for number in range(processes)]
    with workers(read_clones, [(pool, some, total) for some in names]) as pipes:
        ask(pipes, "map and read")
        yield ask(pipes, "measure")


def read_clones(pipe: Pipe, pool: str, names: list[str], total: int) -> None:
    """Be one of the processes: map and read; measure when told; hold it all until the other end is closed."""
    pipe.recv()
    before = memory.page_tables()
    with onecopy.open(pool, "r") as fs, ExitStack() as held:
        mappings = [held.enter_context(fs.map(name)) for name in names]
        if any(checksum(memoryview(mapping)) != total for mapping in mappings):
            raise ValueError("a clone does not read as its origin")
        pipe.send("ready")
        pipe.recv()
        found = memory.measure([(mapping.address, len(mapping)) for mapping in mappings])
        pipe.send(replace(found, page_tables=found.page_tables - before))
        pipe.recv()


def checksum(content: bytes | memoryview) -> int:
    """Return the sum of all 64-bit words."""
    return int(np.frombuffer(content, np.uint64).sum())


if __name__ == "__main__":
    harness.main(measure)
