"""What clone and dedupe must refuse, with which errno, and that a refusal changes nothing."""

import errno
import shutil

import pytest

import onecopy

PAGE = onecopy.PAGE
MAX_SIZE = 1 << 62


@pytest.fixture
def files(twin):
    """Two files of equal content with ragged ends, a directory, links."""
    data = twin.blob(8 * PAGE + 100)
    twin.write("/file1", data)
    twin.write("/file2", data)
    twin.fs.mkdir("/dir")
    twin.fs.symlink("nowhere", "/dangling")
    return twin


# (source, its offset, target, its offset, length) -> errno; "clone" and "dedupe" say who refuses it.
_BAD_RANGES = {
    "source offset within a page": (("/file1", 37, "/file2", 0, PAGE), errno.EINVAL),
    "target offset within a page": (("/file1", 0, "/file2", 59, PAGE), errno.EINVAL),
    "length within a page": (("/file1", 0, "/file2", 0, 23), errno.EINVAL),
    "negative source offset": (("/file1", -PAGE, "/file2", 0, PAGE), errno.EINVAL),
    "negative target offset": (("/file1", 0, "/file2", -PAGE, PAGE), errno.EINVAL),
    "negative length": (("/file1", 0, "/file2", 0, -PAGE), errno.EINVAL),
    "overlap in one file": (("/file1", 0, "/file1", PAGE, 2 * PAGE), errno.EINVAL),
    "overlap of a ragged end": (("/file1", 8 * PAGE, "/file1", 8 * PAGE, 100), errno.EINVAL),
    "onto itself": (("/file1", 0, "/file1", 0, PAGE), errno.EINVAL),
    "source past its end": (("/file1", 80 * PAGE, "/file2", 0, PAGE), errno.EINVAL),
    "source over its end": (("/file1", 4 * PAGE, "/file2", 0, 8 * PAGE), errno.EINVAL),
    "zero length past the end": (("/file1", 80 * PAGE, "/file2", 0, 0), errno.EINVAL),
    "ragged end into the middle": (("/file1", 8 * PAGE, "/file2", PAGE, 100), errno.EINVAL),
    "source is a directory": (("/dir", 0, "/file2", 0, PAGE), errno.EISDIR),
    "target is a directory": (("/file1", 0, "/dir", 0, PAGE), errno.EISDIR),
    "source is missing": (("/nothing", 0, "/file2", 0, PAGE), errno.ENOENT),
    "target is missing": (("/file1", 0, "/nothing", 0, PAGE), errno.ENOENT),
    "target is a dangling link": (("/file1", 0, "/dangling", 0, PAGE), errno.ENOENT),
    "a file taken for a directory": (("/file1/x", 0, "/file2", 0, PAGE), errno.ENOTDIR),
    "huge source offset and length": (("/file1", MAX_SIZE - PAGE, "/file2", 0, MAX_SIZE - PAGE), errno.EFBIG),
    "length beyond all files": (("/file1", 0, "/file2", 0, MAX_SIZE), errno.EINVAL),
    "target beyond all files": (("/file1", 0, "/file2", MAX_SIZE, PAGE), errno.EFBIG),
}
_BAD_DEDUPES = {
    "target over its end": (("/file1", 0, "/file2", 4 * PAGE, 8 * PAGE), errno.EINVAL),
    "ragged end that is not the target's": (("/file1", 8 * PAGE, "/file2", 7 * PAGE, 100), errno.EINVAL),
}


def _refused(twin, code, work, *arguments):
    """Call `work`; hold it to `code` and to having changed nothing."""
    before = twin.used(), twin.pfns("/file1"), twin.pfns("/file2"), twin.fs.info().generation
    with pytest.raises(OSError) as caught:
        work(*arguments)
    assert caught.value.errno == code
    assert (twin.used(), twin.pfns("/file1"), twin.pfns("/file2"), twin.fs.info().generation) == before


@pytest.mark.parametrize(("arguments", "code"), _BAD_RANGES.values(), ids=_BAD_RANGES)
def test_generic_157_bad_clones(files, arguments, code):
    _refused(files, code, files.fs.clone_range, *arguments)


@pytest.mark.parametrize(("arguments", "code"), (_BAD_RANGES | _BAD_DEDUPES).values(), ids=_BAD_RANGES | _BAD_DEDUPES)
def test_generic_158_bad_dedupes(files, arguments, code):
    _refused(files, code, files.fs.dedupe_range, *arguments)


