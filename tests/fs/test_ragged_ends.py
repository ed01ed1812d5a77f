"""Files that do not end at a page boundary: sharing the last page, copying it on write, and the zeros behind the end."""

import resource
import signal

import pytest

import onecopy

PAGE = onecopy.PAGE
TAILS = [1, 17, 511, 512, PAGE - 1]


def _end_is_zeros(twin, path):
    """Growing a file must show zeros, whatever its last page had behind the end before."""
    twin.truncate(path, len(twin.files[path]) + 3 * PAGE)
    twin.compare()


@pytest.mark.parametrize("tail", TAILS)
def test_generic_134_clone_of_the_last_block(twin, tail):
    size = 4 * PAGE + tail
    twin.fill("/file1", 0, size)
    twin.fill("/file2", 0, size)
    twin.create("/file3")
    twin.clone_range("/file1", 4 * PAGE, "/file2", 4 * PAGE, tail)
    twin.clone_range("/file1", 4 * PAGE, "/file3", 0, tail)
    twin.create("/file4")
    twin.clone_range("/file1", 4 * PAGE, "/file4", PAGE, 0)
    assert twin.sharers("/file2") == [1, 1, 1, 1, 4]
    assert twin.sharers("/file4") == [0, 4]
    for path in ("/file1", "/file2", "/file3", "/file4"):
        _end_is_zeros(twin, path)


@pytest.mark.parametrize("tail", TAILS)
def test_generic_136_dedupe_of_the_last_block(twin, tail):
    data = twin.blob(4 * PAGE + tail)
    for path in ("/file1", "/file2"):
        twin.write(path, data)
    twin.write("/file3", data[: 4 * PAGE] + twin.blob(tail))
    assert twin.fs.dedupe_range("/file1", 0, "/file2", 0, len(data))
    assert not twin.fs.dedupe_range("/file1", 4 * PAGE, "/file3", 4 * PAGE, tail)
    assert twin.fs.dedupe_range("/file1", 0, "/file3", 0, 4 * PAGE)
    assert twin.sharers("/file1") == [3, 3, 3, 3, 2]
    _end_is_zeros(twin, "/file2")


def test_dedupe_never_looks_behind_the_end(twin):
    """Two last pages with equal bytes up to different ends are not equal ranges, and are not shared as such."""
    data = twin.blob(PAGE)
    twin.write("/short", data[:100])
    twin.write("/long", data[:200])
    with pytest.raises(OSError, match="ragged"):
        twin.fs.dedupe_range("/short", 0, "/long", 0, 100)


@pytest.mark.parametrize("writer", ["/file1", "/file2"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(PAGE + 17, 17), (PAGE, 17), (PAGE + 16, 2), (17, PAGE), (0, 2 * PAGE), (PAGE + 17, 3 * PAGE), (2 * PAGE + 1, 1)],
)
def test_generic_202_203_cow_across_the_ragged_end(twin, writer, offset, length):
    twin.fill("/file1", 0, PAGE + 17)
    twin.clone("/file1", "/file2")
    twin.fill(writer, offset, length)
    _end_is_zeros(twin, writer)


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("step", [PAGE, 3 * PAGE, 1000])
def test_generic_296_rewrite_of_a_clone_one_byte_longer_than_its_blocks(twin, step, synced):
    size = 32 * PAGE + 1
    twin.fill("/file1", 0, size)
    twin.clone("/file1", "/file2")
    if synced:
        twin.fs.sync()
    for offset in range(0, size, step):
        twin.fill("/file2", offset, min(step, size - offset))
    assert twin.sharers("/file1") == twin.sharers("/file2") == [1] * 33
    assert twin.frames() == 66


@pytest.mark.parametrize("old_size", [17, PAGE - 1, PAGE, PAGE + 17, 5 * PAGE])
@pytest.mark.parametrize("target_offset", [5 * PAGE, 64 * PAGE])
def test_generic_515_clone_beyond_the_end_leaves_zeros_between(twin, old_size, target_offset):
    """Also where the old last page is shared, and once held other bytes behind the end."""
    twin.fill("/donor", 0, 8 * PAGE)
    twin.clone("/donor", "/target")
    twin.truncate("/target", old_size)
    twin.clone("/target", "/target2")
    twin.fill("/source", 0, 3 * PAGE)
    twin.clone_range("/source", 0, "/target", target_offset, 0)
    assert twin.pfns("/target")[-3:] == twin.pfns("/source")


@pytest.mark.parametrize("size", [1, 17, PAGE, PAGE + 1, 3 * PAGE - 1])
@pytest.mark.parametrize("grow", ["truncate", "write", "allocate", "zero", "clone_range"])
def test_what_was_cut_off_a_clone_does_not_come_back(twin, size, grow):
    twin.fill("/file1", 0, 4 * PAGE)
    twin.clone("/file1", "/file2")
    twin.truncate("/file2", size)
    assert len(twin.pfns("/file2")) == -(-size // PAGE)
    if grow == "truncate":
        twin.truncate("/file2", 6 * PAGE)
    elif grow == "clone_range":
        twin.clone_range("/file1", 0, "/file2", 6 * PAGE, PAGE)
    elif grow == "write":
        twin.fill("/file2", 5 * PAGE + 5, 10)
    else:
        getattr(twin, grow)("/file2", 5 * PAGE, PAGE)
    assert twin.fs.read("/file2", size, PAGE) == bytes(PAGE)


def test_generic_514_a_limit_on_file_sizes_stops_a_store_cleanly(twin):
    """RLIMIT_FSIZE speaks of host files, hence of the pool: the store fails as in a full pool and changes nothing."""
    twin.fill("/file1", 0, 8 * PAGE)
    twin.clone("/file1", "/file2")
    before = twin.used(), twin.pfns("/file2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))
    try:
        with pytest.raises(onecopy.NoSpace):
            twin.fs.write("/file2", b"x" * PAGE, PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (twin.used(), twin.pfns("/file2")) == before
