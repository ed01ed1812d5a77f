"""What sharing costs and what gives space back, counted; what extents and du tell about it."""

import pytest

import onecopy

PAGE = onecopy.PAGE
PAGES = 1000
NODES = 24  # tree nodes that a handful of files of at most seven extents may add
COPIES = ["/file2", "/file3", "/file4"]


@pytest.fixture
def counted(twin):
    """A file of 1,000 pages; `twin.empty` and `twin.one` are the pages used before and after."""
    twin.empty = twin.used()
    twin.fill("/file1", 0, PAGES * PAGE)
    twin.one = twin.used()
    assert 0 <= twin.one - twin.empty - PAGES <= NODES
    return twin


@pytest.fixture
def copied(counted):
    """... and three clones of it, which cost about nothing."""
    for path in COPIES:
        counted.clone("/file1", path)
    assert counted.used() - counted.one <= NODES
    assert counted.frames() == PAGES
    return counted


def _costs(twin, pages):
    """Hold the pool to `pages` pages of content, exactly, and few of trees."""
    assert twin.frames() == pages
    assert 0 <= twin.used() - twin.empty - pages <= NODES


def test_generic_150_clones_cost_nothing(copied):
    _costs(copied, PAGES)
    usage = copied.fs.du("/")
    assert (usage.logical, usage.unique, usage.shared, usage.files) == (4 * PAGES * PAGE, PAGES * PAGE, 0, 4)
    one = copied.fs.du("/file2")
    assert (one.logical, one.unique, one.shared, one.files) == (PAGES * PAGE, 0, PAGES * PAGE, 1)


def test_generic_151_deleting_the_clones_gives_nothing_until_the_last(copied):
    for path in ["/file1", *COPIES[:2]]:
        copied.unlink(path)
        _costs(copied, PAGES)
    copied.unlink("/file4")
    _costs(copied, 0)
    assert copied.used() == copied.empty


