"""What clone and dedupe do to content, names and times (numbers: the xfstests scenarios)."""

import os

import pytest

import onecopy

pytestmark = pytest.mark.every_policy

PAGE = onecopy.PAGE
HIGH = 1 << 61  # as high as an offset gets is twice that


def test_generic_110_clone_of_a_clone_then_rewrite_each(twin):
    twin.fill("/original", 0, 9000)
    twin.clone("/original", "/copy1")
    twin.clone("/copy1", "/copy2")
    assert twin.pfns("/original") == twin.pfns("/copy1") == twin.pfns("/copy2")
    assert twin.sharers("/copy2") == [3, 3, 3]
    twin.fill("/original", 0, 9000)
    assert twin.sharers("/copy2") == [2, 2, 2]
    twin.fill("/copy1", 0, 9000)
    assert twin.sharers("/copy2") == [1, 1, 1]


def test_generic_111_clone_of_a_tree(twin):
    twin.fs.mkdir("/tree/deep/er", parents=True)
    for name in ("/tree/a", "/tree/deep/b", "/tree/deep/er/c"):
        twin.fill(name, 0, 9000)
    twin.fs.link("/tree/a", "/tree/deep/again")
    twin.fs.symlink("../a", "/tree/deep/link")
    twin.fs.clone_tree("/tree", "/copy")
    assert [(path, sorted(names)) for path, _, names in twin.fs.walk("/copy")] == [
        ("/copy", ["a"]),
        ("/copy/deep", ["again", "b", "link"]),
        ("/copy/deep/er", ["c"]),
    ]
    assert twin.fs.readlink("/copy/deep/link") == "../a"
    assert twin.fs.stat("/copy/a").st_ino == twin.fs.stat("/copy/deep/again").st_ino
    assert twin.frames("/copy") == twin.frames("/tree") == twin.frames() == 9
    for name in ("a", "deep/b", "deep/er/c"):
        twin.files[f"/copy/{name}"] = bytearray(twin.files[f"/tree/{name}"])
    twin.fill("/copy/deep/b", 0, PAGE)
    twin.unlink("/tree/deep/er/c")


def test_generic_115_moved_and_deleted_clones(twin):
    twin.fs.mkdir("/one")
    twin.fs.mkdir("/two")
    twin.fill("/one/original", 0, 9000)
    twin.clone("/one/original", "/one/copy1")
    twin.clone("/one/original", "/one/copy2")
    twin.rename("/one/copy1", "/two/moved1")
    twin.rename("/one/copy2", "/one/moved2")
    twin.unlink("/one/original")
    assert twin.sharers("/two/moved1") == [2, 2, 2]
    twin.unlink("/one/moved2")
    assert twin.sharers("/two/moved1") == [1, 1, 1]
    twin.rename("/two/moved1", "/one/original")
    assert twin.fs.listdir("/one") == ["original"]


def _pair(twin, data, other=None):
    """Two files of eight pages that begin with a hole of two."""
    twin.write("/file1", data, 2 * PAGE)
    twin.write("/file2", data if other is None else other, 2 * PAGE)


def test_generic_116_clone_range_between_equal_files(twin):
    _pair(twin, twin.blob(6 * PAGE))
    twin.clone_range("/file1", 4 * PAGE, "/file2", 4 * PAGE, 2 * PAGE)
    assert twin.sharers("/file1") == twin.sharers("/file2") == [0, 0, 1, 1, 2, 2, 1, 1]


def test_generic_118_clone_range_between_different_files(twin):
    _pair(twin, twin.blob(6 * PAGE), twin.blob(6 * PAGE))
    twin.clone_range("/file1", 4 * PAGE, "/file2", 4 * PAGE, 2 * PAGE)
    assert twin.sharers("/file1") == twin.sharers("/file2") == [0, 0, 1, 1, 2, 2, 1, 1]


