"""A tree that grows in a pool of its own, beside a dictionary that says what must be in it."""

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

import onecopy
from onecopy.blkcache.frames import USED
from onecopy.fs.btree import MAX_KEY, Tree
from onecopy.fs.format import FANOUT, NODE
from onecopy.fs.mount import Mount


@pytest.fixture
def mount(new_path: Callable[[], str]) -> Iterator[Mount]:
    """An attachment to a pool of 64 MiB."""
    path = new_path()
    onecopy.format(path, "64M")
    with onecopy.open(path) as fs:
        yield fs._mount


class Grown:
    """A tree outside of any subvolume. Changes are made in transactions; `root` and `model` belong together."""

    def __init__(self, mount: Mount, tree: Tree) -> None:
        self.mount, self.tree = mount, tree
        self.root, self.model = 0, dict[int, bytes]()
        self.before = self.used()

    def used(self) -> int:
        """Return how many frames are in use once nothing waits."""
        self.mount.sync()
        return int(((self.mount.frames.array & USED) != 0).sum())

    def value(self, number: int) -> bytes:
        """Return a value of this tree that differs for every `number`."""
        return struct.pack("<Q", number) * self.tree.width

    # ------------------------------------------------------------- changing

    def change(self, work: Callable[["Change"], None]) -> None:
        """Make changes in one transaction."""

        def run(tx):
            change = Change(self, tx)
            work(change)
            return change

        change = self.mount.run(run)
        self.root, self.model = change.root, change.model

    def insert(self, keys, number: int = 0) -> None:
        self.change(lambda change: [change.set(key, self.value(key ^ number)) for key in keys])

    def delete(self, keys) -> None:
        self.change(lambda change: [change.delete(key) for key in keys])

    # -------------------------------------------------------------- looking

    def read(self, offset: int) -> bytes:
        return bytes(self.mount.pool.bytes[offset : offset + self.tree.value.size])

    def items(self, low: int = 0, high: int = MAX_KEY) -> list[tuple[int, bytes]]:
        words = self.mount.pool.words
        return [(key, self.read(offset)) for key, offset in self.tree.items(words, self.root, low, high)]

    def get(self, key: int) -> bytes | None:
        offset = self.tree.find(self.mount.pool.words, self.root, key)
        return None if offset < 0 else self.read(offset)

    def floor(self, key: int) -> tuple[int, bytes] | None:
        found = self.tree.floor(self.mount.pool.words, self.root, key)
        return None if found is None else (found[0], self.read(found[1]))

    def depth(self) -> int:
        return node(self.mount, self.root)["level"] + 1 if self.root else 0

    def verify(self) -> None:
        """Compare with the model, in order and at every key; check every node."""
        assert self.items() == sorted(self.model.items())
        if self.root:
            _verify(self.mount, self.tree, self.root, 0, MAX_KEY)

    def verify_searches(self, probes) -> None:
        """Hold find, floor and ranges against the model at these keys."""
        keys = sorted(self.model)
        for key in probes:
            assert self.get(key) == self.model.get(key)
            at = bisect_right(keys, key)
            assert self.floor(key) == ((keys[at - 1], self.model[keys[at - 1]]) if at else None)
        for low, high in pairwise(probes):
            assert [key for key, _ in self.items(low, high)] == [key for key in keys if low <= key < high]


class Change:
    """A transaction on a `Grown`."""

    def __init__(self, grown: Grown, tx) -> None:
        self.tree, self.tx, self.root, self.model = grown.tree, tx, grown.root, dict(grown.model)

    def set(self, key: int, value: bytes) -> None:
        update = key in self.model and value[0] % 2  # both ways to replace a value
        self.root = (self.tree.update if update else self.tree.insert)(self.tx, self.root, key, value)
        self.model[key] = value

    def delete(self, key: int) -> None:
        self.root = self.tree.delete(self.tx, self.root, key)
        del self.model[key]


def node(mount: Mount, pfn: int) -> dict:
    return NODE.unpack(mount.pool.bytes, pfn * onecopy.PAGE)


def _verify(mount: Mount, tree: Tree, pfn: int, low: int, high: int, level: int | None = None) -> None:
    """Check a node and all below: it says what and where it is, has entries, and they lie in order in their range."""
    head = node(mount, pfn)
    assert (head["kind"], head["pfn"]) == (tree.kind, pfn)
    assert level is None or head["level"] == level
    assert 1 <= head["count"] <= (FANOUT if head["level"] else tree.capacity)
    first = pfn * 512 + 4
    keys = mount.pool.words[first : first + head["count"]].tolist()
    assert all(a < b for a, b in pairwise(keys))
    inner = keys[1:] if head["level"] else keys
    assert all(low <= key < high for key in inner)
    if head["level"]:
        edges = [low, *inner, high]
        children = tree.children(mount.pool.words, pfn * 512)
        for child, first_key, end in zip(children, edges, edges[1:], strict=False):
            _verify(mount, tree, child, first_key, end, head["level"] - 1)


@pytest.fixture
def grow(mount: Mount) -> Callable[[Tree], Grown]:
    """A maker of empty trees."""
    return lambda tree: Grown(mount, tree)
