"""A pool that runs full in the middle of any operation: ENOSPC, nothing changed, all space given back, and room after deleting.

`tests/fs/test_full_pool.py` has the scenarios of copy on write; this is every operation, at every amount of room.
"""

import os

import pytest

import onecopy

PAGE = onecopy.PAGE
KEPT = 48  # pages that the smallest pools keep for deletions
NODES = 3  # tree nodes on the path to an inode, here


def _dump(fs):
    """Return everything that the names lead to, with status, attributes and bytes."""
    found = {}
    for folder, folders, files in fs.walk("/"):
        for name in folders + files:
            path = f"{folder.rstrip('/')}/{name}"
            status = fs.lstat(path)
            kept = [status.st_mode, status.st_nlink, status.st_size, status.st_blocks, status.st_mtime_ns]
            attributes = {} if name in folders else {key: fs.getxattr(path, key) for key in fs.listxattr(path)}
            found[path] = kept, attributes, fs.read(path) if status.st_mode & 0o170000 == 0o100000 else None
    return found


@pytest.fixture
def crowded(new_path):
    """A pool of 2 MiB with some of everything, for `_fill` to fill up."""
    path = new_path()
    onecopy.format(path, "2M")
    fs = onecopy.open(path)
    fs.mkdir("/dir/inner", parents=True)
    fs.write("/file", os.urandom(40 * PAGE))
    fs.clone("/file", "/clone")
    fs.write("/pieces", os.urandom(40 * PAGE))
    for page in range(0, 40, 2):
        fs.punch("/pieces", page * PAGE, PAGE)
    fs.clone("/pieces", "/pieces2")
    for number in range(30):
        fs.write(f"/dir/{number}", os.urandom(100))
    fs.write("/equal", fs.read("/file"))
    fs.create_subvolume("/sub")
    fs.write("/sub/file", os.urandom(5 * PAGE))
    fs.snapshot("/sub", "/snap")
    fs.create("/filler")
    fs.sync()
    yield fs
    assert fs.check().findings == []
    fs.close()
    assert onecopy.check(path).findings == []


def _fill(fs, room):
    """Make /filler so large that `room` pages are left, besides those kept and the nodes of a last write."""
    fs.sync()
    size = 0
    for pages in (64, 8, 1):
        while fs.info().free_pages - KEPT - NODES - room >= pages:
            fs.write("/filler", bytes(pages * PAGE), size)
            fs.sync()
            size += pages * PAGE


@pytest.fixture
def tree(tmp_path):
    """A host tree that takes more room than there is."""
    top = tmp_path / "tree"
    (top / "inner").mkdir(parents=True)
    for number in range(6):
        (top / "inner" / str(number)).write_bytes(os.urandom(40 * PAGE))
    return top


# Every operation that may need room, and more than there is.
_OPERATIONS = {
    "write into a clone": lambda fs: fs.write("/clone", b"x" * 30 * PAGE, 100),
    "write into pieces": lambda fs: fs.write("/pieces2", b"x" * 40 * PAGE),
    "write a new file": lambda fs: fs.write("/new", b"x" * 60 * PAGE),
    "write an inline file larger": lambda fs: fs.write("/dir/7", b"x" * 60 * PAGE, 50),
    "allocate": lambda fs: fs.allocate("/pieces", 0, 90 * PAGE),
    "zero": lambda fs: fs.zero("/clone", 100, 35 * PAGE),
    "unshare": lambda fs: fs.unshare("/clone"),
    "unshare pieces": lambda fs: fs.unshare("/pieces2"),
    "insert": lambda fs: fs.insert("/pieces2", PAGE, PAGE),
    "collapse": lambda fs: fs.collapse("/pieces2", PAGE, PAGE),
    "punch": lambda fs: fs.punch("/pieces2", 5 * PAGE, PAGE),
    "truncate": lambda fs: fs.truncate("/pieces2", 7 * PAGE + 5),
    "clone": lambda fs: fs.clone("/pieces", "/new"),
    "clone_range": lambda fs: fs.clone_range("/pieces", 0, "/clone", 0, 40 * PAGE),
    "clone_tree": lambda fs: fs.clone_tree("/dir", "/new"),
    "dedupe_range": lambda fs: fs.dedupe_range("/file", 0, "/equal", 0, 40 * PAGE),
    "snapshot": lambda fs: fs.snapshot("/sub", "/new"),
    "write into a snapshot": lambda fs: fs.write("/snap/file", b"x" * 5 * PAGE),
    "create_subvolume": lambda fs: fs.create_subvolume("/new"),
    "mkdir": lambda fs: fs.mkdir("/a/b/c/d", parents=True),
    "create": lambda fs: fs.create("/dir/new"),
    "rename": lambda fs: fs.rename("/dir/7", "/dir/inner/7"),
    "link": lambda fs: fs.link("/file", "/" + "n" * 255),
    "symlink": lambda fs: fs.symlink("/" + "t" * 4000, "/new"),
    "setxattr": lambda fs: fs.setxattr("/file", "user.big", b"x" * 60_000),
    "chmod": lambda fs: fs.chmod("/snap/file", 0o600),
}


