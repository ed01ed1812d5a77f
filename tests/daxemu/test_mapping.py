"""Mappings: runs merged to as few VMAs as there can be, what they ask their owner, closed once, and what they refuse."""

import errno
import gc
import os
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onecopy
from onecopy.daxemu.mapping import Mapping, merge_runs
from onecopy.daxemu.units import HUGE, PAGE


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), max_size=20))
def test_merged_runs_say_the_same_with_fewer_words(steps):
    runs, page, pfn = [], 0, 10
    for pages, gap_in_file, gap_in_pool in steps:
        page, pfn = page + gap_in_file, pfn + gap_in_pool
        runs.append((page, pfn, pages))
        page, pfn = page + pages, pfn + pages

    def expand(runs):
        return [(page + n, pfn + n) for page, pfn, pages in runs for n in range(pages)]

    merged = merge_runs(runs)
    assert expand(merged) == expand(runs)
    assert not any(a[0] + a[2] == b[0] and a[1] + a[2] == b[1] for a, b in pairwise(merged))


class Owner:
    """Notes what a mapping asks of who made it."""

    def __init__(self):
        self.asked, self.end = [], 1 << 40  # page before which the file has been cut off

    def pfns(self, mapping):
        return np.arange(-(-len(mapping) // PAGE), dtype=np.uint64)

    def make_writable(self, mapping, low, high):
        self.asked.append(("writable", low, high))

    def is_beyond(self, mapping, page):
        return page >= self.end

    def sync(self):
        self.asked.append("sync")

    def ended(self, space):
        self.asked.append(("ended", space))

    def reduce(self, mapping):
        return str, (f"{mapping.path} {mapping.key}",)


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def make(raw, owner):
    """A maker of mappings of frames 100, none, 300 and 301 of the pool: a, nothing, c and d; 10 bytes short of four pages."""
    for pfn, letter in ((100, b"a"), (300, b"c"), (301, b"d")):
        raw.store(pfn * PAGE, letter * PAGE)

    def make(*, writable=False):
        made = Mapping(4 * PAGE - 10, "/file")
        made.attached(owner, 7, 1, 2, writable=writable)
        made.show(raw.fd, [(0, 100, 1), (2, 300, 1), (3, 301, 1)])
        return made

    return make


@pytest.fixture
def mapping(make):
    return make()


def test_it_shows_its_frames(mapping, owner):
    assert len(mapping) == 4 * PAGE - 10
    assert mapping[:] == b"a" * PAGE + bytes(PAGE) + b"c" * PAGE + b"d" * (PAGE - 10)
    assert mapping[0] == ord("a") and mapping[-1] == ord("d")
    assert mapping[PAGE - 1 : PAGE + 1] == b"a\0"
    with pytest.raises(IndexError):
        mapping[len(mapping)]
    with open("/proc/self/maps") as maps:
        spans = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in maps if ".pool" in line]
    areas = [end - first for first, end in spans if mapping.address <= first < mapping.address + len(mapping)]
    assert areas == [PAGE, 2 * PAGE], "consecutive frames are one VMA"
    mapping.close()


def test_it_is_live(mapping, raw):
    """It shows frames, not copies of them."""
    view = memoryview(mapping)
    os.pwrite(raw.fd, b"new", 300 * PAGE)
    assert bytes(view[2 * PAGE : 2 * PAGE + 4]) == b"newc"
    view.release()
    mapping.close()


def test_where_its_pages_are_its_owner_knows(mapping):
    assert mapping.pfns.tolist() == [0, 1, 2, 3] and mapping.pfns.dtype == np.uint64
    mapping.close()
    without = Mapping(PAGE + 1, "/tiny")
    assert without.pfns.tolist() == [0, 0] and without[:] == bytes(PAGE + 1)


def test_what_is_mapped_for_reading_refuses_stores(mapping, owner):
    assert not mapping.writable and memoryview(mapping).readonly
    for store in (lambda: mapping.__setitem__(0, 1), lambda: mapping.__setitem__(slice(0, 2), b"xy"), mapping.make_writable):
        with pytest.raises(onecopy.ReadOnly, match="mode 'r\\+'"):
            store()
    assert owner.asked == []
    mapping.close()


def test_make_writable_asks_for_whole_pages(make, owner):
    mapping = make(writable=True)
    for low, high in ((0, None), (PAGE - 1, PAGE + 1), (2 * PAGE, 2 * PAGE + 1), (5, 5)):
        mapping.make_writable(low, high)
    assert owner.asked == [("writable", 0, 4), ("writable", 0, 2), ("writable", 2, 3)]
    for low, high in ((-1, 5), (5, 4), (0, len(mapping) + 1)):
        with pytest.raises(onecopy.OneCopyError, match="bytes") as caught:
            mapping.make_writable(low, high)
        assert caught.value.errno == errno.EINVAL
    mapping.close()


def test_a_page_that_was_cut_off_is_an_error_and_no_signal(make, owner):
    mapping = make(writable=True)
    owner.end = 2
    assert mapping[0 : 2 * PAGE] == b"a" * PAGE + bytes(PAGE)
    touches = [
        lambda: mapping[2 * PAGE],
        lambda: mapping[-1],
        lambda: mapping[:],
        lambda: mapping[::-1],
        lambda: mapping[PAGE : 2 * PAGE + 1],
        lambda: mapping.__setitem__(2 * PAGE, 1),
        lambda: mapping.__setitem__(slice(2 * PAGE, 2 * PAGE + 1), b"x"),
        lambda: mapping.make_writable(PAGE, 2 * PAGE + 1),
    ]
    for touch in touches:
        with pytest.raises(OSError, match="cut off") as caught:
            touch()
        assert caught.value.errno == errno.ENXIO
    assert mapping[3 * PAGE : 2 * PAGE] == b""
    mapping.close()


def test_it_ends_once(mapping, owner):
    mapping.sync()
    mapping.close()
    mapping.close()
    mapping.sync()
    assert owner.asked == ["sync", ("ended", 7)] and mapping.closed
    with pytest.raises(ValueError, match="closed"):
        mapping[0]
    assert repr(mapping) == "<onecopy.Mapping of '/file': closed>"


def test_it_says_what_it_is(make):
    for writable, mode in ((False, "r"), (True, "r+")):
        mapping = make(writable=writable)
        assert repr(mapping) == f"<onecopy.Mapping of '/file': {4 * PAGE - 10} bytes, mode {mode}>"
        mapping.close()


def test_it_ends_with_its_last_reference(make, owner):
    array = np.frombuffer(make(), np.uint8)
    gc.collect()
    assert owner.asked == []
    del array
    gc.collect()
    assert owner.asked == [("ended", 7)]


def test_one_that_was_never_made_whole_ends_untold(make, owner):
    mapping = make()
    mapping.forget()
    assert mapping.closed
    del mapping
    gc.collect()
    assert owner.asked == []


def test_it_is_not_unmapped_under_an_array(mapping, owner):
    array = np.frombuffer(mapping, np.uint8)
    with pytest.raises(BufferError), mapping:
        pass
    assert owner.asked == [] and not mapping.closed and array[0] == ord("a")
    del array
    mapping.close()
    assert owner.asked == [("ended", 7)]


def test_it_is_pickled_as_its_owner_says(mapping):
    assert pickle.loads(pickle.dumps(mapping)) == "/file (1, 2)"
    mapping.close()
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(mapping)


def test_what_the_kernel_refuses_is_said(raw, owner, monkeypatch):
    """Past vm.max_map_count its owner has other ways."""

    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    mapping = Mapping(2 * PAGE, "/file")
    monkeypatch.setattr(Mapping, "map", refuse)
    with pytest.raises(OSError, match="Cannot allocate") as caught:
        mapping.show(raw.fd, [(0, 100, 1), (1, 50, 1)])
    assert caught.value.errno == errno.ENOMEM
    mapping.close()


def test_more_than_the_address_space_is_enomem():
    """Nothing else is said about it: a mapping that was not made does not end, either."""
    with pytest.raises(OSError, match="allocate") as caught:
        Mapping(1 << 60, "/huge")
    assert caught.value.errno == errno.ENOMEM


def test_large_mappings_are_aligned_for_huge_pages():
    assert Mapping(HUGE * PAGE, "/file").address % (HUGE * PAGE) == 0
