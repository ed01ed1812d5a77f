"""Copy-on-write by store: over every kind of extent, by every means, seen by all at once, and by no clone (S3, S4)."""

import ctypes
import errno

import numpy as np
import pytest

import onecopy

from .common import PAGE, assert_all_ended, content, counter

pytestmark = pytest.mark.every_policy

PAGES = 40


def make_regular(fs, path):
    fs.write(path, content(PAGES))


def make_hole(fs, path):
    fs.create(path)
    fs.truncate(path, PAGES * PAGE)


def make_unwritten(fs, path):
    fs.create(path)
    fs.allocate(path, 0, PAGES * PAGE)


def make_shared(fs, path):
    fs.write("/origin", content(PAGES))
    fs.clone("/origin", path)


def make_mixed(fs, path):
    """Data of its own, shared data, holes, unwritten frames: a page of each, in turn."""
    fs.write("/origin", content(PAGES))
    fs.create(path)
    fs.truncate(path, PAGES * PAGE)
    for page in range(0, PAGES, 4):
        fs.write(path, content(1, page), page * PAGE)
        fs.clone_range("/origin", page * PAGE, path, (page + 1) * PAGE, PAGE)
        fs.allocate(path, (page + 2) * PAGE, PAGE)


def make_ragged(fs, path):
    fs.write("/origin", content(PAGES)[:-1234])
    fs.clone("/origin", path)


def make_scattered(fs, path):
    """No two neighbouring pages have neighbouring frames."""
    for page in [*range(0, PAGES, 2), *range(1, PAGES, 2)]:
        fs.write(path, content(1, page), page * PAGE)


def make_sparse_shared(fs, path):
    make_hole(fs, "/origin")
    fs.write("/origin", content(1), 7 * PAGE)
    fs.clone("/origin", path)


KINDS = [make_regular, make_hole, make_unwritten, make_shared, make_mixed, make_ragged, make_scattered, make_sparse_shared]


def by_slice(mapping, offset, data):
    mapping[offset : offset + len(data)] = data


def by_item(mapping, offset, data):
    for n, byte in enumerate(data):
        mapping[offset + n] = byte


def by_memoryview(mapping, offset, data):
    with memoryview(mapping) as view:
        view[offset : offset + len(data)] = data


def by_numpy(mapping, offset, data):
    np.frombuffer(mapping, np.uint8)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


def by_c(mapping, offset, data):
    ctypes.memmove(mapping.address + offset, data, len(data))


WAYS = [by_slice, by_item, by_memoryview, by_numpy, by_c]

SPOTS = {
    "the first byte": (0, 1),
    "the last bytes": (PAGES * PAGE - 2000, 700),
    "a byte in the middle": (17 * PAGE + 99, 1),
    "across pages": (5 * PAGE - 10, 20),
    "a whole page": (8 * PAGE, PAGE),
    "many pages": (9 * PAGE + 1, 21 * PAGE),
}


@pytest.fixture
def fs(pool):
    yield pool
    assert_all_ended(pool)


# ------------------------------------------------------------ every kind


