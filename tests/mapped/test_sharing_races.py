"""Stores while others clone, snapshot, dedupe, cut, sync: no store is lost, and each clone is one moment."""

import errno
import os
import struct
import threading
from functools import partial

import numpy as np
import pytest

import onecopy

from .common import PAGE, asked, assert_all_ended, content

PAGES = 64
ROUNDS = 60
WORD = struct.Struct("<Q")


def count_up(path, name, pages, line):
    """Store 1, 2, 3, ... into each of `pages` in turn, always the first page first; say how far it came."""
    with onecopy.open(path) as fs, fs.map(name, "r+", granule=1) as mapping:
        words = memoryview(mapping).cast("Q")
        line.say("ready")
        n = 0
        while not asked(line):
            for _ in range(50):
                n += 1
                for page in pages:
                    words[page * PAGE // 8] = n
        words.release()
    return n


@pytest.fixture
def pool2(pool_path):
    onecopy.format(pool_path, "64M")
    with onecopy.open(pool_path) as fs:
        fs.create_subvolume("/s")
        fs.write("/s/a", bytes(PAGES * PAGE))
        fs.link("/s/a", "/s/b")
        fs.write("/a", bytes(PAGES * PAGE))
    return pool_path


def assert_moments(fs, paths, first, second, last):
    """The second page never holds a later number than the first, nor one that is more than one behind; numbers only grow."""
    previous = 0
    for path in paths:
        a, b = (WORD.unpack(fs.read(path, page * PAGE, 8))[0] for page in (first, second))
        assert b <= a <= b + 1, f"{path}: {a} was stored before {b}"
        assert previous <= b and a <= last
        previous = b


@pytest.mark.parametrize("pages", [(3, 4), (4, 3), (1, 60), (60, 1)])
@pytest.mark.parametrize("how", ["clone", "snapshot", "clone_range"])
def test_a_clone_is_one_moment(pool2, start, how, pages):
    """Each clone shows the stores in the order that they were made in."""
    name = "/s/a" if how == "snapshot" else "/a"
    writer = start(partial(count_up, pool2, name, pages))
    assert writer.hear() == "ready"
    with onecopy.open(pool2) as fs:
        paths = []
        for n in range(ROUNDS):
            if how == "clone":
                fs.clone("/a", f"/clone{n}")
                paths.append(f"/clone{n}")
            elif how == "snapshot":
                fs.snapshot("/s", f"/snapshot{n}")
                paths.append(f"/snapshot{n}/a")
            else:
                fs.create(f"/clone{n}")
                fs.clone_range("/a", 0, f"/clone{n}", 0, 0)
                paths.append(f"/clone{n}")
            assert WORD.unpack(fs.read(paths[-1], pages[0] * PAGE, 8)) == WORD.unpack(fs.read(paths[-1], pages[0] * PAGE, 8))
        first = [fs.read(path) for path in paths]
        fs.sync()
        writer.say()
        last = writer.result()
        assert_moments(fs, paths, *pages, last)
        assert [fs.read(path) for path in paths] == first, "a clone has changed"
        assert [WORD.unpack(fs.read(name, page * PAGE, 8))[0] for page in pages] == [last, last]
        assert_all_ended(fs)


# ------------------------------------------- all kinds against stores


def hammer(path, page, line):
    """Store into words of one page, each round another value; the last must be found by all."""
    with onecopy.open(path) as fs, fs.map("/a", "r+") as mapping:
        words = np.frombuffer(mapping, np.uint64)[page * 512 : (page + 1) * 512]
        line.say("ready")
        n = 0
        while not asked(line):
            n += 1
            words[n % 512] = n
            words[(n * 7) % 512] = n
            if words[n % 512] != n and (n * 7) % 512 != n % 512:
                return ("lost", n)
        found = words.tobytes()
        del words
    return found


def disturb(fs, what, n):
    if what == "clone":
        fs.clone("/a", f"/c{n}")
        if fs.exists(f"/c{n - 4}"):
            fs.unlink(f"/c{n - 4}")
    elif what == "dedupe":
        fs.write("/twin", fs.read("/a"))
        fs.dedupe(apply=True)
    elif what == "truncate":  # behind what is stored to
        fs.truncate("/a", (40 + n % 20) * PAGE + n * 37 % PAGE)
    elif what == "punch":
        fs.punch("/a", 40 * PAGE, 20 * PAGE)
        fs.punch("/a", 3 * PAGE, PAGE)
    elif what == "collapse":
        try:
            fs.insert("/a", 30 * PAGE, 2 * PAGE)
            fs.collapse("/a", 30 * PAGE, 2 * PAGE)
        except OSError as error:
            assert error.errno == errno.EBUSY, error
    elif what == "sync":
        fs.sync()
    elif what == "write":
        fs.write("/a", bytes([n]) * 2 * PAGE, 2 * PAGE)
    elif what == "unshare":
        fs.clone("/a", f"/c{n}")
        fs.unshare("/a")
        fs.unlink(f"/c{n}")
    elif what == "delete":
        fs.clone("/a", "/gone")
        with fs.map("/gone", "r+") as mapping:
            mapping[5] = 1
            fs.unlink("/gone")
            mapping[20 * PAGE] = 1
    elif what == "check":
        assert fs.check().findings == []


KINDS = ["clone", "dedupe", "truncate", "punch", "collapse", "sync", "write", "unshare", "delete", "check"]


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [KINDS])
def test_no_store_is_lost(pool2, start, kinds):
    """Two processes store to pages 10 and 11 (one granule), a third to 25, while everything happens to the file around them."""
    pages = (10, 11, 25)
    with onecopy.open(pool2) as fs:
        fs.write("/a", content(PAGES))
        fs.clone("/a", "/origin")
        writers = [start(partial(hammer, pool2, page)) for page in pages]
        for writer in writers:
            assert writer.hear() == "ready"
        for n in range(ROUNDS):
            disturb(fs, kinds[n % len(kinds)], n)
        for writer in writers:
            writer.say()
        found = [writer.result() for writer in writers]
        assert [fs.read("/a", page * PAGE, PAGE) for page in pages] == found
        assert fs.read("/origin") == content(PAGES)
        assert_all_ended(fs)


