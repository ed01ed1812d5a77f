"""Many runs at once do what one after the other does: in the extents, in the counts, to clones, and when something fails."""

import os
import random
import secrets
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onecopy
from onecopy.blkcache.frames import SHARED
from onecopy.daxemu import steps
from onecopy.fs import batch, bulk, extents, namei
from onecopy.fs import inode as inodes
from onecopy.fs.btree import COUNTS, EXTENTS, MAX_KEY
from onecopy.fs.extents import Extent
from onecopy.fs.format import INLINE_EXTENTS, UNWRITTEN
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx

from ..conftest import forget

PAGE = onecopy.PAGE
Run = tuple[int, int, int]  # (file page, PFN, pages)
Fold = Callable[[Tx, Inode, list[Run]], None]


def one_by_one(tx: Tx, file: Inode, runs: list[Run]) -> None:
    """What `replace_many` has to do."""
    for page, pfn, pages in runs:
        have = extents.clip(extents.load(tx, file, page, page + pages), page, page + pages)
        same = {e[0]: e[2] for e in have if e[1] - e[0] == pfn - page}
        edges = sorted({page, page + pages, *same, *(low + count for low, count in same.items())})
        for low, high in pairwise(edges):
            extents.replace(tx, file, low, high, [(low, pfn + low - page, high - low, 0)], keep=low in same)


def together(tx: Tx, file: Inode, runs: list[Run]) -> None:
    bulk.replace_many(tx, file, np.array(runs, np.uint64).reshape(-1, 3))


def always_together(tx: Tx, file: Inode, runs: list[Run]) -> None:
    few, bulk._FEW = bulk._FEW, 0
    each, batch._EACH = batch._EACH, 0
    try:
        together(tx, file, runs)
    finally:
        bulk._FEW, batch._EACH = few, each


class Pool:
    """A pool with /a, which gets runs by one way or the other. Equal steps take equal frames in every pool."""

    def __init__(self, path: str, fold: Fold, size: str = "64M") -> None:
        onecopy.format(path, size)
        self.fs, self.fold = onecopy.open(path), fold
        self.fs.create("/a")

    def change(self, work: Callable[[Tx, Inode], object]) -> None:
        def run(tx: Tx) -> None:
            file = namei.change_file(tx, "/a")
            work(tx, file)
            file.size = max(file.size, max((e[0] + e[2] for e in extents.load(tx, file)), default=0) * PAGE)
            inodes.save(tx, file)

        self.fs._mount.run(run)

    def lay_out(self, layout: list[Extent]) -> None:
        """Give /a these extents, whose PFNs count from the first frame that is taken for them."""
        if not layout:
            return
        taken = max(pfn + pages for _, pfn, pages, _ in layout) + 1

        def work(tx: Tx, file: Inode) -> None:
            ((base, _),) = tx.frames.take_data(taken)
            spare = set(range(base, base + taken))
            for page, pfn, pages, flags in layout:
                extents.replace(tx, file, page, page + pages, [(page, base + pfn, pages, flags)])
                spare -= set(range(base + pfn, base + pfn + pages))
            tx.freed += [(pfn, 1) for pfn in sorted(spare)]

        self.change(work)

    def put(self, places: list[tuple[int, int, bool]]) -> None:
        """Fold runs (page, pages, again) into /a: fresh frames, in descending order; `again`: those that it has already."""

        def work(tx: Tx, file: Inode) -> None:
            runs = list[Run]()
            fresh = sum(pages for _, pages, _ in places)
            ((base, _),) = tx.frames.take_data(fresh)
            at = base + fresh
            for page, pages, again in places:
                have = extents.clip(extents.load(tx, file, page, page + pages), page, page + pages)
                at -= pages
                if again and have:
                    runs += [e[:3] for e in have]
                    tx.freed.append((at, pages))
                else:
                    runs.append((page, at, pages))
            self.fold(tx, file, runs)

        self.change(work)

    def look(self, path: str = "/a") -> tuple[list[Extent], int, bool]:
        """Return a file's extents, its pages, and whether they lie in its record."""
        with self.fs._mount.reading() as view:
            file = namei.file_at(view, path)
            return extents.load(view, file), file.pages, bool(file.flags & INLINE_EXTENTS)

    def settled(self) -> tuple[int, int]:
        """Check everything, also after a sync; return how many frames are free or nodes, and how many are nodes."""
        assert self.fs.check().findings == []
        self.fs.sync()
        report = self.fs.check()
        assert report.findings == []
        assert self.fs.info().waiting_pages == 0
        return self.fs.info().free_pages + report.counted["nodes"], report.counted["nodes"]


