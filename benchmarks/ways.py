"""The ways to keep a file and its clones that comparisons set side by side: onecopy's policies, and the kernel's.

Every way offers the same few operations, so that a comparison is written once. What this build of onecopy or this
machine can't do is a way as well: one whose `missing` says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import onecopy
from onecopy import FileSystem
from onecopy.benchmarks import harness
from onecopy.benchmarks.files import BASE, COPIES, KERNEL, MEMMAP, XFS, Files, HostFiles, PoolFiles
from onecopy.benchmarks.harness import MiB, SkippedError

DAX, SHARED, PER_INODE = POLICIES = ("dax", "shared", "per-inode")
NAMES = (*POLICIES, *KERNEL, COPIES, MEMMAP)
TREES = 64 * MiB  # of a pool, beside files' pages
KERNEL_TREES = 384 * MiB  # of a kernel file system; mkfs.xfs asks for 300 MiB at least


@dataclass(frozen=True)
class Way:
    """A place for files of one kind; it can be sent to other processes."""

    name: str
    place: str = ""
    missing: str = ""  # why this way can't be tried here; "" when it can

    @contextmanager
    def open(self, mode: Literal["r", "r+"] = "r+") -> Iterator[Files]:
        """Open it in this process."""
        if self.name not in POLICIES:
            yield HostFiles(Path(self.place), self.name)
            return
        with _open(self.place, self.name, mode) as fs:
            yield PoolFiles(fs)


def _open(place: str, policy: str, mode: str) -> FileSystem:
    if policy == DAX:
        return onecopy.open(place, mode)
    return cast(FileSystem, cast(Any, onecopy.open)(place, mode, policy=policy))


@cache
def policies() -> dict[str, str]:
    """Return each policy, and why this build of onecopy can't do it: "" when it can."""
    found = {DAX: ""}
    for policy in POLICIES[1:]:
        if "policy" not in inspect.signature(onecopy.open).parameters:
            found[policy] = f"this build of onecopy has no policy {policy!r}"
            continue
        try:
            with harness.new_pool(TREES, **_cached_pool(4 * MiB)) as path, _open(path, policy, "r+"):
                found[policy] = ""
        except (OSError, TypeError, ValueError) as error:
            found[policy] = f"this build of onecopy can't open a pool with policy {policy!r}: {error}"
    return found


def _cached_pool(limit: int) -> dict[str, Any]:
    return {"device": "cached", "cache_size": limit}


@contextmanager
def place(name: str, room: int, cache_size: int | None = None, inside: str | Path = harness.SHM) -> Iterator[Way]:
    """Make a place with `room` bytes for files, gone afterwards; a buffer cache has `cache_size`, or room for all.

    It lies in /dev/shm, or in the folder `inside`; a kernel file system always in /dev/shm.
    """
    with ExitStack() as made:
        if name in POLICIES:
            try:
                if missing := policies()[name]:
                    raise SkippedError(missing)
                harness.require_memory(room * (1 if name == DAX else 2))
                options = {} if name == DAX else _cached_pool(cache_size or room + TREES)
                yield Way(name, made.enter_context(harness.new_pool(room + TREES, inside, **options)))
            except SkippedError as reason:
                yield Way(name, missing=str(reason))
        elif name in KERNEL:
            kind: Literal["xfs", "btrfs"] = "xfs" if name == XFS else "btrfs"
            kernel = made.enter_context(harness.kernel_filesystem(kind, room + KERNEL_TREES))
            yield Way(name, str(kernel.root or ""), kernel.missing)
        else:
            try:
                harness.require_memory(room)
                yield Way(name, str(made.enter_context(harness.folder(inside))))
            except SkippedError as reason:
                yield Way(name, missing=str(reason))


@contextmanager
def side_by_side(
    names: Sequence[str], room: int, base: int, cache_size: int | None = None, inside: str | Path = harness.SHM
) -> Iterator[dict[str, Way]]:
    """Make places for several ways, each with a file `base` of so many random bytes, the same in all."""
    with ExitStack() as made:
        host = made.enter_context(harness.folder())
        harness.write_random(host / BASE, base)
        found = {name: made.enter_context(place(name, room, cache_size, inside)) for name in names}
        for way in found.values():
            if not way.missing:
                with way.open() as files:
                    files.put(host / BASE, BASE)
                    files.forget(BASE)
        yield found


@contextmanager
def opened(found: dict[str, Way]) -> Iterator[dict[str, Files]]:
    """Open all ways that can be tried."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(way.open()) for name, way in found.items() if not way.missing}


def missing(found: dict[str, Way]) -> dict[str, str]:
    """Return each way's reason for not being tried, "" for the others."""
    return {name: way.missing for name, way in found.items()}
