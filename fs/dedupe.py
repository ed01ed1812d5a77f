"""Dedupe of what exists: find pages with equal bytes, report exactly what sharing frees, share them.

Pages are found by a 64-bit multilinear hash (numpy's matrix product: 0.3 us a page) and believed only after
a byte compare; sharing goes through `sharing.share_pages`, which compares again, under the lock, at that moment.
"""

import errno
import functools
import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from onecopy.daxemu.errors import OneCopyError
from onecopy.daxemu.units import PAGE, pages_of
from onecopy.fs import directory as directories
from onecopy.fs import extents, namei, sharing
from onecopy.fs import inode as inodes
from onecopy.fs.namei import PHANTOM
from onecopy.fs.usage import References, inner_inodes

if TYPE_CHECKING:
    from onecopy.fs.filesystem import FileSystem
    from onecopy.fs.names import Progress
    from onecopy.fs.tx import Tx, View

_CHUNK = 4096  # pages hashed at once
_WEIGHTS = np.random.Generator(np.random.PCG64(20170327)).integers(0, 1 << 63, PAGE // 8, np.uint64) * np.uint64(2) + np.uint64(
    1
)
_COMPARE = 64  # pages compared at once: they stay in the cache
_MAX_RANGE = 1 << 14  # pages shared at once
_BATCH = 64  # ranges shared in one transaction

_Job = tuple[int, int, int, int, int]  # (target file, page, source file, page, pages)


@dataclass(frozen=True)
class DedupeFile:
    """A file and how many of its bytes are kept elsewhere, too."""

    path: str
    duplicate_bytes: int


@dataclass(frozen=True)
class DedupeReport:
    """What dedupe found: pages (4,096 bytes), groups of equal pages, bytes that sharing frees or, `applied`, freed."""

    scanned_pages: int
    duplicate_pages: int
    groups: int
    zero_pages: int
    freed_bytes: int
    applied: bool
    skipped: int = 0
    files: list[DedupeFile] = field(default_factory=list)


@dataclass
class _File:
    path: str
    pages: npt.NDArray[np.int64]  # file pages with data
    pfns: npt.NDArray[np.int64]
    size: int


def dedupe(fs: "FileSystem", paths: tuple[str, ...] | list[str], *, apply: bool, progress: "Progress | None") -> DedupeReport:
    """See FileSystem.dedupe."""
    with fs._mount.reading() as view:
        files = _files(view, paths)
        reached = np.zeros(len(view.table), np.int64)  # how often the files looked at reach each frame
        for one in files:
            np.add.at(reached, one.pfns, 1)
        frames = np.flatnonzero(reached)
        words = np.frombuffer(view.words, np.uint64).reshape(-1, PAGE // 8)
        hashes = _hash(words, frames, progress)
        keep = _masters(words, frames, hashes, compare=not apply)
        zero = int(np.count_nonzero(~words[frames[hashes == 0]].any(1)))
        replaced = keep != frames
        # A frame is freed when every place that reaches it is in the files looked at.
        places = References(view).places
        goes = replaced & (reached[frames] >= places[frames])
    report = DedupeReport(
        scanned_pages=sum(len(f.pages) for f in files),
        duplicate_pages=int(np.count_nonzero(replaced)),
        groups=len(np.unique(keep[replaced])),
        zero_pages=zero,
        freed_bytes=int(np.count_nonzero(goes)) * PAGE,
        applied=False,
        files=_by_file(files, frames, replaced),
    )
    return _apply(fs, files, frames, keep, frames[goes], report, progress) if apply else report


def _files(view: "View", paths: tuple[str, ...] | list[str]) -> list[_File]:
    """Return the regular files below `paths`, each inode once, in the order of their first frames."""
    found: list[_File] = []
    seen: set[tuple[int, int]] = set()
    for start in paths:
        place = namei.existing(view, start)
        stack = [(place.subvolume, place.number, start)] if place.number != PHANTOM else []
        while stack:
            subvolume, number, path = stack.pop()
            if (subvolume, number) in seen:
                continue
            seen.add((subvolume, number))
            inode = inodes.load(view, subvolume, number)
            if inode.is_directory:
                stack += [(*where, name) for where, name in _named(view, inode, path)]
            elif inode.is_file and inode.pages:
                runs = extents.written(extents.load(view, inode, 0, -(-inode.size // PAGE)))
                runs = extents.clip(runs, 0, -(-inode.size // PAGE))
                if runs:
                    pages = np.concatenate([np.arange(page, page + n) for page, _, n, _ in runs])
                    pfns = np.concatenate([np.arange(pfn, pfn + n) for _, pfn, n, _ in runs])
                    found.append(_File(path, pages, pfns, inode.size))
    return sorted(found, key=lambda one: int(one.pfns[0]))


def _named(view: "View", directory: inodes.Inode, path: str) -> list[tuple[tuple[int, int], str]]:
    names = {}
    for entry in directories.entries(view, directory):
        names[entry.target, entry.kind == directories.SUBVOLUME] = path.rstrip("/") + "/" + os.fsdecode(entry.name)
    found = []
    for subvolume, number in inner_inodes(view, directory):
        key = (subvolume, True) if subvolume != directory.subvolume else (number, False)
        found.append(((subvolume, number), names[key]))
    return found


def _hash(words: npt.NDArray[np.uint64], frames: npt.NDArray[np.int64], progress: "Progress | None") -> npt.NDArray[np.uint64]:
    hashes = np.empty(len(frames), np.uint64)
    for at in range(0, len(frames), _CHUNK):
        some = frames[at : at + _CHUNK]
        first, last = int(some[0]), int(some[-1]) + 1
        block = words[first:last] if last - first == len(some) else words[some]  # a view where the frames are a run
        np.dot(block, _WEIGHTS, out=hashes[at : at + len(some)])
        if progress:
            progress(at + len(some), len(frames), "pages")
    return hashes


def _masters(
    words: npt.NDArray[np.uint64], frames: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64], *, compare: bool
) -> npt.NDArray[np.int64]:
    """Return for each frame the lowest frame with the same bytes; with the same hash, if whoever asks compares them."""
    keep = frames.copy()
    order = np.argsort(hashes, kind="stable")  # frames ascend within a hash
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(ordered)])
    master = np.repeat(order[starts], lengths)
    if not compare:
        keep[order] = frames[master]
        return keep
    pairs = np.flatnonzero(order != master)
    rows = order[pairs]
    by_frame = np.argsort(rows)  # frames ascend: runs of equal pages are compared as runs
    rows = rows[by_frame]
    mine, theirs = frames[rows], frames[master[pairs][by_frame]]
    breaks = np.flatnonzero((np.diff(mine) != 1) | (np.diff(theirs) != 1)) + 1
    for start, end in pairwise([0, *breaks.tolist(), len(mine)]):
        for at in range(start, end, _COMPARE):
            size = min(_COMPARE, end - at)
            a, b = int(mine[at]), int(theirs[at])
            equal = (words[a : a + size] == words[b : b + size]).all(1)
            keep[rows[at : at + size][equal]] = theirs[at : at + size][equal]
    return keep


def _by_file(files: list[_File], frames: npt.NDArray[np.int64], replaced: npt.NDArray[np.bool_]) -> list[DedupeFile]:
    found = []
    for one in files:
        duplicate = int(np.count_nonzero(replaced[np.searchsorted(frames, one.pfns)]))
        if duplicate:
            found.append(DedupeFile(one.path, duplicate * PAGE))
    return sorted(found, key=lambda f: (-f.duplicate_bytes, f.path))


def _apply(
    fs: "FileSystem",
    files: list[_File],
    frames: npt.NDArray[np.int64],
    keep: npt.NDArray[np.int64],
    goes: npt.NDArray[np.int64],
    report: DedupeReport,
    progress: "Progress | None",
) -> DedupeReport:
    """Point every duplicate at its master through some file that has the master; count what that freed."""
    jobs = _jobs(files, frames, keep)
    skipped, done, total = 0, 0, sum(job[4] for job in jobs)
    for at in range(0, len(jobs), _BATCH):
        batch = jobs[at : at + _BATCH]
        skipped += _share_as_can_be(fs, files, batch)
        done += sum(job[4] for job in batch)
        if progress:
            progress(done, total, "pages")
    with fs._mount.reading() as view:
        freed = int(np.count_nonzero(References(view).places[goes] == 0))
    return replace(report, freed_bytes=freed * PAGE, applied=True, skipped=skipped)


def _jobs(files: list[_File], frames: npt.NDArray[np.int64], keep: npt.NDArray[np.int64]) -> list[_Job]:
    """Return the ranges to share: as long as target pages and master pages go on side by side."""
    rows = [np.searchsorted(frames, one.pfns) for one in files]
    home, home_page = np.zeros(len(frames), np.int64), np.zeros(len(frames), np.int64)  # the first file with a frame
    for n in range(len(files) - 1, -1, -1):
        home[rows[n]], home_page[rows[n]] = n, files[n].pages
    jobs: list[_Job] = []
    for n, one in enumerate(files):
        some = np.flatnonzero(keep[rows[n]] != one.pfns)
        if not len(some):
            continue
        page, master = one.pages[some], np.searchsorted(frames, keep[rows[n][some]])
        source, source_page = home[master], home_page[master]
        breaks = (np.diff(page) != 1) | (np.diff(source_page) != 1) | (np.diff(source) != 0)
        for start, end in pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(some)]):
            first, other = int(page[start]), int(source_page[start])
            longest = _MAX_RANGE
            if source[start] == n and first != other:
                longest = min(longest, abs(first - other))  # ranges of one file must not overlap
            for at in range(0, end - start, longest):
                jobs.append((n, first + at, int(source[start]), other + at, min(longest, end - start - at)))
    return jobs


def _share_as_can_be(fs: "FileSystem", files: list[_File], jobs: list[_Job]) -> int:
    """Share in one transaction, or, where stores keep coming to some of it, one by one; return how many were left out."""
    try:
        return fs._mount.run(functools.partial(_share_all, files=files, jobs=jobs))
    except OneCopyError as error:
        if error.errno != errno.EBUSY:
            raise
        return 1 if len(jobs) == 1 else sum(_share_as_can_be(fs, files, [job]) for job in jobs)


def _share_all(tx: "Tx", files: list[_File], jobs: list[_Job]) -> int:
    return sum(not _share(tx, files, job) for job in jobs)


def _share(tx: "Tx", files: list[_File], job: _Job) -> bool:
    """Share one range after comparing it, under the lock; False when a file was changed or removed meanwhile."""
    target, page, source, source_page, pages = job
    try:
        first = namei.change_file(tx, files[source].path)
        second = first if source == target else namei.change_file(tx, files[target].path)
    except FileNotFoundError:
        return False
    if page + pages > pages_of(second.size) or source_page + pages > pages_of(first.size):
        return False  # cut off meanwhile: beyond the end there are zeros to compare, but no page to share
    return sharing.share_pages(tx, first, source_page, second, page, pages)