def test_generic_119_clone_range_over_two_sets_of_files(twin):
    for n in (1, 2, 3, 4):
        twin.fill(f"/file{n}", 0, 8 * PAGE)
    twin.clone_range("/file1", 0, "/file2", 0, 4 * PAGE)
    twin.clone_range("/file3", 0, "/file4", 0, 4 * PAGE)
    twin.clone_range("/file1", 0, "/file3", 0, 2 * PAGE)
    twin.clone_range("/file1", 0, "/file4", 0, 2 * PAGE)
    for n in (1, 2, 3, 4):
        assert twin.sharers(f"/file{n}") == [4, 4, 2, 2, 1, 1, 1, 1]
    assert twin.frames() == 2 + 2 * 2 + 4 * 4


def test_generic_121_dedupe_range_between_equal_files(twin):
    _pair(twin, twin.blob(6 * PAGE))
    assert twin.fs.dedupe_range("/file1", 4 * PAGE, "/file2", 4 * PAGE, 2 * PAGE)
    assert twin.sharers("/file1") == twin.sharers("/file2") == [0, 0, 1, 1, 2, 2, 1, 1]
    assert twin.fs.dedupe_range("/file1", 0, "/file2", 0, 8 * PAGE)
    assert twin.sharers("/file2") == [0, 0, *[2] * 6]
    assert twin.frames() == 6


