"""put and get: special files, sources that hold their destination, targets in the way; nothing half done is left."""

import errno
import os
import socket
import stat

import pytest

import onecopy

PAGE = onecopy.PAGE


@pytest.fixture
def tree(tmp_path):
    """A host tree of files, folders, links and a sparse file."""
    top = tmp_path / "tree"
    (top / "a" / "b").mkdir(parents=True)
    for number in range(5):
        (top / "a" / f"{number}").write_bytes(os.urandom(3 * PAGE + number))
    (top / "a" / "b" / "small").write_bytes(b"small")
    os.link(top / "a" / "0", top / "hard")
    os.symlink("a/0", top / "soft")
    os.symlink("/nowhere/at/all", top / "dangling")
    with open(top / "sparse", "wb") as file:
        file.truncate(100 * PAGE)
        file.seek(50 * PAGE)
        file.write(b"island")
    return top


def _special(path, kind):
    """Make something that is neither file, directory nor link."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif os.geteuid():
        pytest.skip("making a device takes privileges")
    else:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_special_files(pool, tmp_path, kind):
    _special(tmp_path / "special", kind)
    generation = pool.info().generation
    with pytest.raises(onecopy.SpecialFile) as caught:
        pool.put(tmp_path / "special", "/special")
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == str(tmp_path / "special")
    assert pool.info().generation == generation


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_special_files_in_a_tree(pool, tree, kind):
    """Noticed before anything is copied."""
    _special(tree / "a" / "b" / "zzz", kind)
    generation = pool.info().generation
    with pytest.raises(onecopy.SpecialFile):
        pool.put(tree, "/tree")
    assert pool.info().generation == generation


def test_a_pool_is_not_put_into_itself(pool, fails):
    free = pool.info().free_pages
    assert fails(pool.put, pool.path, "/pool") == errno.EINVAL
    assert pool.listdir("/") == []
    assert pool.info().free_pages == free


@pytest.mark.parametrize("how", ["within", "by a link", "by its other name"])
def test_a_tree_that_holds_the_pool(tmp_path, how, fails):
    top = tmp_path / "top"
    (top / "below").mkdir(parents=True)
    path = top / "below" / "pool"
    onecopy.format(path if how == "within" else tmp_path / "pool", "4M")
    if how == "by a link":
        os.symlink(tmp_path / "pool", path)
    elif how == "by its other name":
        os.link(tmp_path / "pool", path)
    where = path if how == "within" else tmp_path / "pool"
    with onecopy.open(where) as fs:
        (top / "file").write_bytes(b"x" * PAGE)
        if how == "by a link":  # links stay links: nothing of the pool is copied
            fs.put(top, "/top")
            assert fs.readlink("/top/below/pool") == str(where)
        else:
            assert fails(fs.put, top, "/top") == errno.EINVAL
            assert fs.listdir("/") == []
        assert fs.check().findings == []
    onecopy.remove(where)


def test_a_pool_is_not_written_out_over_itself(pool, tmp_path, fails):
    pool.write("/file", b"x")
    assert fails(pool.get, "/file", pool.path) == errno.EINVAL
    os.symlink(pool.path, tmp_path / "link")
    assert fails(pool.get, "/file", tmp_path / "link") == errno.EINVAL
    assert pool.read("/file") == b"x"


@pytest.mark.parametrize(
    ("src", "dst", "code"),
    [
        ("none", "/new", errno.ENOENT),
        ("tree/a/0", "/none/new", errno.ENOENT),
        ("tree/a/0", "/file/new", errno.ENOTDIR),
        ("tree/a/0", "/dir", errno.EISDIR),
        ("tree/a/0", "/", errno.EISDIR),
        ("tree/a/0", "/new/", errno.EISDIR),
        ("tree/a/0", "new", errno.EINVAL),
        ("tree/a/0", "", errno.ENOENT),
        ("tree/dangling", "/new", errno.ENOENT),
        ("tree", "/dir", errno.EEXIST),
        ("tree", "/file", errno.EEXIST),
        ("tree", "/none/new", errno.ENOENT),
        ("tree", "/", errno.EEXIST),
    ],
)
def test_put_that_can_not_be(pool, tree, src, dst, code, fails):
    pool.mkdir("/dir")
    pool.write("/file", b"old")
    generation = pool.info().generation
    assert fails(pool.put, tree.parent / src, dst) == code
    assert pool.info().generation == generation
    assert pool.read("/file") == b"old"


@pytest.mark.parametrize(
    ("src", "dst", "code"),
    [
        ("/none", "new", errno.ENOENT),
        ("/file", "none/new", errno.ENOENT),
        ("/file", "here", errno.EISDIR),
        ("/dir", "here", errno.EEXIST),
        ("/dir", "file", errno.EEXIST),
        ("/dir", "none/new", errno.ENOENT),
        ("/dir", "file/new", errno.ENOTDIR),
    ],
)
def test_get_that_can_not_be(pool, tmp_path, src, dst, code, fails):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    pool.mkdir("/dir")
    pool.write("/dir/inner", b"x")
    pool.write("/file", b"new")
    assert fails(pool.get, src, tmp_path / dst) == code
    assert sorted(os.listdir(tmp_path)) == ["file", "here"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_file_in_the_way_is_replaced_whole(pool, tree, tmp_path):
    pool.write("/file", b"old" * PAGE)
    pool.put(tree / "a" / "0", "/file")
    assert pool.read("/file") == (tree / "a" / "0").read_bytes()
    (tmp_path / "out").write_bytes(b"older" * PAGE)
    pool.get("/file", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tree / "a" / "0").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out", "tree"]


def test_a_tree_comes_back_as_it_was(pool, tree, tmp_path):
    os.utime(tree / "a" / "1", ns=(1, 2))
    os.chmod(tree / "a" / "2", 0o4711)
    os.chmod(tree / "a", 0o555)
    pool.put(tree, "/tree")
    assert pool.stat("/tree/hard").st_nlink == 2
    assert sum(e.pages for e in pool.extents("/tree/sparse") if e.state == "data") == 1
    pool.get("/tree", tmp_path / "out")
    for folder, _, files in os.walk(tree):
        there = os.path.join(tmp_path / "out", os.path.relpath(folder, tree))
        assert os.stat(folder).st_mode == os.stat(there).st_mode
        for name in files:
            one, two = os.path.join(folder, name), os.path.join(there, name)
            first, second = os.lstat(one), os.lstat(two)
            assert (first.st_mode, first.st_size, first.st_mtime_ns * (not os.path.islink(one))) == (
                second.st_mode, second.st_size, second.st_mtime_ns * (not os.path.islink(two)))  # fmt: skip
            if os.path.islink(one):
                assert os.readlink(one) == os.readlink(two)
            else:
                with open(one, "rb") as left, open(two, "rb") as right:
                    assert left.read() == right.read()
    assert os.stat(tmp_path / "out" / "sparse").st_blocks * 512 < 10 * PAGE
    os.chmod(tree / "a", 0o755)
    os.chmod(tmp_path / "out" / "a", 0o755)


def test_times_before_1970(pool, tmp_path):
    """The pool's times begin there; the host's don't."""
    path = tmp_path / "old"
    path.write_bytes(b"x")
    os.utime(path, ns=(-(10**18), -(10**18)))
    pool.put(path, "/old")
    assert pool.stat("/old").st_mtime_ns == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_can_not_be_read(pool, tree, fails):
    os.chmod(tree / "a" / "3", 0)
    assert fails(pool.put, tree, "/tree") == errno.EACCES
    assert pool.listdir("/") == []


def test_names_that_no_host_takes_do_not_leave_the_target(pool, tmp_path, media, in_child, new_path, fails):
    """A damaged pool whose directory names '../../x' with the right hash: `get` writes nothing outside."""
    import hashlib

    from onecopy.fs.format import DIRENT, NODE

    name = b"../../escaped"
    entry = media.value("directory", lambda e: e["name"][:5] == b"file\0")
    head = media.head(entry.pfn)
    assert media.get(head, "count") == 1
    media.put(entry, "name", name)
    media.put(entry, "length", len(name))
    key = head.at + NODE.size
    digest = hashlib.blake2b(name, digest_size=7).digest()
    media.data[key : key + 8] = b"\0" + digest
    media.mend(entry)
    assert entry.record is DIRENT
    path = new_path()
    media.write(path)
    (tmp_path / "in").mkdir()

    def use():
        with onecopy.open(path) as fs:
            return [fails(fs.get, "/sub", tmp_path / "in" / "out"), fails(fs.get, "/", tmp_path / "in" / "all")]

    assert in_child(use) == [errno.EUCLEAN] * 2
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == []
