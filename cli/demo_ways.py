"""Three ways to have many clones of one input: plain copies, the kernel's reflinks, and a pool of onecopy.

Each way lays the clones out, has a team of processes map and hash them, measures the memory while all mappings are
held, and removes what it made, however it ends. The pool alone is the caller's to remove, who may want to keep it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onecopy
from onecopy.cli.demo_input import ARRAY, TREE, Input
from onecopy.cli.demo_work import Clone, Place, Reading, Team, Worker
from onecopy.cli.measure import Memory, distinct_bytes

FICLONE = 0x40049409
BASE = "base"
RUN_TIME = "/dev/shm"  # holds the run-time files, named after their pools' UUIDs
SPARE_MEMORY = 1 << 30  # bytes of memory that a comparison leaves to everybody else on the machine
XFS_OVERHEAD = 512 << 20  # bytes of an XFS image beside the files: its log, and the least that mkfs.xfs accepts
POOL_OVERHEAD = 256 << 20  # bytes of the pool beside the files' pages; the file is sparse, so too much costs nothing

Step = Callable[[str], AbstractContextManager[Callable[[int, int, str], None] | None]]
"""Announce one step of the work for as long as the context lasts; gives a progress callback, or None."""


@dataclass(frozen=True)
class Physical:
    """Memory below the mappings of all processes together, in bytes."""

    bytes: int  # the figure to go by
    source: str  # where it comes from: "frames" counted, "pss" with its rounding (at most so much), or "computed"
    pss: int | None = None
    pss_rounding: int | None = None
    page_tables: int | None = None


@dataclass(frozen=True)
class Observation:
    """What the processes found and occupied while they read their clones."""

    seconds: float
    hashes: int
    wrong: list[str]
    physical: Physical


@dataclass(frozen=True)
class Rewriting:
    """What it costs that each process rewrites a hundredth of its clones, in bytes and seconds."""

    bytes: int
    seconds: float
    pool_growth: int
    after: Observation


@dataclass(frozen=True)
class Outcome:
    """What one way costs, in bytes and seconds; the times are None where it was computed, not tried."""

    way: str
    logical: int
    stored: int
    physical: Physical
    clone_seconds: float | None = None
    read: Observation | None = None
    skipped: str | None = None  # why it was not tried
    put_seconds: float | None = None  # from here on: onecopy alone
    backed: int | None = None  # of the pool file, by the host: what it uses now and what it has used before
    run_time: int | None = None  # of the run-time file
    rewriting: Rewriting | None = None
    base_hashes: int = 0
    base_wrong: list[str] = field(default_factory=list)
    findings: int = 0

    @property
    def hashes(self) -> int:
        """How many files were hashed and compared with their originals."""
        before = self.read.hashes if self.read else 0
        return before + (self.rewriting.after.hashes if self.rewriting else 0) + self.base_hashes

    @property
    def wrong(self) -> list[str]:
        """Every file that was not what it should be, whenever it was noticed."""
        before = self.read.wrong if self.read else []
        after = self.rewriting.after.wrong if self.rewriting else []
        return [*before, *after, *self.base_wrong]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold off Ctrl-C and SIGTERM, in this process and in the commands it starts, so that tidying up is finished."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plain_copies(source: Input, clones: Sequence[Clone], processes: int, scratch: Path, step: Step) -> Outcome:
    """Copy every file for every clone; computed where the copies would not fit beside what else the machine does."""
    way, logical, all_pages = "plain copies", source.size * len(clones), source.footprint * len(clones)
    if shortage := _shortage(all_pages, scratch):
        skipped = f"plain copies not made: {shortage}"
        return Outcome(way, logical, all_pages, Physical(all_pages, "computed"), skipped=skipped)
    root = scratch / "plain"
    try:
        with step(f"{way}: copy"):
            stored = 0
            start = time.monotonic()
            for clone in clones:
                for file, path in _lay_out(source, root / clone.name):
                    shutil.copyfile(file, path)
                    stored += path.stat().st_blocks * 512
            seconds = time.monotonic() - start
        with Team(Place(str(root)), source.files, clones, processes) as team, step(f"{way}: map and hash"):
            read = _observe(team)
        return Outcome(way, logical, stored, read.physical, seconds, read)
    finally:
        with uninterrupted():
            shutil.rmtree(root, ignore_errors=True)


def kernel_clones(source: Input, clones: Sequence[Clone], processes: int, scratch: Path, step: Step) -> Outcome:
    """Clone every file with the kernel's reflink, on an XFS made for it; computed where that can't be mounted."""
    way, logical = "kernel page cache", source.size * len(clones)
    try:
        with _xfs(source.footprint + XFS_OVERHEAD, source.footprint * len(clones), scratch) as root:
            empty = shutil.disk_usage(root).used
            with step(f"{way}: reflink"):
                for original, path in _lay_out(source, root / BASE):
                    shutil.copyfile(original, path)
                _run("sync", "--file-system", str(root))  # or the first clone's time would be that of the disk
                start = time.monotonic()
                for clone in clones:
                    for (_, path), file in zip(_lay_out(source, root / clone.name), source.files, strict=True):
                        _reflink(root / BASE / file.name, path)
                seconds = time.monotonic() - start
            stored = shutil.disk_usage(root).used - empty
            with Team(Place(str(root)), source.files, clones, processes) as team, step(f"{way}: map and hash"):
                read = _observe(team)
        return Outcome(way, logical, stored, read.physical, seconds, read)
    except SkippedError as reason:
        physical = Physical(source.footprint * len(clones), "computed")
        skipped = f"page cache of reflinks not measured: {reason}"
        return Outcome(way, logical, source.footprint, physical, skipped=skipped)


def pool_clones(source: Input, clones: Sequence[Clone], processes: int, pool: str, step: Step) -> Outcome:
    """Clone array and tree inside a new pool, read, rewrite one page in a hundred, and read again.

    Raises FileExistsError when there is a pool already. The caller removes the pool, also after an error.
    """
    place = Place("", pool)
    onecopy.format(pool, pool_need(source, len(clones)))
    with onecopy.open(pool) as fs:
        start = time.monotonic()
        _put(fs, source, step)
        put_seconds = time.monotonic() - start
        with step("onecopy: clone"):
            start = time.monotonic()
            for clone in clones:
                fs.mkdir(f"/{clone.name}")
                if source.array:
                    fs.clone(f"/{BASE}/{ARRAY}", f"/{clone.name}/{ARRAY}")
                if source.tree:
                    fs.snapshot(f"/{BASE}/{TREE}", f"/{clone.name}/{TREE}")
            clone_seconds = time.monotonic() - start
        stored = _stored(fs)
    # Nothing of ours is mapped from here on: the figures are those of the processes.
    with Team(place, source.files, clones, processes) as team:
        with step("onecopy: map and hash"):
            read = _observe(team)
        with step("onecopy: rewrite"):
            start = time.monotonic()
            rewritten = sum(team.ask("rewrite"))
            seconds = time.monotonic() - start
        with onecopy.open(pool) as fs:
            growth = _stored(fs) - stored
            info = fs.info()
            run_time = sum(path.stat().st_blocks * 512 for path in Path(RUN_TIME).glob(f"*{info.uuid}*"))
        with step("onecopy: map and hash again"):
            rewriting = Rewriting(rewritten, seconds, growth, _observe(team))
    with step("onecopy: check"):
        with Worker(place, source.files, [Clone(BASE, 0)]) as worker:
            base = worker.read()
        findings = len(onecopy.check(pool).findings)
    return Outcome(
        "onecopy",
        source.size * len(clones),
        stored,
        read.physical,
        clone_seconds,
        read,
        put_seconds=put_seconds,
        backed=info.backed_bytes,
        run_time=run_time,
        rewriting=rewriting,
        base_hashes=base.hashes,
        base_wrong=list(base.wrong),
        findings=findings,
    )


def pool_need(source: Input, clones: int) -> int:
    """Bytes of a pool that holds the input, and what rewriting a hundredth of each clone adds."""
    return source.footprint + source.footprint * clones // 25 + POOL_OVERHEAD


def _put(fs: onecopy.FileSystem, source: Input, step: Step) -> None:
    fs.mkdir(f"/{BASE}")
    if source.array:
        with step("onecopy: put the array") as progress:
            fs.put(source.array, f"/{BASE}/{ARRAY}", progress=progress)
    if source.tree:
        # A subvolume of its own makes a snapshot of the tree one step, however many files it has.
        fs.create_subvolume(f"/{BASE}/{TREE}")
        for entry in os.scandir(source.tree):
            with step(f"onecopy: put {entry.name}") as progress:
                fs.put(entry.path, f"/{BASE}/{TREE}/{entry.name}", progress=progress)


def _stored(fs: onecopy.FileSystem) -> int:
    """Bytes of the pool in use, trees included, once all that was written has its place in them."""
    fs.sync()
    info = fs.info()
    return info.used_pages * info.page_size


def _observe(team: Team) -> Observation:
    start = time.monotonic()
    readings: list[Reading] = team.ask("read")
    seconds = time.monotonic() - start
    wrong = [path for reading in readings for path in reading.wrong]
    return Observation(seconds, sum(reading.hashes for reading in readings), wrong, _together(team.ask("measure")))


def _together(memories: Sequence[Memory]) -> Physical:
    """Add up what the processes occupy, a page that several of them map counted once."""
    pss = sum(memory.pss for memory in memories)
    rounding = sum(memory.pss_rounding for memory in memories)
    tables = sum(memory.page_tables for memory in memories)
    frames = distinct_bytes(memories)
    if frames is None:
        return Physical(pss + rounding, "pss", pss, rounding, tables)
    return Physical(frames, "frames", pss, rounding, tables)


def _lay_out(source: Input, root: Path) -> Iterator[tuple[str, Path]]:
    """Make the directories below `root`; yield each file's original and where its copy goes."""
    for folder in {os.path.dirname(file.name) for file in source.files}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for file in source.files:
        yield file.original, root / file.name


