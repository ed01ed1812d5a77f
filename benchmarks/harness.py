"""What every benchmark needs: rows, alternating runs and their medians, and places to work in that are gone afterwards."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import onecopy

SHM = "/dev/shm"
KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
SPARE_MEMORY = 1 << 30  # bytes of memory that a benchmark leaves to everybody else on the machine

Timed = Callable[[], Sequence[int]]
"""Do a piece of work and return how many nanoseconds each repetition took, preparation not counted."""


@dataclass(frozen=True)
class Row:
    """One figure. `ours` and `against` are medians in `unit`; `ratio` is ours over against."""

    question: str
    peer: str  # what `against` is the figure of
    ours: float | None
    against: float | None
    unit: str
    ratio: float | None
    reach: str  # what is aimed at; "" where the figure is only reported
    met: bool | None  # None: nothing is aimed at, or it could not be measured
    note: str
    skipped: str  # why a figure is missing; "" when none is


@dataclass(frozen=True)
class Reach:
    """What a benchmark aims at: a limit on `ours` itself or on its ratio to the peer."""

    of: Literal["ratio", "ours"]
    sense: Literal["at most", "at least", "under"]
    limit: float

    def text(self, unit: str) -> str:
        """Return the aim in words."""
        return f"{self.sense} {self.limit:g}" + (f" {unit}" if self.of == "ours" else " times")

    def met(self, ours: float | None, against: float | None) -> bool | None:
        """Return whether the figures reach the aim; None where one that counts is missing."""
        scale = against if self.of == "ratio" else 1
        if ours is None or scale is None:
            return None
        if self.sense == "at least":
            return ours >= self.limit * scale
        return ours < self.limit if self.sense == "under" else ours <= self.limit * scale


class SkippedError(Exception):
    """Something can't be measured on this machine; the message says why."""


def row(
    question: str,
    peer: str,
    ours: float | None,
    against: float | None,
    unit: str,
    *,
    reach: Reach | None = None,
    note: str = "",
    skipped: str = "",
) -> Row:
    """Make a row: works out the ratio and whether the aim is met."""
    ratio = ours / against if ours is not None and against else None
    text = reach.text(unit) if reach else ""
    met = reach.met(ours, against) if reach else None
    return Row(question, peer, ours, against, unit, ratio, text, met, note, skipped)


# ------------------------------------------------------------------ time


def alternate(rounds: int, *works: Timed | None) -> list[list[int]]:
    """Time pieces of work in turn, A B, B A, A B and so on; return the times of each, in nanoseconds.

    All see the same disturbances, and each runs as often after another as before it. The garbage collector is off
    meanwhile. Where a piece is None, so is what there is to compare with: its list is empty.
    """
    times: list[list[int]] = [[] for _ in works]
    order = [(work, found) for work, found in zip(works, times, strict=True) if work]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for work, found in order:
                found += work()
            order.reverse()
    finally:
        gc.enable()
    return times


def nanoseconds(work: Callable[..., object], *arguments: object) -> int:
    """Return how long a call takes."""
    start = time.perf_counter_ns()
    work(*arguments)
    return time.perf_counter_ns() - start


def median(times: Sequence[int]) -> float | None:
    """Return the median in nanoseconds; None of nothing."""
    return statistics.median(times) if times else None


def scaled(figure: float | None, factor: float) -> float | None:
    """Return the figure times `factor`; None stays None."""
    return None if figure is None else figure * factor


def speed(size: int, times: Sequence[int]) -> float | None:
    """Return the median speed in GB/s at which `size` bytes were moved; None of nothing."""
    middle = median(times)
    return None if middle is None else size / middle


def spread(factor: float, **samples: Sequence[int]) -> str:
    """Return the middle half of each sample, in nanoseconds times `factor`, for a row's note."""
    parts = []
    for name, times in samples.items():
        if len(times) > 1:
            low, _, high = statistics.quantiles(times, method="inclusive")
            parts.append(f"{name} {low * factor:.3g} to {high * factor:.3g} of {len(times)}")
    return f"middle half: {'; '.join(parts)}" if parts else ""


# ---------------------------------------------------------------- places


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold off Ctrl-C and SIGTERM, in this process and in the commands it starts, so that tidying up is finished."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def available_memory() -> int:
    """Return how many bytes of memory can be taken without pressing anybody: of the machine, and as files in /dev/shm."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return min(int(found[1]) * KiB if found else 0, shutil.disk_usage(SHM).free)


def require_memory(needed: int) -> None:
    """Raise SkippedError when `needed` bytes can't be kept in /dev/shm."""
    there = available_memory()
    if needed + SPARE_MEMORY > there:
        raise SkippedError(
            f"takes {onecopy.format_size(needed)} of memory and leaves {onecopy.format_size(SPARE_MEMORY)}; "
            f"{onecopy.format_size(there)} is available"
        )


@contextmanager
def folder() -> Iterator[Path]:
    """Make a directory in /dev/shm for as long as the context lasts."""
    path = Path(SHM, f"onecopy_bench_{os.getpid()}_{secrets.token_hex(4)}")
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        with uninterrupted():
            shutil.rmtree(path)


@contextmanager
def new_pool(size: int, *, device: str = "direct", cache_size: str | None = None, policy: str | None = None) -> Iterator[str]:
    """Format a pool of `size` bytes in /dev/shm; it is removed afterwards, so nobody may have it open then."""
    with folder() as inside, _pool_in(inside, size, device=device, cache_size=cache_size, policy=policy) as path:
        yield path


