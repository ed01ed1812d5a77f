"""Copy on write of whole files: many clones, large pieces, fragmented space, clones over fragmented files."""

import itertools

import pytest

import onecopy

pytestmark = pytest.mark.every_policy

PAGE = onecopy.PAGE


@pytest.mark.parametrize(("offset", "length"), [(0, 17 * PAGE), (4 * PAGE, 8 * PAGE), (4 * PAGE + 17, 8 * PAGE)])
@pytest.mark.parametrize("writer", ["/file1", "/file2"])
def test_generic_138_139_cow_leaves_the_other_file(twin, writer, offset, length):
    """How the two stay apart: whole, in the middle, at odd offsets; written on either side."""
    twin.fill("/file1", 0, 17 * PAGE)
    twin.clone("/file1", "/file2")
    twin.fill(writer, offset, length)


def test_generic_142_143_n_rewritten_copies_leave_the_original(twin):
    copies = [f"/copy{n}" for n in range(9)]
    twin.fill("/file1", 0, 32 * PAGE)
    for path in copies:
        twin.clone("/file1", path)
    assert twin.sharers("/file1") == [10] * 32
    for n, path in enumerate(copies):
        twin.fill(path, n * PAGE, 16 * PAGE)
    assert twin.frames() == 32 + 9 * 16
    for path in copies:
        twin.fill(path, 0, 32 * PAGE)
    assert twin.sharers("/file1") == [1] * 32
    assert twin.frames() == 32 * 10


def test_generic_186_187_cow_when_free_space_is_fragmented(make_twin):
    """No two free pages lie side by side: a large copy takes many runs."""
    twin = make_twin("4M")
    pages = 128
    twin.fill("/file1", 0, pages * PAGE)
    twin.fill("/file2", 0, pages * PAGE)
    twin.create("/file3")
    for page in range(pages):
        twin.clone_range(f"/file{1 + page % 2}", page * PAGE, "/file3", page * PAGE, PAGE)
    twin.fill_up("/filler")
    for page in range(1, len(twin.files["/filler"]) // PAGE, 2):
        twin.punch("/filler", page * PAGE, PAGE)
    twin.used()
    twin.fill("/file3", pages // 4 * PAGE, pages // 2 * PAGE)
    middle = sorted(twin.pfns("/file3")[pages // 4 : 3 * pages // 4])
    assert sum(b - a > 1 for a, b in itertools.pairwise(middle)) >= 10
    assert twin.sharers("/file3") == [2] * 32 + [1] * 64 + [2] * 32


def test_generic_201_cow_then_unlink_at_once(twin):
    pages = 64
    twin.fill("/file1", 0, pages * PAGE)
    twin.fill("/file3", 0, pages * PAGE)
    before = twin.used()
    for page in range(0, pages, 2):
        twin.clone_range("/file1", page * PAGE, "/file3", page * PAGE, PAGE)
    twin.fill("/file3", pages // 4 * PAGE, pages // 2 * PAGE)
    twin.unlink("/file3")
    assert before - pages - 2 <= twin.used() <= before - pages + 1


@pytest.mark.parametrize("chunk", [1 << 20, 4 << 20])
def test_generic_242_243_cow_of_large_files_in_large_chunks(make_twin, chunk):
    twin = make_twin("128M")
    twin.fill("/file1", 0, 12 << 20)
    twin.clone("/file1", "/file2")
    for offset in range(0, 12 << 20, chunk):
        twin.fill("/file2", offset, chunk)
    assert len(twin.fs.extents("/file2")) <= 12 << 20 // chunk


def test_generic_612_write_beyond_what_was_copied_before(twin):
    """A first small copy must not make the larger write that overlaps it go in place."""
    twin.fill("/b", 0, 64 * PAGE)
    twin.clone("/b", "/a")
    twin.remount()
    twin.fill("/a", 0, PAGE)
    twin.fill("/a", PAGE, 32 * PAGE)
    twin.fill("/a", 32 * PAGE, 16 * PAGE)
    assert twin.sharers("/b") == [1] * 48 + [2] * 16


_KINDS = ["shared", "unwritten", "hole", "regular", "fresh"]


def _rainbow(twin, path, pages):
    """A file whose pages are in turn shared, unwritten, a hole, stored and synced, stored since."""
    twin.fill("/origin", 0, pages * PAGE)
    twin.create(path)
    twin.truncate(path, pages * PAGE)
    for page in range(pages):
        kind = _KINDS[page % 5]
        if kind == "shared":
            twin.clone_range("/origin", page * PAGE, path, page * PAGE, PAGE)
        elif kind == "unwritten":
            twin.allocate(path, page * PAGE, PAGE)
        elif kind == "regular":
            twin.fill(path, page * PAGE, PAGE)
    twin.fs.sync()
    for page in range(4, pages, 5):
        twin.fill(path, page * PAGE, PAGE)


@pytest.mark.parametrize("source", [pytest.param("regular", id="540-542"), pytest.param("rainbow", id="541-543")])
@pytest.mark.parametrize("shift", [0, 16])
def test_generic_clone_range_over_mixed_extents(twin, source, shift):
    """The middle half of a plain, or of a mixed, file goes over a mixed one: at the same place, or further on."""
    pages = 64
    _rainbow(twin, "/file3", pages)
    if source == "regular":
        twin.fill("/file2", 0, pages * PAGE)
    else:
        twin.rename("/file3", "/file2")
        _rainbow(twin, "/file3", pages)
    twin.clone_range("/file2", 16 * PAGE, "/file3", (16 + shift) * PAGE, 32 * PAGE)
    assert twin.fs.read("/file3", (16 + shift) * PAGE, 32 * PAGE) == twin.fs.read("/file2", 16 * PAGE, 32 * PAGE)
    found = twin.pfns("/file3")[16 + shift : 48 + shift]
    unwritten = twin.states("/file2")[16:48]
    for here, there, state in zip(found, twin.pfns("/file2")[16:48], unwritten, strict=True):
        assert here == (there if state == "data" else 0)


def test_generic_562_large_extents_over_a_fragmented_file_in_a_full_pool(make_twin):
    """A clone over hundreds of small extents works although hardly a page is free: it frees more than it takes."""
    twin = make_twin("16M")
    pages = 1200
    twin.fill("/file1", 0, pages * PAGE)
    twin.fill("/small", 0, 2 * PAGE)
    twin.create("/file2")
    for page in range(pages):
        twin.clone_range("/small", page % 2 * PAGE, "/file2", page * PAGE, PAGE)
    assert len(twin.fs.extents("/file2")) == pages // 2
    twin.fill_up("/filler")
    twin.truncate("/filler", len(twin.files["/filler"]) - 16 * PAGE)
    twin.clone_range("/file1", 0, "/file2", 0, pages * PAGE)
    assert twin.pfns("/file2") == twin.pfns("/file1")
