"""Address spaces end with the last mapping, and what a deleted file's mappings show stays theirs (S5)."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onecopy
from onecopy.blkcache.frames import MAX_RUN, PINNED, USED
from onecopy.blkcache.spaces import BEYOND, LIVE, PFN_MASK, PRIVATE, STORED
from onecopy.daxemu import steps
from onecopy.daxemu.mapping import Mapping
from onecopy.daxemu.units import PAGE
from onecopy.fs import extents, maps, namei
from onecopy.fs import inode as inodes

from ..multiproc.processes import at_step
from .spaces import assert_kept, frames, key, known, pinned

# --------------------------------------------------- mapped, and not any more


def test_a_space_lives_as_long_as_a_mapping(fs):
    spaces = fs._mount.spaces
    with fs.map("/a") as first, fs.map("/a") as second, fs.map("/b"):
        assert known(spaces) == {key(fs, "/a"): LIVE, key(fs, "/b"): LIVE} and pinned(fs) == set()
        second.close()
        assert known(spaces) == {key(fs, "/a"): LIVE, key(fs, "/b"): LIVE}
        first.close()
        assert known(spaces) == {key(fs, "/b"): LIVE}
    assert known(spaces) == {}


def test_mappings_show_what_is_written(fs):
    with fs.map("/a") as mapping, fs.map("/b", "r+") as storing:
        for name, each in (("/a", mapping), ("/b", storing)):
            before = frames(fs, name)
            fs.write(name, b"in place", PAGE)
            assert frames(fs, name) == each.pfns.tolist() == before
            fs.clone(name, name + "+")
            fs.write(name, b"elsewhere", PAGE)
            assert frames(fs, name) == each.pfns.tolist()
            assert [page for page, pfn in enumerate(each.pfns) if pfn != before[page]] == [1]
            assert each[PAGE : PAGE + 9] == b"elsewhere" and fs.read(name + "+", PAGE, 8) == b"in place"
            assert each[:] == fs.read(name)


def test_a_mapping_that_ends_while_the_next_one_is_made(fs):
    """A new mapping gets the memory of an old one, hence its id. It must not be ended in its place."""
    held = [fs.map("/a")]

    def find(view):
        held.clear()
        return namei.file_at(view, "/b")

    mapping = fs._mount.map(find, "/b")
    fs.write("/c", b"")
    assert known(fs._mount.spaces) == {key(fs, "/b"): LIVE}
    fs.unlink("/b")
    assert_kept(fs, mapping, b"b")
    mapping.close()
    assert known(fs._mount.spaces) == {} and pinned(fs) == set()


def test_a_mapping_that_ends_in_a_transaction_is_let_go_of_by_the_next(fs):
    held = [fs.map("/a")]
    fs._mount.run(lambda tx: held.clear())
    assert known(fs._mount.spaces)
    fs.write("/c", b"")
    assert known(fs._mount.spaces) == {}


def test_a_file_in_more_runs_than_the_kernel_maps(fs, monkeypatch):
    """It gets entries, and its pages are mapped when they are touched; it is as live as any."""
    for page in range(0, 12, 2):
        fs.write("/holes", bytes([page + 1]) * PAGE, page * PAGE)
    wanted = fs.read("/holes")

    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    for where, name, value in ((maps, "_MANY", 5), (Mapping, "show", refuse)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            with fs.map("/holes") as mapping:
                assert fs._mount.spaces.with_entries() != []
                assert mapping[:] == wanted
                fs.write("/holes", b"new", 3 * PAGE)
                assert mapping[3 * PAGE : 3 * PAGE + 4] == b"new\0"
                fs.punch("/holes", 3 * PAGE, PAGE)
                assert mapping[:] == wanted
        assert known(fs._mount.spaces) == {}


def make_large(fs, path: str, pages: int) -> None:
    """Make a file of one run of frames without storage."""

    def make(tx):
        inode, at = namei.change_file(tx, path), 0
        for pfn, count in tx.frames.take_data(pages):
            extents.replace(tx, inode, at, at + count, [(at, pfn, count, 0)])
            at += count
        inode.size = pages * PAGE
        inodes.save(tx, inode)

    fs.create(path)
    fs._mount.run(make)


def test_a_file_larger_than_an_extent_can_be_mapped(new_path):
    """64 GiB in one run, without storage: only its address space is real."""
    path, pages = new_path(), MAX_RUN + 200
    onecopy.format(path, "65G")
    with onecopy.open(path) as fs:
        make_large(fs, "/large", pages)
        with fs.map("/large") as mapping:
            assert len(mapping) == pages * PAGE and mapping[-1] == 0
            with open("/proc/self/maps") as lines:
                spans = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in lines if path in line]
            assert [mapping.address, mapping.address + len(mapping)] in spans, "one VMA"
        fs.unlink("/large")


def test_a_large_file_s_orphan(new_path):
    path, pages = new_path(), 1 << 18
    onecopy.format(path, "2G")
    with onecopy.open(path) as fs:
        make_large(fs, "/large", pages)
        free = fs.info().free_pages
        with fs.map("/large") as mapping:
            fs.unlink("/large")
            assert len(pinned(fs)) == pages and mapping[-1] == 0
        fs.sync()
        assert pinned(fs) == set() and fs.info().free_pages >= free + pages


# -------------------------------------------------------------------- orphans


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_deleted_file_s_frames_are_kept_until_its_last_mapping_ends(fs, mode):
    gone, free = frames(fs, "/a"), fs.info().free_pages
    with fs.map("/a", mode) as first, fs.map("/a") as second, fs.map("/b", mode):
        assert pinned(fs) == set()
        fs.unlink("/a")
        assert pinned(fs) == set(gone) and fs.info().pinned_pages == 5
        second.close()
        assert pinned(fs) == set(gone)
        assert_kept(fs, first, b"a")
        assert first.pfns.tolist() == gone
    assert pinned(fs) == set() and known(fs._mount.spaces) == {}
    for name in "xy":
        fs.unlink(f"/{name}")
    fs.sync()
    assert fs.info().free_pages >= free + 5


def test_two_handles_keep_it_for_themselves(fs, small):
    gone = set(frames(fs, "/a"))
    with onecopy.open(small) as other, fs.map("/a") as mapping:
        theirs = other.map("/a")
        fs.unlink("/a")
        theirs.close()
        assert pinned(fs) == gone
        assert_kept(fs, mapping, b"a")
    fs.info()
    assert pinned(fs) == set()


def test_stores_to_a_deleted_file(fs):
    """They go to its own frames as before, and to none that a clone names; all are free at the end."""
    fs.clone("/a", "/clone")
    fs.sync()
    free = fs.info().free_pages
    with fs.map("/a", "r+") as mapping, fs.map("/a") as reading:
        mapping[0] = 1
        fs.unlink("/a")
        mapping[PAGE : 5 * PAGE] = b"x" * 4 * PAGE
        assert reading[:] == b"\1" + b"a" * (PAGE - 1) + b"x" * 4 * PAGE
        assert fs.read("/clone") == b"a" * 5 * PAGE
        fs.sync()
        assert reading[:] == b"\1" + b"a" * (PAGE - 1) + b"x" * 4 * PAGE
    fs.sync()
    assert pinned(fs) == set() and known(fs._mount.spaces) == {}
    assert fs.info().free_pages >= free and fs.info().used_pages == fs.check().counted["used_pages"]
    fs.unlink("/clone")
    fs.sync()
    assert fs.info().free_pages >= free + 5


def test_a_file_that_was_cut_off_keeps_nothing_behind_its_end(fs):
    gone = frames(fs, "/a")
    with fs.map("/a") as mapping:
        fs.truncate("/a", 2 * PAGE)
        fs.unlink("/a")
        assert pinned(fs) == set(gone[:2])
        assert mapping.pfns.tolist() == [*gone[:2], 0, 0, 0] and mapping[0 : 2 * PAGE] == b"a" * 2 * PAGE
        with pytest.raises(OSError, match="cut off"):
            mapping[2 * PAGE]
    assert pinned(fs) == set()


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


def test_a_deletion_that_was_given_up_leaves_no_pins(fs):
    """The bits of an abandoned deletion do no harm: the next to settle clears them."""
    mount, gone = fs._mount, frames(fs, "/a")
    with fs.map("/a"):

        def interrupt():
            raise KeyboardInterrupt

        at_step("live root written", 1, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                fs.unlink("/a")
        finally:
            steps.hook = None
        assert known(mount.spaces) == {key(fs, "/a"): LIVE} and fs.read("/a") == b"a" * 5 * PAGE
        fs.write("/a", b"again", PAGE)
        assert fs.map("/a")[PAGE : PAGE + 6] == b"againa"
    fs.unlink("/a")
    fs.sync()
    with mount.lock:
        mount.spaces.settle_pins()
    assert pinned(fs) == set() and not (mount.frames.array[gone] & USED).any()


ENTRY = st.builds(lambda pfn, bits: pfn | bits, st.integers(1, 60), st.sampled_from([0, PRIVATE, PRIVATE | STORED])) | st.just(
    0
)


@given(st.lists(st.lists(ENTRY, min_size=1, max_size=9), max_size=4), st.integers(0, 40), st.integers(1, 30))
def test_orphans_say_what_is_pinned(one_pool, files, low, size):
    spaces, table = one_pool._mount.spaces, one_pool._mount.frames.array
    before = table.copy()
    with one_pool._mount.lock:
        there = []
        for number, entries in enumerate(files):
            there.append(spaces.ensure(9, number + 1))
            spaces.enter(there[-1], 0, np.array([*entries, BEYOND], np.uint64))
            spaces.pin(there[-1])
            spaces.orphan(there[-1])
        named = [{entry & PFN_MASK for entry in entries if entry} for entries in files]
        assert pinned(one_pool) == set().union(*named)
        table[1:80] |= np.uint8(PINNED)
        spaces.settle_pins(low, low + size)
        inside = set(range(low, low + size))
        assert pinned(one_pool) == set(range(1, 80)) - inside | (set().union(*named) & inside)
        spaces.settle_pins()
        for index in there:
            assert pinned(one_pool) == set().union(*named)
            named.pop(0)
            spaces.end(index)
        assert pinned(one_pool) == set()
        spaces.engine.count("strays", -spaces.runtime.counter("strays"))
        spaces.engine.count("dirty", -spaces.engine.count("dirty", 0))
    assert (table == before).all()


@pytest.fixture(scope="module")
def one_pool():
    path = f"/dev/shm/test-{os.getpid()}-spaces.pool"
    onecopy.format(path, "1M")
    try:
        with onecopy.open(path) as fs:
            yield fs
    finally:
        onecopy.remove(path)