@pytest.mark.parametrize("granule", [None, 1, 512])
@pytest.mark.parametrize("make", KINDS)
def test_a_store_changes_this_file_only(fs, make, granule):
    make(fs, "/a")
    fs.clone("/a", "/before")
    names = fs.listdir("/")
    model = bytearray(fs.read("/a"))
    others = {name: fs.read("/" + name) for name in names if name != "a"}
    with fs.map("/a", "r+", granule=granule) as mapping, fs.map("/a") as reader, fs.map("/before") as clone:
        for n, (offset, length) in enumerate(SPOTS.values()):
            data = content(length // PAGE + 1, n)[:length]
            by_memoryview(mapping, offset, data)
            model[offset : offset + length] = data
            assert mapping[:] == model and reader[:] == model and fs.read("/a") == model
            assert clone[:] == others["before"]
        assert {name: fs.read("/" + name) for name in others} == others
        fs.clone("/a", "/after")
        by_memoryview(mapping, 3 * PAGE, b"later")
        assert fs.read("/after") == model
        assert fs.check().findings == []
    model[3 * PAGE : 3 * PAGE + 5] = b"later"
    assert fs.read("/a") == model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spot", SPOTS)
def test_by_any_means(fs, way, spot):
    make_mixed(fs, "/a")
    fs.clone("/a", "/b")
    model, (offset, length) = bytearray(fs.read("/a")), SPOTS[spot]
    if way is by_item:
        length = min(length, 3000)
    data = content(length // PAGE + 1, 9)[:length]
    with fs.map("/b", "r+") as mapping:
        way(mapping, offset, data)
        before, model[offset : offset + length] = bytes(model), data
        assert fs.read("/b") == model == mapping[:]
    assert fs.read("/a") == before


def test_granule_1_copies_one_page(fs):
    make_shared(fs, "/a")
    with fs.map("/a", "r+", granule=1) as mapping:
        before = mapping.pfns
        for page in (3, 17, 4):
            mapping[page * PAGE] = 1
        assert np.flatnonzero(mapping.pfns != before).tolist() == [3, 4, 17]
        assert counter(fs, "copied") == 3


@pytest.mark.parametrize("granule", [2, 16, 128, 512])
def test_a_granule_is_aligned(fs, granule):
    fs.write("/origin", content(600))
    fs.clone("/origin", "/a")
    with fs.map("/a", "r+", granule=granule) as mapping:
        before = mapping.pfns
        mapping[300 * PAGE] = 1
        changed = np.flatnonzero(mapping.pfns != before)
        first = 300 - 300 % granule
        assert changed.tolist() == list(range(first, min(600, first + granule)))


@pytest.mark.parametrize("granule", [0, 3, -1, 1024, 513])
def test_a_granule_that_can_not_be(fs, granule):
    make_regular(fs, "/a")
    with pytest.raises(OSError) as caught:
        fs.map("/a", "r+", granule=granule)
    assert caught.value.errno == errno.EINVAL


def test_files_of_many_blocks(fs):
    """Blocks of 512 pages, each locked by itself; a store, a clone and a cut over their borders."""
    fs.write("/a", content(1300))
    fs.clone("/a", "/b")
    model = bytearray(fs.read("/a"))
    with fs.map("/b", "r+") as mapping, fs.map("/b", "r+", granule=512) as other:
        for page in (0, 511, 512, 1023, 1024, 1299):
            by_memoryview(mapping, page * PAGE + 5, b"first")
            model[page * PAGE + 5 : page * PAGE + 10] = b"first"
        data = content(700, 3)
        by_memoryview(other, 400 * PAGE + 7, data)
        model[400 * PAGE + 7 : 400 * PAGE + 7 + len(data)] = data
        assert mapping[:] == other[:] == fs.read("/b") == model
        fs.clone("/b", "/c")
        by_memoryview(mapping, 511 * PAGE, bytes(2 * PAGE))
        assert fs.read("/c") == model
        fs.truncate("/b", 600 * PAGE + 1)
        assert mapping[: 512 * PAGE] == model[: 511 * PAGE] + bytes(PAGE)
        fs.truncate("/b", 1300 * PAGE)
        assert other[600 * PAGE + 1 :] == bytes(700 * PAGE - 1)
    assert fs.read("/a") == content(1300)


def test_an_array_takes_stores(fs, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5000.0).reshape(50, 100))
    fs.put(tmp_path / "a.npy", "/a.npy")
    fs.clone("/a.npy", "/b.npy")
    array, other = fs.array("/b.npy", "r+"), fs.array("/b.npy")
    array[:, 3] = -1
    array[7] += 100
    np.testing.assert_array_equal(array, other)
    np.testing.assert_array_equal(fs.array("/a.npy"), np.arange(5000.0).reshape(50, 100))
    fs.get("/b.npy", tmp_path / "b.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), array)
    del array, other


def test_mapped_for_reading_it_takes_no_store(fs):
    make_regular(fs, "/a")
    with fs.map("/a") as mapping:
        assert memoryview(mapping).readonly and not mapping.writable
        with pytest.raises(onecopy.ReadOnly):
            mapping[0] = 1
        with pytest.raises(onecopy.ReadOnly):
            mapping.make_writable()


@pytest.mark.parametrize("size", [1, 100, 150])
def test_content_that_lies_in_the_inode(fs, size):
    """Mapping it moves it to a page, which then takes stores as any other."""
    fs.write("/a", bytes(range(size)))
    fs.clone("/a", "/b")
    with fs.map("/a", "r+") as mapping, fs.map("/a", "r+") as other:
        mapping[0] = 200
        fs.clone("/a", "/c")
        mapping[size - 1] = 201
        assert other[:] == fs.read("/a") == mapping[:]
    assert fs.read("/b") == bytes(range(size))
    assert fs.read("/a")[-1] == 201 and (size == 1 or fs.read("/c")[-1] == size - 1)


def test_an_empty_file(fs):
    fs.create("/a")
    with fs.map("/a", "r+") as mapping:
        assert len(mapping) == 0 and mapping[:] == b""
        mapping.make_writable()
        mapping.sync()
        fs.write("/a", b"x" * PAGE)
        assert len(mapping) == 0


# --------------------------------------------------- several mappings


def test_many_mappings_of_one_file_agree(fs):
    make_mixed(fs, "/a")
    maps = [fs.map("/a", "r+" if n % 3 else "r", granule=[1, None, 4, 64][n % 4]) for n in range(12)]
    model = bytearray(fs.read("/a"))
    for n, mapping in enumerate(maps):
        if mapping.writable:
            offset = n * 3 * PAGE + 11
            by_memoryview(mapping, offset, b"mapping %d" % n)
            model[offset : offset + len(b"mapping %d" % n)] = b"mapping %d" % n
            assert all(m[:] == model for m in maps)
            if n % 2:
                fs.clone("/a", f"/clone{n}")
    for mapping in maps:
        mapping.close()
    assert fs.read("/a") == model


def test_a_mapping_made_after_a_store_shows_it(fs):
    make_shared(fs, "/a")
    with fs.map("/a") as early, fs.map("/a", "r+") as mapping:
        mapping[PAGE : 2 * PAGE] = b"x" * PAGE
        with fs.map("/a") as reader, fs.map("/a", "r+") as writer:
            assert early[PAGE] == reader[PAGE] == writer[PAGE] == ord("x")
            writer[PAGE] = ord("y")
            assert early[PAGE] == reader[PAGE] == mapping[PAGE] == ord("y")


def test_a_mapping_is_longer_than_the_one_before(fs):
    """The file grew in between: the address space grows with it."""
    fs.write("/a", content(3))
    with fs.map("/a", "r+") as short:
        fs.write("/a", content(700), 2 * PAGE)
        with fs.map("/a", "r+") as long:
            long[600 * PAGE] = 7
            long[0] = 8
            assert short[0] == 8 and fs.read("/a", 600 * PAGE, 1) == b"\7"
            fs.clone("/a", "/b")
            long[600 * PAGE] = 9
            short[0] = 10
        assert fs.read("/b", 600 * PAGE, 1) == b"\7" and fs.read("/b", 0, 1) == b"\x08"
    assert fs.read("/a", 600 * PAGE, 1) == b"\t"


def test_through_names_of_one_inode(fs):
    make_shared(fs, "/a")
    fs.link("/a", "/link")
    with fs.map("/a", "r+") as one, fs.map("/link", "r+") as other:
        one[5] = 1
        other[6] = 2
        fs.rename("/a", "/b")
        one[7] = 3
        assert fs.read("/link", 5, 3) == fs.read("/b", 5, 3) == other[5:8] == bytes([1, 2, 3])


def test_through_two_handles_of_one_process(fs):
    make_shared(fs, "/a")
    with onecopy.open(fs.path) as other:  # noqa: SIM117
        with fs.map("/a", "r+") as one, other.map("/a", "r+") as two, other.map("/origin") as origin:
            one[5] = 1
            assert two[5] == 1
            two[5 * PAGE] = 2
            two[6] = 3
            assert one[5 * PAGE] == 2 and one[6] == 3
            assert origin[:] == content(PAGES)
            assert fs.read("/a") == other.read("/a") == one[:]


def test_system_calls_store_after_make_writable(fs, tmp_path):
    make_shared(fs, "/a")
    (tmp_path / "source").write_bytes(content(PAGES, 5))
    with fs.map("/a", "r+") as mapping, open(tmp_path / "source", "rb", buffering=0) as file:
        with memoryview(mapping) as view, pytest.raises(OSError) as caught:
            file.readinto(view)
        assert caught.value.errno == errno.EFAULT
        mapping.make_writable(PAGE, 3 * PAGE)
        file.seek(0)
        with memoryview(mapping) as view:
            assert file.readinto(view[PAGE : 3 * PAGE]) == 2 * PAGE
        assert fs.read("/a", PAGE, 2 * PAGE) == content(PAGES, 5)[: 2 * PAGE]
        mapping.make_writable()
        file.seek(0)
        with memoryview(mapping) as view:
            assert file.readinto(view) == PAGES * PAGE
    assert fs.read("/a") == content(PAGES, 5) and fs.read("/origin") == content(PAGES)


def test_stores_survive_a_reopening(pool_path):
    onecopy.format(pool_path, "16M")
    with onecopy.open(pool_path) as fs:
        make_mixed(fs, "/a")
        mapping = fs.map("/a", "r+")
        mapping[5 * PAGE] = 77
        fs.close()
        mapping[6 * PAGE] = 78  # the handle is closed, the mapping isn't
        mapping.close()
    with onecopy.open(pool_path) as fs:
        assert fs.read("/a", 5 * PAGE, 1) + fs.read("/a", 6 * PAGE, 1) == bytes([77, 78])
        assert_all_ended(fs)
