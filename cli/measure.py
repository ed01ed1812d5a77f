"""Physical memory, measured: which frames of the machine's memory some address ranges of this process occupy.

Two sources, both the kernel's own. The frame numbers in /proc/self/pagemap are exact, and their union over several
processes counts a shared frame once; but they are shown to root only. Pss in /proc/self/smaps is there for everybody:
each page divided by the number of its mappings, so that the sum over all processes that map it is one. The kernel
rounds Pss down to whole KiB per mapped area, which matters for thousands of small files: `Memory.pss_rounding` says
by how much at most.

Nothing here knows onecopy. What it deliberately leaves to the caller: to touch the pages first, since memory that
no process has touched through a range isn't counted there.
"""

import bisect
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE = os.sysconf("SC_PAGE_SIZE")
PRESENT = np.uint64(1 << 63)  # pagemap: the page is in memory
FRAME = np.uint64((1 << 55) - 1)  # pagemap: the frame number's bits
AREA = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .*?^Pss: +(\d+) kB", re.MULTILINE | re.DOTALL)

Range = tuple[int, int]
"""An address range of this process: (first address, length), in bytes."""

Frames = NDArray[np.uint64]


@dataclass(frozen=True)
class Memory:
    """What some address ranges of one process occupy, in bytes; `frames` are frame numbers, each once, ascending."""

    pss: int
    pss_rounding: int  # the true Pss is less than this much above `pss`
    frames: Frames | None  # None: the kernel hides frame numbers from this process
    page_tables: int  # of the whole process


def measure(ranges: Sequence[Range]) -> Memory:
    """Measure the memory below address ranges of this process; they don't overlap.

    Raises OSError where /proc isn't mounted or lacks one of the files.
    """
    pss, areas = proportional_share(ranges)
    return Memory(pss, 1024 * areas, frame_numbers(ranges), page_tables())


def proportional_share(ranges: Sequence[Range]) -> tuple[int, int]:
    """Sum the Pss, in bytes, of the mapped areas that meet the ranges; return it and the number of those areas.

    An area counts whole: the kernel merges neighbours that continue each other in the same file.
    """
    ordered = sorted(ranges)
    starts = [start for start, _ in ordered]
    total = areas = 0
    for area in AREA.finditer(Path("/proc/self/smaps").read_bytes()):
        first, end = int(area[1], 16), int(area[2], 16)
        before = bisect.bisect_left(starts, end) - 1  # the last range that starts below the area's end
        if before >= 0 and sum(ordered[before]) > first:
            total += int(area[3]) * 1024
            areas += 1
    return total, areas


def frame_numbers(ranges: Iterable[Range]) -> Frames | None:
    """The numbers of the frames mapped in the ranges, each once, ascending; None where the kernel hides them.

    A process without CAP_SYS_ADMIN sees every frame as 0, which no mapped page has; some can't open the file at all.
    """
    found = [np.empty(0, np.uint64)]
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for start, length in ranges:
                first, end = start // PAGE, -(-(start + length) // PAGE)
                entries = np.frombuffer(_read(pagemap.fileno(), (end - first) * 8, first * 8), np.uint64)
                found.append(entries[(entries & PRESENT) != 0] & FRAME)
    except PermissionError:
        return None
    frames = np.unique(np.concatenate(found))
    return None if frames.size and frames[0] == 0 else frames


def _read(descriptor: int, length: int, offset: int) -> bytes:
    """Read exactly `length` bytes: one call gives no more than 2 GiB, and the kernel may stop earlier."""
    parts = []
    while length:
        part = os.pread(descriptor, length, offset)
        if not part:
            raise OSError(f"/proc/self/pagemap ended {length} bytes early at offset {offset}")
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


def page_tables() -> int:
    """Bytes of page tables of this process (VmPTE)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmPTE:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def distinct_bytes(memories: Iterable[Memory]) -> int | None:
    """Bytes of memory that the measured ranges of several processes occupy together, a shared frame counted once.

    None when any of them could not see its frame numbers.
    """
    every = [memory.frames for memory in memories]
    if any(frames is None for frames in every):
        return None
    union = np.unique(np.concatenate([frames for frames in every if frames is not None]))
    return int(union.size) * PAGE
