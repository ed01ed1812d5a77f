"""The B+tree against a dictionary: at every size, in every order, for readers of older roots, and shared by several."""

import random
from collections import Counter

import pytest

import onecopy
from onecopy.fs import counts
from onecopy.fs.btree import ENTRIES, INODES, MAX_KEY, TREES
from onecopy.fs.format import FANOUT

from ..multiproc.processes import counting

ALL = pytest.mark.parametrize("tree", TREES.values(), ids=lambda tree: tree.name.replace(" tree", ""))

ORDERS = {
    "ascending": lambda keys: keys,
    "descending": lambda keys: keys[::-1],
    "inwards": lambda keys: [key for pair in zip(keys, keys[::-1], strict=True) for key in pair][: len(keys)],
    "shuffled": lambda keys: random.Random(17).sample(keys, len(keys)),
}


def order(name: str, keys: list[int]) -> list[int]:
    """Return the keys, each once, in one of ORDERS."""
    return list(dict.fromkeys(ORDERS[name](keys)))


# ------------------------------------------------------------- every size


@pytest.mark.parametrize("going", ORDERS)
@pytest.mark.parametrize("coming", ORDERS)
def test_every_size_from_nothing_to_three_leaves_and_back(grow, coming, going):
    grown = grow(INODES)
    keys = [7 * n + 3 for n in range(3 * INODES.capacity)]
    for key in order(coming, keys):
        grown.insert([key])
        grown.verify()
    for key in order(going, keys):
        grown.delete([key])
        grown.verify()
    assert (grown.root, grown.depth()) == (0, 0)
    assert grown.used() == grown.before


