"""Processes that tests drive step by step: forked, connected by a pipe, and gone when the test is over."""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import pytest

import onecopy
from onecopy.daxemu import steps

PACKAGE = os.path.dirname(onecopy.__file__)
PATIENCE = 120  # seconds without a word after which a process counts as hung


class Process:
    """A child that runs `work(line)`. `line.say(x)` there arrives at `hear()` here, and the other way round."""

    def __init__(self, work: Callable[["Line"], Any]) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._pipe = ours
        self.pid = fork()
        if not self.pid:
            ours.close()
            _live(work, Line(theirs))
        theirs.close()
        self._status: int | None = None

    def hear(self) -> Any:
        """Return what the child says next; AssertionError when it raised, ended or hangs instead."""
        if not self._pipe.poll(PATIENCE):
            raise AssertionError(f"process {self.pid} has been silent for {PATIENCE} s")
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise AssertionError(f"process {self.pid} ended with status {self.wait()}") from None
        if kind == "raised":
            raise AssertionError(f"process {self.pid} raised:\n{value}")
        return value

    def say(self, value: Any = None) -> None:
        self._pipe.send(value)

    def ask(self, value: Any = None) -> Any:
        """Say something and hear the answer."""
        self.say(value)
        return self.hear()

    def wait(self) -> int:
        """Return the exit status; negative: killed by that signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def wait_for_all(self) -> int:
        """`wait`, also for all that the child forked: they hold the other end of the pipe."""
        status = self.wait()
        with contextlib.suppress(EOFError):
            while self._pipe.poll(PATIENCE):
                self._pipe.recv()
            raise AssertionError(f"what process {self.pid} forked hangs")
        return status

    def result(self) -> Any:
        """Return what `work` returned, once the child has ended."""
        value = self.hear()
        assert self.wait() == 0
        return value

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def stop(self) -> None:
        """SIGSTOP; returns when the child has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(self.pid, os.WUNTRACED)[1])

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class Line:
    """The child's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, value: Any = None) -> None:
        self._pipe.send(("said", value))

    def hear(self) -> Any:
        return self._pipe.recv()

    def stop_at(self, step: str, arrival: int = 1) -> None:
        """From now on say the step's name when it is reached for the `arrival`-th time, and go on when told to."""
        at_step(step, arrival, lambda: (self.say(step), self.hear()))


def fork() -> int:
    """os.fork without the warning of Python 3.12 about threads, of which numpy has some that mind nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _live(work: Callable[[Line], Any], line: Line) -> None:
    try:
        steps.hook = None
        line.say(work(line))
    except BaseException:
        with contextlib.suppress(OSError):
            line._pipe.send(("raised", traceback.format_exc()))
    finally:
        os._exit(0)


def at_step(step: str, arrival: int, act: Callable[[], object]) -> None:
    """Call `act` when this process reaches `step` for the `arrival`-th time from now on."""
    wanted, arrivals = steps.STEPS.index(step), 0

    def hook(number: int) -> None:
        nonlocal arrivals
        arrivals += number == wanted
        if number == wanted and arrivals == arrival:
            act()

    steps.hook = hook


def die() -> None:
    """Die at once, as nothing in the process can prevent or notice."""
    os.kill(os.getpid(), signal.SIGKILL)


class Lines:
    """Counts the lines of the package's own code that this process runs, and calls `act` at one of them (0: at none)."""

    def __init__(self, number: int = 0, act: Callable[[], object] = die) -> None:
        self.number, self.act, self.count = number, act, 0

    def __enter__(self) -> "Lines":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "line":
            self._pass()
        return self._line

    def _pass(self) -> None:
        self.count += 1
        if self.count == self.number:
            self.act()


class Calls(Lines):
    """As `Lines`, but at the points where Python runs signal handlers: where a function starts and where one in C has ended.

    `skip`: functions, as "module.name", at whose start nothing happens.
    """

    def __init__(self, number: int = 0, act: Callable[[], object] = die, skip: frozenset[str] = frozenset()) -> None:
        super().__init__(number, act)
        self.skip = skip

    def __enter__(self) -> "Calls":
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        name = f"{frame.f_globals['__name__'].rpartition('.')[2]}.{frame.f_code.co_name}"
        if event == "c_return" or name not in self.skip:
            self._pass()


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the steps that this process reaches."""
    reached: Counter[str] = Counter()
    before, steps.hook = steps.hook, lambda number: reached.update([steps.STEPS[number]])
    try:
        yield reached
    finally:
        steps.hook = before


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[Line], Any]], Process]]:
    """A maker of processes; what is left of them at the end is killed."""
    made: list[Process] = []

    def make(work: Callable[[Line], Any]) -> Process:
        made.append(Process(work))
        return made[-1]

    yield make
    for process in made:
        process.kill()
