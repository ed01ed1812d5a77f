"""Address spaces: found by inode, given entries where somebody stores, looked up without a lock."""

import errno
import os
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onecopy
from onecopy.blkcache import spaces as module
from onecopy.blkcache.spaces import BEYOND, LIVE, ORPHAN, PFN_MASK, PRIVATE, STORED, runs_of
from onecopy.daxemu import runtime
from onecopy.daxemu.runtime import MAX_PAGES
from onecopy.daxemu.units import PAGE

from .spaces import assert_whole, colliding, frames, key, known, words

# -------------------------------------------------------------------- records


def test_a_space_is_found_by_its_inode(spaces):
    assert not spaces.any and spaces.find(1, 5) == -1
    index = spaces.ensure(1, 5)
    assert spaces.any and not spaces.any_entries
    assert (spaces.find(1, 5), spaces.ensure(1, 5)) == (index, index)
    assert [spaces.find(*other) for other in ((2, 5), (1, 6), (5, 1))] == [-1, -1, -1]
    assert (spaces.key(index), spaces.state(index), spaces.pages(index), spaces.length(index)) == ((1, 5), LIVE, 0, 0)
    spaces.end(index)
    assert spaces.find(1, 5) == -1 and known(spaces) == {}


def test_a_record_that_is_used_again_has_another_version(spaces):
    index = spaces.ensure(1, 5)
    spaces.lengthen(index, 9)
    spaces.lengthen(index, 4)
    assert spaces.length(index) == 9
    before = spaces.version(index)
    spaces.end(index)
    assert spaces.ensure(1, 6) == index and spaces.find(1, 5) == -1
    assert spaces.version(index) != before
    assert (spaces.length(index), spaces.pages(index), spaces.is_dirty(index), spaces.is_mapped(index)) == (0, 0, False, False)


@pytest.mark.parametrize("gone", [[0], [1], [2], [3], [0, 1], [1, 2], [2, 3], [3, 1], [0, 3], [0, 1, 2, 3]])
def test_chains_lose_any_of_their_links(spaces, gone):
    numbers = colliding(spaces, 4)
    indexes = [spaces.ensure(1, number) for number in numbers]
    for n in gone:
        spaces.end(indexes[n])
        assert_whole(spaces)
    assert [spaces.find(1, number) >= 0 for number in numbers] == [n not in gone for n in range(4)]
    for number in numbers:
        spaces.ensure(1, number)
    assert_whole(spaces)
    assert spaces.runtime.get("spaces_used") == 4, "records are used again"


def test_three_thousand(spaces):
    rng = np.random.default_rng(3)
    wanted = {(int(s), int(n)) for s, n in zip(rng.integers(1, 9, 3200), rng.integers(1, 1 << 40, 3200), strict=True)}
    there = {one: spaces.ensure(*one) for one in wanted}
    assert len(set(there.values())) == len(wanted) > 3000
    for one in list(there)[::3]:
        spaces.end(there.pop(one))
    assert known(spaces) == dict.fromkeys(there, LIVE)
    for one in wanted:
        assert spaces.find(*one) == there.get(one, -1)
    again = {one: spaces.ensure(*one) for one in wanted}
    assert {one: again[one] for one in there} == there
    assert spaces.runtime.get("spaces_used") == len(wanted)
    spaces.end_unmapped()
    assert known(spaces) == {}
    assert_whole(spaces)


def test_of_a_subvolume(spaces):
    ours = [spaces.ensure(3, number) for number in (7, 8)]
    orphan, other = spaces.ensure(3, 9), spaces.ensure(4, 7)
    spaces.orphan(orphan)
    assert spaces.of_subvolume(3) == ours and spaces.of_subvolume(4) == [other] and spaces.of_subvolume(5) == []
    assert spaces.state(orphan) == ORPHAN


def test_more_files_than_there_are_spaces_is_enfile(spaces, monkeypatch):
    monkeypatch.setattr(module, "SPACES", 3)
    for number in range(3):
        spaces.ensure(1, number + 1)
    with pytest.raises(onecopy.OneCopyError, match="3 files are mapped") as caught:
        spaces.ensure(1, 9)
    assert caught.value.errno == errno.ENFILE
    assert spaces.ensure(1, 2) == 1
    spaces.end(1)
    assert spaces.ensure(1, 9) == 1


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_dev_shm_is_nospace(fs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "fallocate", full)
        with pytest.raises(onecopy.NoSpace, match="/dev/shm has no room"):
            fs.map("/a")
    with monkeypatch.context() as patch:
        patch.setattr(module, "fallocate", full)
        with pytest.raises(onecopy.NoSpace, match="entries"):
            fs.map("/a", "r+")
    assert known(fs._mount.spaces) == {}
    with fs.map("/a", "r+") as mapping:
        mapping[0] = 1
    assert fs.read("/a", 0, 2) == b"\1a"


@given(st.sets(st.integers(0, 40)))
def test_runs_of_frames(pfns):
    runs = runs_of(np.array(sorted(pfns), np.int64))
    assert [pfn + n for pfn, pages in runs for n in range(pages)] == sorted(pfns)
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(runs))


# -------------------------------------------------------------------- entries


