"""Peers that do not see each other as processes: another user, another PID namespace; and folding unasked (S3, S8)."""

import ctypes
import os
import time

import numpy as np
import pytest

import onecopy
from onecopy.fs import maps

from ..multiproc.processes import fork
from .common import PAGE, assert_all_ended, content, counter

NOBODY = 65534
NEW_PID_NAMESPACE = 0x20000000  # CLONE_NEWPID
PAGES = 24


@pytest.fixture
def fs(pool_path):
    """A pool that everybody may write to, with /origin and its clone /a."""
    onecopy.format(pool_path, "64M", mode=0o666)
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")
        yield fs
        assert fs.read("/origin") == content(PAGES)
        assert_all_ended(fs)


def become_somebody_else(work):
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return work()


def leave_for_another_namespace(work):
    """Run `work` in a child that is process 1 of a PID namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_PID_NAMESPACE):
        raise OSError(ctypes.get_errno(), "unshare")
    pid = fork()
    if not pid:
        try:
            assert os.getpid() == 1
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the right to become somebody else")
@pytest.mark.parametrize("leave", [become_somebody_else, leave_for_another_namespace])
def test_a_stranger_takes_part(fs, start, leave):
    """Each sees the other's first stores, which shoot at the other's mapping; each survives the other's death."""

    def stranger(line):
        def work():
            other = onecopy.open(fs.path)
            mapping = other.map("/a", "r+")
            line.say("mapped")
            assert line.hear() == "stored" and mapping[0:4] == b"ours"
            mapping[8 * PAGE : 8 * PAGE + 6] = b"theirs"
            line.say("stored")
            line.hear()  # and then it dies with its mapping

        leave(work)

    process = start(stranger)
    assert process.hear() == "mapped"
    with fs.map("/a", "r+") as mapping:
        before = counter(fs, "shootdowns")
        mapping[0:4] = b"ours"
        assert counter(fs, "shootdowns") == before + 1, "it maps the page, and was told"
        assert process.ask("stored") == "stored"
        assert mapping[8 * PAGE : 8 * PAGE + 6] == b"theirs" == fs.read("/a", 8 * PAGE, 6)
        process.say("enough")
        process.hear()
        assert process.wait() == 0
        mapping[16 * PAGE] = 1
        assert mapping[8 * PAGE : 8 * PAGE + 6] == b"theirs"


def test_much_that_is_stored_is_folded_unasked(fs, monkeypatch):
    """Past the threshold a thread makes extents of it; what it folds is a transaction like any other."""
    monkeypatch.setattr(maps, "FOLD_AT", 16)
    fs.write("/b", bytes(1024 * PAGE))
    fs.clone("/b", "/c")
    with fs.map("/c", "r+") as mapping:
        generation = fs.info().generation
        array = np.frombuffer(memoryview(mapping), np.uint8)
        array[:: 4 * PAGE] = 1
        end = time.monotonic() + 60
        while counter(fs, "dirty"):
            assert time.monotonic() < end, "nothing was folded within a minute"
            time.sleep(0.001)
        assert fs.info().generation > generation, "in a transaction"
        del array
    assert fs.check().findings == []
