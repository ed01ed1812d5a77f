"""The large ones: a block with 2^20 references, 10^6 extents, 10^6 fragments, and what random rewriting leaves.

Each runs in a small size by default, and as large as its scenario asks for under the `slow` mark.
"""

import os
import random
import shutil

import pytest

import onecopy

PAGE = onecopy.PAGE
NODE_ENTRIES = 160  # extents that fit a leaf, about


def _sizes(small, large):
    return pytest.mark.parametrize("count", [small, pytest.param(large, marks=pytest.mark.slow)])


@pytest.fixture
def roomy(new_path, policy):
    """A maker of open pools of any size, skipped where memory is short; every one is checked at the end."""
    made = []

    def make(size):
        free = shutil.disk_usage("/dev/shm").free
        if onecopy.parse_size(size) > free:
            pytest.skip(f"needs up to {size} in /dev/shm, which has {onecopy.format_size(free)}")
        path = new_path()
        if policy == "dax":
            onecopy.format(path, size)
        else:  # the nodes that one transaction makes are to fit into half of the cache
            onecopy.format(path, size, device="cached", policy=policy, cache_size="256M")
        made.append(onecopy.open(path))
        return made[-1]

    yield make
    for fs in made:
        findings = fs.check().findings
        fs.close()
        assert findings == []
        assert onecopy.check(fs.path).findings == []


def _used(fs):
    fs.sync()
    return fs.info().used_pages


def _double(fs, path, pages, target):
    """Clone a file's content behind its own end until it has `target` pages."""
    while pages < target:
        fs.clone_range(path, 0, path, pages * PAGE, min(pages, target - pages) * PAGE)
        pages *= 2


@_sizes(1 << 14, 1 << 20)
def test_generic_175_one_block_with_as_many_references(roomy, count):
    fs = roomy("64M" if count < 1 << 20 else "1G")
    empty, block = _used(fs), os.urandom(PAGE)
    fs.write("/file", block)
    _double(fs, "/file", 1, count)
    assert fs.stat("/file").st_size == count * PAGE
    assert fs.du("/").total == PAGE
    assert _used(fs) - empty <= 2 * count // NODE_ENTRIES + 8
    last = fs.extents("/file")[-1]
    assert (last.file_page, last.pages, last.sharers) == (count - 1, 1, count)
    assert fs.check().counted["fragments"] == 1
    fs.write("/file", b"x" * PAGE, count // 2 * PAGE)
    assert fs.extents("/file")[0].sharers == count - 1
    fs.clone("/file", "/clone")
    assert fs.extents("/clone")[0].sharers == 2 * (count - 1)
    fs.truncate("/file", count // 4 * PAGE)
    for page in (0, count // 4 - 1):
        assert fs.read("/clone", page * PAGE, PAGE) == fs.read("/file", page * PAGE, PAGE) == block
    assert fs.extents("/clone")[0].sharers == count - 1 + count // 4
    fs.unlink("/clone")
    fs.unlink("/file")
    assert _used(fs) == empty


@_sizes(30_000, 1_000_000)
def test_generic_176_clone_of_a_file_of_as_many_extents(roomy, count):
    """The clone costs the same as one of a small file, and its first write a path of nodes, not all of them."""
    fs = roomy("64M" if count < 1_000_000 else "1G")
    empty = _used(fs)
    fs.write("/file", os.urandom(PAGE))
    fs.truncate("/file", 2 * PAGE)
    _double(fs, "/file", 2, 2 * count)
    one = _used(fs)
    fs.clone("/file", "/clone")
    fs.create_subvolume("/inner")
    fs.clone("/file", "/inner/clone")
    assert _used(fs) - one <= 12
    fs.write("/clone", b"x" * PAGE, count // 2 * 2 * PAGE)
    assert _used(fs) - one <= 24
    extents = fs.extents("/clone")
    data = [extent for extent in extents if extent.state == "data"]
    assert (len(data), len(extents)) == (count, 2 * count)
    assert {extent.sharers for extent in data} == {1, 3 * count - 1}
    assert fs.read("/clone", count // 2 * 2 * PAGE, 2 * PAGE) == b"x" * PAGE + bytes(PAGE)
    for path in ("/file", "/clone", "/inner/clone"):
        fs.unlink(path)
    fs.rmdir("/inner")
    assert _used(fs) == empty


@_sizes(12_000, 1_000_000)
def test_generic_447_deletion_of_as_many_reference_counts(roomy, count):
    """Three files share all pages, one of them every other page only: each page has another count than its neighbours."""
    fs = roomy(count * PAGE + (96 << 20))
    empty, piece = _used(fs), os.urandom(1 << 20)
    for offset in range(0, count * PAGE, len(piece)):
        fs.write("/file1", piece[: count * PAGE - offset], offset)
    for path in ("/file2", "/file3"):
        fs.create(path)
        fs.clone_range("/file1", 0, path, 0, 0)  # by its fragments, where a clone would share the root above them
    for page in range(0, count, 2):
        fs.punch("/file3", page * PAGE, PAGE)
    assert fs.check().counted["fragments"] == count
    assert [extent.sharers for extent in fs.extents("/file2")] == [2, 3] * (count // 2)
    fs.unlink("/file1")
    assert fs.check().counted["fragments"] == count // 2
    fs.unlink("/file3")
    assert [extent.sharers for extent in fs.extents("/file2")] == [1]
    assert fs.read("/file2", 0, len(piece)) == piece
    fs.unlink("/file2")
    assert _used(fs) == empty


@_sizes(3000, 100_000)
def test_a_clone_of_a_tree_of_as_many_files(roomy, count):
    """A snapshot takes the same few pages for any number of files; a copied tree takes inodes, but no content."""
    fs = roomy("64M" if count < 100_000 else "1G")
    fs.create_subvolume("/images")
    fs.write("/origin", os.urandom(4 * PAGE))
    for number in range(count):
        if number % 1000 == 0:
            fs.mkdir(f"/images/{number // 1000}")
        fs.clone("/origin", f"/images/{number // 1000}/{number}")
    before = _used(fs)
    fs.snapshot("/images", "/snap")
    assert _used(fs) - before <= 8
    fs.clone_tree("/images/0", "/copy")
    assert fs.du("/").total == 4 * PAGE
    assert fs.extents("/origin")[0].sharers == 1 + 2 * count + 1000
    fs.write("/snap/0/7", b"x")
    fs.delete_subvolume("/images")
    assert fs.read("/snap/0/7") == b"x" + fs.read("/origin", 1)
    assert fs.extents("/origin")[0].sharers == 1 + count - 1 + 1000 + 1 - 1
    fs.delete_subvolume("/snap")
    fs.rmtree("/copy")
    assert fs.extents("/origin")[0].sharers == 1


@pytest.mark.parametrize("synced", [False, True])
def test_generic_301_302_random_rewriting_leaves_few_extents(roomy, synced):
    """Fewer than two thirds of the blocks: single pages, rewritten in random order, come to lie beside each other."""
    fs, pages, dice = roomy("64M"), 512, random.Random(301)
    fs.write("/file1", bytes(pages * PAGE + 1))
    fs.clone("/file1", "/file2")
    for _ in range(8):
        for page in dice.choices(range(pages), k=pages):
            fs.write("/file2", b"c" * PAGE, page * PAGE)
        if synced:
            fs.sync()
    assert len(fs.extents("/file1")) < pages * 2 // 3
    assert len(fs.extents("/file2")) < pages * 2 // 3
