"""Names and paths: too long, climbing out, odd bytes, links in circles; what a directory refuses."""

import errno
import inspect
import os
import sys

import pytest

import onecopy


def _deep(levels):
    return "/d" * levels


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "\udcff" * 255, " ", "..a", "-", "a\nb", "a\\b", "*"])
def test_names_that_are_fine(pool, name):
    pool.write(f"/{name}", b"x")
    pool.mkdir(f"/dir of {name}"[:100])
    assert name in pool.listdir("/")
    pool.rename(f"/{name}", "/moved")
    pool.rename("/moved", f"/{name}")
    pool.unlink(f"/{name}")


@pytest.mark.parametrize("name", ["n" * 256, "ü" * 128, "\udcff" * 256])
@pytest.mark.parametrize("call", ["create", "mkdir", "stat", "create_subvolume", "listdir", "read", "unlink", "rmdir"])
def test_names_that_are_too_long(pool, call, name, fails):
    assert fails(getattr(pool, call), f"/{name}") == errno.ENAMETOOLONG
    assert fails(getattr(pool, call), f"/{name}/x") == errno.ENAMETOOLONG


def test_a_target_name_that_is_too_long(pool, fails):
    pool.write("/file", b"x")
    pool.mkdir("/dir")
    for call in (pool.rename, pool.clone, pool.link):
        assert fails(call, "/file", f"/{'n' * 256}") == errno.ENAMETOOLONG
    assert fails(pool.clone_tree, "/dir", f"/{'n' * 256}") == errno.ENAMETOOLONG
    assert fails(pool.put, __file__, f"/{'n' * 256}") == errno.ENAMETOOLONG
    assert pool.listdir("/") == ["dir", "file"]


def test_paths_that_are_too_long(pool, fails):
    assert fails(pool.stat, "/" + "./" * 2048) == errno.ENAMETOOLONG
    assert fails(pool.mkdir, _deep(2049), parents=True) == errno.ENAMETOOLONG
    assert not pool.exists("/" + "./" * 2048)
    assert fails(pool.symlink, "t" * 4097, "/link") == errno.ENAMETOOLONG
    pool.symlink("/" + "t" * 4095, "/link")
    assert fails(pool.stat, "/link") == errno.ENAMETOOLONG
    assert fails(pool.write, "/link", b"x") == errno.ENAMETOOLONG


@pytest.fixture
def _little_recursion():
    """Leave Python a hundred frames."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("_little_recursion")
def test_deeper_than_recursion_goes(pool, tmp_path):
    """Walking, counting, copying and removing get by without recursion, as deep as a path may be."""
    levels = 300
    pool.mkdir(_deep(levels), parents=True)
    pool.write(f"{_deep(levels)}/file", b"at the bottom")
    assert len(list(pool.walk("/"))) == levels + 1
    assert pool.du("/").logical == 13
    pool.clone_tree("/d", "/e")
    assert pool.read(f"/e{_deep(levels - 1)}/file") == b"at the bottom"
    assert pool.dedupe().scanned_pages == 0
    pool.get("/e", tmp_path / "e")
    with open(f"{tmp_path}/e{_deep(levels - 1)}/file", "rb") as file:
        assert file.read() == b"at the bottom"
    pool.rmtree("/d")
    assert pool.listdir("/") == ["e"]


@pytest.mark.parametrize("path", ["/../../x", "/..", "/../dir/../x", "/dir/../../../x", "/dir/inner/../../../../x"])
def test_climbing_out_stays_at_the_top(pool, path, fails):
    """As everywhere: the parent of the top is the top."""
    pool.mkdir("/dir/inner", parents=True)
    if path.endswith("x"):
        pool.write(path, b"here")
        assert pool.read("/x") == b"here"
        assert pool.listdir("/") == ["dir", "x"]
    else:
        assert pool.listdir(path) == ["dir"]
        assert fails(pool.rmdir, path) == errno.EBUSY


def test_links_that_climb_out_stay_at_the_top(pool):
    pool.mkdir("/dir")
    pool.symlink("../../../../target", "/dir/link")
    pool.write("/dir/link", b"through the link")
    assert pool.read("/target") == b"through the link"
    pool.symlink("/../../dir", "/again")
    assert pool.listdir("/again") == ["link"]


def test_names_in_a_subvolume_do_not_end_there(pool):
    pool.create_subvolume("/sub")
    pool.write("/sub/../file", b"outside")
    pool.write("/sub/file", b"inside")
    assert pool.read("/file") == b"outside"


@pytest.mark.parametrize("path", ["", "file", "./file", "../file", "~"])
def test_paths_that_are_not_absolute(pool, path, fails):
    for call in (pool.stat, pool.create, pool.mkdir, pool.listdir):
        assert fails(call, path) == (errno.EINVAL if path else errno.ENOENT)


@pytest.mark.parametrize("call", ["stat", "create", "mkdir", "listdir"])
def test_a_zero_byte_in_a_path(pool, call, fails):
    assert fails(getattr(pool, call), "/a\0b") == errno.EINVAL
    assert fails(pool.symlink, "a\0b", "/link") == errno.EINVAL
    assert fails(pool.symlink, "", "/link") == errno.EINVAL


@pytest.mark.parametrize("path", [None, 5, ["/"], b"/bytes"])
def test_paths_that_are_no_text(pool, path):
    if isinstance(path, bytes):
        return
    with pytest.raises(TypeError):
        pool.stat(path)


@pytest.mark.parametrize("size", [1, 168, 169, 500, 4095])
def test_targets_of_links_of_any_length(pool, size, fails):
    """Those that don't fit the inode lie in pages."""
    target = ("/" + "t" * 200) * 40
    target = target[: size - 1] + "x"
    pool.symlink(target, "/link")
    assert pool.readlink("/link") == target
    assert pool.lstat("/link").st_size == size
    assert fails(pool.stat, "/link") == errno.ENOENT


