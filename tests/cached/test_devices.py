"""Devices that fail, stall and recover: errors name the block, nothing is lost, and all works when the device does again."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

import onecopy
from onecopy.blkcache.device import Conditioned, FileDevice

from ..mapped.common import assert_sound
from .common import PAGE, assert_settled, begin, content, end, frames, new_pool, page_of

PAGES = 600


@pytest.fixture
def conditions(pool_path):
    yield f"{pool_path}.conditions"
    if os.path.exists(f"{pool_path}.conditions"):
        os.unlink(f"{pool_path}.conditions")


@pytest.fixture(params=["shared", "per-inode"])
def failing(pool_path, conditions, request):
    """A pool with /a, and directories of many files, opened cold on a device of which all can go wrong."""
    new_pool(pool_path, policy=request.param)
    with onecopy.open(pool_path) as fs:
        fs.write("/a", content(PAGES))
        for n in range(300):
            fs.write(f"/file {n}", bytes([n % 256]) * 200)
    forget_cache(pool_path)
    device = Conditioned(FileDevice(pool_path), path=conditions)
    with onecopy.open(pool_path, device=device) as fs:
        yield fs, device
        device.heal()
        device.resume()


def forget_cache(path):
    """As a power cut: what was in memory is gone."""
    marker = f"-{os.stat(path).st_dev:x}.{os.stat(path).st_ino:x}"
    for name in os.listdir("/dev/shm"):
        if name.startswith("onecopy-") and marker in name:
            os.unlink(f"/dev/shm/{name}")


def flush_out(fs):
    """Let nothing be in memory that can be elsewhere."""
    fs.sync()
    fs._mount.pool.cache.drop(0, fs._mount.pool.frames)


def test_file_data_that_can_not_be_read(failing):
    fs, device = failing
    assert fs.read("/a", 0, PAGE) == content(PAGES)[:PAGE]
    pfn = int(fs.map("/a", "r").pfns[400])
    device.fail(pfn, pfn + 1, read=True)
    with pytest.raises(OSError, match=f"could not read block.* {pfn}") as caught:
        fs.read("/a", 400 * PAGE, PAGE)
    assert caught.value.errno == errno.EIO
    assert fs.read("/a", 399 * PAGE, PAGE) == content(PAGES)[399 * PAGE : 400 * PAGE]
    with pytest.raises(OSError) as caught:
        fs.read("/a", 0, PAGES * PAGE)
    assert caught.value.errno == errno.EIO
    device.heal()
    assert fs.read("/a", 0, PAGES * PAGE) == content(PAGES)
    assert_settled(fs)


def test_nodes_that_can_not_be_read(failing):
    fs, device = failing
    flush_out(fs)
    device.fail(read=True)
    for work in (lambda: fs.listdir("/"), lambda: fs.stat("/file 7"), lambda: fs.write("/new", b"x"), fs.check):
        with pytest.raises(OSError, match="could not read block") as caught:
            work()
        assert caught.value.errno == errno.EIO
    device.heal()
    assert len(fs.listdir("/")) == 301
    fs.write("/new", b"x")
    assert fs.read("/file 7", 0, 10) == b"\x07" * 10
    assert_sound(fs)


def test_many_threads_that_read_what_can_not_be_read(failing):
    """Each error is heard of by who saw the zeros, and none of the zeros stay."""
    fs, device = failing
    flush_out(fs)
    device.fail(read=True)
    together, wrong = threading.Barrier(4), []

    def look(number):
        for n in range(number, 300, 4):
            together.wait()
            try:
                found = fs.read(f"/file {n}", 0, 200)
                wrong.append((n, found[:10]))
            except OSError as error:
                if error.errno != errno.EIO:
                    wrong.append((n, error))

    threads = [threading.Thread(target=look, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    device.heal()
    for n in range(300):
        assert fs.read(f"/file {n}", 0, 200) == bytes([n % 256]) * 200
    assert_sound(fs)


def test_a_thread_that_did_not_read_takes_no_error_away(failing):
    """The zeros that one thread was shown are an error for it, whoever asks about errors in between."""
    fs, device = failing
    pool = fs._mount.pool
    flush_out(fs)
    device.fail(read=True)
    since = pool.losses()
    first = [bytes(pool.bytes[pfn * PAGE : pfn * PAGE + 8]) for pfn in (5, 9)]
    assert first == [bytes(8)] * 2
    with pytest.raises(OSError):
        fs.listdir("/")
    with pytest.raises(OSError):
        pool.raise_lost(since)
    device.heal()
    pool.raise_lost(pool.losses())
    for pfn in (5, 9):
        assert bytes(pool.bytes[pfn * PAGE : (pfn + 1) * PAGE]) == pool.read_media(pfn)


def test_zeros_that_were_shown_are_not_written(failing):
    """A block that one handle could not read is read and changed by another; the first one evicts it."""
    fs, device = failing
    pool = fs._mount.pool
    flush_out(fs)
    pfn = int(fs.map("/a", "r").pfns[3])
    device.fail(pfn, pfn + 1, read=True)
    assert bytes(pool.bytes[pfn * PAGE : pfn * PAGE + 8]) == bytes(8)
    device.heal()
    pool.cache.store(pfn * PAGE, page_of(3, 3)[:8])
    pool.cache.write_back(pfn, 1)
    assert pool.read_media(pfn) == page_of(3, 3)[:8] + content(PAGES)[3 * PAGE + 8 : 4 * PAGE]


def test_opening_what_can_not_be_read(pool_path, conditions):
    new_pool(pool_path)
    with onecopy.open(pool_path) as fs:
        fs.write("/a", content(PAGES))
    forget_cache(pool_path)
    device = Conditioned(FileDevice(pool_path), path=conditions)
    device.fail(3, read=True)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="could not read block") as caught:
        onecopy.open(pool_path, device=device)
    assert caught.value.errno == errno.EIO
    del caught
    device.heal()
    assert len(os.listdir("/proc/self/fd")) < before  # the device was closed, too
    with onecopy.open(pool_path) as fs:
        assert fs.read("/a", 0, PAGES * PAGE) == content(PAGES)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_mapped_page_that_can_not_be_read(pool_path, conditions, mode):
    new_pool(pool_path)
    with onecopy.open(pool_path) as fs:
        fs.write("/a", content(PAGES))
        pfn = int(fs.map("/a", "r").pfns[400])
    forget_cache(pool_path)
    program = f"""
