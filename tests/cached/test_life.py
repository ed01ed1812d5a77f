"""Caches made, shared by several pools, missed, and gone: policies, names, sizes, files deleted, nothing left behind."""

import errno
import gc
import multiprocessing
import os
import resource
import secrets

import pytest

import onecopy
from onecopy.blkcache import cache as caches
from onecopy.daxemu import _fault
from onecopy.daxemu.errors import PoolBusy, RuntimeLost

from ..mapped.common import assert_all_ended, assert_sound
from .common import PAGE, assert_settled, begin, content, end, frames, new_pool, page_of

PAGES = 300
SHM = "/dev/shm"


@pytest.fixture
def name():
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    for ending in (".cache", ".frames"):
        if os.path.exists(f"{SHM}/onecopy-cache-{name}{ending}"):
            os.unlink(f"{SHM}/onecopy-cache-{name}{ending}")


@pytest.fixture
def pools(new_path):
    """Two cached pools with different content."""
    made = [new_path(), new_path()]
    for number, path in enumerate(made):
        new_pool(path)
        with onecopy.open(path) as fs:
            fs.write("/a", content(PAGES, number))
        forget_runtime(path)
    return made


def open_files():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def files_of(path):
    status = os.stat(path)
    return {name for name in os.listdir(SHM) if f"-{status.st_dev:x}.{status.st_ino:x}" in name}


def ours(pools, name):
    """Return all that there is of these pools, and of caches by that name."""
    return {file for path in pools for file in files_of(path)} | {file for file in os.listdir(SHM) if name in file}


def forget_runtime(path):
    for name in files_of(path):
        os.unlink(f"{SHM}/{name}")


def test_two_pools_in_one_cache(pools, start, name):
    """The limit is one for both; each evicts what is clean of the other's, and both are consistent."""
    hands = [begin(start, path, cache=name, cache_size="2M") for path in pools]
    model = [bytearray(content(PAGES, number)) for number in range(2)]
    for hand in hands:
        hand.ask(("map", "/a", "r+"))
    for turn in range(3):
        for number, hand in enumerate(hands):
            assert hand.ask(("look", "/a", [(0, PAGES * PAGE)])) == [model[number]]
            for page in range(turn, PAGES, 7):
                model[number][page * PAGE : (page + 1) * PAGE] = page_of(page, turn + 10 * number)
                hand.ask(("store", "/a", page * PAGE, page_of(page, turn + 10 * number)))
            now = hand.ask(("frames",))
            assert (now.limit, now.over) == (512, 0)
            assert now.physical <= 512
            hand.ask(("sync",))
    end(*hands)
    for number, path in enumerate(pools):
        with onecopy.open(path, cache=name) as fs:
            assert fs.read("/a", 0, PAGES * PAGE) == model[number]
            assert_settled(fs)
            assert_all_ended(fs)


def test_a_pool_that_nobody_uses_any_more_leaves_room(pools, start, name):
    """What its last user stored through mappings and synced can be evicted by others."""
    first, second = (begin(start, path, cache=name, cache_size="1M") for path in pools)
    first.ask(("map", "/a", "r+"))
    for page in range(256):
        first.ask(("store", "/a", page * PAGE, page_of(page, 1)))
    end(first)
    for _ in range(3):
        assert second.ask(("read", "/a", 0, PAGES * PAGE)) == content(PAGES, 1)
    now = second.ask(("frames",))
    assert now.over == 0
    assert now.physical <= 256
    end(second)
    with onecopy.open(pools[0], cache=name) as fs:
        assert fs.read("/a", 0, 256 * PAGE) == b"".join(page_of(page, 1) for page in range(256))


def test_one_pool_fills_the_cache_with_dirty_frames(pools, start, name):
    """The other pool's user can't write them back: the limit is passed by little, and counted, until the first one syncs."""
    first, second = (begin(start, path, cache=name, cache_size="1M") for path in pools)
    first.ask(("map", "/a", "r+"))
    for page in range(256):
        first.ask(("store", "/a", page * PAGE, page_of(page, 1)))
    assert second.ask(("read", "/a", 0, PAGES * PAGE)) == content(PAGES, 1)
    now = second.ask(("frames",))
    assert now.physical <= 256 + 70
    first.ask(("unmap", "/a"))
    first.ask(("sync",))
    assert second.ask(("read", "/a", 0, PAGES * PAGE)) == content(PAGES, 1)
    assert second.ask(("frames",)).physical <= 256
    end(first, second)


