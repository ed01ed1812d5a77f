"""Pools in which a process is going to die or to be interrupted, and what must hold afterwards (S6, S8)."""

import contextlib
import fcntl
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

import onecopy

from ..conftest import forget
from .processes import Calls, Line, Lines, Process, counting
from .scenarios import SCENARIOS, SIZE, Scenario, before, picture, states

# Where a `with` statement begins and ends. Python runs signal handlers at the start of any function that is written in it,
# these too: what they were to release stays held, then, until the process ends. Nothing in Python can prevent that.
LEAVING = frozenset({"locks.release", "locks.__exit__", "mount.__exit__", "slots.retract", "slots.announce"})

States = list[dict[str, Any]]
Counts = tuple[States, Counter[str], int, int]


def restore(path: str, image: bytes) -> None:
    """Make a pool file with this content."""
    with open(path, "wb") as file:
        file.write(image)


def reboot(path: str) -> None:
    """Do what a reboot does to a pool: its run-time file is gone."""
    status = os.stat(path)
    for name in os.listdir("/dev/shm"):
        if name.startswith("onecopy-") and name.removesuffix(".lock").endswith(f"-{status.st_dev:x}.{status.st_ino:x}"):
            with contextlib.suppress(FileNotFoundError):  # another process's `format` may be sweeping
                os.unlink(f"/dev/shm/{name}")


def early(scenario: Scenario, fs: onecopy.FileSystem) -> None:
    """Do what is not going to be cut short."""
    for operation in scenario.early:
        operation(fs)


def late(scenario: Scenario, fs: onecopy.FileSystem) -> None:
    """Do what may be."""
    for operation in scenario.operations:
        operation(fs)


# ------------------------------------------------------------- afterwards


def assert_unlocked(fs: onecopy.FileSystem) -> None:
    """Nobody holds the transaction lock."""
    other = os.open(f"/proc/self/fd/{fs._mount.lock.fd}", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def assert_sound(fs: onecopy.FileSystem) -> None:
    """Nothing is locked or damaged, and every frame is accounted for: used, free, or about to be."""
    assert_unlocked(fs)
    assert fs.check().findings == []
    fs.chmod("/", 0o755)  # without any change a sync would have nothing to do
    fs.sync()
    report, info = fs.check(), fs.info()
    assert report.findings == []
    assert info.used_pages == report.counted["used_pages"]
    assert (info.used_pages + info.free_pages, info.waiting_pages, info.pinned_pages) == (info.pages, 0, 0)
    assert [user.pid for user in info.users] == [os.getpid()]


def assert_survived(fs: onecopy.FileSystem, allowed: States) -> None:
    """Who had the pool open goes on, as does who opens it after a reboot; and they see the same, which is allowed."""
    with fs:
        found = picture(fs)
        assert found in allowed, differences(found, allowed)
        assert_sound(fs)
        fs.write("/afterwards", b"x" * 10_000)
        fs.unlink("/afterwards")
    reboot(fs.path)
    with onecopy.open(fs.path) as fresh:
        assert picture(fresh) == found
        assert fresh.check().findings == []
    onecopy.remove(fs.path)


def differences(found: dict[str, Any], allowed: States) -> str:
    """Return in words what is not as in any of the allowed states."""
    lines = []
    for number, state in enumerate(allowed):
        wrong = [name for name in {*found, *state} if found.get(name) != state.get(name)]
        lines.append(f"differs from state {number} in {sorted(wrong)}")
    return "; ".join(lines)


# ------------------------------------------------------------- undisturbed


def undisturbed(path: str, image: bytes, work: Callable[[onecopy.FileSystem], Any]) -> Any:
    """Do something with a pool of this content in a process of its own; return what it returns."""

    def work_in_child(_: Line) -> Any:
        with onecopy.open(path) as fs:
            return work(fs)

    restore(path, image)
    return Process(work_in_child).result()


def counts(path: str, image: bytes, scenario: Scenario) -> Counts:
    """Return the states that a scenario goes through, the steps it reaches, how many lines it runs, how many calls it makes."""

    def run(fs: onecopy.FileSystem, watch: AbstractContextManager[Any]) -> Any:
        early(scenario, fs)
        with watch as watched:
            late(scenario, fs)
        return watched

    return (
        undisturbed(path, image, lambda fs: list(states(scenario, fs))),
        undisturbed(path, image, lambda fs: run(fs, counting())),
        undisturbed(path, image, lambda fs: run(fs, Lines()).count),
        undisturbed(path, image, lambda fs: run(fs, Calls(skip=LEAVING)).count),
    )


def spread(count: int, most: int) -> list[int]:
    """Return `most` numbers of 1 ... count, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + n * (count - 1) // (most - 1) for n in range(most)})


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def image() -> Iterator[bytes]:
    """A pool file with the content that every scenario starts from."""
    path = f"/dev/shm/test-{os.getpid()}-image.pool"
    try:
        onecopy.format(path, SIZE)
        with onecopy.open(path) as fs:
            before(fs)
        with open(path, "rb") as file:
            yield file.read()
    finally:
        forget(path)


@pytest.fixture(scope="session")
def counted(image: bytes) -> Callable[[str], Counts]:
    """Return, for a scenario's name, its `counts`."""

    @functools.cache
    def run(name: str) -> Counts:
        path = f"/dev/shm/test-{os.getpid()}-dry.pool"
        try:
            return counts(path, image, SCENARIOS[name])
        finally:
            forget(path)

    return run


@pytest.fixture
def trial(image: bytes, new_path: Callable[[], str]) -> Callable[[], str]:
    """Return the path of a new pool of the content that every scenario starts from."""

    def make() -> str:
        path = new_path()
        restore(path, image)
        return path

    return make