@pytest.mark.parametrize(
    ("tree", "going"),
    [(INODES, "ascending"), (INODES, "descending"), *((tree, "shuffled") for tree in TREES.values())],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_trees_of_three_levels(grow, tree, going):
    grown = grow(tree)
    keys = list(range(0, FANOUT * tree.capacity * 11, 11))
    for at in range(0, len(keys), 4096):
        grown.insert(keys[at : at + 4096])
    assert grown.depth() == 3
    grown.verify()
    rest = order(going, keys)
    while rest:
        grown.delete(rest[:8192])
        rest = rest[8192:]
        grown.verify()
    assert grown.used() == grown.before


@ALL
def test_ascending_keys_leave_full_leaves_behind(grow, tree):
    grown = grow(tree)
    grown.insert(range(20 * tree.capacity))
    leaves = grown.used() - grown.before - 1
    assert leaves <= 22


@pytest.mark.parametrize("seed", range(3))
@ALL
def test_random_changes(grow, tree, seed):
    rng = random.Random(seed)
    grown = grow(tree)
    space = rng.choice([tree.capacity * 3, tree.capacity * 40, MAX_KEY])

    def work(change):
        for _ in range(rng.randrange(1, 60)):
            if change.model and rng.random() < shrinking:
                change.delete(rng.choice(list(change.model)) if rng.random() < 0.5 else min(change.model))
            else:
                change.set(rng.randrange(space), grown.value(rng.getrandbits(64)))

    for turn in range(60):
        shrinking = 0.3 if turn % 20 < 12 else 0.8
        grown.change(work)
    grown.verify()
    keys = sorted(grown.model)
    probes = [0, MAX_KEY - 1, *keys[:3], *(key + 1 for key in keys[-3:]), *(rng.randrange(space) for _ in range(200))]
    grown.verify_searches(probes)
    grown.delete(keys)
    assert grown.used() == grown.before


# ------------------------------------------------------------- the edges


@ALL
def test_an_empty_tree_has_nothing(grow, tree):
    grown = grow(tree)
    assert (grown.get(0), grown.floor(MAX_KEY), grown.items()) == (None, None, [])
    assert tree.own_path(None, 0, 0, MAX_KEY) == 0


def test_the_floor_may_lie_in_the_left_neighbour(grow):
    """A separator is a lower bound only: the leaf that a key belongs into may have nothing at or below it."""
    grown = grow(INODES)
    grown.insert(range(0, 1000, 10))
    low, high = (key for key, _ in grown.items(490, 510))
    grown.delete([key for key in range(0, 1000, 10) if low < key < 900])
    for key in range(low, 900):
        assert grown.floor(key) == (low, grown.model[low])
    assert high not in grown.model


@ALL
def test_the_largest_and_smallest_keys(grow, tree):
    grown = grow(tree)
    grown.insert([MAX_KEY - 1, 0, 1, MAX_KEY - 2])
    grown.verify()
    grown.verify_searches([0, 1, 2, MAX_KEY - 3, MAX_KEY - 2, MAX_KEY - 1])


@ALL
def test_what_is_not_there_can_not_be_changed(grow, tree):
    grown = grow(tree)
    grown.insert(range(0, 500, 5))
    with pytest.raises(onecopy.CorruptRecord, match="expected 7, found none"):
        grown.delete([7])
    with pytest.raises(onecopy.CorruptRecord, match="expected 7, found none"):
        grown.change(lambda change: tree.update(change.tx, change.root, 7, grown.value(1)))
    grown.verify()


@pytest.mark.parametrize("damage", ["pointer", "kind", "level", "count", "no entries"])
def test_a_damaged_node_is_named(grow, damage):
    grown = grow(ENTRIES)
    grown.insert(range(3 * ENTRIES.capacity))
    words = grown.mount.pool.words
    child = words[grown.root * 512 + 4 + FANOUT]
    if damage == "pointer":
        child = words[grown.root * 512 + 4 + FANOUT] = 1 << 40
    elif damage == "kind":
        words[child * 512] ^= 1 << 24
    elif damage == "level":
        words[child * 512] ^= 1 << 16
    else:
        words[child * 512] = words[child * 512] >> 16 << 16 | (ENTRIES.capacity + 1 if damage == "count" else 0)
    with pytest.raises(onecopy.CorruptRecord) as caught:
        grown.items()
    assert caught.value.pfn == child and caught.value.record.startswith("directory tree")


# ------------------------------------------------------------ copy on write


def test_older_roots_stay_as_they_were(grow):
    grown = grow(INODES)
    grown.insert(range(0, 4000, 2))
    older, rng = [], random.Random(5)
    for turn in range(7):
        reading = grown.mount.reading()
        reading.__enter__()
        older.append((reading, grown.root, dict(grown.model)))
        for _ in range(20):
            grown.insert((rng.randrange(4000) for _ in range(20)), number=turn + 1)
            grown.delete(rng.sample(sorted(grown.model), 20))
        grown.mount.sync()
        for _, root, model in older:
            found = [(key, grown.read(offset)) for key, offset in INODES.items(grown.mount.pool.words, root)]
            assert found == sorted(model.items())
    for reading, _, _ in older:
        reading.__exit__(None, None, None)
    grown.verify()


def test_a_change_copies_the_path_and_nothing_else(grow):
    grown = grow(INODES)
    grown.insert(range(0, FANOUT * INODES.capacity * 4, 4))
    assert grown.depth() == 3
    for change in (lambda: grown.insert([41]), lambda: grown.delete([400]), lambda: grown.insert([4], number=1)):
        with counting() as reached:
            change()
        assert reached["node copied"] == 3


def test_nodes_of_the_same_transaction_are_changed_in_place(grow):
    grown = grow(INODES)
    grown.insert(range(0, 100, 10))
    with counting() as reached:
        grown.insert(range(1, 14, 3), number=8)
    assert reached["node copied"] == 1


def test_an_aborted_change_changes_nothing(grow):
    grown = grow(ENTRIES)
    grown.insert(range(0, 5000, 3))

    def work(change):
        for key in range(0, 5000, 3):
            change.delete(key)
        raise KeyError

    used = grown.used()
    with pytest.raises(KeyError):
        grown.change(work)
    grown.verify()
    assert grown.used() == used


# ---------------------------------------------------------------- sharing


def share(grown):
    """Take another reference on a tree's root, as a snapshot does; return a second `Grown` for it."""
    grown.mount.run(lambda tx: counts.add(tx, grown.root, 1, 1))
    other = type(grown)(grown.mount, grown.tree)
    other.root, other.model = grown.root, dict(grown.model)
    return other


def references(grown) -> Counter:
    """Recount, from the roots of several trees, how often each of their nodes is referred to."""
    counted, seen = Counter(), set()
    stack = [one.root for one in grown if one.root]
    while stack:
        pfn = stack.pop()
        counted[pfn] += 1
        if pfn not in seen:
            seen.add(pfn)
            stack += grown[0].tree.children(grown[0].mount.pool.words, pfn * 512)
    return counted


@pytest.mark.parametrize("seed", range(4))
def test_shared_trees_change_apart(grow, seed):
    """Clones of clones, changed and dropped in any order: each keeps its content, and counts move down as they must."""
    rng = random.Random(seed)
    first = grow(ENTRIES)
    first.insert(range(0, 40_000, 9))
    trees = [first]
    for _ in range(40):
        one = rng.choice(trees)
        if rng.random() < 0.25 and len(trees) < 6:
            trees.append(share(one))
        elif rng.random() < 0.15 and len(trees) > 1:
            trees.remove(one)
            one.mount.run(lambda tx, one=one: counts.drop(tx, ENTRIES, one.root))
        elif one.model and rng.random() < 0.5:
            one.delete(rng.sample(sorted(one.model), min(len(one.model), 30)))
        else:
            one.insert([rng.randrange(40_000) for _ in range(30)], number=rng.getrandbits(32))
        for tree in trees:
            tree.verify()
        view = first.mount.live_view()
        counted = references(trees)
        assert {pfn: counts.references(view, pfn) for pfn in counted} == counted
    for one in trees:
        one.mount.run(lambda tx, one=one: counts.drop(tx, ENTRIES, one.root))
    assert first.used() == first.before
    assert first.mount.live_view().counts == 0