def test_generic_137_clones_and_dedupe_within_one_file(twin):
    """Pages A B B; A goes to every third, B to every fifth; page 2 is deduped with every seventh that has its bytes."""
    pages = 420
    a, b = twin.blob(PAGE), twin.blob(PAGE)
    twin.write("/file", a + b + b)
    twin.allocate("/file", pages // 2 * PAGE, pages // 2 * PAGE)
    for page in range(3, pages, 3):
        twin.clone_range("/file", 0, "/file", page * PAGE, PAGE)
    for page in range(5, pages, 5):
        twin.clone_range("/file", PAGE, "/file", page * PAGE, PAGE)
    for page in range(7, pages, 7):
        assert twin.fs.dedupe_range("/file", 2 * PAGE, "/file", page * PAGE, PAGE) == (page % 5 == 0)
    pfns = twin.pfns("/file")
    first, second, third = pfns[:3]
    for page in range(3, pages):
        if page % 5 == 0:
            assert pfns[page] == (third if page % 7 == 0 else second)
        elif page % 3 == 0:
            assert pfns[page] == first
    assert twin.frames() == 3 + twin.states("/file").count("unwritten")


@pytest.mark.parametrize("tail", [0, 1, PAGE - 1])
def test_generic_181_clone_range_of_length_zero_goes_to_the_end(twin, tail):
    twin.fill("/file1", 0, 16 * PAGE + tail)
    twin.fill("/file2", 0, 17 * PAGE + tail)
    twin.clone_range("/file1", PAGE, "/file2", 2 * PAGE, 0)
    assert twin.sharers("/file2")[:3] == [1, 1, 2]
    assert twin.pfns("/file2")[2:17] == twin.pfns("/file1")[1:16]


def test_generic_182_dedupe_range_of_length_zero_goes_to_the_end(twin):
    data = twin.blob(PAGE) * 2 + twin.blob(PAGE)
    twin.write("/file1", data[PAGE:])
    twin.write("/file2", data)
    assert not twin.fs.dedupe_range("/file1", 0, "/file2", 0, 0)
    assert twin.sharers("/file2") == [1, 1, 1]
    assert twin.fs.dedupe_range("/file1", 0, "/file2", PAGE, 0)
    assert twin.sharers("/file2") == [1, 2, 2]
    assert twin.fs.dedupe_range("/file1", 2 * PAGE, "/file2", 0, 0)


def test_generic_303_clones_at_high_offsets(twin):
    fs, end = twin.fs, 2 * HIGH
    fs.write("/single", b"a", end - 1)
    fs.create("/empty")
    fs.truncate("/empty", end)
    fs.clone("/single", "/single2")
    fs.clone("/empty", "/empty2")
    for path, byte in (("/single2", b"a"), ("/empty2", b"\0")):
        assert fs.stat(path).st_size == end
        assert fs.read(path, end - 1) == byte
    fs.create("/low")
    fs.clone_range("/single", end - PAGE, "/low", PAGE, PAGE)
    assert fs.read("/low") == bytes(2 * PAGE - 1) + b"a"
    fs.clone_range("/low", PAGE, "/empty", end - PAGE, PAGE)
    assert fs.read("/empty", end - PAGE) == bytes(PAGE - 1) + b"a"
    assert twin.sharers("/low") == [0, 4]
    assert fs.seek("/single", 0, "data") == end - PAGE


def test_generic_304_dedupe_at_high_offsets(twin):
    fs, end = twin.fs, 2 * HIGH
    data = twin.blob(PAGE)
    for path in ("/file1", "/file2"):
        fs.write(path, data, end - PAGE)
    fs.write("/low", data, PAGE)
    assert fs.dedupe_range("/file1", end - PAGE, "/file2", end - PAGE, PAGE)
    assert fs.dedupe_range("/file1", end - PAGE, "/low", PAGE, PAGE)
    assert not fs.dedupe_range("/file1", end - PAGE, "/low", 0, PAGE)
    assert twin.frames() == 1
    assert fs.read("/file2", end - PAGE) == data


def _times(twin, path):
    status = twin.fs.stat(path)
    return status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns


def test_generic_407_513_clone_range_sets_the_targets_times(twin):
    for path in ("/source", "/target"):
        twin.fill(path, 0, 4 * PAGE)
        twin.fs.utime(path, (1, 1))
    source, before = _times(twin, "/source"), _times(twin, "/target")
    twin.clone_range("/source", 0, "/target", 0, PAGE)
    after = _times(twin, "/target")
    assert after[0] == before[0] and after[1] > before[1] and after[2] > before[2]
    assert _times(twin, "/source") == source


def test_generic_408_dedupe_sets_no_times(twin):
    data = twin.blob(4 * PAGE)
    for path in ("/file1", "/file2"):
        twin.write(path, data)
        twin.fs.utime(path, (1, 1))
    before = _times(twin, "/file1"), _times(twin, "/file2")
    assert twin.fs.dedupe_range("/file1", 0, "/file2", 0, 4 * PAGE)
    assert twin.fs.dedupe(apply=True).applied
    assert (_times(twin, "/file1"), _times(twin, "/file2")) == before


@pytest.mark.parametrize("share", ["clone", "dedupe"])
def test_generic_373_374_across_handles_of_one_pool(twin, share):
    """What two mounts of one file system are there, two handles on one pool are here."""
    data = twin.blob(3 * PAGE)
    twin.write("/file1", data)
    with onecopy.open(twin.path) as other:
        if share == "clone":
            other.clone("/file1", "/file2")
        else:
            other.write("/file2", data)
            assert other.dedupe_range("/file1", 0, "/file2", 0, 3 * PAGE)
        twin.files["/file2"] = bytearray(data)
        assert twin.sharers("/file1") == [2, 2, 2]
        twin.fill("/file2", PAGE, PAGE)
        assert [e.sharers for e in other.extents("/file1")] == [2, 1, 2]
        assert other.read("/file2") == twin.files["/file2"]


def test_generic_373_clone_between_subvolumes(twin):
    twin.fill("/file1", 0, 3 * PAGE)
    twin.fs.create_subvolume("/inner")
    twin.clone("/file1", "/inner/file2")
    assert twin.pfns("/inner/file2") == twin.pfns("/file1")
    assert twin.fs.stat("/inner/file2").st_dev != twin.fs.stat("/file1").st_dev
    twin.create("/inner/file3")
    twin.clone_range("/file1", PAGE, "/inner/file3", 0, PAGE)
    assert twin.sharers("/file1") == [2, 3, 2]


_OVERLAPS = ["nothing", "source with a third", "target with a third", "each other", "each with its own third",
             "both with one third"]  # fmt: skip


@pytest.mark.parametrize("shared", _OVERLAPS)
@pytest.mark.parametrize("source", ["low", "high"])
def test_generic_544_clone_range_whatever_is_shared_and_whichever_inode_is_lower(twin, source, shared):
    for path in ("/low", "/high"):
        twin.fill(path, 0, 2 * PAGE)
    assert twin.fs.stat("/low").st_ino < twin.fs.stat("/high").st_ino
    source, target = (f"/{source}", "/high" if source == "low" else "/low")
    if shared in ("source with a third", "each with its own third", "both with one third"):
        twin.clone(source, "/third")
    if shared in ("target with a third", "each with its own third"):
        twin.clone(target, "/fourth")
    if shared == "both with one third":
        twin.clone_range(target, PAGE, "/third", PAGE, PAGE)
    if shared == "each other":
        twin.clone_range("/low", 0, "/high", 0, PAGE)
    twin.clone_range(source, PAGE, target, PAGE, PAGE)
    assert twin.pfns(source)[1] == twin.pfns(target)[1]


def _noise(twin, folder, files=12):
    """Files whose pages repeat, within and among them, at various places."""
    pages = [twin.blob(PAGE) for _ in range(4)] + [bytes(PAGE)]
    for n in range(files):
        twin.write(f"{folder}/{n}", b"".join(pages[(n * k) % 5] for k in range(1, 6 + n)) + twin.blob(n))


def test_generic_559_dedupe_keeps_the_content(twin):
    twin.fs.mkdir("/src")
    _noise(twin, "/src")
    frames, report = twin.frames(), twin.fs.dedupe()
    assert report.freed_bytes > 0 and not report.applied
    assert twin.frames() == frames
    applied = twin.fs.dedupe(apply=True)
    assert applied.freed_bytes == report.freed_bytes == (frames - twin.frames()) * PAGE
    assert twin.fs.dedupe(apply=True).freed_bytes == 0
    twin.compare()


def test_generic_560_copies_of_copies_deduped_again_and_again(twin):
    twin.fs.mkdir("/0")
    _noise(twin, "/0")
    for turn in range(1, 5):
        twin.fs.mkdir(f"/{turn}")
        for name in twin.fs.listdir(f"/{turn - 1}"):
            twin.write(f"/{turn}/{name}", bytes(twin.files[f"/{turn - 1}/{name}"]))
        twin.fill(f"/{turn}/0", 0, 100)
        twin.fs.dedupe([f"/{turn}", f"/{turn - 1}"], apply=True)
        twin.compare()
    twin.fs.dedupe(apply=True)
    distinct = {bytes(data[at : at + PAGE]).ljust(PAGE, b"\0") for data in twin.files.values()
                for at in range(0, len(data), PAGE)}  # fmt: skip
    assert twin.frames() == len(distinct)


def test_generic_513_a_clone_is_a_file_of_its_own(twin):
    """Content and permissions come along; link count, names and attributes written later do not."""
    twin.fill("/source", 0, 2 * PAGE)
    twin.fs.chmod("/source", 0o640)
    twin.fs.setxattr("/source", "user.kind", b"x" * 5000)
    twin.fs.link("/source", "/source2")
    twin.files["/source2"] = bytearray(twin.files["/source"])
    twin.clone("/source", "/target")
    status = twin.fs.stat("/target")
    assert (status.st_nlink, status.st_mode & 0o7777) == (1, 0o640)
    assert status.st_mtime_ns == twin.fs.stat("/source").st_mtime_ns
    twin.fs.setxattr("/target", "user.kind", b"y")
    assert twin.fs.getxattr("/source", "user.kind") == b"x" * 5000
    assert twin.fs.getxattr("/target", "user.kind") == b"y"


@pytest.mark.parametrize("size", [0, 1, 100, 168, 169])
def test_clone_of_content_that_lies_in_the_inode(twin, size):
    twin.create("/small")
    twin.fill("/small", 0, size)
    assert twin.frames() == (size > 168)
    twin.clone("/small", "/clone")
    twin.create("/range")
    twin.clone_range("/small", 0, "/range", 0, 0)
    twin.create("/clone2")
    twin.clone_range("/small", 0, "/clone2", PAGE, size)
    twin.fill("/clone", size // 2, size)


def test_listing_after_it_all(twin):
    """A clone appears under one name, in one directory, and nowhere else."""
    twin.fs.mkdir("/d")
    twin.fill("/a", 0, PAGE)
    for n in range(300):
        twin.clone("/a", f"/d/{n:03}")
    assert twin.fs.listdir("/d") == [f"{n:03}" for n in range(300)]
    assert twin.fs.listdir("/") == ["a", "d"]
    assert twin.sharers("/a") == [301]
    assert os.path.getsize(twin.path) == twin.fs.info().size