def _reflink(original: Path, path: Path) -> None:
    with open(original, "rb") as source, open(path, "wb") as target:
        fcntl.ioctl(target, FICLONE, source.fileno())


def require_memory(needed: int, directory: Path) -> None:
    """Raise OSError (ENOSPC) when `needed` bytes can't be kept in files of the directory."""
    if shortage := _shortage(needed, directory):
        raise OSError(errno.ENOSPC, f"{shortage}; choose another place with --pool, or a smaller input")


def _shortage(needed: int, directory: Path) -> str | None:
    """Say what is short when `needed` bytes of memory, kept in files of the directory, are more than there is."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    memory = int(found[1]) * 1024 if found else 0
    room = shutil.disk_usage(directory).free
    if needed + SPARE_MEMORY > memory:
        return f"{onecopy.format_size(needed)} needed, {onecopy.format_size(memory)} of memory available"
    if needed > room:
        return f"{onecopy.format_size(needed)} needed, {onecopy.format_size(room)} free in {directory}"
    return None


class SkippedError(Exception):
    """Something can't be tried on this machine; the message says why."""


@contextmanager
def _xfs(size: int, cached: int, scratch: Path) -> Iterator[Path]:
    """Make an XFS of `size` bytes in a file and mount it for as long as the context lasts; `cached` bytes will be read.

    Raises SkippedError where it can't be mounted.
    """
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    mkfs, mount, umount = (shutil.which(name, path=search) for name in ("mkfs.xfs", "mount", "umount"))
    if os.geteuid() != 0:
        raise SkippedError("only root can mount an XFS")
    if not (mkfs and mount and umount):
        raise SkippedError("mkfs.xfs is not installed (package xfsprogs)")
    if shortage := _shortage(size + cached, scratch):
        raise SkippedError(shortage)
    image, root = scratch / "xfs.img", scratch / "xfs"
    root.mkdir()
    try:
        with open(image, "wb") as file:
            file.truncate(size)
        for command in ((mkfs, "-q", "-m", "reflink=1", str(image)), (mount, "-o", "loop", str(image), str(root))):
            if complaint := _run(*command):
                raise SkippedError(complaint)
        yield root
    finally:
        with uninterrupted():
            if os.path.ismount(root) and (complaint := _run(umount, str(root))):
                raise OSError(errno.EBUSY, complaint)
            image.unlink(missing_ok=True)
            root.rmdir()


def _run(*command: str) -> str | None:
    """Run a command; return what it complained about, or None when it succeeded."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if not done.returncode:
        return None
    complaint = done.stderr.strip().partition("\n")[0]
    return f"{os.path.basename(command[0])} failed: {complaint or f'status {done.returncode}'}"
