"""Who watches over the workers of the stress test: starts them, kills them, replaces them, and notices when one hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onecopy
from onecopy.benchmarks.harness import uninterrupted
from onecopy.cli.stress_board import BEAT, DOING, KILLED, KINDS, LEAVE, QUIET, QUOTA, REST, Board
from onecopy.cli.stress_end import verify
from onecopy.cli.stress_work import Job, fork, report, work

_TICK = 0.02  # seconds
_ORPHAN_LIFE = 0.3  # seconds that a child has to go on after its parent was killed
_STACK_SIGNAL = signal.SIGUSR1  # makes a process write down where it is
_STACK_TIME = 0.2  # seconds that it gets for that
_BELOW = re.compile(r'\n(  File .*cli/stress_work.py", line \d+ in (?:work|_one))(?:\n  File .*)*')  # the same for all
_BETWEEN_KILLS = 0.1  # seconds, on the average

Found = dict[str, Any]


@dataclass
class Member:
    """A process, forked, with all that it forks in a group of its own; the pipe ends when the last of them does."""

    pid: int
    pipe: int
    row: int
    heard: bytes = b""
    status: int | None = None
    died: float = 0.0
    silent: bool = False
    given_up: bool = False
    beats: tuple[int, ...] = ()
    moved: float = field(default_factory=time.monotonic)

    def listen(self) -> None:
        """Take what it says, as far as it is there."""
        while not self.silent and select.select([self.pipe], [], [], 0)[0]:
            said = os.read(self.pipe, 1 << 16)
            self.heard += said
            self.silent = not said

    def signal_all(self, number: int) -> None:
        """Send a signal to the process and to what it has forked; its number is not given away before it is `reaped`."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class Team:
    """The workers of one run, and at the end the process that verifies. At the end of the context no process is left."""

    def __init__(self, board: Board, job: Job, patience: float) -> None:
        self._board, self._job, self._patience = board, job, patience
        self._members: list[Member] = []
        self._stacks = os.memfd_create("onecopy-stacks", os.MFD_CLOEXEC)
        self._random = random.Random(job.seed)
        self._next_kill = 0.0
        self._ending = False
        self.found: list[Found] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with uninterrupted():
            self._end_all()
            # Nobody is left, but a lock may be; so another process tidies up, and is given up if it can't.
            member = self._fork(self._job.processes * 2, self._tidy_up)
            deadline = time.monotonic() + self._patience
            while not member.silent and time.monotonic() < deadline:
                time.sleep(_TICK / 4)
                member.listen()
            self._end_all()
            os.close(self._stacks)

    def _end_all(self) -> None:
        for member in self._members:
            member.signal_all(signal.SIGKILL)
            os.waitpid(member.pid, 0)
            while not member.silent:
                member.silent = not os.read(member.pipe, 1 << 16)
            os.close(member.pipe)
        self._members.clear()

    def _tidy_up(self, _: int) -> None:
        with onecopy.open(self._job.pool) as fs:
            if fs.exists(self._job.directory):
                fs.rmtree(self._job.directory)

    def run(self, seconds: float | None) -> None:
        """Let the workers work until the time is over, all operations are done, or something is wrong."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for row in range(self._job.processes):
            self._start(row)
        while not self.found and not self._done() and (deadline is None or time.monotonic() < deadline):
            time.sleep(_TICK)
            self._watch()
            if self._job.kill:
                self._kill()

    def end(self) -> Found:
        """Stop the workers, have everything verified, and return what the pool said of itself."""
        self._ending = True
        self._board.enter(REST)
        verifier = self._fork(self._job.processes * 2, lambda pipe: verify(self._board, self._job, pipe))
        while verifier in self._members and b"\n" not in verifier.heard:  # its first line: it has the pool open
            time.sleep(_TICK)
            self._watch()
        self._board.enter(LEAVE)
        while self._members:
            time.sleep(_TICK)
            self._watch()
            if self._members == [verifier]:
                self._board.enter(QUIET)
        said = [json.loads(line) for line in verifier.heard.splitlines()]
        self.found += [one for one in said if "message" in one]
        return next((one for one in said if "info" in one), {})

    # ---------------------------------------------------------- processes

    def _start(self, row: int) -> None:
        self._fork(row, lambda pipe: work(self._board, row, self._job, pipe))

    def _fork(self, row: int, task: Callable[[int], None]) -> Member:
        ours, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:  # an interrupt comes when we know of the process, or before there is one
            pid = fork()
            if not pid:
                _live(task, theirs, self._stacks, before)
            os.close(theirs)
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)
            member = Member(pid, ours, row)
            self._members.append(member)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return member

    def _done(self) -> bool:
        quotas = [(row, self._job.quota(row)) for row in range(self._job.processes)]
        return all(quota is not None and self._board.row(row, QUOTA) >= quota for row, quota in quotas)

    def _watch(self) -> None:
        for member in list(self._members):
            member.listen()
            if member.status is None:
                self._look_at(member)
            elif member.silent:
                self._bury(member)
            elif time.monotonic() > member.died + _ORPHAN_LIFE:
                member.signal_all(signal.SIGKILL)

    def _look_at(self, member: Member) -> None:
        """See whether a process has ended, or hangs."""
        ended = os.waitid(os.P_PID, member.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended:
            # It is not waited for yet: as long as it is there, its group's number is not that of others.
            member.status = -ended.si_status if ended.si_code != os.CLD_EXITED else ended.si_status
            member.died = time.monotonic()
            return
        rows = (member.row, member.row + self._job.processes) if member.row < self._job.processes else (member.row,)
        beats = tuple(self._board.row(row, BEAT) for row in rows)
        if beats != member.beats:
            member.beats, member.moved = beats, time.monotonic()
        elif time.monotonic() > member.moved + self._patience:
            self._give_up(member)

    def _bury(self, member: Member) -> None:
        """Forget a process that is gone, with all that it has forked; start another one when it was killed."""
        os.waitpid(member.pid, 0)
        os.close(member.pipe)
        self._members.remove(member)
        if member.row == self._job.processes * 2:
            if member.status and not member.given_up:
                self._note("", f"the process that verifies ended with status {member.status}")
            return
        found = [json.loads(line) for line in member.heard.splitlines()]
        self.found += found
        for row in (member.row, member.row + self._job.processes):
            self._board.leave_all(row)
        if member.status == -signal.SIGKILL and self._job.kill:
            self._board.add_header(KILLED)
            if not self._ending:
                self._start(member.row)
        elif member.status and not found and not member.given_up:
            how = f"died of {signal.Signals(-member.status).name}" if member.status < 0 else f"exited with {member.status}"
            self._note("S8", f"worker {member.row} {how} {self._doing(member.row)}")

    def _kill(self) -> None:
        if time.monotonic() < self._next_kill:
            return
        if self._next_kill:
            alive = [member for member in self._members if member.status is None]
            if alive:
                os.kill(self._random.choice(alive).pid, signal.SIGKILL)
        self._next_kill = time.monotonic() + self._random.expovariate(1 / _BETWEEN_KILLS)

    # ----------------------------------------------------------- findings

    def _note(self, rule: str, message: str) -> None:
        self.found.append({"rule": rule, "message": message, "pages": []})

    def _where(self, member: Member) -> str:
        """Say where a process is, and what it has forked: what the kernel says, and Python's stack as far as it answers."""
        lines = [f"worker {member.row} {self._doing(member.row)}:"]
        for pid in sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
            if _group(pid) == member.pid:
                start = os.lseek(self._stacks, 0, os.SEEK_END)
                lines.append(f"process {pid}: {_waits(pid)}")
                os.kill(pid, _STACK_SIGNAL)  # it is in the group still: a zombie, at least
                time.sleep(_STACK_TIME)
                stack = os.pread(self._stacks, os.lseek(self._stacks, 0, os.SEEK_END) - start, start)
                lines.append(_BELOW.sub("", stack.decode(errors="replace")))
        return "\n".join(lines)

    def _doing(self, row: int) -> str:
        doing = self._board.row(row, DOING)
        return f"during {KINDS[doing - 1]}" if doing else "between operations"

    def _give_up(self, member: Member) -> None:
        """Have all processes say where they are, and kill the one that hangs."""
        member.given_up = True
        if any(other.given_up for other in self._members if other is not member):
            member.signal_all(signal.SIGKILL)  # it waits for what the first one waits for, and the first report says where
            return
        everybody = "\n".join(self._where(other) for other in self._members if other.status is None)
        self._note(
            "S8",
            f"worker {member.row} (process {member.pid}) has made no progress for {self._patience:g} s "
            f"{self._doing(member.row)}; where all processes are:\n{everybody}",
        )
        member.signal_all(signal.SIGKILL)


def _live(task: Callable[[int], None], pipe: int, stacks: int, mask: Iterable[int]) -> None:
    """Be a forked process: do the task, report what goes wrong, and end."""
    status = 1

    def thread_failed(failure: threading.ExceptHookArgs) -> None:
        if isinstance(failure.exc_value, Exception):
            report(pipe, failure.exc_value)

    try:
        os.setpgid(0, 0)
        threading.excepthook = thread_failed
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who watches over us decides what it means
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        faulthandler.register(_STACK_SIGNAL, stacks, all_threads=True)
        task(pipe)
        status = 0
    except Exception as error:
        report(pipe, error)
    finally:
        os._exit(status)


def _waits(pid: int) -> str:
    """Say what each thread of a process waits for in the kernel, as far as it can be read."""
    lines = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        found = [thread.name]
        for name in ("comm", "wchan", "syscall"):
            with suppress(OSError):
                found.append((thread / name).read_text().strip())
        lines.append(" ".join(found))
    return "; ".join(lines)


def _group(pid: int) -> int:
    """Return the process group that a process is in; 0 when it is gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
