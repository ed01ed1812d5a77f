"""allocate, punch, zero, collapse, insert, truncate and unshare on shared ranges and midway through copied ones."""

import errno

import pytest

import onecopy

pytestmark = pytest.mark.every_policy

PAGE = onecopy.PAGE
FALLOC = ["allocate", "collapse", "punch", "insert", "zero"]


@pytest.fixture
def cloned(twin):
    """/file1 and its clone /file2, 16 pages each."""
    twin.fill("/file1", 0, 16 * PAGE)
    twin.clone("/file1", "/file2")
    return twin


def test_generic_144_allocate_steps_around_shared_ranges(twin):
    twin.fill("/file1", 0, 8 * PAGE)
    twin.create("/file2")
    for page in (1, 5):
        twin.clone_range("/file1", page * PAGE, "/file2", page * PAGE, 2 * PAGE)
    twin.allocate("/file2", 0, 9 * PAGE)
    assert twin.sharers("/file2") == [1, 2, 2, 1, 1, 2, 2, 1, 1]
    assert [state == "unwritten" for state in twin.states("/file2")] == [s == 1 for s in twin.sharers("/file2")]
    twin.fill("/file2", 0, 9 * PAGE)


# What each operation does to pages 4 to 7 of a shared file: sharers of each of its pages afterwards.
_ON_SHARED = {
    "144-allocate": ("allocate", [2] * 16),
    "145-collapse": ("collapse", [2] * 12),
    "146-punch": ("punch", [2] * 4 + [0] * 4 + [2] * 8),
    "147-insert": ("insert", [2] * 4 + [0] * 4 + [2] * 12),
    "149-zero": ("zero", [2] * 4 + [1] * 4 + [2] * 8),
    "156-unshare": ("unshare", [2] * 4 + [1] * 4 + [2] * 8),
}


@pytest.mark.parametrize("writer", ["/file1", "/file2"])
@pytest.mark.parametrize(("operation", "sharers"), _ON_SHARED.values(), ids=_ON_SHARED)
def test_generic_on_a_shared_range(cloned, operation, sharers, writer):
    getattr(cloned, operation)(writer, 4 * PAGE, 4 * PAGE)
    assert cloned.sharers(writer) == sharers
    other = "/file2" if writer == "/file1" else "/file1"
    assert len(cloned.sharers(other)) == 16
    cloned.compare()
    cloned.fill(writer, 2 * PAGE, 8 * PAGE)


@pytest.mark.parametrize("size", [0, 1, 8 * PAGE - 17, 8 * PAGE, 8 * PAGE + 17])
def test_generic_148_truncate_of_a_shared_range(cloned, size):
    before = cloned.pfns("/file1")
    cloned.truncate("/file2", size)
    assert cloned.pfns("/file1") == before
    whole = size // PAGE
    assert cloned.pfns("/file2")[:whole] == before[:whole]
    assert cloned.sharers("/file1") == [2] * whole + [1] * (16 - whole)


@pytest.mark.parametrize("synced", [True, False])
def test_generic_178_punch_does_not_clobber_what_was_copied(cloned, synced):
    cloned.fill("/file2", 0, 8 * PAGE)
    if synced:
        cloned.fs.sync()
    cloned.punch("/file2", PAGE, 6 * PAGE)
    assert cloned.sharers("/file2") == [1, 0, 0, 0, 0, 0, 0, 1] + [2] * 8


@pytest.mark.parametrize(("first", "length"), [(PAGE + 1, 2 * PAGE - 2), (PAGE - 17, 34), (17, 34), (17, 3 * PAGE)])
@pytest.mark.parametrize("operation", [pytest.param("punch", id="179-punch"), pytest.param("zero", id="180-zero")])
def test_generic_unaligned_on_a_shared_range(cloned, operation, first, length):
    getattr(cloned, operation)("/file2", first, length)
    cut = [page for page in range(16) if page * PAGE < first + length and (page + 1) * PAGE > first]
    for page, sharers in enumerate(cloned.sharers("/file2")):
        assert sharers < 2 if page in cut else sharers == 2


_MIDWAY = {
    "253-truncate": lambda twin: twin.truncate("/file2", 7 * PAGE + 100),
    "254-punch": lambda twin: twin.punch("/file2", 6 * PAGE, 3 * PAGE),
    "259-zero": lambda twin: twin.zero("/file2", 6 * PAGE, 3 * PAGE),
    "261-collapse": lambda twin: twin.collapse("/file2", 6 * PAGE, 3 * PAGE),
    "262-insert": lambda twin: twin.insert("/file2", 6 * PAGE, 3 * PAGE),
    "264-allocate": lambda twin: twin.allocate("/file2", 6 * PAGE, 3 * PAGE),
    "264-allocate beyond the end": lambda twin: twin.allocate("/file2", 14 * PAGE, 8 * PAGE),
    "unshare": lambda twin: twin.unshare("/file2", 6 * PAGE, 3 * PAGE),
}


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("operation", _MIDWAY.values(), ids=_MIDWAY)
def test_generic_midway_through_copy_on_write(cloned, operation, synced):
    cloned.fill("/file2", 4 * PAGE, 8 * PAGE)
    if synced:
        cloned.remount()
    operation(cloned)
    cloned.compare()
    cloned.fill("/file2", 5 * PAGE + 17, 6 * PAGE)