@contextmanager
def _pool_in(
    inside: Path, size: int, *, device: str = "direct", cache_size: str | None = None, policy: str | None = None
) -> Iterator[str]:
    path = str(inside / "bench.pool")
    onecopy.format(path, size, device=device, cache_size=cache_size, policy=policy)
    try:
        yield path
    finally:
        with uninterrupted():
            onecopy.remove(path)


@contextmanager
def open_pool(size: int, inside: Path | None = None) -> Iterator[onecopy.FileSystem]:
    """Format and open a pool of `size` bytes in /dev/shm, or `inside` a folder; it is closed and removed afterwards."""
    with _pool_in(inside, size) if inside else new_pool(size) as path, onecopy.open(path) as fs:
        yield fs


@dataclass(frozen=True)
class Kernel:
    """A file system of the kernel's, mounted at `root`; or None, and why not."""

    root: Path | None
    missing: str


@contextmanager
def kernel_filesystem(kind: Literal["xfs", "btrfs"], size: int) -> Iterator[Kernel]:
    """Make and mount a file system of `size` bytes in a file in /dev/shm; unmounted and removed afterwards.

    Pool and peer thus lie in the same memory. Where it can't be had, `Kernel.missing` says why.
    """
    with folder() as inside:
        image, root = inside / "image", inside / "mounted"
        root.mkdir()
        try:
            missing = _mount(kind, size, image, root)
            yield Kernel(None if missing else root, missing)
        finally:
            with uninterrupted():
                if os.path.ismount(root):
                    _unmount(root)


@contextmanager
def huge_tmpfs(size: int) -> Iterator[Kernel]:
    """Mount a tmpfs of at most `size` bytes in pages of 2 MiB; unmounted and removed afterwards.

    Where it can't be had, `Kernel.missing` says why.
    """
    with folder() as root:
        try:
            missing = _mount_huge(size, root)
            yield Kernel(None if missing else root, missing)
        finally:
            with uninterrupted():
                if os.path.ismount(root):
                    _unmount(root)


def _mount_huge(size: int, root: Path) -> str:
    mount = program("mount")
    if os.geteuid() != 0 or not mount:
        return "only root can mount a tmpfs with huge pages"
    try:
        require_memory(size)
    except SkippedError as reason:
        return f"a tmpfs with huge pages {reason}"
    if missing := command(mount, "-t", "tmpfs", "-o", f"huge=always,mode=700,size={size}", "tmpfs", str(root)):
        return missing
    with tempfile.TemporaryFile(dir=root) as file:
        file.truncate(2 * MiB)
        return "" if os.fstat(file.fileno()).st_blksize >= 2 * MiB else "the kernel denies tmpfs huge pages"


def _mount(kind: str, size: int, image: Path, root: Path) -> str:
    """Make and mount the file system; return why that fails, "" when it does not."""
    mkfs, mount = program(f"mkfs.{kind}"), program("mount")
    if os.geteuid() != 0:
        return f"only root can mount {kind}"
    if not (mkfs and mount):
        return f"mkfs.{kind} is not installed"
    try:
        require_memory(2 * size)  # the image, and the page cache above it
    except SkippedError as reason:
        return f"{kind} {reason}"
    with open(image, "wb") as file:
        file.truncate(size)
    options = ["-m", "reflink=1"] if kind == "xfs" else []
    return command(mkfs, "-q", *options, str(image)) or command(mount, "-o", "loop", str(image), str(root))


def _unmount(root: Path) -> None:
    """Unmount, waiting a moment for whoever looks into it; at last let the kernel do it when they have left."""
    for _ in range(20):
        if not command("umount", str(root)):
            return
        time.sleep(0.1)
    if complaint := command("umount", "--lazy", str(root)):
        raise OSError(complaint)


def program(name: str) -> str | None:
    """Return the path of an installed program, also of one that only root has in its search path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def command(*words: str) -> str:
    """Run a command; return what it complained about, "" when it succeeded."""
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if not done.returncode:
        return ""
    return f"{os.path.basename(words[0])} failed: {done.stderr.strip() or f'status {done.returncode}'}"


def sync(root: Path) -> None:
    """Write out what a mounted file system holds back, and leave all other file systems alone."""
    if complaint := command("sync", "--file-system", str(root)):
        raise OSError(complaint)


def write_random(path: Path, size: int) -> None:
    """Make a file of random bytes."""
    with open(path, "wb") as file:
        for at in range(0, size, MiB):
            file.write(os.urandom(min(MiB, size - at)))


# --------------------------------------------------------------- running


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the program by way of an exception, as Ctrl-C does, so that what was made is removed."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(measure: Callable[[bool], list[Row]]) -> None:
    """Be the program that a benchmark is when it runs alone."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quick", action="store_true", help="less work and fewer runs: shows that it works, no more")
    wanted = parser.parse_args()
    with ended_by_sigterm():
        rows = measure(wanted.quick)
    if wanted.json:
        print(json.dumps({"schema": 1, "quick": wanted.quick, "rows": [asdict(one) for one in rows]}))
        return
    for one in rows:
        print("\n".join(describe(one)))


def figure(value: float | None) -> str:
    """Return a figure with four digits that count; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def verdict(one: Row) -> str:
    """Return in a word how a row came out."""
    if one.met is None:
        return "skipped" if one.skipped else "reported"
    return "met" if one.met else "missed"


def describe(one: Row) -> Iterator[str]:
    """Yield the lines that tell a row to people."""
    yield f"{one.question}: {figure(one.ours)} {one.unit}"
    if one.peer:
        yield f"    {one.peer}: {figure(one.against)} {one.unit}; ratio {figure(one.ratio)}"
    yield f"    {verdict(one)}" + (f"; aim: {one.reach}" if one.reach else "")
    yield from (f"    {text}" for text in (one.skipped, one.note) if text)