def test_a_long_link_leads_where_it_says(pool):
    folder = "/" + "/".join("n" * 100 for _ in range(3))
    pool.mkdir(folder, parents=True)
    pool.write(f"{folder}/file", b"found")
    pool.symlink(folder, "/link")
    assert pool.read("/link/file") == b"found"


def test_links_in_circles(pool, fails):
    pool.symlink("/b", "/a")
    pool.symlink("/a", "/b")
    pool.symlink("self/x", "/self")
    for path in ("/a", "/self", "/a/x", "/self/y"):
        for call in (pool.stat, pool.read, pool.listdir, pool.create):
            assert fails(call, path) == errno.ELOOP
        assert not pool.exists(path)
    assert pool.lstat("/a").st_size == 2
    for path in ("/a", "/b", "/self"):
        pool.unlink(path)


@pytest.mark.parametrize("links", [40, 41])
def test_chains_of_links(pool, links, fails):
    pool.write("/0", b"end")
    for number in range(1, links + 1):
        pool.symlink(str(number - 1), f"/{number}")
    if links == 40:
        assert pool.read(f"/{links}") == b"end"
    else:
        assert fails(pool.read, f"/{links}") == errno.ELOOP


def test_what_a_directory_refuses(pool, fails):
    pool.mkdir("/dir/inner", parents=True)
    pool.write("/file", b"x")
    assert fails(pool.rmdir, "/dir") == errno.ENOTEMPTY
    assert fails(pool.unlink, "/dir") == errno.EISDIR
    assert fails(pool.rmdir, "/file") == errno.ENOTDIR
    assert fails(pool.mkdir, "/dir") == errno.EEXIST
    assert fails(pool.mkdir, "/file", exist_ok=True) == errno.EEXIST
    assert fails(pool.mkdir, "/file/x", parents=True) == errno.ENOTDIR
    assert fails(pool.mkdir, "/none/x") == errno.ENOENT
    assert fails(pool.rename, "/dir", "/dir/inner/x") == errno.EINVAL
    assert fails(pool.rename, "/dir", "/dir/inner") == errno.EINVAL
    assert fails(pool.rename, "/file", "/dir") == errno.EISDIR
    assert fails(pool.rename, "/dir/inner", "/file") == errno.ENOTDIR
    assert fails(pool.rename, "/dir/inner", "/dir") == errno.ENOTEMPTY
    assert fails(pool.create, "/file", exist_ok=False) == errno.EEXIST
    assert fails(pool.listdir, "/file") == errno.ENOTDIR
    assert fails(pool.stat, "/file/") == errno.ENOTDIR
    assert fails(pool.stat, "/file/..") == errno.ENOTDIR
    assert pool.listdir("/") == ["dir", "file"]


def test_a_tree_is_not_cloned_into_itself(pool, fails):
    pool.mkdir("/dir/inner", parents=True)
    pool.symlink("dir/inner", "/link")
    for target in ("/dir/copy", "/dir/inner/copy", "/link/copy", "/dir/inner/../copy"):
        assert fails(pool.clone_tree, "/dir", target) == errno.EINVAL
    assert fails(pool.clone_tree, "/", "/dir/copy") == errno.EINVAL
    pool.clone_tree("/dir", "/dir2")
    assert list(pool.walk("/dir2")) == [("/dir2", ["inner"], []), ("/dir2/inner", [], [])]


def test_a_snapshot_within_its_source_does_not_hold_itself(pool, fails):
    """As in Btrfs: the snapshot shows an empty directory where it would be within itself."""
    pool.create_subvolume("/sub")
    pool.write("/sub/file", b"x")
    pool.snapshot("/sub", "/sub/snap")
    assert pool.listdir("/sub/snap") == ["file"]
    pool.snapshot("/sub", "/again")
    assert pool.listdir("/again") == ["file", "snap"]
    assert pool.listdir("/again/snap") == []
    for call, arguments in ((pool.create, ()), (pool.mkdir, ()), (pool.write, (b"x",))):
        assert fails(call, "/again/snap/x", *arguments) == errno.EPERM
    assert fails(pool.delete_subvolume, "/sub") == errno.EBUSY
    assert sum(1 for _ in pool.walk("/")) == 5
    pool.rmtree("/again")
    pool.rmtree("/sub")
    assert pool.listdir("/") == []


def test_names_are_bytes_to_the_pool(pool, tmp_path):
    """What is no UTF-8 comes back as it was, also over the host."""
    (tmp_path / "in").mkdir()
    for name in (b"\xff\xfe", "ü".encode(), "u\u0308".encode()):
        with open(os.path.join(os.fsencode(tmp_path / "in"), name), "wb") as file:
            file.write(name)
    pool.put(tmp_path / "in", "/in")
    pool.get("/in", tmp_path / "out")
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == sorted(os.listdir(os.fsencode(tmp_path / "in")))
    assert pool.read("/in/\udcff\udcfe") == b"\xff\xfe"
    assert onecopy.check(pool.path) is not None