def test_no_store_is_lost_when_other_processes_disturb(pool2, start):
    """As above, with two processes that disturb at the same time."""

    def work(kinds, line):
        with onecopy.open(pool2) as fs:
            for n in range(30):
                disturb(fs, kinds[n % len(kinds)], n)

    pages = (10, 25)
    with onecopy.open(pool2) as fs:
        fs.write("/a", content(PAGES))
        writers = [start(partial(hammer, pool2, page)) for page in pages]
        for writer in writers:
            assert writer.hear() == "ready"
        others = [start(partial(work, kinds)) for kinds in (["clone", "sync", "punch"], ["write", "truncate", "check"])]
        for other in others:
            other.result()
        for writer in writers:
            writer.say()
        found = [writer.result() for writer in writers]
        assert [fs.read("/a", page * PAGE, PAGE) for page in pages] == found
        assert_all_ended(fs)


# --------------------------------------- mwrite all copies (generic/578)


@pytest.mark.parametrize("granule", [None, 1])
def test_578_all_copies_of_a_shared_block_are_stored_to_at_once(pool_path, start, granule):
    """Eight files that share blocks at shifted places; eight processes store to all of them at the same time."""

    def work(n, line):
        with onecopy.open(pool_path) as fs, fs.map(f"/f{n}", "r+", granule=granule) as mapping:
            words = np.frombuffer(mapping, np.uint64)
            line.say("ready")
            line.hear()
            for page in range(n, n + 32):
                words[page * 512 + n] = 1000 + n
            words[:8] = n
            del words

    onecopy.format(pool_path, "64M")
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(32))
        for n in range(8):
            fs.create(f"/f{n}")
            fs.clone_range("/origin", 0, f"/f{n}", n * PAGE, 0)
        processes = [start(partial(work, n)) for n in range(8)]
        for process in processes:
            assert process.hear() == "ready"
        for process in processes:
            process.say()
        for process in processes:
            process.result()
        for n in range(8):
            words = np.frombuffer(bytes(n * PAGE) + content(32), np.uint64).copy()
            for page in range(n, n + 32):
                words[page * 512 + n] = 1000 + n
            words[:8] = n
            assert fs.read(f"/f{n}") == words.tobytes()
        assert fs.read("/origin") == content(32)
        assert_all_ended(fs)


def test_threads_of_one_process_store_to_the_same_and_to_other_granules(pool_path):
    onecopy.format(pool_path, "64M")
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(600))
        fs.clone("/origin", "/a")
        model = np.frombuffer(content(600), np.uint64).copy()
        maps = [fs.map("/a", "r+") for _ in range(2)]
        arrays = [np.frombuffer(one, np.uint64) for one in maps]
        barrier = threading.Barrier(4)

        def work(n):
            for page in range(600):
                if page % 50 == 0:
                    barrier.wait()
                arrays[n % 2][page * 512 + n] = n + page
                if page % 100 == 50 and n == 3:
                    fs.clone("/a", f"/c{page}")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for n in range(4):
            model[np.arange(600) * 512 + n] = np.arange(600) + n
        assert (arrays[0] == model).all() and (arrays[1] == model).all()
        assert fs.read("/a") == model.tobytes()
        assert fs.read("/origin") == content(600)
        arrays.clear()
        for one in maps:
            one.close()
        assert_all_ended(fs)


def test_mapping_and_unmapping_while_others_store(pool2, start):
    """Whoever maps in the middle of a fault sees the page before it or after it, and then what comes."""

    def come_and_go(line):
        with onecopy.open(pool2) as fs:
            for n in range(150):
                with fs.map("/a", "r+" if n % 2 else "r") as mapping:
                    a, b = (WORD.unpack(mapping[page * PAGE : page * PAGE + 8])[0] for page in (60, 1))
                    assert a <= b, (a, b)
                    if n % 10 == 0:
                        fs.clone("/a", f"/x{os.getpid()}-{n}")

    writer = start(partial(count_up, pool2, "/a", (1, 60)))
    assert writer.hear() == "ready"
    others = [start(come_and_go) for _ in range(2)]
    for other in others:
        other.result()
    writer.say()
    last = writer.result()
    with onecopy.open(pool2) as fs:
        assert WORD.unpack(fs.read("/a", PAGE, 8)) == WORD.unpack(fs.read("/a", 60 * PAGE, 8)) == (last,)
        assert_all_ended(fs)