import onecopy, sys
from onecopy.blkcache.device import Conditioned, FileDevice
device = Conditioned(FileDevice({pool_path!r}), path={conditions!r})
fs = onecopy.open({pool_path!r}, device=device)
m = fs.map("/a", {mode!r})
view = memoryview(m)
device.fail({pfn}, {pfn + 1}, read=True)
print(view[399 * 4096], flush=True)
if {mode!r} == "r":
    print(view[400 * 4096 + 5])
else:
    view[400 * 4096 + 5] = 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert done.stdout == f"{content(PAGES)[399 * PAGE]}\n"
    if mode == "r":
        assert f"could not read block {pfn}, page 400 of inode" in done.stderr
    else:
        assert "could not read" in done.stderr
    with onecopy.open(pool_path) as fs:
        assert fs.read("/a", 0, PAGES * PAGE) == content(PAGES)
        assert_settled(fs)


def test_writes_that_fail(failing):
    """At eviction they cost memory, at sync they are said; nothing is lost."""
    fs, device = failing
    model = bytearray(content(PAGES))
    device.fail(write=True)
    with fs.map("/a", "r+") as mapping, memoryview(mapping) as view:
        for page in range(320):  # more than the cache has
            view[page * PAGE : page * PAGE + 8] = model[page * PAGE : page * PAGE + 8] = page_of(page, 5)[:8]
    assert frames(fs).over > 0
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            fs.sync()
        assert caught.value.errno == errno.EIO
    assert fs.read("/a", 0, PAGES * PAGE) == model
    device.heal()
    fs.sync()
    assert fs.read("/a", 0, PAGES * PAGE) == model
    fs._mount.pool.cache.shrink()
    assert_settled(fs)
    assert_sound(fs)


