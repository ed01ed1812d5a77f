"""Address spaces: found by inode, ended with the last mapping, and what a deleted file's mappings show stays theirs (S5)."""

import errno
import os
import signal
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onecopy
from onecopy.blkcache import spaces as module
from onecopy.blkcache.frames import HELD, MAX_RUN, PINNED, USED
from onecopy.blkcache.spaces import BEYOND, LIVE, ORPHAN, PFN_MASK, PRIVATE, STORED, runs_of
from onecopy.daxemu import runtime, steps
from onecopy.daxemu.mapping import Mapping
from onecopy.daxemu.runtime import MAX_PAGES
from onecopy.daxemu.units import PAGE
from onecopy.fs import extents, maps, namei
from onecopy.fs import inode as inodes

from ..multiproc.processes import Lines, at_step, die


def pinned(fs) -> set[int]:
    """Return the frames with a PINNED bit."""
    return set(np.flatnonzero(fs._mount.frames.array & PINNED).tolist())


def frames(fs, path: str) -> list[int]:
    return [extent.pfn + n for extent in fs.extents(path) for n in range(extent.pages) if extent.pfn]


def key(fs, path: str) -> tuple[int, int]:
    with fs._mount.reading() as view:
        inode = namei.file_at(view, path)
        return inode.subvolume, inode.number


def known(spaces) -> dict[tuple[int, int], int]:
    """Return the states of all spaces there are, by key."""
    used = range(spaces.runtime.get("spaces_used"))
    return {spaces.key(index): spaces.state(index) for index in used if spaces.state(index)}


def free_list(spaces) -> list[int]:
    """Return the records that are free to be used again."""
    found, index = [], spaces.runtime.get("spaces_free") - 1
    while index >= 0:
        assert index not in found
        found.append(index)
        index = spaces.runtime.words[spaces._at(index) + module._NEXT] - 1
    return found


def assert_whole(spaces) -> None:
    """Each space is found by its key and no free record is; a record is free or one inode's, and no chain goes round."""
    free = free_list(spaces)
    for index in range(spaces.runtime.get("spaces_used")):
        found = spaces.find(*spaces.key(index))
        assert (found == index) == bool(spaces.state(index)) != (index in free)


@pytest.fixture
def fs(small):
    with onecopy.open(small) as handle:
        for name in "ab":
            handle.write(f"/{name}", name.encode() * 5 * PAGE)
        yield handle
        assert handle.check().findings == []


@pytest.fixture
def spaces(mount):
    """The address spaces of an empty pool, with the transaction lock held."""
    with mount.lock:
        yield mount.spaces


def assert_kept(fs, mapping, letter: bytes) -> None:
    """The mapping of a file that is gone shows what it showed, whatever is written to files."""
    for n in range(6):
        for name in "xy":
            fs.write(f"/{name}", bytes([n]) * 7 * PAGE)
        fs.sync()
    assert mapping[:] == letter * 5 * PAGE


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


def colliding(spaces, count: int) -> list[int]:
    """Return inode numbers of subvolume 1 that hash to one bucket."""
    wanted, found, number = spaces._bucket(1, 1), [], 0
    while len(found) < count:
        number += 1
        if spaces._bucket(1, number) == wanted:
            found.append(number)
    return found


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


# -------------------------------------------------------------------- entries


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


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


# ---------------------------------------------------- mapped, and not any more


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


# ------------------------------------------------------------------- orphans


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


@given(st.sets(st.integers(0, 40)))
def test_runs_of_frames(pfns):
    runs = runs_of(np.array(sorted(pfns), np.int64))
    assert [pfn + n for pfn, pages in runs for n in range(pages)] == sorted(pfns)
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(runs))


# -------------------------------------------------------------------- strays


def test_what_no_entry_names_is_found(fs):
    """Frames that a fault took and no entry names: as a fault leaves them that died before its entries."""
    mount = fs._mount
    fs.clone("/a", "/clone")
    fs.sync()
    free = fs.info().free_pages
    with fs.map("/a", "r+", granule=1) as mapping:
        mapping[PAGE] = 1
        (named,) = {int(mapping.pfns[1])}
        with mount.lock:
            assert mount.spaces.strays() == []
            at = int(np.flatnonzero(mount.frames.array == 0)[40])
            assert mount.engine.claim(at, 3, USED | mount.frames.array[named])
            mount.engine.count("held", 3)
            mount.engine.count("strays", 1)
            assert mount.spaces.strays() == [(at, 3)]
        fs.sync()
        assert not (mount.frames.array[at : at + 3] & USED).any()
        assert mapping[PAGE] == 1 and int(mapping.pfns[1]) == named
    assert (fs.info().free_pages, mount.runtime.counter("held"), mount.runtime.counter("strays")) == (free - 1, 0, 0)


@pytest.mark.parametrize("claimed", [(0, 2), (1, 1), None])
def test_what_a_fault_vouches_for_is_no_stray(fs, claimed):
    """A fault's record says what it has taken, or (all ones) that it is about to take something: then wait."""
    mount, layout = fs._mount, fs._mount.runtime.layout
    words = mount.runtime.words
    record = (layout.messages + mount.slot.index * runtime.MESSAGES * runtime.MESSAGE.size) // 8
    count, first = record + runtime.MESSAGE.word("count"), record + runtime.MESSAGE.word("claimed")
    with mount.lock:
        at = int(np.flatnonzero(mount.frames.array == 0)[40])
        held = module.Frames(mount.runtime, mount.pool, mount.engine)
        assert mount.engine.claim(at, 2, HELD)
        mount.engine.count("held", 2)
        words[first], words[count] = (at + claimed[0], claimed[1]) if claimed else (0, (1 << 64) - 1)
        assert mount.spaces.strays() == ([(at, 1)] if claimed == (1, 1) else [])
        words[count] = 0
        assert mount.spaces.strays() == [(at, 2)] and held.held().tolist() == [at, at + 1]
        mount.engine.count("strays", 1)
    fs.sync()
    assert not (mount.frames.array[at : at + 2] & USED).any()