@pytest.mark.parametrize("room", [0, 4, 20])
@pytest.mark.parametrize("operation", _OPERATIONS.values(), ids=_OPERATIONS)
def test_all_of_it_or_nothing(crowded, operation, room):
    """With so many pages to take: it works, or ENOSPC leaves every name, byte, time and page as it was."""
    _fill(crowded, room)
    before, info = _dump(crowded), crowded.info()
    assert KEPT + room <= info.free_pages <= KEPT + NODES + room
    try:
        operation(crowded)
    except onecopy.NoSpace:
        after = crowded.info()
        assert _dump(crowded) == before
        assert after.free_pages + after.waiting_pages == info.free_pages + info.waiting_pages
        assert crowded.check().findings == []
        crowded.unlink("/filler")
        operation(crowded)


@pytest.mark.parametrize("operation", _OPERATIONS.values(), ids=_OPERATIONS)
def test_space_ends_at_every_single_frame(crowded, operation):
    """The first frame is refused, then the second, and so on until the operation gets all that it takes."""
    frames = crowded._mount.frames
    before, info = _dump(crowded), crowded.info()
    for granted in range(1000):
        left = [granted]

        def limited(take, left=left):
            def run(*arguments, **options):
                if not left[0]:
                    raise onecopy.NoSpace("no frame more")
                left[0] -= 1
                return take(*arguments, **options)

            return run

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frames, "take_node", limited(frames.take_node))
            patch.setattr(frames, "take_data", limited(frames.take_data))
            try:
                operation(crowded)
                break
            except onecopy.NoSpace:
                pass
        if granted % 5 == 0:
            assert _dump(crowded) == before
            assert crowded.check().findings == []
        after = crowded.info()
        assert after.free_pages + after.waiting_pages == info.free_pages + info.waiting_pages
    assert granted > 1


def test_operations_of_the_test_above_do_run_full(crowded):
    """Else it would show nothing: without any room, all that takes data frames must fail."""
    _fill(crowded, 0)
    names = ("write", "allocate", "zero", "unshare", "setxattr")
    failed = 0
    for name, operation in _OPERATIONS.items():
        if name.startswith(names):
            with pytest.raises(onecopy.NoSpace):
                operation(crowded)
            failed += 1
    assert failed > 8


@pytest.mark.parametrize("room", [10, 60, 200])
def test_put_of_a_tree_that_does_not_fit(crowded, tree, room):
    for number in range(30):
        crowded.unlink(f"/dir/{number}")
    crowded.unlink("/equal")
    _fill(crowded, room)
    before, info = _dump(crowded), crowded.info()
    assert sum(1 for _ in (tree / "inner").iterdir()) * 40 > info.free_pages - KEPT
    with pytest.raises(onecopy.NoSpace):
        crowded.put(tree, "/tree")
    assert {path: found[1:] for path, found in _dump(crowded).items()} == {path: found[1:] for path, found in before.items()}
    crowded.sync()
    assert crowded.info().free_pages == info.free_pages


def test_dedupe_makes_room_in_a_full_pool(crowded):
    _fill(crowded, 0)
    before = crowded.du("/").total
    report = crowded.dedupe(["/file", "/equal"], apply=True)
    assert report.freed_bytes == 40 * PAGE == before - crowded.du("/").total
    crowded.write("/new", b"x" * 30 * PAGE)


def test_a_full_pool_can_be_synced_closed_and_opened(crowded):
    _fill(crowded, 0)
    with pytest.raises(onecopy.NoSpace):
        while True:
            crowded.write("/last", bytes(PAGE), crowded.stat("/last").st_size if crowded.exists("/last") else 0)
    crowded.sync()
    before = _dump(crowded)
    with onecopy.open(crowded.path) as other:
        assert _dump(other) == before
        other.unlink("/equal")
    crowded.write("/last", bytes(10 * PAGE))


@pytest.mark.policies("dax", reason="the limit would be one for the cache's files")
def test_limits_of_the_host_are_limits_of_the_pool(in_child, new_path):
    """The host's file system gives no more: the pool says ENOSPC, not SIGBUS, and goes on when there is room again."""
    import resource
    import signal

    path = new_path()
    onecopy.format(path, "64M")

    def use():
        with onecopy.open(path) as fs:
            fs.write("/file", b"x" * 100 * PAGE)
            fs.clone("/file", "/clone")
            before = _dump(fs)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200 * PAGE, hard))
            try:
                fs.write("/clone", b"y" * 500 * PAGE)
            except onecopy.NoSpace:
                assert _dump(fs) == before
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                fs.write("/clone", b"y" * 500 * PAGE)
                return [finding.code for finding in fs.check().findings]
        return "there was no limit"

    assert in_child(use) == []