@pytest.mark.parametrize("what", ["write", "flush"])
def test_a_sync_that_failed_and_then_nodes_that_can_not_be_read(failing, what):
    fs, device = failing
    for n in range(100):
        fs.write(f"/more {n}", bytes([n]) * 300)
    device.fail(64, write=what == "write", flush=what == "flush")
    with pytest.raises(OSError):
        fs.sync()
    device.heal()
    pool = fs._mount.pool
    for pfn in range(pool.frames):  # evict what is clean
        if not dirty(fs, pfn):
            pool.cache.drop(pfn, 1)
    device.fail(read=True)
    with pytest.raises(OSError) as caught:
        fs.sync()
    assert caught.value.errno == errno.EIO
    device.heal()
    fs.sync()
    fs.close()
    forget_cache(fs._mount.pool.path)
    with onecopy.open(fs._mount.pool.path) as fs:
        assert fs.read("/more 99", 0, 300) == bytes([99]) * 300
        assert_sound(fs)


def dirty(fs, pfn):
    word = os.pread(fs._mount.pool._control, 8, (1 << 20) + 8 * pfn)
    return int.from_bytes(word, "little") >> 33 & 1


def test_a_stalled_device(pool_path, conditions, start):
    """Who reads what is in memory goes on; the request that waited is done when the device is."""
    new_pool(pool_path)
    with onecopy.open(pool_path) as fs:
        fs.write("/a", content(PAGES))
    reader, waiter = (begin(start, pool_path, policy="shared", conditions=conditions) for _ in range(2))
    device = Conditioned(FileDevice(pool_path), path=conditions)
    reader.ask(("read", "/a", 0, 100 * PAGE))
    reader.ask(("read", "/a", 300 * PAGE, 100 * PAGE))
    reader.ask(("map", "/a", "r"))
    assert reader.ask(("read", "/a", 350 * PAGE, 20 * PAGE)) == content(PAGES)[350 * PAGE : 370 * PAGE]
    device.stall()
    before = device.counters.reads
    waiter.say(("read", "/a", 500 * PAGE, PAGE))
    while device.counters.reads == before:
        assert not waiter._pipe.poll(0.01)
    for _ in range(3):
        assert reader.ask(("read", "/a", 350 * PAGE, 20 * PAGE)) == content(PAGES)[350 * PAGE : 370 * PAGE]
        assert reader.ask(("look", "/a", [(350 * PAGE, 370 * PAGE)])) == [content(PAGES)[350 * PAGE : 370 * PAGE]]
    assert not waiter._pipe.poll(0)
    device.resume()
    assert waiter.hear() == content(PAGES)[500 * PAGE : 501 * PAGE]
    end(reader, waiter)
    device.close()


def test_killed_while_the_device_is_stalled(pool_path, conditions, start):
    new_pool(pool_path)
    with onecopy.open(pool_path) as fs:
        fs.write("/a", content(PAGES))
    forget_cache(pool_path)
    victim, other = (begin(start, pool_path, conditions=conditions) for _ in range(2))
    device = Conditioned(FileDevice(pool_path), path=conditions)
    victim.ask(("read", "/a", 0, PAGE))
    device.stall()
    before = device.counters.reads
    victim.say(("read", "/a", 100 * PAGE, 50 * PAGE))
    while device.counters.reads == before:
        assert not victim._pipe.poll(0.01)
    victim.kill()
    device.resume()
    assert other.ask(("read", "/a", 0, PAGES * PAGE)) == content(PAGES)
    end(other)
    with onecopy.open(pool_path) as fs:
        assert_settled(fs)
    device.close()
