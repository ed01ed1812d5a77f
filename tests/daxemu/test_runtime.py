"""The run-time file: made once, lost under the living, rebuilt for nobody, and never believed when it is out of date."""

import errno
import gc
import os
import shutil
import stat

import numpy as np
import pytest

import onecopy
from onecopy.daxemu import runtime
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.runtime import HEADER, MAGIC, SLOTS, STATE, Layout, W, runtime_paths
from onecopy.daxemu.units import PAGE
from onecopy.fs import lifecycle


@pytest.fixture
def paths(small):
    """The paths of the run-time file and of the lock file of the pool `small`."""
    pool = Pool(small, writable=False)
    yield runtime_paths(pool)
    pool.close()


@pytest.fixture
def user(small):
    """A handle on the pool `small`, with one file in it that has not been synced."""
    with onecopy.open(small) as fs:
        fs.write("/file", b"content")
        yield fs


def content(path: str) -> bytes:
    with onecopy.open(path) as fs:
        assert fs.check().findings == []
        return fs.read("/file")


@pytest.mark.parametrize("which", ["run-time file", "lock file", "both"])
def test_lost_under_a_live_user_it_is_not_made_a_second_time(small, paths, user, which):
    for path in {"run-time file": paths[:1], "lock file": paths[1:], "both": paths}[which]:
        os.unlink(path)
    with pytest.raises(onecopy.RuntimeLost) as caught:
        onecopy.open(small)
    assert caught.value.errno == errno.ESTALE
    user.write("/file", b"still works")
    user.close()
    assert content(small) == b"still works"


@pytest.mark.parametrize("which", [0, 1])
def test_lost_with_nobody_there_it_is_rebuilt(small, paths, user, which):
    user.close()
    os.unlink(paths[which])
    assert content(small) == b"content"
    assert all(map(os.path.exists, paths))


@pytest.mark.parametrize("at", ["start", "everywhere", "end"])
def test_a_damaged_one_is_rebuilt(small, paths, user, at):
    user.close()
    size = os.path.getsize(paths[0])
    with open(paths[0], "r+b") as file:
        if at == "end":
            file.truncate(size - 1)
        else:
            file.write(bytes(HEADER.size if at == "start" else 1 << 20))
    assert content(small) == b"content"


def test_a_half_built_one_is_rebuilt(small, paths, user):
    user.close()
    with open(paths[0], "r+b") as file:
        file.write(bytes(8))  # the magic, which is stored last
    assert content(small) == b"content"


def test_it_outlives_its_users_and_holds_what_was_not_synced(small, user, start):
    def write_and_die(line):
        fs = onecopy.open(small)
        fs.write("/file", b"from a process that was killed")
        os.kill(os.getpid(), 9)

    user.close()
    assert start(write_and_die).wait() == -9
    assert content(small) == b"from a process that was killed"


@pytest.fixture
def older(small, user, tmp_path):
    """A copy of the pool file as it was before its last sync, when the file's content was another one."""
    user.sync()
    shutil.copyfile(small, tmp_path / "older")
    user.write("/file", b"newer")
    user.sync()
    return tmp_path / "older"


def restore(copy, path: str) -> None:
    """Write a copy over a pool file, in place, as `cp` does."""
    with open(copy, "rb") as source, open(path, "r+b") as target:
        shutil.copyfileobj(source, target)


def test_it_is_rebuilt_after_the_pool_was_restored_from_an_older_copy(small, user, older):
    user.close()
    restore(older, small)
    assert content(small) == b"content"


def test_a_pool_that_is_restored_under_a_live_user_admits_nobody(small, user, older):
    user.write("/other", b"")
    restore(older, small)
    gc.collect()  # what earlier tests forgot must not be closed meanwhile
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(onecopy.RuntimeLost, match="replaced"):
        onecopy.open(small)
    assert set(os.listdir("/proc/self/fd")) <= descriptors


def test_a_copy_of_a_pool_has_a_run_time_file_of_its_own(small, paths, user, new_path):
    user.sync()
    copy = new_path()
    shutil.copyfile(small, copy)
    with onecopy.open(copy) as other:
        other.write("/file", b"of the copy")
        assert (user.read("/file"), other.read("/file")) == (b"content", b"of the copy")
    assert user.check().findings == []


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_it_has_the_pool_s_owner_and_mode(new_path, mode):
    path = new_path()
    onecopy.format(path, "4M", mode=mode)
    with onecopy.open(path):
        pool = Pool(path, writable=False)
        for one in runtime_paths(pool):
            status = os.stat(one)
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (mode, pool.status.st_uid)
        pool.close()