def test_generic_458_zero_collapse_insert_and_truncate_in_a_row(twin):
    twin.fill("/foo", 0, 0x40000)
    twin.clone("/foo", "/bar")
    twin.zero("/foo", 0x169F, 0x387C)
    twin.collapse("/foo", 0x29000, 0xD000)
    twin.insert("/foo", 0, 0x8000)
    twin.truncate("/foo", 0x8000)
    assert twin.states("/foo") == ["hole"] * 8
    assert set(twin.sharers("/bar")) == {1}


@pytest.mark.parametrize("pages", [10, 200])
def test_generic_649_unshare_of_a_sparse_clone(twin, pages):
    twin.fill("/a", 0, pages * PAGE)
    twin.clone("/a", "/b")
    for page in range(0, pages, 2):
        twin.punch("/b", page * PAGE, PAGE)
    frames = twin.frames()
    twin.unshare("/b")
    assert twin.sharers("/b") == [0, 1] * (pages // 2)
    assert twin.frames() == frames + pages // 2


@pytest.mark.parametrize("cold", [True, False])
def test_generic_734_unshare_keeps_the_content(twin, cold):
    twin.fill("/file1", 0, 4 * PAGE)
    twin.clone("/file1", "/file2")
    twin.clone("/file1", "/file3")
    if cold:
        twin.remount()
    twin.unshare("/file2", 0, 4 * PAGE)
    twin.unshare("/file3", PAGE + 1, PAGE)
    assert twin.sharers("/file1") == [2, 1, 1, 2]
    assert twin.sharers("/file2") == [1] * 4
    twin.unshare("/file3")
    assert twin.frames() == 12


def test_unshare_of_what_is_not_shared_changes_nothing(twin):
    twin.fill("/file", 0, 4 * PAGE)
    twin.truncate("/file", 9 * PAGE)
    twin.allocate("/file", 5 * PAGE, PAGE)
    before = twin.fs.extents("/file")
    twin.unshare("/file")
    twin.unshare("/file", 100 * PAGE, PAGE)
    assert twin.fs.extents("/file") == before


# Numbers of bytes from which each operation would need something that is not there.
@pytest.mark.parametrize(
    ("operation", "offset", "length", "code"),
    [
        *((name, -PAGE, PAGE, errno.EINVAL) for name in FALLOC),
        *((name, 0, -PAGE, errno.EINVAL) for name in FALLOC),
        *((name, 0, 0, errno.EINVAL) for name in FALLOC),
        *((name, 1 << 62, PAGE, errno.EFBIG) for name in FALLOC),
        ("collapse", 17, PAGE, errno.EINVAL),
        ("collapse", 0, 17, errno.EINVAL),
        ("collapse", 0, 16 * PAGE, errno.EINVAL),
        ("collapse", 20 * PAGE, PAGE, errno.EINVAL),
        ("insert", 17, PAGE, errno.EINVAL),
        ("insert", 0, 17, errno.EINVAL),
        ("insert", 16 * PAGE, PAGE, errno.EINVAL),
        ("insert", 0, (1 << 62) - PAGE, errno.EFBIG),
        ("unshare", -PAGE, PAGE, errno.EINVAL),
        ("truncate", -1, None, errno.EINVAL),
        ("truncate", (1 << 62) + 1, None, errno.EFBIG),
        ("allocate", 0, 1 << 40, errno.ENOSPC),
        ("zero", 0, 1 << 40, errno.ENOSPC),
    ],
)
def test_impossible_ranges(cloned, operation, offset, length, code):
    before = cloned.used(), cloned.pfns("/file1"), cloned.pfns("/file2")
    arguments = (offset,) if length is None else (offset, length)
    with pytest.raises(OSError) as caught:
        getattr(cloned.fs, operation)("/file2", *arguments)
    assert caught.value.errno == code
    assert (cloned.used(), cloned.pfns("/file1"), cloned.pfns("/file2")) == before


@pytest.mark.parametrize("whence", ["data", "hole"])
def test_seek_finds_what_extents_show(twin, whence):
    """Over holes, unwritten runs (which are holes) and a ragged end, from every place in a page."""
    twin.create("/file")
    for page in (1, 2, 5, 9):
        twin.fill("/file", page * PAGE, PAGE)
    twin.allocate("/file", 6 * PAGE, 2 * PAGE)
    twin.fill("/file", 11 * PAGE, 17)
    size = len(twin.files["/file"])
    is_data = [state == "data" for state in twin.states("/file")]
    for offset in sorted({0, 1, size - 1, *(page * PAGE + d for page in range(1, 12) for d in (-1, 0, 1))}):
        pages = [n for n in range(offset // PAGE, 12) if is_data[n] == (whence == "data")]
        wanted = max(offset, pages[0] * PAGE) if pages else size if whence == "hole" else None
        if wanted is not None:
            assert twin.fs.seek("/file", offset, whence) == wanted
    for offset in (size, size + 1, -1):
        with pytest.raises(OSError) as caught:
            twin.fs.seek("/file", offset, whence)
        assert caught.value.errno == errno.ENXIO
