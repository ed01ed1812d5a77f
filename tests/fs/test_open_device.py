"""The raw door: frames by PFN, never at the same time as files, and nothing is believed afterwards that is not in the pool."""

import errno
import gc
import mmap
import os
import signal

import numpy as np
import pytest

import onecopy
from onecopy.daxemu import pool
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.runtime import runtime_paths
from onecopy.fs.format import NODE, SUPERBLOCK_PFNS
from onecopy.fs.superblock import newest

PAGE = onecopy.PAGE


@pytest.fixture
def small(new_path):
    """The path of a pool of 4 MiB with one file of four pages."""
    path = new_path()
    onecopy.format(path, "4M")
    with onecopy.open(path) as fs:
        fs.write("/file", b"".join(bytes([letter]) * PAGE for letter in b"ABCD"))
    return path


def pfns(path, file="/file"):
    with onecopy.open(path, "r") as fs, fs.map(file) as m:
        return m.pfns.tolist()


def runtime_file(path):
    raw = Pool(path, writable=False)
    try:
        return runtime_paths(raw)[0]
    finally:
        raw.close()


def refused(kind, code, work, *arguments):
    with pytest.raises(kind) as caught:
        work(*arguments)
    assert caught.value.errno == code


def test_frames_are_mapped_by_pfn(small):
    first = pfns(small)[0]
    with onecopy.open_device(small) as device:
        assert (device.frames, device.page_size, device.writable, device.path) == (1024, PAGE, True, small)
        with device.map(first, 4) as memory:
            assert memory[:] == b"".join(bytes([letter]) * PAGE for letter in b"ABCD")
        with device.map(0, 1) as header, device.map(SUPERBLOCK_PFNS[0], 2) as superblocks:
            assert header[:7] == b"onecopy"
            assert len(superblocks) == 2 * PAGE
        with device.map(first + 1, 1, "r+") as memory:
            memory[:3] = b"raw"
            np.frombuffer(memory, np.uint8)[-1] = 7
            device.flush(first + 1, 1)
    with onecopy.open(small) as fs:
        page = fs.read("/file", PAGE, PAGE)
        assert page == b"raw" + b"B" * (PAGE - 4) + b"\7"
        assert fs.check().findings == []


def test_it_is_not_open_together_with_the_file_system(small):
    for mode in ("r", "r+"):
        with onecopy.open(small, mode):
            refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open_device, small)
    device = onecopy.open_device(small)
    for mode in ("r", "r+"):
        refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open, small, mode)
        refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open_device, small, mode)
    for work in (onecopy.remove, lambda path: onecopy.format(path, "4M", force=True)):
        refused(onecopy.PoolBusy, errno.EBUSY, work, small)
    device.close()
    device.close()
    onecopy.open(small).close()


def test_readers_share_it_with_each_other_and_the_file_system(small, policy):
    pfn = pfns(small)[0]
    with onecopy.open(small) as fs, onecopy.open_device(small, "r") as one, onecopy.open_device(small, "r") as two:
        with one.map(pfn, 1) as memory:
            fs.write("/file", b"new")
            if policy != "dax":
                fs.sync()
            assert memory[:4] == b"newA"
        refused(onecopy.ReadOnly, errno.EROFS, two.map, pfn, 1, "r+")
        with two.map(pfn, 1) as memory, pytest.raises(TypeError):
            memory[0] = 1
        refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open_device, small)
        two.flush(pfn, 1)
        assert fs.check().findings == []
    with onecopy.open_device(small, "r"):
        onecopy.open(small).close()
        refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open_device, small)


def test_a_run_time_file_is_not_built_beside_a_raw_reader(small):
    with onecopy.open_device(small, "r"):
        os.unlink(runtime_file(small))
        with pytest.raises(onecopy.PoolBusy, match="raw device"):
            onecopy.open(small)
    with onecopy.open(small) as fs, onecopy.open_device(small, "r"):
        os.unlink(runtime_file(small))
        with pytest.raises(onecopy.PoolBusy, match="raw device"):
            onecopy.open(small)
        fs.write("/file", b"still works")
    assert onecopy.check(small).ok