def test_generic_152_punching_all_copies_gives_the_blocks_back(copied):
    half = PAGES // 2 * PAGE
    copied.punch("/file2", 0, PAGES * PAGE)
    copied.punch("/file3", 0, half)
    copied.punch("/file4", half, half)
    _costs(copied, PAGES)
    copied.punch("/file3", half, half)
    copied.punch("/file4", 0, half)
    _costs(copied, PAGES)
    copied.punch("/file1", 0, half)
    _costs(copied, PAGES // 2)
    copied.punch("/file1", half, half)
    _costs(copied, 0)


def test_generic_153_collapsing_all_copies_gives_the_blocks_back(copied):
    half = PAGES // 2 * PAGE
    copied.collapse("/file2", 0, (PAGES - 1) * PAGE)
    copied.collapse("/file3", 0, half)
    copied.collapse("/file4", half, half - PAGE)
    _costs(copied, PAGES)
    copied.collapse("/file3", 0, half - PAGE)
    copied.collapse("/file4", 0, half)
    copied.collapse("/file1", 0, (PAGES - 1) * PAGE)
    _costs(copied, 1)
    assert copied.sharers("/file1") == [4]


def test_generic_154_rewriting_the_copies_costs_all_of_them(copied):
    half = PAGES // 2 * PAGE
    copied.fill("/file2", 0, PAGES * PAGE)
    copied.fill("/file3", 0, half)
    copied.fill("/file4", half, half)
    _costs(copied, 3 * PAGES)
    copied.fill("/file3", half, half)
    copied.fill("/file4", 0, half)
    _costs(copied, 4 * PAGES)
    copied.fill("/file1", 0, PAGES * PAGE)
    _costs(copied, 4 * PAGES)


def test_generic_155_zeroing_the_copies_costs_all_of_them(copied):
    half = PAGES // 2 * PAGE
    copied.zero("/file2", 0, PAGES * PAGE)
    copied.fill("/file3", 0, half)
    copied.zero("/file4", half, half)
    _costs(copied, 3 * PAGES)
    copied.fill("/file2", 0, PAGES * PAGE)
    copied.fill("/file3", 0, PAGES * PAGE)
    copied.zero("/file4", 0, PAGES * PAGE)
    _costs(copied, 4 * PAGES)
    copied.fill("/file1", 0, PAGES * PAGE)
    _costs(copied, 4 * PAGES)


def test_generic_156_unsharing_the_copies_costs_all_of_them(copied):
    half = PAGES // 2 * PAGE
    copied.unshare("/file2")
    copied.unshare("/file3", 0, half)
    copied.unshare("/file4", half, half)
    _costs(copied, 3 * PAGES)
    copied.unshare("/file3")
    copied.unshare("/file4")
    _costs(copied, 4 * PAGES)
    copied.unshare("/file1")
    _costs(copied, 4 * PAGES)


def test_generic_148_truncating_the_copies_gives_the_blocks_back(copied):
    copied.truncate("/file1", PAGE)
    for path in COPIES:
        _costs(copied, PAGES)
        copied.truncate(path, PAGE)
    _costs(copied, 1)


@pytest.mark.parametrize("synced", [True, False])
def test_what_a_clone_costs_page_by_page(counted, synced):
    """Each rewritten page costs itself; the path to it is copied once for a page of extents, not once for each."""
    counted.clone("/file1", "/file2")
    counted.used()
    for n in range(1, 51):
        counted.fill("/file2", 20 * n * PAGE - PAGE, PAGE)
        if synced:
            counted.fs.sync()
        assert counted.frames() == PAGES + n
    _costs(counted, PAGES + 50)


# -------------------------------------------------------------- what is seen


def test_generic_352_every_page_of_a_file_is_the_same_block(twin):
    pages = 2048
    twin.fill("/file", 0, PAGE)
    done = 1
    while done < pages:
        twin.clone_range("/file", 0, "/file", done * PAGE, done * PAGE)
        done *= 2
    assert twin.sharers("/file") == [pages] * pages
    assert twin.frames() == 1
    twin.fill("/file", 0, PAGE)
    assert twin.sharers("/file") == [1] + [pages - 1] * (pages - 1)


@pytest.mark.parametrize("synced", [True, False])
def test_generic_353_sharers_are_right_before_and_after_a_sync(twin, synced):
    twin.fill("/file1", 0, 16 * PAGE)
    if synced:
        twin.fs.sync()
    twin.clone("/file1", "/file2")
    if synced:
        twin.fs.sync()
    assert [(e.pages, e.sharers) for e in twin.fs.extents("/file1")] == [(16, 2)]
    assert twin.fs.extents("/file1") == twin.fs.extents("/file2")


def test_generic_372_extents_of_crossed_ranges(twin):
    twin.fill("/file1", 0, 5 * PAGE)
    twin.create("/file2")
    twin.clone_range("/file1", PAGE, "/file2", 3 * PAGE, PAGE)
    twin.clone_range("/file1", 3 * PAGE, "/file2", PAGE, PAGE)
    assert [(e.file_page, e.pages, e.sharers, e.state) for e in twin.fs.extents("/file2")] == [
        (0, 1, 0, "hole"),
        (1, 1, 2, "data"),
        (2, 1, 0, "hole"),
        (3, 1, 2, "data"),
    ]
    assert twin.sharers("/file1") == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("backwards", [False, True])
def test_generic_414_adjacent_clones_make_one_extent(twin, backwards):
    pages = 32
    twin.fill("/file1", 0, pages * PAGE)
    twin.create("/file2")
    order = range(pages)
    for page in order[::-1] if backwards else order:
        twin.clone_range("/file1", page * PAGE, "/file2", page * PAGE, PAGE)
    for _ in ("now", "after a remount"):
        assert [(e.pages, e.sharers) for e in twin.fs.extents("/file2")] == [(pages, 2)]
        assert twin.fs.extents("/file1") == twin.fs.extents("/file2")
        twin.remount()


@pytest.mark.parametrize("first", [0, 32])
def test_generic_702_one_of_two_neighbours_is_shared(twin, first):
    twin.fill("/foo", 0, 32 * PAGE)
    twin.fs.sync()
    twin.fill("/foo", 32 * PAGE, 32 * PAGE)
    twin.create("/bar")
    twin.clone_range("/foo", first * PAGE, "/bar", 0, 32 * PAGE)
    assert [(e.file_page, e.pages, e.sharers) for e in twin.fs.extents("/foo")] == [
        (0, 32, 1 if first else 2),
        (32, 32, 2 if first else 1),
    ]


def test_generic_358_359_references_sliced_ever_finer(twin):
    """One owner changes at page 1, two at page 2, and so on: the count stays, the owners don't."""
    pages = 32
    twin.fill("/file", 0, pages * PAGE)
    for n in range(1, pages):
        twin.create(f"/{n}.0")
        twin.clone_range("/file", 0, f"/{n}.0", 0, n * PAGE)
        twin.create(f"/{n}.rest")
        for page in range(n, pages):
            twin.clone_range("/file", page * PAGE, f"/{n}.rest", page * PAGE, PAGE)
    assert twin.sharers("/file") == [pages] * pages
    assert twin.fs.check().counted["fragments"] == 1
    for n in range(1, pages):  # now the counts change at every page
        twin.unlink(f"/{n}.rest")
    assert twin.sharers("/file") == [pages - page for page in range(pages)]
    for n in range(pages - 1, 0, -2):
        twin.unlink(f"/{n}.0")


def test_snapshots_cost_nothing_and_pages_are_counted_once(twin):
    twin.fs.create_subvolume("/images")
    for n in range(20):
        twin.fill(f"/images/{n}", 0, 20 * PAGE)
    before = twin.used()
    for n in range(5):
        twin.fs.snapshot("/images", f"/snap{n}")
        for name in range(20):
            twin.files[f"/snap{n}/{name}"] = bytearray(twin.files[f"/images/{name}"])
    assert twin.used() - before <= NODES
    assert twin.frames() == 400
    assert twin.fs.check().findings == []
    assert twin.sharers("/snap3/7") == [6] * 20
    twin.fill("/snap3/7", 0, PAGE)
    assert twin.sharers("/snap3/7") == [1] + [6] * 19
    assert twin.sharers("/images/7") == [5] + [6] * 19
    usage = twin.fs.du("/snap3")
    assert (usage.unique, usage.shared) == (PAGE, 399 * PAGE)
    for n in (3, 0, 4, 1, 2):
        twin.fs.delete_subvolume(f"/snap{n}")
        for name in range(20):
            del twin.files[f"/snap{n}/{name}"]
    assert twin.used() == before
    assert twin.sharers("/images/7") == [1] * 20
