"""Pins: what is mapped is neither handed out again nor stored into, for as long as one living mapping shows it (S5)."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onecopy
from onecopy.blkcache.frames import MAX_RUN, PINNED
from onecopy.daxemu.units import PAGE
from onecopy.fs import extents, mount, namei
from onecopy.fs import inode as inodes

from ..multiproc.processes import die


def pinned(fs) -> set[int]:
    """Return the frames with a PINNED bit."""
    return set(np.flatnonzero(fs._mount.frames.array & PINNED).tolist())


def frames(fs, path: str) -> list[int]:
    return [extent.pfn + n for extent in fs.extents(path) for n in range(extent.pages) if extent.pfn]


@pytest.fixture
def fs(small):
    with onecopy.open(small) as handle:
        for name in "ab":
            handle.write(f"/{name}", name.encode() * 5 * PAGE)
        yield handle
        assert handle.check().findings == []


def assert_kept(fs, mapping, letter: bytes) -> None:
    """The mapping shows what it showed, whatever is written to the files."""
    for n in range(6):
        for name in "ab":
            fs.write(f"/{name}", bytes([n]) * 7 * PAGE)
        fs.sync()
    assert mapping[:] == letter * 5 * PAGE


def test_what_is_mapped_is_pinned_until_it_ends(fs):
    with fs.map("/a") as first, fs.map("/a") as second, fs.map("/b"):
        assert pinned(fs) == {*frames(fs, "/a"), *frames(fs, "/b")}
        second.close()
        assert pinned(fs) == {*frames(fs, "/a"), *frames(fs, "/b")}
        assert_kept(fs, first, b"a")
    assert pinned(fs) == set()


def test_two_handles_pin_for_themselves(fs, small):
    with onecopy.open(small) as other, fs.map("/a") as mapping:
        other.map("/a").close()
        assert pinned(fs) == set(frames(fs, "/a"))
        assert_kept(fs, mapping, b"a")


def test_a_write_to_what_is_mapped_goes_elsewhere(fs):
    with fs.map("/a") as mapping:
        fs.write("/a", b"new", PAGE)
        assert mapping.pfns.tolist() != frames(fs, "/a")
        assert mapping[:] == b"a" * 5 * PAGE and fs.read("/a", PAGE, 4) == b"newa"
    before = frames(fs, "/a")
    fs.write("/a", b"again", PAGE)
    assert frames(fs, "/a") == before, "unpinned, it is written in place"


def test_a_mapping_outlives_its_file_and_its_handle(small):
    fs = onecopy.open(small)
    fs.write("/a", b"a" * 5 * PAGE)
    mapping = fs.map("/a")
    fs.unlink("/a")
    fs.close()
    with pytest.raises(onecopy.PoolBusy):
        onecopy.remove(small)
    with onecopy.open(small) as other:
        other.write("/b", b"")
        assert_kept(other, mapping, b"a")
        mapping.close()
        assert pinned(other) == set() and len(other.info().users) == 1


def test_a_mapping_that_ends_while_the_next_one_is_made(fs):
    """A new mapping gets the memory of an old one, hence its id. It must not be unpinned in its place."""
    held = [fs.map("/a")]

    def find(view):
        held.clear()
        return namei.file_at(view, "/b")

    mapping = fs._mount.map(find, "/b")
    fs.info()
    assert pinned(fs) == set(frames(fs, "/b"))
    assert_kept(fs, mapping, b"b")
    mapping.close()
    fs.info()
    assert pinned(fs) == set()


def test_a_mapping_that_ends_in_a_transaction_is_unpinned_by_the_next(fs):
    held = [fs.map("/a")]
    fs._mount.run(lambda tx: held.clear())
    assert pinned(fs)
    fs.write("/c", b"")
    assert pinned(fs) == set()


def test_what_only_the_dead_had_mapped_is_free_again(fs, small, start):
    def map_and_die(line):
        other = onecopy.open(small)
        mapping = other.map("/a")
        line.say(len(mapping))
        line.hear()
        die()

    process = start(map_and_die)
    assert process.hear() == 5 * PAGE
    gone, alive = frames(fs, "/a"), fs.map("/b")
    fs.unlink("/a")
    fs.sync()
    assert pinned(fs) > set(gone)
    process.say()
    process.wait()
    info = fs.info()
    assert pinned(fs) == set(frames(fs, "/b"))
    assert (info.waiting_pages, info.pinned_pages, len(info.users)) == (0, 5, 1)
    alive.close()


def test_a_reap_that_was_cut_short_is_done_again(fs, small, start, monkeypatch):
    def map_and_die(line):
        mapping = onecopy.open(small).map("/a")
        fs.close()  # so that only one slot remains
        assert mapping
        die()

    start(map_and_die).wait()
    mount = fs._mount
    monkeypatch.setattr(mount.limbo, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), mount.lock:
        mount.pins.reap()
    monkeypatch.undo()
    fs.info()
    assert pinned(fs) == set() and len(fs.info().users) == 1


def test_more_runs_than_a_process_can_pin_is_enomem(fs, monkeypatch):
    for page in range(0, 12, 2):
        fs.write("/holes", b"x" * PAGE, page * PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(mount, "PINS", 5)
        with pytest.raises(onecopy.OneCopyError, match="6 mapped runs; a process can pin 5") as caught:
            fs.map("/holes")
        assert caught.value.errno == errno.ENOMEM
        with fs.map("/a"), fs.map("/a"), fs.map("/b"):
            assert pinned(fs) == {*frames(fs, "/a"), *frames(fs, "/b")}
    assert pinned(fs) == set()
    with fs.map("/holes") as mapping:
        assert len(mapping.runs) == 6


def test_a_file_larger_than_a_pin_entry_can_be_mapped(new_path):
    """64 GiB in one run, without storage: only its address space is real."""
    path, pages = new_path(), MAX_RUN + 200
    onecopy.format(path, "65G")

    def make(tx):
        inode, at = namei.change_file(tx, "/large"), 0
        for pfn, count in tx.frames.take_data(pages):
            extents.replace(tx, inode, at, at + count, [(at, pfn, count, 0)])
            at += count
        inode.size = pages * PAGE
        inodes.save(tx, inode)

    with onecopy.open(path) as fs:
        fs.create("/large")
        fs._mount.run(make)
        with fs.map("/large") as mapping:
            assert len(mapping) == pages * PAGE and mapping[-1] == 0
            assert len(mapping.runs) == 1
            assert int(np.count_nonzero(fs._mount.frames.array & PINNED)) == pages
        assert not (fs._mount.frames.array & PINNED).any()
        fs.unlink("/large")


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6), st.integers(0, 40), st.integers(1, 30))
def test_lists_say_what_is_pinned(lists_pool, runs, low, size):
    places = list(range(len(runs)))[::-1]
    pins, slot = lists_pool._mount.pins, lists_pool._mount.slot.index
    with lists_pool._mount.lock:
        pins.add(slot, runs, places)
        named = {pfn + n for pfn, pages in runs for n in range(pages)}
        assert (np.flatnonzero(pins.pinned(low, low + size)) + low).tolist() == sorted(named & {*range(low, low + size)})
        assert named <= pinned(lists_pool)
        pins.drop(slot, runs[1:], places[1:])
        assert pinned(lists_pool) == {pfn + n for pfn, pages in runs[:1] for n in range(pages)}
        pins.drop(slot, runs[:1], places[:1])
        assert pinned(lists_pool) == set()


@pytest.fixture(scope="module")
def lists_pool():
    path = f"/dev/shm/test-{os.getpid()}-pins.pool"
    onecopy.format(path, "1M")
    try:
        with onecopy.open(path) as fs:
            yield fs
    finally:
        onecopy.remove(path)