def test_lost_under_users_it_is_still_called_lost(small):
    with onecopy.open(small):
        os.unlink(runtime_file(small))
        with pytest.raises(onecopy.RuntimeLost):
            onecopy.open(small)


def test_the_run_time_file_goes_before_anything_can_be_stored(small):
    file = runtime_file(small)
    assert os.path.exists(file)
    onecopy.open_device(small, "r").close()
    assert os.path.exists(file)
    with onecopy.open_device(small):
        assert not os.path.exists(file)
        assert onecopy.check(small).ok
    assert not os.path.exists(file)
    onecopy.open(small).close()
    assert os.path.exists(file)


def node_of_a_tree(path):
    """The PFN of the tree node that the superblock names first."""
    raw = Pool(path, writable=False)
    try:
        return newest(raw).roots
    finally:
        raw.close()


def test_a_node_damaged_raw_is_found(small):
    pfn = node_of_a_tree(small)
    with onecopy.open_device(small) as device, device.map(pfn, 1, "r+") as memory:
        memory[NODE.size] ^= 1
        device.flush(pfn, 1)
    findings = onecopy.check(small).findings
    assert ("checksum", pfn) in {(finding.code, finding.pfn) for finding in findings}
    with pytest.raises(onecopy.CorruptRecord) as caught:
        onecopy.open(small)
    assert caught.value.pfn == pfn
    with onecopy.open_device(small) as device, device.map(pfn, 1, "r+") as memory:
        memory[NODE.size] ^= 1
    assert onecopy.check(small).ok
    onecopy.open(small).close()


def test_a_superblock_restored_raw_counts(small):
    """Both slots put back as they were: the generation is an older one, and the file of then is there again."""
    with onecopy.open_device(small) as device, device.map(0, device.frames) as memory:
        before = memory[:]
    with onecopy.open(small) as fs:
        fs.write("/file", b"later")
        fs.write("/other", b"gone")
    with onecopy.open_device(small) as device, device.map(0, device.frames, "r+") as memory:
        memory[:] = before
    with onecopy.open(small) as fs:
        assert fs.listdir("/") == ["file"]
        assert fs.read("/file", 0, 8) == b"A" * 8
        assert fs.check().findings == []


@pytest.mark.parametrize("how", ["write", "store", "store after a sync", "sync under way"])
def test_what_a_killed_process_left_is_synced_first(small, how):
    """S8: a process that is killed loses nothing, also not to who opens the raw device next."""
    pid = os.fork()
    if not pid:
        fs = onecopy.open(small)
        fs.clone("/file", "/clone")
        if how in ("store after a sync", "sync under way"):
            fs.sync()
        if how == "sync under way":
            fs.write("/clone", b"done")
            fs._mount.runtime.set("intent", 2)
        elif how == "write":
            fs.write("/clone", b"done")
        else:
            memoryview(fs.map("/clone", "r+")).cast("B")[:4] = b"done"
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.path.exists(runtime_file(small))
    with onecopy.open_device(small) as device:
        assert not os.path.exists(runtime_file(small))
        device.map(0, 1).close()
    with onecopy.open(small) as fs:
        assert fs.read("/clone", 0, 8) == b"doneAAAA"
        assert fs.read("/file", 0, 8) == b"A" * 8
        assert fs.check().findings == []


def test_a_buffer_keeps_the_door_its_own(small):
    """A mapping that outlives its device could still store: nobody else comes in until it is gone."""
    device = onecopy.open_device(small)
    memory = device.map(900, 2, "r+")
    array = np.frombuffer(memory, np.uint8)
    del memory
    device.close()
    array[0] = 9
    refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open, small)
    refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open_device, small, "r")
    del array
    onecopy.open(small).close()