@pytest.mark.parametrize(
    ("src", "dst", "code"),
    [
        ("/dir", "/new", errno.EISDIR),
        ("/nothing", "/new", errno.ENOENT),
        ("/dangling", "/new", errno.ENOENT),
        ("/file1", "/file2", errno.EEXIST),
        ("/file1", "/file1", errno.EEXIST),
        ("/file1", "/dir", errno.EEXIST),
        ("/file1", "/dangling", errno.EEXIST),
        ("/file1", "/nowhere/new", errno.ENOENT),
        ("/file1", "/file2/new", errno.ENOTDIR),
        ("/file1", "/new/", errno.ENOENT),
        ("/file1", "/", errno.EEXIST),
    ],
)
def test_generic_157_bad_whole_file_clones(files, src, dst, code):
    _refused(files, code, files.fs.clone, src, dst)
    assert files.fs.listdir("/") == ["dangling", "dir", "file1", "file2"]


def test_generic_303_clone_past_the_greatest_size(twin):
    twin.fill("/file1", 0, PAGE + 1)
    twin.fill("/file2", 0, PAGE)
    _refused(twin, errno.EFBIG, twin.fs.clone_range, "/file1", 0, "/file2", MAX_SIZE - PAGE, 0)
    _refused(twin, errno.EFBIG, twin.fs.clone_range, "/file1", 0, "/file2", MAX_SIZE - PAGE, PAGE + 1)


@pytest.mark.parametrize("differing", [0, PAGE - 1, PAGE, 3 * PAGE + 17, 7 * PAGE, 8 * PAGE + 99])
def test_generic_122_516_dedupe_of_unequal_ranges(files, differing):
    """One byte in one page differs: nothing is shared, not even the pages that are equal."""
    files.write("/file2", bytes([files.files["/file2"][differing] ^ 1]), differing)
    before = files.used(), files.pfns("/file2")
    assert not files.fs.dedupe_range("/file1", 0, "/file2", 0, 8 * PAGE + 100)
    assert (files.used(), files.pfns("/file2")) == before
    assert files.sharers("/file1") == [1] * 9


def test_generic_122_dedupe_of_bytes_with_a_hole(twin):
    """A hole is equal to zeros, and to nothing else."""
    twin.write("/zeros", bytes(2 * PAGE))
    twin.fill("/data", 0, 2 * PAGE)
    twin.create("/hole")
    twin.truncate("/hole", 2 * PAGE)
    assert not twin.fs.dedupe_range("/hole", 0, "/data", 0, 2 * PAGE)
    assert not twin.fs.dedupe_range("/data", 0, "/hole", 0, 2 * PAGE)
    assert twin.fs.dedupe_range("/hole", 0, "/zeros", 0, 2 * PAGE)
    assert twin.states("/zeros") == ["hole", "hole"]


@pytest.mark.parametrize("target_size", [9 * PAGE, 8 * PAGE + 101])
def test_generic_517_dedupe_of_a_ragged_end_with_the_middle(files, target_size):
    files.truncate("/file2", target_size)
    _refused(files, errno.EINVAL, files.fs.dedupe_range, "/file1", 8 * PAGE, "/file2", 8 * PAGE, 100)
    assert files.fs.dedupe_range("/file1", 0, "/file2", 0, 8 * PAGE)


@pytest.mark.parametrize("length", [0, 100, 2 * PAGE + 100])
def test_generic_518_clone_of_a_ragged_end_into_the_middle(files, length):
    """It would put bytes from beyond the source's end into the target."""
    files.fill("/file2", 0, 12 * PAGE)
    start = (8 * PAGE + 100 - length) // PAGE * PAGE if length else 4 * PAGE
    _refused(files, errno.EINVAL, files.fs.clone_range, "/file1", start, "/file2", 0, length)


def test_generic_744_a_copy_of_the_pool_is_a_pool_of_its_own(twin, new_path):
    """Both have one UUID. Neither sees what the other does."""
    twin.fill("/file1", 0, 3 * PAGE)
    twin.fs.sync()
    copy = new_path()
    shutil.copyfile(twin.path, copy)
    with onecopy.open(copy) as other:
        assert other.info().uuid == twin.fs.info().uuid
        other.clone("/file1", "/file2")
        other.write("/file1", b"other")
        assert not twin.fs.exists("/file2")
        twin.fill("/file1", PAGE, PAGE)
        assert other.read("/file1", 0, 5) == b"other"
        assert other.read("/file2", 5) == other.read("/file1", 5) != twin.fs.read("/file1", 5)
        assert other.check().findings == []