def open_named(path, name, barrier, results):
    barrier.wait()
    with onecopy.open(path, cache=name, cache_size="1M") as fs:
        results.put((path, fs._mount.pool.number))
        fs.write("/b", os.path.basename(path).encode() * 1000)
        barrier.wait()
        results.put((path, fs.read("/a", 0, 100 * PAGE) == fs.read("/a", 0, 100 * PAGE)))


@pytest.mark.parametrize("attempt", range(3))
def test_a_named_cache_made_by_two_at_once(pools, name, attempt, monkeypatch):
    """Two who make it at the same time get devices of their own in it."""
    spawn = multiprocessing.get_context("fork")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    plain = caches.CachedPool._open

    def slowly(self, base, *, empty):
        got = plain(self, base, empty=empty)
        if self._name and self._together:
            barrier.wait()  # both have opened the files, neither has made them
            self._together = False
        return got

    monkeypatch.setattr(caches.CachedPool, "_open", slowly)
    monkeypatch.setattr(caches.CachedPool, "_together", True, raising=False)
    made = [spawn.Process(target=open_named, args=(path, name, barrier, results)) for path in pools]
    for process in made:
        process.start()
    found = [results.get(timeout=60) for _ in range(4)]
    for process in made:
        process.join()
    assert len({number for _, number in found if not isinstance(number, bool)}) == 2
    monkeypatch.undo()
    for number, path in enumerate(pools):
        with onecopy.open(path, cache=name) as fs:
            assert fs.read("/a", 0, PAGES * PAGE) == content(PAGES, number)
            assert fs.read("/b", 0, 10**6) == os.path.basename(path).encode() * 1000
            assert_sound(fs)


def test_another_cache_than_the_users_have(pools, start, name):
    hand = begin(start, pools[0], cache=name, cache_size="1M")
    hand.ask(("write", "/a", page_of(1, 1), 0))
    before = ours(pools, name)
    for options in ({}, {"cache": name + "x"}, {"cache": None, "policy": "shared"}):
        with pytest.raises(RuntimeLost, match="another cache"):
            onecopy.open(pools[0], **options)
    assert ours(pools, name) == before
    hand.kill()
    with pytest.raises(RuntimeLost, match="another cache"):
        onecopy.open(pools[0])
    with onecopy.open(pools[0], cache=name) as fs:
        assert fs.read("/a", 0, PAGE) == page_of(1, 1)


def test_the_limit_is_changed_by_who_says_so(pools, name):
    with onecopy.open(pools[0], cache=name, cache_size="2M") as fs:
        assert frames(fs).limit == 512
        with onecopy.open(pools[1], cache=name) as other:
            assert frames(other).limit == 512
        with onecopy.open(pools[0], cache=name, cache_size="4M"):
            assert frames(fs).limit == 1024
    assert fs.closed


@pytest.mark.parametrize("ending", [".cache", ".frames"])
@pytest.mark.parametrize("named", [False, True])
def test_files_that_were_deleted(pools, name, start, ending, named):
    options = {"cache": name} if named else {}
    hand = begin(start, pools[0], **options)
    hand.ask(("write", "/a", page_of(1, 1), 0))
    base = f"{SHM}/onecopy-cache-{name}" if named else f"{SHM}/{min(files_of(pools[0]), key=len)}"
    os.unlink(base + ending)
    before, descriptors = ours(pools, name), open_files()
    with pytest.raises(RuntimeLost):
        onecopy.open(pools[0], **options)
    assert ours(pools, name) == before
    assert open_files() == descriptors
    assert hand.ask(("read", "/a", 0, PAGE)) == page_of(1, 1)
    hand.ask(("sync",))
    end(hand)
    forget_runtime(pools[0])
    if named:  # what is left of it is of no use
        os.unlink(base + (".frames" if ending == ".cache" else ".cache"))
    with onecopy.open(pools[0], **options) as fs:
        assert fs.read("/a", 0, PAGE) == page_of(1, 1)


def test_policies_that_do_not_fit(pools, start):
    hand = begin(start, pools[0])
    hand.ask(("write", "/a", page_of(7, 7), 0))
    for policy in ("dax", "per-inode"):
        with pytest.raises(PoolBusy):
            onecopy.open(pools[0], policy=policy)
    hand.kill()
    for policy in ("per-inode", "dax", "shared", "dax"):
        with onecopy.open(pools[0], policy=policy) as fs:
            assert fs.read("/a", 0, PAGE) == page_of(7, 7)
            assert_sound(fs)
    with pytest.raises(OSError) as caught:
        onecopy.open(pools[0], policy="none")
    assert caught.value.errno == errno.EINVAL


