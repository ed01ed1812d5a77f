"""Ctrl-C, and exceptions out of progress callbacks, in the middle of long work: all or nothing, and the lock is free."""

import os
import signal
import subprocess
import sys

import pytest

import onecopy
from onecopy.daxemu import steps

PAGE = onecopy.PAGE


class Stop(BaseException):
    """What no code may catch and go on from."""


@pytest.fixture
def source(tmp_path):
    """A host tree: one file that takes two transactions, and small ones."""
    top = tmp_path / "tree"
    (top / "inner").mkdir(parents=True)
    with open(top / "large", "wb") as file:
        file.write(os.urandom(PAGE) * 17 * 1024)  # 68 MiB
    for number in range(20):
        (top / "inner" / str(number)).write_bytes(os.urandom(2 * PAGE))
    return top


@pytest.fixture
def large(pool_path):
    """An open pool of 160 MiB with a file of its own; checked at the end, by a handle that could wait for a lock."""
    onecopy.format(pool_path, "160M")
    with onecopy.open(pool_path) as fs:
        fs.write("/kept", b"kept")
        yield fs
        assert fs.check().findings == []
    with onecopy.open(pool_path) as fs:
        assert fs.read("/kept") == b"kept"
        assert fs.check().findings == []


def _used(fs):
    fs.sync()
    return fs.info().used_pages


def _stop_at(call, error=Stop):
    """Return a progress callback that raises at its n-th call."""
    left = [call]

    def progress(done, total, unit):
        assert 0 <= done <= total and unit in ("bytes", "files", "pages")
        left[0] -= 1
        if not left[0]:
            raise error

    return progress


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", [1, 2, 5, 15])
def test_put_of_a_tree_stopped_by_its_progress(large, source, call, error):
    before = _used(large)
    with pytest.raises(error):
        large.put(source, "/tree", progress=_stop_at(call, error))
    assert large.listdir("/") == ["kept"]
    assert _used(large) == before
    large.put(source / "inner", "/tree")


@pytest.mark.parametrize("exists", [True, False])
def test_put_of_a_large_file_stopped_by_its_progress(large, source, exists):
    if exists:
        large.write("/large", b"old")
    before = _used(large)
    with pytest.raises(Stop):
        large.put(source / "large", "/large", progress=_stop_at(1))
    assert large.listdir("/") == (["kept", "large"] if exists else ["kept"])
    if exists:
        assert large.read("/large") == b"old"
    assert _used(large) == before


@pytest.mark.parametrize("call", [1, 2, 10])
def test_get_stopped_by_its_progress(large, source, tmp_path, call):
    large.put(source, "/tree")
    with pytest.raises(Stop):
        large.get("/tree", tmp_path / "out", progress=_stop_at(call))
    with pytest.raises(Stop):
        large.get("/tree/large", tmp_path / "file", progress=_stop_at(1))
    assert os.listdir(tmp_path) == ["tree"]


@pytest.fixture
def doubled(large):
    """Twenty files of which every page is in each."""
    page = [os.urandom(PAGE) for _ in range(200)]
    for number in range(20):
        large.write(f"/{number}", b"".join(page[number:] + page[:number]))
    return large


@pytest.mark.parametrize(("apply", "call"), [(False, 1), (True, 1), (True, 2)])
def test_dedupe_stopped_by_its_progress(doubled, apply, call):
    """What was shared until then stays shared; what the files hold does not change."""
    contents = {name: doubled.read(f"/{name}") for name in doubled.listdir("/")}
    with pytest.raises(Stop):
        doubled.dedupe(apply=apply, progress=_stop_at(call))
    assert {name: doubled.read(f"/{name}") for name in doubled.listdir("/")} == contents
    assert doubled.check().findings == []
    doubled.dedupe(apply=True)
    assert doubled.du("/").total == 200 * PAGE


@pytest.mark.parametrize("call", [1, 2])
def test_rmtree_stopped_by_its_progress(large, call):
    """Others see it half removed, and it can be finished."""
    large.mkdir("/tree")
    for number in range(600):
        large.write(f"/tree/{number}", b"x")
    with pytest.raises(Stop):
        large.rmtree("/tree", progress=_stop_at(call))
    assert len(large.listdir("/tree")) == 600 - 256 * call
    assert large.check().findings == []
    large.rmtree("/tree")
    assert large.listdir("/") == ["kept"]


