"""A small input of every kind of file, and the demo in a process of its own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from onecopy.cli.measure import PAGE

PROGRAM = [sys.executable, "-c", "from onecopy.cli.main import run; run()", "demo"]


@pytest.fixture
def tree(tmp_path):
    """Make a tree with an empty file, tiny ones, large ones, a sparse one, odd names and a symbolic link."""
    root = tmp_path / "tree"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "sub" / "empty folder").mkdir()
    (root / "empty").touch()
    (root / "tiny").write_bytes(b"tiny")
    (root / "sub" / "page").write_bytes(os.urandom(PAGE))
    (root / "sub" / "more than a page").write_bytes(os.urandom(PAGE + 1))
    (root / "sub" / "deep" / os.fsdecode(b"not utf-8 \xff")).write_bytes(os.urandom(300_000))
    (root / "sub" / "link").symlink_to("page")
    with open(root / "sparse", "wb") as sparse:
        sparse.seek(200 * PAGE)
        sparse.write(os.urandom(10 * PAGE))
    for number in range(30):
        (root / f"file {number}").write_bytes(os.urandom(1000 * number))
    return root


@pytest.fixture
def pools():
    """Make a directory in shared memory for all that the demo makes."""
    with tempfile.TemporaryDirectory(prefix="test-demo-", dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def start(tmp_path, pools):
    """Start the demo in a session of its own, with its pool in `pools`; what still runs at the end is killed."""
    started = []

    def start(*args, **options):
        places = ["--pool", str(pools / "p"), "--png", str(tmp_path / "demo.png")]
        process = subprocess.Popen(
            [*PROGRAM, *places, *map(str, args)],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, **options},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