def test_a_forked_child_keeps_it_too(small):
    reader, writer = os.pipe()
    device = onecopy.open_device(small)
    pid = os.fork()
    if not pid:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    device.close()
    refused(onecopy.PoolBusy, errno.EBUSY, onecopy.open, small)
    os.close(writer)
    os.waitpid(pid, 0)
    os.close(reader)
    onecopy.open(small).close()


def test_it_knows_its_bounds(small):
    with onecopy.open_device(small) as device:
        for pfn, pages in ((-1, 1), (0, 0), (0, -1), (1024, 1), (1023, 2), (1 << 60, 1)):
            refused(onecopy.OneCopyError, errno.EINVAL, device.map, pfn, pages)
            refused(onecopy.OneCopyError, errno.EINVAL, device.flush, pfn, pages)
        refused(onecopy.OneCopyError, errno.EINVAL, device.map, 0, 1, "w")
        assert len(device.map(1023, 1)) == PAGE
    refused(OSError, errno.EBADF, device.map, 0, 1)
    refused(OSError, errno.EBADF, device.flush, 0, 1)
    refused(onecopy.OneCopyError, errno.EINVAL, onecopy.open_device, small, "w")


def test_what_is_no_pool(small, tmp_path):
    (tmp_path / "text").write_text("no pool")
    refused(onecopy.NotAPool, errno.EINVAL, onecopy.open_device, tmp_path / "text")
    refused(FileNotFoundError, errno.ENOENT, onecopy.open_device, tmp_path / "none")
    refused(onecopy.NotAPool, errno.EINVAL, onecopy.open_device, tmp_path)
    assert os.listdir(tmp_path) == ["text"]


def test_frames_to_store_to_get_storage_first(small, monkeypatch):
    """Where the host has no room, mapping says so, and no store is a SIGBUS."""
    blocks = os.stat(small).st_blocks
    with onecopy.open_device(small) as device:
        device.map(500, 100).close()
        assert os.stat(small).st_blocks == blocks
        device.map(500, 100, "r+").close()
        assert os.stat(small).st_blocks >= blocks + 100 * 8

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(pool, "fallocate", full)
            refused(onecopy.NoSpace, errno.ENOSPC, device.map, 700, 1, "r+")


def test_on_a_disk_what_was_flushed_is_durable(tmp_path):
    path = str(tmp_path / "pool")
    onecopy.format(path, "4M")
    try:
        with onecopy.open_device(path) as device, device.map(1000, 1, "r+") as memory:
            memory[:4] = b"disk"
            device.flush(1000, 1)
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as all_of_it:
                assert all_of_it[1000 * PAGE : 1000 * PAGE + 4] == b"disk"
        assert onecopy.check(path).ok
    finally:
        onecopy.remove(path)


def test_no_descriptor_is_left(small):
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    for mode in ("r", "r+"):
        device = onecopy.open_device(small, mode)
        device.map(3, 4, mode).close()
        device.close()
        with onecopy.open(small), pytest.raises(onecopy.PoolBusy):
            onecopy.open_device(small)
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("policy", ["shared", "per-inode"])
def test_a_pool_with_a_buffer_cache(tmp_path, policy):
    """What the cache holds is on the device before the door opens, and is not believed afterwards."""
    path = str(tmp_path / "pool")
    onecopy.format(path, "4M", device="cached", cache_size="2M", policy=policy)
    try:
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            fs = onecopy.open(path)
            fs.write("/file", b"A" * PAGE + b"B" * PAGE)
            os.write(writer, fs.map("/file").pfns[1].tobytes())
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        pfn = int.from_bytes(os.read(reader, 8), "little")
        os.close(reader)
        os.close(writer)
        with onecopy.open_device(path) as device, device.map(pfn, 1, "r+") as memory:
            assert memory[:] == b"B" * PAGE
            memory[:3] = b"raw"
            device.flush(pfn, 1)
        with onecopy.open(path) as fs:
            assert fs.read("/file", PAGE, 4) == b"rawB"
            assert fs.check().findings == []
    finally:
        onecopy.remove(path)