# ------------------------------------------------------- signals as they come

_CHILD = """
import os, signal, sys
import onecopy
from onecopy.daxemu import steps
path, step, nth = sys.argv[1], sys.argv[2], int(sys.argv[3])
fs = onecopy.open(path)
left = nth
def hook(number):
    global left
    left -= steps.STEPS[number] == step
    if not left:
        left = -1
        os.kill(os.getpid(), signal.SIGINT)
steps.hook = hook
try:
    WORK
except KeyboardInterrupt:
    steps.hook = None
    fs.close()
    print("interrupted")
"""


def _interrupted(fs, work, step, nth):
    """Send SIGINT to a process that does `work` when it gets to a step for the n-th time; it must end by it, cleanly."""
    command = [sys.executable, "-c", _CHILD.replace("WORK", work), fs.path, step, str(nth)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False, text=True)
    assert (done.stdout, done.returncode) == ("interrupted\n", 0), done.stderr


@pytest.mark.parametrize("step", ["frame taken", "node copied", "limbo appended", "published"])
@pytest.mark.parametrize("nth", [1, 7])
def test_a_real_interrupt_during_put(large, source, step, nth):
    before = _used(large)
    _interrupted(large, f"fs.put({str(source)!r}, '/tree')", step, nth)
    assert large.listdir("/") == ["kept"]
    assert _used(large) == before
    assert [user.pid for user in large.info().users] == [os.getpid()]


@pytest.mark.parametrize("step", ["lock taken", "node copied", "published"])
def test_a_real_interrupt_during_dedupe(doubled, step):
    contents = {name: doubled.read(f"/{name}") for name in doubled.listdir("/")}
    _interrupted(doubled, "fs.dedupe(apply=True)", step, 1)
    assert {name: doubled.read(f"/{name}") for name in doubled.listdir("/")} == contents
    assert doubled.check().findings == []
    doubled.write("/0", b"the lock is free")


@pytest.mark.parametrize("step", ["sync intended", "checksums set", "pages flushed", "superblock stored", "durable noted"])
def test_a_real_interrupt_during_sync(large, step):
    """The sync is finished by whoever comes next, also by the close that the interrupt leads to."""
    large.write("/more", os.urandom(20 * PAGE))
    _interrupted(large, "fs.sync()", step, 1)
    large.write("/evenmore", b"x")
    large.sync()
    assert large.info().durable_generation == large.info().generation
    assert onecopy.check(large.path).findings == []


@pytest.mark.parametrize("call", ["write", "clone", "unlink", "mkdir", "rename", "truncate"])
def test_every_step_of_a_change_can_be_interrupted(pool, call):
    """An exception at the n-th step, for every n, until the change gets through: before, nothing; after, all of it."""
    data = os.urandom(20 * PAGE)
    pool.write("/file", data)
    pool.clone("/file", "/other")
    arguments = {"write": ("/file", b"x" * 9 * PAGE, PAGE), "clone": ("/file", "/new"), "unlink": ("/file",),
                 "mkdir": ("/new",), "rename": ("/file", "/new"), "truncate": ("/file", PAGE)}[call]  # fmt: skip
    before, used = _state(pool), _used(pool)
    step, state = 0, before
    while state == before:
        left = iter(range(step, -1, -1))
        steps.hook = lambda _, left=left: next(left, 1) == 0 and signal.raise_signal(signal.SIGINT)
        try:
            getattr(pool, call)(*arguments)
        except KeyboardInterrupt:
            pass
        finally:
            steps.hook = None
        state = _state(pool)
        assert pool.check().findings == []
        if state == before:
            assert _used(pool) == used
        step += 1
    assert step > 4
    assert pool.read("/other") == data


def _state(fs):
    """Return what the top directory holds: names, and bytes of the files."""
    return [(entry.name, entry.kind == "file" and fs.read(f"/{entry.name}")) for entry in fs.scandir("/")]
