"""A process killed at any step, at any line: the next one goes on, nothing completed is lost, nothing leaks (S6, S8)."""

import fcntl
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

import onecopy
from onecopy.daxemu.steps import STEPS

from ..conftest import forget
from .processes import Line, Lines, Process, at_step, counting, die
from .scenarios import SCENARIOS, SIZE, Scenario, before, picture, states

States = list[dict[str, Any]]


@pytest.fixture(scope="module")
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


def restore(path: str, image: bytes) -> None:
    with open(path, "wb") as file:
        file.write(image)


class Trial:
    """One pool, in which one process is going to die."""

    def __init__(self, image: bytes, path: str) -> None:
        self.path, self.image = path, image
        restore(path, image)

    def dry_run(self, scenario: Scenario) -> tuple[States, Counter[str], int]:
        """Do a scenario undisturbed: return the states it goes through, steps it reaches, lines it runs."""

        def run(fs: onecopy.FileSystem, watch: AbstractContextManager[Any]) -> Any:
            early(scenario, fs)
            with watch as watched:
                late(scenario, fs)
            return watched

        return (
            self.undisturbed(lambda fs: list(states(scenario, fs))),
            self.undisturbed(lambda fs: run(fs, counting())),
            self.undisturbed(lambda fs: run(fs, lines := Lines()) and lines.count),
        )

    def undisturbed(self, work: Callable[[onecopy.FileSystem], Any]) -> Any:
        """Do something in a process of its own, from the start; return what it returns."""

        def work_in_child(_: Line) -> Any:
            with onecopy.open(self.path) as fs:
                return work(fs)

        restore(self.path, self.image)
        return Process(work_in_child).result()

    def kill(self, scenario: Scenario, arm: Callable[[], object], *, inherited: bool) -> onecopy.FileSystem:
        """Do a scenario in a process that `arm` lets die in it; return a handle that was open all the time."""
        fs = onecopy.open(self.path)

        def work(_: Line) -> None:
            mine = fs if inherited else onecopy.open(self.path)
            early(scenario, mine)
            arm()
            late(scenario, mine)

        assert Process(work).wait() in (-9, 0)  # 0: it ran fewer lines than the one that counted them
        return fs


def early(scenario: Scenario, fs: onecopy.FileSystem) -> None:
    for operation in scenario.early:
        operation(fs)


def late(scenario: Scenario, fs: onecopy.FileSystem) -> None:
    for operation in scenario.operations:
        operation(fs)


def assert_sound(fs: onecopy.FileSystem) -> None:
    """Nobody holds the lock, nothing is damaged, and every frame is accounted for: used, free, or about to be."""
    other = os.open(f"/proc/self/fd/{fs._mount.lock.fd}", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    assert fs.check().findings == []
    fs.chmod("/", 0o755)  # without any change a sync would have nothing to do
    fs.sync()
    report, info = fs.check(), fs.info()
    assert report.findings == []
    assert info.used_pages == report.counted["used_pages"]
    assert (info.used_pages + info.free_pages, info.waiting_pages, info.pinned_pages) == (info.pages, 0, 0)
    assert [user.pid for user in info.users] == [os.getpid()]


def assert_survived(fs: onecopy.FileSystem, allowed: States) -> None:
    """Whoever had the pool open goes on, as does who opens it after a reboot; and they see the same."""
    with fs:
        found = picture(fs)
        assert found in allowed, differences(found, allowed)
        assert_sound(fs)
        fs.write("/afterwards", b"x" * 10_000)
        fs.unlink("/afterwards")
    forget_runtime(fs.path)
    with onecopy.open(fs.path) as fresh:
        assert picture(fresh) == found
        assert fresh.check().findings == []
    onecopy.remove(fs.path)


def differences(found: dict[str, Any], allowed: States) -> str:
    lines = []
    for number, state in enumerate(allowed):
        wrong = [name for name in {*found, *state} if found.get(name) != state.get(name)]
        lines.append(f"differs from state {number} in {sorted(wrong)}")
    return "; ".join(lines)


def forget_runtime(path: str) -> None:
    """What a reboot does to a pool."""
    status = os.stat(path)
    for name in os.listdir("/dev/shm"):
        if name.startswith("onecopy-") and name.removesuffix(".lock").endswith(f"-{status.st_dev:x}.{status.st_ino:x}"):
            os.unlink(f"/dev/shm/{name}")


@pytest.fixture
def trial(image, new_path) -> Callable[[], Trial]:
    """A maker of trials."""
    return lambda: Trial(image, new_path())


@pytest.fixture(scope="module")
def dry_run(image: bytes) -> Callable[[str], tuple[States, Counter[str], int]]:
    """Return, for a scenario's name, what `Trial.dry_run` found."""

    @functools.cache
    def run(name: str) -> tuple[States, Counter[str], int]:
        path = f"/dev/shm/test-{os.getpid()}-dry.pool"
        try:
            return Trial(image, path).dry_run(SCENARIOS[name])
        finally:
            forget(path)

    return run


def try_all(trial, name: str, ways: list[tuple[str, Callable[[], object]]], allowed: States) -> None:
    for number, (where, arm) in enumerate(ways):
        try:
            assert_survived(trial().kill(SCENARIOS[name], arm, inherited=bool(number % 2)), allowed)
        except BaseException as error:
            error.add_note(f"killed while doing '{name}' at {where}")
            raise


def steps_of(reached: Counter[str], most: int) -> list[tuple[str, Callable[[], object]]]:
    """Return a way to die at each of the first `most` arrivals at each step reached."""
    return [
        (f"'{step}', arrival {arrival}", functools.partial(at_step, step, arrival, die))
        for step, count in reached.items()
        for arrival in range(1, min(count, most) + 1)
    ]


def lines_of(count: int, most: int) -> list[tuple[str, Callable[[], object]]]:
    """Return ways to die at `most` lines, evenly spread over those that are run."""
    chosen = sorted({1 + n * (count - 1) // (most - 1) for n in range(most)}) if count > most else range(1, count + 1)
    return [(f"line event {number}", lambda number=number: Lines(number, die).__enter__()) for number in chosen]


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_each_step(trial, dry_run, name):
    allowed, reached, _ = dry_run(name)
    try_all(trial, name, steps_of(reached, 1), allowed)


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_some_lines(trial, dry_run, name):
    allowed, _, lines = dry_run(name)
    try_all(trial, name, lines_of(lines, 6), allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_each_step_again_and_again(trial, dry_run, name):
    allowed, reached, _ = dry_run(name)
    try_all(trial, name, steps_of(reached, 5), allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_any_line(trial, dry_run, name):
    allowed, _, lines = dry_run(name)
    try_all(trial, name, lines_of(lines, 400), allowed)


def test_every_step_is_one_to_die_at(dry_run):
    assert {step for name in SCENARIOS for step in dry_run(name)[1]} == set(STEPS)