def test_a_full_dev_shm_is_nospace(small, paths, user, monkeypatch):
    user.close()
    os.unlink(paths[0])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "fallocate", full)
        with pytest.raises(onecopy.NoSpace, match="/dev/shm has no room"):
            onecopy.open(small)
    assert not os.path.exists(paths[0])
    assert content(small) == b"content"


def test_areas_follow_each_other_and_grow_on_demand(small, user):
    layout, shared = Layout(1024), user._mount.runtime
    areas = "slots readers counters table limbo taken log messages bells buckets spaces windows size"
    edges = [getattr(layout, area) for area in areas.split()]
    assert edges == sorted(edges) and all(edge % PAGE == 0 for edge in edges)
    assert layout.slots >= HEADER.size + STATE.size
    assert HEADER.unpack(shared.bytes)["magic"] == MAGIC
    storage = os.fstat(shared.fd).st_blocks
    assert storage * 512 < layout.size / 100
    with user._mount.lock:
        shared.reserve(W["limbo_room"], layout.limbo, 100_000)
        assert shared.get("limbo_room") >= 100_000
        grown = os.fstat(shared.fd).st_blocks
        shared.reserve(W["limbo_room"], layout.limbo, 90_000)
    assert os.fstat(shared.fd).st_blocks == grown > storage


def test_a_new_one_announces_no_reader(small, user):
    shared = user._mount.runtime
    words = np.frombuffer(shared.bytes[shared.layout.readers : shared.layout.counters], np.uint64)
    assert len(words) == SLOTS * runtime.READERS and (words == (1 << 64) - 1).all()


def test_what_is_left_of_pools_that_are_gone_is_swept_away(small, paths, user, new_path):
    user.close()
    other = new_path()
    onecopy.format(other, "4M")
    assert all(map(os.path.exists, paths)), "the pool is still there"
    os.unlink(small)
    onecopy.format(other, "4M", force=True)
    assert not any(map(os.path.exists, paths))


def test_what_is_in_use_is_not_swept_away(small, paths, user, new_path):
    with open(small, "rb"):
        os.unlink(small)
        onecopy.format(new_path(), "4M")
        assert all(map(os.path.exists, paths))
        user.write("/file", b"x")
        user.close()
        onecopy.format(new_path(), "4M")
    assert not any(map(os.path.exists, paths))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", bytes(8)),
        ("layout", (runtime.LAYOUT + 1).to_bytes(8, "little")),
        ("path", b"\1\0/dev/shm"),
        ("path", bytes(9)),
    ],
)
def test_what_it_does_not_understand_is_not_swept_away(small, paths, user, new_path, field, value):
    """Another version's run-time file, one that is half-built, or damage: not ours to delete, no reason not to make a pool."""
    user.close()
    os.unlink(small)
    with open(paths[0], "r+b") as file:
        file.seek(HEADER.offset[field])
        file.write(value)
    try:
        onecopy.format(new_path(), "4M")
        assert all(map(os.path.exists, paths))
    finally:
        for path in paths:
            os.unlink(path)


def test_a_pool_may_be_removed_while_another_process_sweeps(small, paths, user, monkeypatch):
    """The sweeper finds the pool gone and is faster with its run-time files."""
    user.close()
    unlink = os.unlink

    def and_sweep(path):
        unlink(path)
        if path == small:
            lifecycle.sweep()

    monkeypatch.setattr(os, "unlink", and_sweep)
    onecopy.remove(small)
    assert not any(map(os.path.exists, (small, *paths)))


def test_run_time_files_of_another_version_are_not_swept(small, paths, user, tmp_path, monkeypatch):
    """Its header has other fields: the pool's path would be looked for in the wrong place, and the pool taken for gone."""
    header = bytearray(HEADER.size)
    header[: HEADER.size - 8] = user._mount.runtime.bytes[: HEADER.size - 8]
    header[HEADER.offset["layout"] : HEADER.offset["layout"] + 8] = (runtime.LAYOUT + 1).to_bytes(8, "little")
    where = HEADER.offset["path"]
    for shift in (-8, -1, 0, 1, 8):
        moved = bytearray(header)
        moved[where:] = bytes(len(header) - where)
        moved[where + shift : where + shift + len(small)] = small.encode()
        (tmp_path / f"onecopy-{shift}").write_bytes(moved)
    names = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(runtime, "FOLDER", str(tmp_path))
    assert lifecycle.sweep() == []
    assert sorted(os.listdir(tmp_path)) == names
