"""Mappings: runs merged to as few VMAs as there can be, closed once, and what they refuse."""

import errno
import gc
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


@pytest.fixture
def ended():
    """Notes which mappings have ended."""
    return []


@pytest.fixture
def mapping(raw, ended):
    """Frames 100, none, 300 and 301 of the pool, full of a, nothing, c and d; 10 bytes short of four pages."""
    for pfn, letter in ((100, b"a"), (300, b"c"), (301, b"d")):
        raw.store(pfn * PAGE, letter * PAGE)
    made = Mapping(4 * PAGE - 10, [(0, 100, 1), (2, 300, 1), (3, 301, 1)], "/file")
    made.attach(raw, ended.append)
    return made


def test_it_shows_its_frames(mapping):
    assert mapping.runs == [(0, 100, 1), (2, 300, 2)]
    assert mapping.pfns.tolist() == [100, 0, 300, 301]
    assert mapping.pfns.dtype == np.uint64
    assert len(mapping) == 4 * PAGE - 10
    assert mapping[:] == b"a" * PAGE + bytes(PAGE) + b"c" * PAGE + b"d" * (PAGE - 10)
    assert mapping[0] == ord("a") and mapping[-1] == ord("d")
    assert mapping[PAGE - 1 : PAGE + 1] == b"a\0"
    with pytest.raises(IndexError):
        mapping[len(mapping)]
    mapping.close()


def test_it_ends_once(mapping, ended):
    mapping.close()
    mapping.close()
    assert ended == [mapping] and mapping.closed
    with pytest.raises(ValueError, match="closed"):
        mapping[0]
    assert repr(mapping) == "<onecopy.Mapping of '/file': closed>"


def test_it_ends_with_its_last_reference(raw):
    ended = []
    mapping = Mapping(PAGE, [(0, 100, 1)], "/file")
    mapping.attach(raw, lambda _: ended.append(True))
    array = np.frombuffer(mapping, np.uint8)
    del mapping
    gc.collect()
    assert ended == []
    del array
    gc.collect()
    assert ended == [True]


def test_it_is_not_unmapped_under_an_array(mapping, ended):
    array = np.frombuffer(mapping, np.uint8)
    with pytest.raises(BufferError), mapping:
        pass
    assert ended == [] and not mapping.closed and array[0] == ord("a")
    del array
    mapping.close()
    assert ended == [mapping]


def test_it_can_not_be_sent_to_another_process(mapping):
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(mapping)
    mapping.close()


def test_too_many_runs_for_the_kernel_is_enomem(raw, ended, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    mapping = Mapping(2 * PAGE, [(0, 100, 1), (1, 50, 1)], "/file")
    monkeypatch.setattr(Mapping, "map", refuse)
    with pytest.raises(onecopy.OneCopyError, match=r"2 runs.*max_map_count") as caught:
        mapping.attach(raw, ended.append)
    assert caught.value.errno == errno.ENOMEM
    mapping.close()
    assert ended == []


def test_large_mappings_are_aligned_for_huge_pages(raw):
    assert Mapping(HUGE * PAGE, [], "/file").address % (HUGE * PAGE) == 0
