"""What changes a file or its name while it is mapped for storing, with pages stored to and not yet in any tree."""

import errno
import os

import numpy as np
import pytest

import onecopy

from ..multiproc.trials import reboot
from .common import PAGE, assert_all_ended, content

PAGES = 40


class Mapped:
    """A pool with a file /a mapped r+ (and r), a clone of it, /origin, and a model of /a; some pages have been stored to."""

    def __init__(self, fs):
        self.fs = fs
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")
        self.mapping, self.reader = fs.map("/a", "r+", granule=4), fs.map("/a")
        self.model = bytearray(content(PAGES))
        for page in (0, 9, 10, 11, 12, 25, 39):
            self.store(page * PAGE + 100, b"stored before")

    def store(self, offset, data):
        with memoryview(self.mapping) as view:
            view[offset : offset + len(data)] = data
        self.model[offset : offset + len(data)] = data

    def verify(self, path="/a"):
        """The file and its mappings show the model; nobody else anything new."""
        fs, model = self.fs, self.model
        assert fs.read(path) == model
        shown = min(len(model), len(self.mapping))
        assert self.mapping[:shown] == model[:shown]
        assert self.reader[:shown] == model[:shown]
        assert fs.check().findings == []
        assert self.mapping[:shown] == model[:shown]

    def store_everywhere(self):
        """Store to each page once more, and look."""
        for page in range(min(len(self.model), len(self.mapping)) // PAGE):
            self.store(page * PAGE + 7, b"after %d" % page)

    def close(self):
        self.mapping.close()
        self.reader.close()


@pytest.fixture
def mapped(pool):
    yield (mapped := Mapped(pool))
    mapped.close()
    assert pool.read("/origin") == content(PAGES)
    assert_all_ended(pool)


RANGES = [
    (0, PAGE),
    (9 * PAGE, 3 * PAGE),
    (9 * PAGE + 50, 2 * PAGE),
    (11 * PAGE + 90, 30),
    (0, PAGES * PAGE),
    (38 * PAGE + 1, 2 * PAGE - 1),
]


@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("what", ["write", "zero", "punch", "allocate", "unshare"])
def test_a_range(mapped, what, where):
    fs, (offset, length) = mapped.fs, where
    if what == "write":
        data = content(PAGES, 3)[:length]
        fs.write("/a", data, offset)
        mapped.model[offset : offset + length] = data
    else:
        getattr(fs, what)("/a", offset, length)
        if what in ("zero", "punch"):
            mapped.model[offset : offset + length] = bytes(length)
    mapped.verify()
    mapped.store_everywhere()
    mapped.verify()


@pytest.mark.parametrize("first", [0, 9, 10, 30])
@pytest.mark.parametrize("pages", [1, 2, 9])
def test_collapse(mapped, first, pages):
    mapped.fs.collapse("/a", first * PAGE, pages * PAGE)
    del mapped.model[first * PAGE : (first + pages) * PAGE]
    mapped.verify()
    mapped.store_everywhere()
    mapped.verify()


@pytest.mark.parametrize("first", [0, 9, 10, 39])
@pytest.mark.parametrize("pages", [1, 7, 600])
def test_insert(mapped, first, pages):
    mapped.fs.insert("/a", first * PAGE, pages * PAGE)
    mapped.model[first * PAGE : first * PAGE] = bytes(pages * PAGE)
    mapped.verify()
    mapped.store_everywhere()
    mapped.verify()


@pytest.mark.parametrize("size", [0, 1, 9 * PAGE, 9 * PAGE + 101, 11 * PAGE - 1, 39 * PAGE + 4095])
def test_truncate_and_back(mapped, size):
    fs = mapped.fs
    fs.truncate("/a", size)
    del mapped.model[size:]
    mapped.verify()
    if -(-size // PAGE) * PAGE < PAGES * PAGE:
        with pytest.raises(OSError) as caught:
            mapped.mapping[-1]
        assert caught.value.errno == errno.ENXIO
        with pytest.raises(OSError) as caught:
            mapped.mapping[-1] = 0
        assert caught.value.errno == errno.ENXIO
    fs.truncate("/a", PAGES * PAGE)
    mapped.model += bytes(PAGES * PAGE - size)
    mapped.verify()
    mapped.store_everywhere()
    mapped.verify()


GROW = {
    "truncate": lambda fs, path: fs.truncate(path, 20 * PAGE),
    "write behind a gap": lambda fs, path: fs.write(path, b"x", 20 * PAGE - 1),
    "write behind a short gap": lambda fs, path: fs.write(path, b"x", 5000),
    "allocate": lambda fs, path: fs.allocate(path, 15 * PAGE, 5 * PAGE),
    "zero": lambda fs, path: fs.zero(path, 15 * PAGE, 5 * PAGE),
    "clone_range": lambda fs, path: fs.clone_range("/origin", 0, path, 19 * PAGE, PAGE),
}


@pytest.mark.parametrize("state", ["mapped", "closed", "clone", "clone, then closed", "range", "snapshot", "rebooted"])
@pytest.mark.parametrize("grow", GROW)
def test_what_was_stored_behind_a_ragged_end_reads_as_zeros_when_the_file_grows(pool_path, grow, state):
    onecopy.format(pool_path, "16M")
    path = "/s/a"
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(20))
        fs.create_subvolume("/s")
        fs.write("/s/a", content(2))
        fs.sync()
        with fs.map("/s/a", "r+") as mapping:
            fs.truncate("/s/a", 4500)
            mapping[4600] = mapping[5500] = 7
            if state.startswith("clone"):
                path = "/s/b"
                fs.clone("/s/a", path)
            elif state == "range":
                path = "/s/b"
                fs.create(path)
                fs.clone_range("/s/a", 0, path, 0, 0)
            elif state == "snapshot":
                path = "/t/a"
                fs.snapshot("/s", "/t")
            if "closed" in state or state == "rebooted":
                mapping.close()
            if state != "rebooted":
                look(fs, path, grow)
    if state == "rebooted":
        reboot(pool_path)
        with onecopy.open(pool_path) as fs:
            look(fs, path, grow)


def look(fs, path, grow):
    GROW[grow](fs, path)
    found = np.frombuffer(fs.read(path, 4500, 4000), np.uint8)
    assert np.flatnonzero(found).tolist() == ([500] if "short" in grow else [])
    assert fs.check().findings == []


def test_unlinked(mapped):
    fs = mapped.fs
    fs.unlink("/a")
    assert mapped.mapping[:] == mapped.reader[:] == mapped.model
    mapped.store_everywhere()
    assert mapped.mapping[:] == mapped.reader[:] == mapped.model
    assert fs.listdir("/") == ["origin"]
    for n in range(20):  # whatever may be used again is
        fs.write("/churn", bytes([n]) * 60 * PAGE)
        fs.sync()
        fs.unlink("/churn")
    assert mapped.mapping[:] == mapped.reader[:] == mapped.model
    assert fs.check().findings == []
    mapped.mapping.close()
    assert mapped.reader[:] == mapped.model
    mapped.reader.close()
    fs.sync()
    assert fs.info().used_pages < PAGES + 20


@pytest.mark.parametrize("stores", ["before", "after", "both", "none"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_deleted_file_gives_all_frames_back_when_the_last_mapping_ends(pool, shared, stores):
    pool.write("/origin", content(PAGES))
    pool.clone("/origin", "/a") if shared else pool.write("/a", content(PAGES, 1))
    pool.unlink("/a")
    pool.sync()
    used = pool.info().used_pages
    pool.clone("/origin", "/a") if shared else pool.write("/a", content(PAGES, 1))
    pool.sync()
    mapping = pool.map("/a", "r+")
    if stores in ("before", "both"):
        mapping[3 * PAGE] = mapping[30 * PAGE] = 1
        pool.sync()
        mapping[4 * PAGE] = 2
    pool.unlink("/a")
    if stores in ("after", "both"):
        mapping[5 * PAGE] = mapping[39 * PAGE] = 3
    pool.sync()
    mapping.close()
    assert_all_ended(pool)
    assert pool.info().used_pages == used
    assert pool.read("/origin") == content(PAGES)


def test_renamed_over(mapped):
    """The inode that loses its last name lives on in its mappings; the other one is what the name leads to."""
    fs = mapped.fs
    fs.write("/new", content(5, 8))
    fs.rename("/new", "/a")
    assert fs.read("/a") == content(5, 8)
    mapped.store_everywhere()
    assert mapped.mapping[:] == mapped.reader[:] == mapped.model
    assert fs.read("/a") == content(5, 8) and fs.check().findings == []


def test_renamed_over_another_mapped_file(mapped):
    fs = mapped.fs
    fs.clone("/a", "/b")
    with fs.map("/b", "r+") as other:
        other[0] = 250
        fs.rename("/a", "/b")
        mapped.store(1, b"the winner")
        other[1] = 251
        assert other[:2] == bytes([250, 251])
        mapped.verify("/b")


def test_in_a_deleted_subvolume_and_a_removed_tree(pool):
    for make, remove in ((pool.create_subvolume, pool.delete_subvolume), (pool.mkdir, pool.rmtree)):
        make("/top")
        pool.write("/top/a", content(PAGES))
        pool.clone("/top/a", "/top/b")
        mappings = [pool.map(path, "r+") for path in ("/top/a", "/top/b")]
        mappings[0][5 * PAGE] = 1
        mappings[1][6 * PAGE] = 2
        remove("/top")
        assert not pool.exists("/top")
        mappings[0][6 * PAGE] = 3
        mappings[1][5 * PAGE] = 4
        model = [bytearray(content(PAGES)) for _ in range(2)]
        model[0][5 * PAGE], model[1][6 * PAGE], model[0][6 * PAGE], model[1][5 * PAGE] = 1, 2, 3, 4
        pool.write("/churn", content(200, 5))
        pool.sync()
        pool.unlink("/churn")
        assert [mapping[:] for mapping in mappings] == model
        for mapping in mappings:
            mapping.close()
        assert_all_ended(pool)
        assert pool.info().used_pages < 20


def test_snapshots_of_mapped_files(pool):
    pool.create_subvolume("/s")
    pool.write("/s/a", content(PAGES))
    with pool.map("/s/a", "r+", granule=1) as mapping:
        want = []
        for n in range(6):
            mapping[n * PAGE] = n
            mapping[0] = 100 + n
            want.append(mapping[:])
            pool.snapshot("/s", f"/s{n}")
            if n % 2:
                pool.sync()
        mapping[:] = bytes(PAGES * PAGE)
        assert [pool.read(f"/s{n}/a") for n in range(6)] == want
        with pool.map("/s3/a", "r+") as other:  # the same number, another subvolume
            other[1] = 9
            assert mapping[1] == 0 and pool.read("/s2/a")[1] == want[2][1]
    assert_all_ended(pool)


@pytest.mark.parametrize("pages", [1, 3, 40])
def test_clone_range_as_source_as_target_and_within(mapped, pages):
    fs = mapped.fs
    fs.write("/other", content(PAGES, 6))
    fs.clone_range("/a", 0, "/other", 0, pages * PAGE)
    other = mapped.model[: pages * PAGE] + content(PAGES, 6)[pages * PAGE :]
    mapped.store(5, b"not in the clone")
    assert fs.read("/other") == other
    mapped.verify()
    count = min(pages, 20)
    fs.clone_range("/a", 9 * PAGE, "/a", 29 * PAGE - 9 * PAGE + 9 * PAGE, min(count, 11) * PAGE)
    count = min(count, 11)
    mapped.model[29 * PAGE : (29 + count) * PAGE] = mapped.model[9 * PAGE : (9 + count) * PAGE]
    mapped.verify()
    mapped.store_everywhere()
    mapped.verify()
    fs.clone_range("/other", 0, "/a", 0, pages * PAGE)
    mapped.model[: pages * PAGE] = other[: pages * PAGE]
    mapped.verify()
    mapped.store_everywhere()
    assert fs.read("/other") == other
    mapped.verify()


def test_dedupe_range(mapped):
    fs = mapped.fs
    fs.write("/twin", bytes(mapped.model))
    assert fs.dedupe_range("/twin", 0, "/a", 0, PAGES * PAGE) is True
    mapped.verify()
    assert {e.sharers for e in fs.extents("/a")} <= {2, 3}
    mapped.store(9 * PAGE, b"differs")
    assert fs.dedupe_range("/a", 0, "/twin", 0, PAGES * PAGE) is False
    mapped.verify()
    mapped.store_everywhere()
    mapped.verify()
    assert fs.read("/twin")[9 * PAGE : 9 * PAGE + 7] != b"differs"


def test_dedupe(mapped):
    """Pages that faults copied and nobody changed are equal to their origin's: sharing comes back."""
    fs = mapped.fs
    mapped.mapping.make_writable()
    before = fs.du("/").total
    assert fs.dedupe(apply=True).skipped == 0
    mapped.verify()
    assert fs.du("/").total < before
    mapped.store_everywhere()
    mapped.verify()
    fs.dedupe(apply=True)
    mapped.verify()


def test_dedupe_of_a_file_with_equal_pages(pool):
    """Several ranges of one mapped file are shared in one transaction."""
    half = content(20)
    pool.write("/a", half + content(3, 1) + half + half)
    model = bytearray(pool.read("/a"))
    pool.clone("/a", "/b")
    with pool.map("/b", "r+", reserve=True) as mapping, pool.map("/a", "r+", reserve=True) as other:
        mapping[0], model[0] = model[0] ^ 1, model[0] ^ 1
        pool.dedupe(apply=True)
        pool.sync()
        assert pool.check().findings == []
        pool.write("/churn", content(300, 2))
        assert mapping[:] == pool.read("/b") == model
        model[0] ^= 1
        assert other[:] == pool.read("/a") == model
    assert_all_ended(pool)


def test_get_and_put(mapped, tmp_path):
    fs = mapped.fs
    fs.get("/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mapped.model
    (tmp_path / "b").write_bytes(os.urandom(3 * PAGE))
    fs.put(tmp_path / "b", "/a")  # replaces the name; the mapping keeps the inode
    mapped.store_everywhere()
    assert mapped.mapping[:] == mapped.reader[:] == mapped.model
    assert fs.read("/a") == (tmp_path / "b").read_bytes()


def test_extents_and_du_see_what_was_stored(mapped):
    """Readers without the lock go by the entries, which are newer than any tree."""
    fs = mapped.fs
    table = np.zeros(PAGES, np.int64)
    for one in fs.extents("/a"):
        if one.state == "data":
            table[one.file_page : one.file_page + one.pages] = np.arange(one.pfn, one.pfn + one.pages)
    assert table.tolist() == mapped.mapping.pfns.tolist()
    with fs.map("/origin") as origin:
        differ = set(np.flatnonzero(origin.pfns != mapped.mapping.pfns).tolist())
    assert {0, 9, 10, 11, 12, 25, 39} <= differ
    fs.sync()
    assert fs.du("/a").unique == len(differ) * PAGE


def test_used_pages_before_and_after_a_sync(mapped):
    fs = mapped.fs
    used = fs.info().used_pages
    mapped.store_everywhere()
    assert used < fs.info().used_pages <= used + PAGES
    before = fs.info().used_pages
    fs.sync()
    fs.sync()
    assert fs.info().used_pages <= before + 3, "the trees' own pages at most"
    mapped.verify()
