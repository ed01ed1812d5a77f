"""A process killed at any step, at any line: the next one goes on, nothing completed is lost, nothing leaks (S6, S8)."""

import functools
import os
from collections.abc import Callable

import pytest

import onecopy
from onecopy.daxemu.steps import STEPS

from .processes import Lines, Process, at_step, die, fork
from .scenarios import SCENARIOS, pages, picture
from .trials import States, assert_survived, early, late, reboot, spread

Arm = Callable[[], object]  # makes this process die later on


def kill(path: str, name: str, arm: Arm, *, inherited: bool) -> onecopy.FileSystem:
    """Do a scenario in a process that `arm` lets die in it; return a handle that was open all the time."""
    fs, scenario = onecopy.open(path), SCENARIOS[name]

    def work(_):
        mine = fs if inherited else onecopy.open(path)
        early(scenario, mine)
        arm()
        late(scenario, mine)

    assert Process(work).wait_for_all() in (-9, 0)  # 0: it ran fewer lines than the one that counted them
    return fs


def try_all(trial, name: str, ways: dict[str, Arm], allowed: States) -> None:
    for number, (where, arm) in enumerate(ways.items()):
        try:
            assert_survived(kill(trial(), name, arm, inherited=bool(number % 2)), allowed)
        except BaseException as error:
            error.add_note(f"after a kill while doing '{name}' at {where}")
            raise


def steps_of(reached, most: int) -> dict[str, Arm]:
    """Return ways to die: at each of the first `most` arrivals at each step reached."""
    return {
        f"'{step}', arrival {arrival}": functools.partial(at_step, step, arrival, die)
        for step, count in reached.items()
        for arrival in range(1, min(count, most) + 1)
    }


def lines_of(count: int, most: int) -> dict[str, Arm]:
    """Return ways to die: at `most` of the lines that are run."""
    return {f"line event {number}": Lines(number).__enter__ for number in spread(count, most)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_each_step_and_some_lines(trial, counted, name):
    allowed, reached, lines, _ = counted(name)
    try_all(trial, name, steps_of(reached, 1) | lines_of(lines, 3), allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_each_step_again_and_again(trial, counted, name):
    allowed, reached, _, _ = counted(name)
    try_all(trial, name, steps_of(reached, 5), allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_any_line(trial, counted, name):
    allowed, _, lines, _ = counted(name)
    try_all(trial, name, lines_of(lines, 400), allowed)


def test_every_step_is_one_to_die_at(counted):
    assert {step for name in SCENARIOS for step in counted(name)[1]} == set(STEPS)


# ------------------------------------------------------ coming and going


def open_and_close(path: str) -> None:
    with onecopy.open(path) as fs:
        fs.write("/tiny", b"tiny")


def split(path: str) -> None:
    """Fork with a handle and a mapping; both processes use them."""
    with onecopy.open(path) as fs, fs.map("/private") as mapping:
        pid = fork()
        assert mapping[0] == ord("a")
        if not pid:
            fs.close()
            os._exit(0)
        os.waitpid(pid, 0)


def mapping_left(path: str) -> None:
    """A mapping that outlives its handle, then ends."""
    fs = onecopy.open(path)
    mapping = fs.map("/private")
    fs.close()
    mapping.close()


COMING = {"open and close": open_and_close, "fork": split, "a mapping outlives its handle": mapping_left}
FOUND = ["a user", "a run-time file", "a pool alone"]


@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("name", COMING)
def test_killed_while_coming_and_going(trial, name, found):
    come_and_go(trial, name, found, 15)


@pytest.mark.slow
@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("name", COMING)
def test_killed_while_coming_and_going_at_any_line(trial, name, found):
    come_and_go(trial, name, found, 600)


def come_and_go(trial, name: str, found: str, most: int) -> None:
    """Kill processes that open, close, fork; `found` is what they find when they come."""

    def count(_):
        with Lines() as lines:
            COMING[name](path)
        return lines.count

    def prepare() -> tuple[str, onecopy.FileSystem]:
        path = trial()
        fs = onecopy.open(path)
        if found != "a user":
            fs.close()
        if found == "a pool alone":
            reboot(path)
        return path, fs

    path, fs = prepare()
    total = Process(count).result()
    fs.close()
    with onecopy.open(path) as fs:
        allowed = [picture(fs)]
    for number in spread(total, most):
        path, fs = prepare()
        Process(lambda _, path=path, number=number: (Lines(number).__enter__(), COMING[name](path))).wait_for_all()
        try:
            assert_survived(onecopy.open(path) if fs.closed else fs, allowed)
        except BaseException as error:
            error.add_note(f"after a kill at line event {number} of {total}")
            raise


def test_killed_in_the_child_s_part_of_a_fork(trial):
    """The parent goes on, and so does what it has mapped."""

    def work(_, number=0):
        with onecopy.open(path) as fs, fs.map("/private") as mapping:
            lines = Lines(number, lambda: os.getpid() != parent and die())
            parent = os.getpid()
            with lines:
                pid = fork()
            if not pid:
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            fs.unlink("/private")
            fs.write("/new", b"n" * 400 * onecopy.PAGE)
            fs.sync()
            assert mapping[:] == pages("abcdefgh")
            fs.unlink("/new")
            return lines.count, status

    path = trial()
    count, status = Process(work).result()
    assert count > 100 and status == 0
    died = 0
    for number in spread(3 * count, 15):
        path = trial()
        died += Process(lambda line, number=number: work(line, number)).result()[1] != 0
        with onecopy.open(path) as fs:
            allowed = [picture(fs)]
        assert_survived(onecopy.open(path), allowed)
    assert died
