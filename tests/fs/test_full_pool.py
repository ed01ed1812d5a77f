"""Copy on write when the pool runs full: the writer gets ENOSPC, nobody's bytes change, deleting helps."""

import pytest

import onecopy

PAGE = onecopy.PAGE


@pytest.fixture
def full(make_twin):
    """A file of 256 pages, its clone, and a third file that fills the pool up."""
    twin = make_twin("4M")
    twin.fill("/file1", 0, 256 * PAGE)
    twin.clone("/file1", "/file2")
    twin.fill_up("/filler")
    return twin


@pytest.mark.parametrize("writer", ["/file1", "/file2"])
@pytest.mark.parametrize("offset", [0, 100])
def test_generic_171_174_one_large_copy_on_write(full, writer, offset):
    before = full.used(), full.pfns(writer)
    with pytest.raises(onecopy.NoSpace):
        full.fs.write(writer, full.blob(255 * PAGE), offset)
    assert (full.used(), full.pfns(writer)) == before
    full.compare()
    full.unlink("/filler")
    full.fill(writer, offset, 255 * PAGE)


@pytest.mark.parametrize("synced", [True, False])
def test_generic_172_page_by_page_until_space_ends(full, synced):
    written = 0
    with pytest.raises(onecopy.NoSpace):
        for page in range(256):
            full.fill("/file2", page * PAGE + 17, PAGE - 34)
            written += 1
            if synced:
                full.fs.sync()
    full.compare()
    full.truncate("/filler", 100 * PAGE)
    full.fill("/file2", written * PAGE, PAGE)


@pytest.mark.parametrize("page", [100, 200])
def test_a_write_that_fails_stores_nothing_in_place(full, page):
    """Pages of the range that are private already would take new bytes without new frames: they must not get them."""
    full.truncate("/filler", len(full.files["/filler"]) - 8 * PAGE)
    full.fill("/file2", page * PAGE, 2 * PAGE)
    full.fill_up("/filler2")
    with pytest.raises(onecopy.NoSpace):
        full.fs.write("/file2", full.blob(150 * PAGE), 90 * PAGE)
    full.compare()


def test_writes_in_place_need_no_space(full):
    full.unlink("/file1")
    for page in range(0, 256, 5):
        full.fill("/file2", page * PAGE + 17, PAGE)


def test_what_was_allocated_can_be_written(make_twin):
    twin = make_twin("4M")
    twin.create("/file")
    twin.allocate("/file", 0, 300 * PAGE)
    twin.fill_up("/filler")
    for page in range(0, 300, 30):
        twin.fill("/file", page * PAGE + 100, PAGE // 2)
    twin.fill("/file", 0, 300 * PAGE)


def test_generic_387_truncate_of_a_heavily_shared_file_in_a_full_pool(make_twin):
    twin = make_twin("16M")
    twin.fill("/testfile", 0, 32 * PAGE)
    for n in range(1, 256):
        twin.clone_range("/testfile", 0, "/testfile", 32 * n * PAGE, 32 * PAGE)
    assert len(twin.fs.extents("/testfile")) == 256
    twin.fill_up("/filler")
    twin.truncate("/testfile", 17)
    twin.truncate("/testfile", 0)
    assert twin.frames("/testfile") == 0


@pytest.mark.parametrize("pages", [1, 1000])
def test_everything_can_be_deleted_from_a_full_pool(make_twin, pages):
    """The reserve is there for this, however many small things fill the pool."""
    twin = make_twin("6M")
    empty = twin.used()
    twin.fill("/origin", 0, 100 * PAGE)
    number = 0
    try:
        while True:
            if pages == 1:
                twin.fill(f"/{number}", 0, PAGE)
            else:
                twin.clone("/origin", f"/{number}")
                twin.fill(f"/{number}", number % 100 * PAGE, PAGE)
            number += 1
    except onecopy.NoSpace:
        pass
    assert number > 100
    for path in list(twin.files):
        twin.unlink(path)
    assert twin.used() == empty