@pytest.fixture
def make(new_path: Callable[[], str]) -> Iterator[Callable[..., Pool]]:
    """A maker of pools."""
    made: list[Pool] = []

    def new(fold: Fold, size: str = "64M") -> Pool:
        made.append(Pool(new_path(), fold, size))
        return made[-1]

    yield new
    for pool in made:
        pool.fs.close()


def agree(pools: list[Pool]) -> None:
    """Hold all pools against the first."""
    wanted = pools[0].look()
    free, nodes = pools[0].settled()
    for pool in pools[1:]:
        found = pool.look()
        assert found[:2] == wanted[:2]
        assert found[2] == wanted[2] or len(found[0]) <= 7  # one by one, there may have been more in between
        now, used = pool.settled()
        assert now == free and used <= nodes + nodes // 4 + 2


SPREAD = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 8), st.booleans(), st.sampled_from([0, 0, 1, 5])), min_size=0, max_size=25
)
RUNS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 5), st.sampled_from([False, False, False, True])), min_size=1, max_size=40
)
SHARING = st.lists(st.sampled_from(["clone", "range", "self", "sync", "write", "unlink"]), max_size=4)


def laid_out(spread: list[tuple[int, int, bool, int]], times: int) -> list[Extent]:
    layout, page, pfn = list[Extent](), 0, 0
    for gap, pages, unwritten, jump in spread * times:
        page, pfn = page + gap, pfn + jump
        layout.append((page, pfn, pages, UNWRITTEN if unwritten else 0))
        page, pfn = page + pages, pfn + pages
    return layout


def share(fs: onecopy.FileSystem, how: str) -> None:
    size = fs.stat("/a").st_size // PAGE * PAGE
    if how == "sync":
        fs.sync()
    elif how == "clone":
        fs.clone("/a", "/b") if not fs.exists("/b") else fs.clone("/a", "/c") if not fs.exists("/c") else None
    elif how == "unlink" and fs.exists("/b"):
        fs.unlink("/b")
    elif size >= 6 * PAGE:
        third = size // PAGE // 3 * PAGE
        if how == "range":
            fs.create("/d") if not fs.exists("/d") else None
            fs.clone_range("/a", third, "/d", 0, third)
        elif how == "self":
            fs.clone_range("/a", 0, "/a", 2 * third, third)
        else:
            fs.write("/a", b"x" * 2 * PAGE, third)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    spread=SPREAD, times=st.sampled_from([1, 1, 12]), sharing=SHARING,
    rounds=st.lists(st.tuples(RUNS, st.sampled_from([1, 1, 6]), st.booleans()), min_size=1, max_size=3),
)  # fmt: skip
def test_runs_together_do_what_they_do_one_by_one(spread, times, sharing, rounds):
    paths = [f"/dev/shm/test-{os.getpid()}-{secrets.token_hex(4)}.pool" for _ in range(3)]
    pools = []
    try:
        for path, fold in zip(paths, (one_by_one, together, always_together), strict=True):
            pools.append(Pool(path, fold))
            pools[-1].lay_out(laid_out(spread, times))
            for how in sharing:
                share(pools[-1].fs, how)
        others = {name: pools[0].look(name) for name in ("/b", "/c", "/d") if pools[0].fs.exists(name)}
        assert others == {name: pools[2].look(name) for name in others}
        for runs, more, clone in rounds:
            places, page = [], 0
            for gap, pages, again in runs * more:
                places.append((page + gap, pages, again))
                page += gap + pages
            for pool in pools:
                pool.put(places)
            agree(pools)
            if clone:
                for pool in pools:
                    share(pool.fs, "clone")
        for pool in pools:
            for name, wanted in others.items():
                assert pool.look(name) == wanted
    finally:
        for pool in pools:
            pool.fs.close()
        for path in paths:
            forget(path)


@pytest.mark.parametrize("seed", range(4))
def test_many_runs_into_many_extents(make, seed):
    """Clones and clones of clones, folded into again and again; what is cut away is shared, was shared until lately, or not."""
    rng = random.Random(seed)
    pools = [make(fold, "256M") for fold in (one_by_one, together, always_together)]
    spread = [(rng.choice([0, 0, 0, 3]), rng.randrange(1, 5), rng.random() < 0.2, rng.choice([0, 7])) for _ in range(2000)]
    for pool in pools:
        pool.lay_out(laid_out(spread, 1))
    end = pools[0].fs.stat("/a").st_size // PAGE
    for _ in range(5):
        for how in rng.choices(["clone", "range", "self", "sync", "write", "unlink"], k=3):
            for pool in pools:
                share(pool.fs, how)
        low, step = rng.randrange(end), rng.choice([2, 10, 200])
        places = [(page, rng.randrange(1, step + 1), rng.random() < 0.2) for page in range(low, end + 20, step)]
        for pool in pools:
            pool.put(places)
        agree(pools)


