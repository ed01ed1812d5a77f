"""The stress test in a process of its own, and a board by itself."""

import os
import subprocess
import sys

import pytest

from onecopy.cli.stress_board import Board

PROGRAM = [sys.executable, "-c", "from onecopy.cli.main import run; run()", "stress"]


@pytest.fixture
def start():
    """Start the stress test in a session of its own; what still runs at the end is killed."""
    started = []

    def start(*args):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen([*PROGRAM, *map(str, args)], **options))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def board():
    with Board(rows=3, names=2, pages=8) as board:
        yield board


def family(session: int) -> list[int]:
    """Return the processes that live in a session: that of a run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, its_session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(name))
    return found
