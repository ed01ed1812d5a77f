"""A worker of the stress test: a process that does one operation after the other until it is told to stop, or is killed."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import onecopy
from onecopy.cli.stress_board import BEAT, BUSY, COUNTS, DOING, KILLED, KINDS, PHASE, QUOTA, REST, WORK, Board
from onecopy.cli.stress_hands import Hands, SkippedOperation
from onecopy.cli.stress_ops import OPERATIONS, WEIGHTS
from onecopy.cli.stress_oracle import Violation

_PACKAGE = os.path.dirname(onecopy.__file__)
_SUICIDE = 1 / 400  # of the operations, where killing is asked for
_LINES = 3000  # within which such an operation ends
_CHILD_OPERATIONS = 40
_CHILD_LIFE = 0.3  # seconds within which a forked child is killed, where killing is asked for

_KILLERS = (signal.SIGKILL, signal.SIGALRM)

Trace = Callable[[FrameType, str, Any], Any]


@dataclass(frozen=True)
class Job:
    """What the workers of one run are to do."""

    pool: str
    directory: str
    seed: int
    processes: int
    operations: int | None  # of all workers together
    kill: bool
    kinds: frozenset[str]

    def quota(self, row: int) -> int | None:
        """Return how many operations are this worker's."""
        return None if self.operations is None else (self.operations + row) // self.processes


def work(board: Board, row: int, job: Job, pipe: int) -> None:
    """Be worker `row` until the board says stop. Raises Violation."""
    try:
        Worker(board, row, job, pipe).run()
    except Exception:
        board.enter(REST)  # before more operations push what has led to it out of the logs
        raise


def report(pipe: int, error: Exception) -> None:
    """Write what has gone wrong to the process that watches over the workers: a line of JSON."""
    found: dict[str, object] = {"rule": "", "message": "".join(traceback.format_exception(error, limit=-12)), "pages": []}
    if isinstance(error, Violation):
        found = {"rule": error.rule, "message": error.message, "pages": error.pages}
    with suppress(BrokenPipeError):
        os.write(pipe, json.dumps(found).encode() + b"\n")


def fork() -> int:
    """Fork, although a thread may be running: the package's own one, which knows about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class Worker:
    """One process and, now and then, a child that it forks."""

    def __init__(self, board: Board, row: int, job: Job, pipe: int) -> None:
        self._board, self._job, self._pipe = board, job, pipe
        self._hands = Hands(board, row, job.pool, job.directory, job.seed)
        self._child: int | None = None
        self._kinds = [kind for kind in WEIGHTS if kind in job.kinds]
        self._weights = [WEIGHTS[kind] for kind in self._kinds]

    def run(self) -> None:
        """Work until it is time to stop; then close everything."""
        board, row, quota = self._board, self._hands.row, self._job.quota(self._hands.row)
        while board.header(PHASE) <= REST and os.getppid() == board.maker:
            if board.header(PHASE) == REST or (quota is not None and board.row(row, QUOTA) >= quota):
                time.sleep(0.005)  # with the pool open: the last one to close it takes the counters of the run-time file along
                board.add_row(row, BEAT)
            elif self._one():
                board.add_row(row, QUOTA)
        self._reap(wait=True)
        self._hands.close()

    def _one(self) -> bool:
        """Do one operation; return whether it could be done."""
        hands, board = self._hands, self._board
        kind = hands.random.choices(self._kinds, self._weights)[0]
        board.add_row(hands.row, BEAT)
        board.set_row(hands.row, DOING, 1 + KINDS.index(kind))
        die = self._job.kill and hands.chance(_SUICIDE)
        if die:
            sys.settrace(_trace(int(math.exp(hands.random.uniform(0, math.log(_LINES))))))
        try:
            if kind == "fork":
                self._fork()
            else:
                OPERATIONS[kind](hands)
            hands.noted()
        except SkippedOperation:
            board.add_row(hands.row, BUSY)
            return False
        finally:
            if die:
                sys.settrace(None)
            hands.let_go()
            board.set_row(hands.row, DOING, 0)
        board.add_row(hands.row, COUNTS + KINDS.index(kind))
        return True

    # --------------------------------------------------------------- fork

    def _fork(self) -> None:
        """Let a child go on with the same handle and mappings, beside this process."""
        hands, board = self._hands, self._board
        if hands.row >= self._job.processes or not self._reap(wait=False):
            raise SkippedOperation
        row = hands.row + self._job.processes
        board.inherit(hands.row, row)
        child = fork()
        if child:
            self._child = child
            return
        status = 1
        try:
            if self._job.kill and hands.chance(0.5):
                signal.setitimer(signal.ITIMER_REAL, hands.random.uniform(0.001, _CHILD_LIFE))
            hands.become(row)
            for _ in range(hands.random.randint(1, _CHILD_OPERATIONS)):
                if board.header(PHASE) != WORK:
                    break
                self._one()
            if hands.chance(0.5):
                hands.close()
            status = 0
        except Exception as error:
            board.enter(REST)  # before more operations push what has led to it out of the logs
            report(self._pipe, error)
        finally:
            os._exit(status)

    def _reap(self, *, wait: bool) -> bool:
        """Return whether there is no child any more."""
        if self._child is not None:
            pid, status = os.waitpid(self._child, 0 if wait else os.WNOHANG)
            if not pid:
                return False
            self._child = None
            self._board.leave_all(self._hands.row + self._job.processes)
            if os.WIFSIGNALED(status):
                if os.WTERMSIG(status) not in _KILLERS or not self._job.kill:
                    name = signal.Signals(os.WTERMSIG(status)).name
                    raise Violation("S8", f"the forked child of worker {self._hands.row} died of {name}")
                self._board.add_header(KILLED)
        return True


def _trace(lines: int) -> Trace:
    """Return a trace function that kills the process when it has run so many lines of the package's own code."""

    def line(frame: FrameType, event: str, _: object) -> Trace:
        nonlocal lines
        lines -= event == "line"
        if lines == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: FrameType, event: str, _: object) -> Trace | None:
        name = frame.f_code.co_filename
        return line if name.startswith(_PACKAGE) and "/cli/" not in name else None

    return call