WAYS = pytest.mark.parametrize("fold", [together, always_together], ids=["together", "always"])


def test_a_tree_of_three_levels(make):
    """Shared as a whole, folded into at both ends and in the middle, then everywhere, then over all of it."""
    pools = [make(fold, "512M") for fold in (one_by_one, together, always_together)]
    pages = 50_000
    scattered = [(5 * n, 1 if n % 3 else 2, False) for n in range(pages // 5)]
    some = [(page, 1, page % 5 == 0) for page in (0, 1, 6000, 6001, 6004, 9000, 49_900)] + [(pages + 10, 3, False)]
    for pool in pools:
        pool.change(lambda tx, file: bulk.replace_many(tx, file, backwards(tx, pages)))
        assert pool.fs._mount.pool.words[namei.file_at(pool.fs._mount.live_view(), "/a").root << 9] >> 16 & 0xFF == 2
        pool.fs.clone("/a", "/b")
    agree(pools)
    for places in (some, scattered, [(0, 50_100, False)]):
        for pool in pools:
            pool.put([(page, count, again) for page, count, again in places])
        agree(pools)
        assert all(len(pool.look("/b")[0]) == pages for pool in pools)


def backwards(tx: Tx, pages: int) -> np.ndarray:
    """Return runs of one page, none of which continues the one before."""
    ((base, _),) = tx.frames.take_data(pages)
    return np.array([(page, base + pages - 1 - page, 1) for page in range(pages)], np.uint64)


def test_a_run_that_has_come_to_more_pages_since(make):
    for fold in (one_by_one, together, always_together):
        pool = make(fold)
        pool.lay_out([(0, 0, 50, 0)])
        pool.fs.clone("/a", "/b")

        def work(tx: Tx, file: Inode, fold: Fold = fold) -> None:
            ((base, _),) = tx.frames.take_data(200)
            fold(tx, file, [(20 * n, base + 10 * n, 3) for n in range(20)])
            fold(tx, file, [(20 * n, base + 10 * n, 10) for n in range(20)])
            fold(tx, file, [(20 * n, base + 10 * n, 10) for n in range(20)])

        pool.change(work)
        assert pool.look()[1] == 50 + 200 - 30
        pool.settled()


@WAYS
def test_extents_in_the_record_become_a_tree(make, fold):
    pools = [make(one_by_one), make(fold)]
    for pool in pools:
        pool.lay_out([(3 * n, 5 * n, 2, n & 1) for n in range(7)])
        assert pool.look()[2]
        pool.put([(20, 2, False), (30, 3, False)])
        assert not pool.look()[2]
        pool.put([(0, 40, False)])
        assert len(pool.look()[0]) == 1 and not pool.look()[2]
    agree(pools)


@WAYS
def test_extents_that_fit_the_record_stay_there(make, fold):
    pools = [make(one_by_one), make(fold)]
    for pool in pools:
        pool.lay_out([(0, 0, 20, 0)])
        pool.fs.create("/b")
        pool.fs.clone_range("/a", 0, "/b", 0, 20 * PAGE)
        pool.put([(4, 2, False), (10, 3, False)])
    agree(pools)
    assert len(pools[1].look()[0]) == 5


def test_no_runs_change_nothing(make):
    pool = make(together)
    pool.lay_out([(0, 0, 20, 0)])
    before = pool.look()
    pool.change(lambda tx, file: together(tx, file, []))
    assert pool.look() == before


@WAYS
def test_nothing_has_happened_when_space_runs_out(make, fold):
    """At whatever node: the pool is as before. With enough of them, the runs are there."""
    pool = make(fold)
    pool.lay_out([(n * 10, n * 11, 10, 0) for n in range(400)])
    pool.fs.clone("/a", "/b")
    before, (free, _) = pool.look(), pool.settled()
    frames = pool.fs._mount.frames
    limit = 0
    while True:

        def work(tx: Tx, file: Inode, limit: int = limit) -> None:
            ((base, _),) = tx.frames.take_data(700)
            kept = frames.room - frames._node_room - limit
            frames.room -= kept
            fold(tx, file, [(5 * n, base + n, 1) for n in range(700)])
            frames.room += kept

        try:
            pool.change(work)
            break
        except onecopy.NoSpace:
            assert pool.look() == before
            assert pool.settled()[0] == free
        limit += 1
    assert limit > 10
    assert pool.look()[1] == before[1]
    assert pool.settled()[0] == free - 700


@WAYS
def test_nothing_has_happened_when_it_is_interrupted(make, fold, monkeypatch):
    pool = make(fold)
    pool.lay_out([(n * 10, n * 11, 10, 0) for n in range(400)])
    pool.fs.clone("/a", "/b")
    before, (free, _) = pool.look(), pool.settled()
    reached = 0

    def hook(_: int) -> None:
        nonlocal reached
        reached += 1
        if reached == stop:
            raise KeyboardInterrupt

    def work(tx: Tx, file: Inode) -> None:
        ((base, _),) = tx.frames.take_data(700)
        fold(tx, file, [(5 * n, base + n, 1) for n in range(700)])

    stop = 0
    while True:
        stop, reached = stop + 1, 0
        monkeypatch.setattr(steps, "hook", hook)
        try:
            pool.change(work)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(steps, "hook", None)
            if pool.look() != before:
                break  # after it was published
            assert pool.settled()[0] == free
    monkeypatch.setattr(steps, "hook", None)
    assert stop > 10
    assert pool.settled()[0] == free - 700


# ------------------------------------------------------------- the edges


@pytest.mark.parametrize("page, beside", [(-1, 0), (0, -1)], ids=["behind", "before"])
@WAYS
def test_runs_meet_their_neighbours_across_leaves(make, fold, page, beside):
    """A run at the border of a leaf continues what is in the next leaf, or in the one before."""
    pool = make(fold)

    def work(tx: Tx, file: Inode) -> None:
        ((base, pages),) = tx.frames.take_data(2000)
        one_by_one(tx, file, [(n, base + 4 * n + 1, 1) for n in range(500)])
        root = file.root * 512
        borders = tx.words[root + 5 : root + 4 + (tx.words[root] & 0xFFFF)].tolist()
        runs = [(n + page, base + 4 * (n + beside) + 1 + page - beside, 1) for n in borders]
        for run in runs:
            fold(tx, file, [run])
        assert len(borders) > 1
        assert [e for e in extents.load(tx, file) if e[2] > 1] == [
            (n - 1, base + 4 * (n + beside) + min(0, page - beside) + 1, 2, 0) for n in borders
        ]
        held = {pfn + n for _, pfn, count, _ in extents.load(tx, file) for n in range(count)}
        gone = {pfn + n for pfn, count in tx.freed for n in range(count)}
        tx.freed += [(pfn, 1) for pfn in range(base, base + pages) if pfn not in held | gone]

    pool.change(work)
    pool.settled()


@WAYS
def test_an_extent_that_reaches_over_the_keys_of_the_next_leaf(make, fold):
    pools = [make(one_by_one), make(fold)]
    for pool in pools:
        pool.lay_out([(2 * n, 2 * n, 1, 0) for n in range(300)])
        root = namei.file_at(pool.fs._mount.live_view(), "/a").root
        border = pool.fs._mount.pool.words[root * 512 + 5]
        pool.fold = one_by_one
        pool.put([(border - 1, 60, False)])
        pool.fold = fold if pool is pools[1] else one_by_one
        assert pool.fs._mount.pool.words[namei.file_at(pool.fs._mount.live_view(), "/a").root * 512 + 5] == border
        pool.fs.clone("/a", "/b")
        pool.put([(border + 3 + 3 * n, 1, False) for n in range(18)])
    agree(pools)
    assert max(e[2] for e in pools[1].look("/b")[0]) == 60


@WAYS
def test_hints_are_handed_down(make, fold):
    """The clone is gone, but the durable root names it: nothing may be stored to in place before a sync."""
    pool = make(fold)
    pool.lay_out([(2 * n, 3 * n, 1, 0) for n in range(1000)])
    pool.fs.clone("/a", "/b")
    pool.fs.sync()
    pool.fs.unlink("/b")
    pool.put([(20 * n, 1, False) for n in range(100)])
    hinted = [bool(pool.fs._mount.frames.table[pfn] & SHARED) for _, pfn, _, _ in pool.look()[0]]
    assert hinted == [n % 10 != 0 for n in range(1000)]
    pool.settled()


@WAYS
def test_no_extent_becomes_too_long(make, fold, monkeypatch):
    for module in (bulk, extents):
        monkeypatch.setattr(module, "MAX_RUN", 16)
    pool = make(fold)
    pool.lay_out([(n, n, 1, 0) for n in range(10)])

    def work(tx: Tx, file: Inode) -> None:
        ((base, _),) = tx.frames.take_data(200)
        fold(tx, file, [(10 + 4 * n, base + 4 * n, 4) for n in range(50)])

    pool.change(work)
    found, pages, _ = pool.look()
    assert pages == 210 and max(e[2] for e in found) == 16
    pool.settled()


@WAYS
def test_damage_is_named(make, fold):
    pool = make(fold)
    pool.lay_out([(2 * n, 2 * n, 1, 0) for n in range(300)])
    view = pool.fs._mount.live_view()
    words, (base, _, _) = pool.fs._mount.pool.words, next(EXTENTS.slices(view.words, namei.file_at(view, "/a").root))
    for word, wrong, what in ((base + 8, 1 << 63, "keys"), (base + EXTENTS.values + 6, 1 << 62, "extent"), (base, 7, "header")):
        before, words[word] = words[word], wrong
        with pytest.raises(onecopy.CorruptRecord, match=what):
            pool.put([(n, 1, False) for n in range(40)])
        words[word] = before
    pool.settled()


# -------------------------------------------------------------- the tree


def test_thin_leaves_join_their_neighbours(grow):
    """Every second leaf is left with one key: it goes into the leaf beside it, right or left."""
    grown = grow(EXTENTS)
    grown.insert(range(0, 20_000, 2))
    words = grown.mount.pool.words
    leaves = [words[base + 4 + i : base + 4 + j].tolist() for base, i, j in EXTENTS.slices(words, grown.root)]
    gone = np.array([key for leaf in leaves[::2] for key in leaf[1:]], np.uint64)

    def work(change):
        none = np.empty((0, 2), np.uint64)
        change.root = batch.apply(EXTENTS, change.tx, change.root, none[:, 0], none, gone)
        change.model = {key: value for key, value in change.model.items() if key not in set(gone.tolist())}

    grown.change(work)
    grown.verify()
    assert len(list(EXTENTS.slices(words, grown.root))) <= len(leaves) * 3 // 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tree", [EXTENTS, COUNTS], ids=["extents", "counts"])
def test_batches_on_a_tree(grow, tree, seed):
    rng, grown = random.Random(seed), grow(tree)

    def work(change, keys, delete, found):
        keys = np.array(sorted(keys), np.uint64)
        have = np.array(sorted(change.model), np.uint64)
        gone = np.intersect1d(keys, have) if delete else keys[:0]
        values = np.frombuffer(b"".join(grown.value(int(key) ^ 77) for key in keys), np.uint64).reshape(-1, tree.width)
        if delete:
            keys, values = keys[:0], values[:0]
        if found and len(keys):
            change.root, entries = batch.own_over(tree, change.tx, change.root, keys, keys + np.uint64(1))
            assert {key for key in keys.tolist() if key in change.model} <= set(entries.keys.tolist())
            every = dict(zip(entries.keys.tolist(), entries.values.tolist(), strict=True))
            every |= dict(zip(keys.tolist(), values.tolist(), strict=True))
            new = np.array(sorted(every), np.uint64)
            rows = np.array([every[key] for key in sorted(every)], np.uint64)
            change.root = batch.replace(tree, change.tx, change.root, entries, new, rows)
        else:
            change.root = batch.apply(tree, change.tx, change.root, keys, values, gone)
        for key in gone.tolist():
            del change.model[key]
        change.model.update({key: grown.value(key ^ 77) for key in keys.tolist()})

    for turn in range(20):
        low, wide = rng.randrange(60_000), rng.choice([100, 3000, 60_000])
        keys = {low + n for n in rng.sample(range(wide), min(wide, rng.choice([1, 30, 500, 3000])))}
        if turn % 4 == 3:
            keys |= {key for key in grown.model if low <= key < low + wide}
        delete, found = turn % 4 > 1, rng.random() < 0.5
        grown.change(lambda change, keys=keys, delete=delete, found=found: work(change, keys, delete, found))
        grown.verify()
    grown.change(lambda change: work(change, set(change.model), True, False))
    assert (grown.root, grown.used()) == (0, grown.before)


def test_a_batch_of_the_largest_keys(grow):
    grown = grow(EXTENTS)
    keys = np.array([0, 1, MAX_KEY - 2, MAX_KEY - 1], np.uint64)

    def work(change):
        change.root = batch.apply(EXTENTS, change.tx, 0, keys, np.stack((keys, keys), 1), keys[:0])
        change.model = {key: grown.value(key) for key in keys.tolist()}

    grown.change(work)
    grown.verify()