# ------------------------------------------------------------------ the dead


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
    assert pinned(fs) == set(gone)
    process.say()
    process.wait()
    info = fs.info()
    assert known(fs._mount.spaces) == {key(fs, "/b"): LIVE}
    assert (info.waiting_pages, info.pinned_pages, len(info.users)) == (0, 0, 1)
    assert not (fs._mount.frames.array[gone] & USED).any()
    alive.close()


def test_what_the_dead_stored_is_folded_and_its_space_ends(fs, small, start):
    def store_and_die(line):
        other = onecopy.open(small)
        mapping = other.map("/a", "r+")
        mapping[PAGE] = 1
        die()

    fs.clone("/a", "/clone")
    start(store_and_die).wait()
    assert fs.read("/a", PAGE, 2) == b"\1a"
    fs.sync()
    assert known(fs._mount.spaces) == {} and fs.info().dirty_pages == 0
    assert fs.read("/a", PAGE, 2) == b"\1a" and fs.read("/clone") == b"a" * 5 * PAGE


@pytest.mark.parametrize("step", ["block locked", "frames claimed", "pages copied"])
def test_who_died_before_it_had_stored_leaves_nothing(fs, small, start, step):
    """Its space may be marked as stored to, but no entry is: one sync ends it, and the next has nothing to do."""

    def store_and_die(line):
        mapping = onecopy.open(small).map("/a", "r+")
        steps.signal_at(step, 1, signal.SIGKILL)
        mapping[PAGE] = 1

    fs.clone("/a", "/clone")
    assert start(store_and_die).wait() == -9
    fs.sync()
    assert known(fs._mount.spaces) == {} and fs.read("/a") == fs.read("/clone")
    generation = fs.info().generation
    fs.sync()
    assert fs.info().generation == generation
    assert fs.info().used_pages == fs.check().counted["used_pages"]


@pytest.mark.parametrize("at", ["settle", "recount", "end_unmapped"])
def test_a_reap_that_was_cut_short_is_done_again(fs, small, start, monkeypatch, at):
    def map_and_die(line):
        mapping = onecopy.open(small).map("/a")
        fs.unlink("/a")
        fs.close()  # so that only one slot remains
        assert mapping
        die()

    start(map_and_die).wait()
    mount = fs._mount
    assert pinned(fs) != set()
    where = {"settle": mount.limbo, "recount": mount.frames, "end_unmapped": mount.spaces}[at]
    monkeypatch.setattr(where, at, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), mount.lock:
        mount.spaces.reap()
    monkeypatch.undo()
    fs.info()
    assert pinned(fs) == set() and len(fs.info().users) == 1


def assert_survived(small, start, work) -> None:
    """Let a process die at each line of `work(spaces, lines)` in turn; whoever comes next finds records that are whole."""
    with onecopy.open(small) as fs:
        spaces, number, gone = fs._mount.spaces, 0, False
        with fs._mount.lock:
            numbers = colliding(spaces, 5)
            others = [spaces.ensure(1, n) for n in numbers[3:]]
            for index in others:
                spaces.engine.map_for(index, fs._mount.slot.index, True)
        while not gone:
            number += 1

            def attempt(line, number=number):
                other = onecopy.open(small)._mount
                with other.lock:
                    work(other.spaces, numbers[:3], Lines(number))
                other.lock.acquire()
                line.say("did not die")
                line.hear()

            process = start(attempt)
            try:
                gone = process.hear() == "did not die"
                process.kill()
            except AssertionError:
                assert process.wait() == -9
            with fs._mount.lock:
                fs._mount.recover()
                spaces.reap()
                assert known(spaces) == dict.fromkeys([spaces.key(index) for index in others], LIVE)
                assert [spaces.find(1, n) for n in numbers] == [-1, -1, -1, *others]
                assert len(set(free_list(spaces)) & set(others)) == 0
                again = [spaces.ensure(1, n) for n in numbers[:3]]
                assert len({*again, *others}) == 5
                assert [spaces.find(1, n) for n in numbers] == [*again, *others]
                for index in again:
                    spaces.end(index)
        assert number > 15
        for index in others:
            spaces.engine.map_for(index, fs._mount.slot.index, False)


def test_a_death_at_any_line_of_making_a_space(small, start):
    def work(spaces, numbers, lines):
        spaces.ensure(1, numbers[0])
        with lines:
            spaces.ensure(1, numbers[1])

    assert_survived(small, start, work)


def test_a_death_at_any_line_of_ending_a_space(small, start):
    def work(spaces, numbers, lines):
        indexes = [spaces.ensure(1, number) for number in numbers]
        spaces.enter(indexes[1], 0, words(5, 0, BEYOND))
        spaces.orphan(indexes[1])
        with lines:
            spaces.end(indexes[1])

    assert_survived(small, start, work)


# -------------------------------------------------------------- without a lock


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
