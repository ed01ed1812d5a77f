"""A limit on the memory of a process and what it caches: a control group, version 2 or 1, that root may make."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onecopy.benchmarks.harness import SkippedError

CONTROL = Path("/sys/fs/cgroup")
FILES = {2: ("memory.current", "memory.max"), 1: ("memory.usage_in_bytes", "memory.limit_in_bytes")}


@dataclass(frozen=True)
class Group:
    """A control group for memory."""

    path: str
    version: int

    def join(self) -> None:
        """Move this process into the group; what it has allocated already stays charged to the old one."""
        Path(self.path, "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, spare: int) -> None:
        """Let the group have `spare` bytes more than it has now."""
        usage, limit = FILES[self.version]
        now = int(Path(self.path, usage).read_text())
        Path(self.path, limit).write_text(str(now + spare))

    def used(self) -> int:
        """Return how many bytes are charged to the group."""
        return int(Path(self.path, FILES[self.version][0]).read_text())


@contextmanager
def group() -> Iterator[Group]:
    """Make a control group; it is removed afterwards, by when its processes must have ended. Raises SkippedError."""
    home, version = _home()
    path = home / f"onecopy_bench_{os.getpid()}_{secrets.token_hex(4)}"
    try:
        path.mkdir()
    except OSError as error:
        raise SkippedError(f"no control group for a limit of memory: {error.strerror}") from error
    try:
        if not (path / FILES[version][1]).exists():
            raise SkippedError("no control group for a limit of memory: its parent does not hand on that controller")
        yield Group(str(path), version)
    finally:
        _remove(path)


def _home() -> tuple[Path, int]:
    """Return the folder that groups are made in, and their version."""
    if os.geteuid() != 0:
        raise SkippedError("only root can make a control group for a limit of memory")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _existing(CONTROL / "memory", path), 1
    handed_on = CONTROL / "cgroup.controllers"
    if handed_on.exists() and "memory" in handed_on.read_text().split():
        return CONTROL, 2
    raise SkippedError("no control group for a limit of memory: the controller is not mounted")


def _existing(root: Path, path: str) -> Path:
    """Return the folder of our own group, or the root where that can't be seen (a namespace hides it)."""
    own = root / path.lstrip("/")
    return own if own.is_dir() else root


def _remove(path: Path) -> None:
    for _ in range(50):  # the kernel takes a moment to notice that the last process has ended
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    path.rmdir()