def test_entries_are_given_and_lengthened(spaces):
    index = spaces.ensure(1, 5)
    spaces.enter(index, 0, words(100 | PRIVATE, 0, 102))
    assert spaces.any_entries and spaces.pages(index) == 3 and spaces.with_entries() == [index]
    spaces.enter(index, 3, words(BEYOND, BEYOND))
    assert spaces.entries(index, 0, 5).tolist() == [100 | PRIVATE, 0, 102, BEYOND, BEYOND]
    assert spaces.entries(index, 2, 4).tolist() == [102, BEYOND]
    assert spaces.private_runs() == [(100, 1)]
    spaces.end(index)
    assert spaces.ensure(1, 6) == index and spaces.pages(index) == 0
    spaces.enter(index, 0, words(7))
    assert spaces.entries(index, 0, 1).tolist() == [7] and spaces.pages(index) == 1


def test_the_window_of_an_ended_space_has_no_storage(mount, spaces):
    before = os.fstat(spaces.runtime.fd).st_blocks
    index = spaces.ensure(1, 5)
    spaces.enter(index, 0, np.full(300_000, 7, np.uint64))
    assert os.fstat(spaces.runtime.fd).st_blocks - before > 300_000 * 8 // 512
    spaces.end(index)
    assert os.fstat(spaces.runtime.fd).st_blocks - before < 1000
    assert mount.runtime.counter("epoch") == 1


def test_larger_than_a_window_is_efbig(spaces):
    with pytest.raises(onecopy.OneCopyError, match="can't be mapped for storing") as caught:
        spaces.enter(spaces.ensure(1, 5), MAX_PAGES, words(0))
    assert caught.value.errno == errno.EFBIG


def test_a_file_larger_than_a_window_is_mapped_for_reading_only(fs):
    fs.create("/sparse")
    fs.truncate("/sparse", (MAX_PAGES + 1) * PAGE)
    with pytest.raises(onecopy.OneCopyError, match="can't be mapped for storing") as caught:
        fs.map("/sparse", "r+")
    assert caught.value.errno == errno.EFBIG
    assert known(fs._mount.spaces) == {}
    with fs.map("/sparse") as mapping:
        assert mapping[-1] == 0 and len(mapping) == (MAX_PAGES + 1) * PAGE


def test_entries_only_where_somebody_stores(fs):
    spaces = fs._mount.spaces
    with fs.map("/a") as reading:
        assert not spaces.any_entries and spaces.pages(spaces.find(*key(fs, "/a"))) == 0
        with fs.map("/a", "r+") as storing:
            (index,) = spaces.with_entries()
            assert spaces.pages(index) == 5 and not spaces.is_dirty(index)
            storing[2 * PAGE] = 9
            assert reading[2 * PAGE] == 9
        assert spaces.with_entries(LIVE) == [index], "as long as somebody maps it at all"
    assert known(spaces) == {}


def test_what_is_stored_is_known_until_it_is_folded(fs):
    spaces = fs._mount.spaces
    fs.clone("/a", "/clone")
    fs.clone("/b", "/clone of b")
    with fs.map("/a", "r+", granule=1) as mapping, fs.map("/b", "r+") as other:
        index = spaces.find(*key(fs, "/a"))
        before = frames(fs, "/a")
        assert spaces.dirty() == []
        mapping[PAGE] = mapping[3 * PAGE] = 7
        assert spaces.dirty() == [index] and fs.info().dirty_pages == 2
        entries = spaces.entries(index, 0, 5)
        assert np.flatnonzero(entries & np.uint64(STORED)).tolist() == [1, 3]
        assert np.flatnonzero(entries & np.uint64(PRIVATE)).tolist() == [1, 3]
        assert (entries & np.uint64(PFN_MASK))[[0, 2, 4]].tolist() == [before[0], before[2], before[4]]
        fs.sync()
        assert spaces.dirty() == [] and fs.info().dirty_pages == 0
        assert frames(fs, "/a") == (spaces.entries(index, 0, 5) & np.uint64(PFN_MASK)).tolist() == mapping.pfns.tolist()
        other[0] = 1
        assert spaces.dirty() == [spaces.find(*key(fs, "/b"))]
    assert fs.read("/a") == (b"a" * PAGE + b"\7" + b"a" * (PAGE - 1)) * 2 + b"a" * PAGE
    assert fs.info().dirty_pages == 0 and known(spaces) == {}


# ------------------------------------------------------------- without a lock


def test_lookups_without_the_lock_while_spaces_come_and_go(mount, start):
    """A space that stays is found at all times, whatever comes and goes in its chain."""
    spaces = mount.spaces
    with mount.lock:
        numbers = colliding(spaces, 6)
        stays = spaces.ensure(1, numbers[2])
    wrong, stop = [], threading.Event()

    def change(line):
        other = onecopy.open(mount.pool.path)._mount
        rng = np.random.default_rng(1)
        line.say("ready")
        while True:
            with other.lock:
                number = numbers[int(rng.choice([0, 1, 3, 4, 5]))]
                index = other.spaces.find(1, number)
                if index >= 0:
                    other.spaces.end(index)
                else:
                    other.spaces.ensure(1, number)
                if rng.random() < 0.2:
                    other.spaces.ensure(2, int(rng.integers(1, 1000)))

    def look():
        while not stop.is_set():
            if spaces.find(1, numbers[2]) != stays:
                wrong.append("missed")

    process = start(change)
    process.hear()
    thread = threading.Thread(target=look)
    thread.start()
    time.sleep(1.5)
    stop.set()
    thread.join()
    process.kill()
    assert wrong == []