def test_caches_too_small(pools, new_path):
    path = new_path()
    for size in ("512K", 0, PAGE):
        with pytest.raises(OSError) as caught:
            onecopy.format(path, "32M", device="cached", cache_size=size)
        assert caught.value.errno == errno.EINVAL
        assert not os.path.exists(path)
        with pytest.raises(OSError) as caught:
            onecopy.open(pools[0], cache_size=size)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EMFILE])
@pytest.mark.parametrize("fresh", [True, False])
def test_no_userfaultfd(pools, monkeypatch, code, fresh):
    if not fresh:
        onecopy.open(pools[0]).close()
    descriptors, maps = open_files(), mappings()

    def refuse(control, frames, *_):
        os.close(control)  # as the real one does
        os.close(frames)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(_fault, "Cache", refuse)
        with pytest.raises(OSError) as caught:
            onecopy.open(pools[0])
        if code != errno.EMFILE:
            assert "userfaultfd" in str(caught.value)
            assert caught.value.errno == errno.EOPNOTSUPP
        del caught
    assert open_files() == descriptors
    assert mappings() <= maps + 2
    with onecopy.open(pools[0]) as fs:
        assert fs.read("/a", 0, PAGES * PAGE) == content(PAGES)


def mappings():
    with open("/proc/self/maps") as lines:
        return sum("onecopy" in line for line in lines)


def test_no_descriptors_left(pools):
    """At whatever descriptor the process runs out: an error, and none of them leaks."""
    onecopy.open(pools[0]).close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = open_files()
    descriptors, opened = here, False
    try:
        for more in range(1, 40):
            highest = max(int(n) for n in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
            try:
                onecopy.open(pools[0]).close()
                opened = True
            except OSError as error:
                assert error.errno == errno.EMFILE, error
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert open_files() == descriptors, more
            if opened:
                break
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert opened


def test_nothing_is_left(pools):
    with onecopy.open(pools[0]) as fs:
        fs.write("/a", page_of(1, 1), 0)
    assert len(files_of(pools[0])) == 4
    marker = files_of(pools[0])
    onecopy.remove(pools[0])
    assert not marker & set(os.listdir(SHM))
    with onecopy.open(pools[1]) as fs:
        fs.write("/a", page_of(1, 1), 0)
    marker = files_of(pools[1])
    onecopy.format(pools[1], "32M", device="cached", cache_size="1M", force=True)
    assert not marker & set(os.listdir(SHM))
    marker = files_of(pools[1])
    os.unlink(pools[1])
    onecopy.sweep() if hasattr(onecopy, "sweep") else __import__("onecopy.fs.lifecycle", fromlist=["sweep"]).sweep()
    assert not marker & set(os.listdir(SHM))


def test_a_stranger_that_is_stopped(pools, start):
    """Somebody who may store is stopped: others read on, within the limit, and nothing of what was stored is lost."""
    stopped, reader = (begin(start, pools[0]) for _ in range(2))
    stopped.ask(("map", "/a", "r+"))
    for page in range(200):
        stopped.ask(("store", "/a", page * PAGE, page_of(page, 1)))
    reader.ask(("map", "/a", "r"))
    stopped.stop()
    try:
        for _ in range(2):
            expected = b"".join(page_of(page, 1) for page in range(200)) + content(PAGES)[200 * PAGE :]
            assert reader.ask(("read", "/a", 0, PAGES * PAGE)) == expected
            assert reader.ask(("look", "/a", [(0, PAGES * PAGE)])) == [expected]
        assert reader.ask(("frames",)).physical <= 256 + 32
    finally:
        stopped.resume()
    for page in range(200):
        stopped.ask(("store", "/a", page * PAGE, page_of(page, 2)))
    assert reader.ask(("look", "/a", [(0, 200 * PAGE)])) == [b"".join(page_of(page, 2) for page in range(200))]
    end(stopped, reader)
    with onecopy.open(pools[0]) as fs:
        assert_settled(fs)
        assert_all_ended(fs)


def test_reading_only_beside_dirty_frames(pools, start):
    """Who can't write evicts what is clean."""
    writer, reader = begin(start, pools[0]), begin(start, pools[0], mode="r")
    for page in range(0, 240, 8):
        writer.ask(("write", "/a", b"".join(page_of(page + n, 1) for n in range(8)), page * PAGE))
    expected = b"".join(page_of(page, 1) for page in range(240)) + content(PAGES)[240 * PAGE :]
    for _ in range(3):
        assert reader.ask(("read", "/a", 0, PAGES * PAGE)) == expected
        assert reader.ask(("frames",)).physical <= 256 + 16
    end(writer, reader)
