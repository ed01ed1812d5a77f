"""Many changes to a B+tree at once, with numpy: each node that they touch is read and written once, whole.

`own_over` makes the paths to the touched leaves the transaction's own and returns what is in those leaves; `apply` puts and
deletes entries. Touched nodes that lie side by side are filled anew together, at every level; the others stay.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from onecopy.daxemu.errors import CorruptRecord
from onecopy.fs.btree import MAX_KEY, Tree
from onecopy.fs.format import FANOUT, NODE_WORDS

if TYPE_CHECKING:
    from onecopy.fs.tx import Tx

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
_PAGE = 512  # words

_EACH = 10  # changes of a stretch of leaves up to which they are made one by one

_NONE: Words = np.empty(0, np.uint64)


class Entries(NamedTuple):
    """What is in some leaves: keys, a row of values for each, and how many stretches of neighbouring leaves there are."""

    keys: Words
    values: Words
    stretches: int = 0


class _Node(NamedTuple):
    """What is in nodes: keys, a row of values (or a child) for each, and the word of the pool where each key is."""

    keys: Words
    rest: Words
    places: Places


class _Edits(NamedTuple):
    keys: Words  # ascending
    values: Words  # a row for each key, zeros for what is deleted
    put: npt.NDArray[np.bool_]


def groups(apart: npt.NDArray[np.bool_], count: int) -> tuple[Places, Places]:
    """Return where the groups of `count` things begin and end (their last ones), given which neighbours are apart."""
    edge = np.ones(min(count, 1), bool)
    return np.flatnonzero(np.concatenate((edge, apart))), np.flatnonzero(np.concatenate((apart, edge)))


def joined(starts: Places, ends: Places) -> list[tuple[int, int]]:
    """Return ascending ranges [start, end) as a list, those that touch made one."""
    first, last = groups(starts[1:] != ends[:-1], len(starts))
    return list(zip(starts[first].tolist(), ends[last].tolist(), strict=True))


def over(starts: Places, ends: Places, at: Places) -> Places:
    """Return which of the ascending ranges [start, end) each of `at` lies in; -1: in none."""
    found = starts.searchsorted(at, "right") - 1
    return np.where(at < np.append(ends, -1)[found], found, -1)


def own_over(tree: Tree, tx: "Tx", root: int, lows: Words, highs: Words) -> tuple[int, Entries]:
    """Own the leaves with the keys of all ranges [low, high), lows ascending, and with the greatest key below each.

    Returns the new root and what is in these leaves.
    """
    if not root:
        return 0, Entries(_NONE, np.empty((0, tree.width), np.uint64))
    root = tx.own(tree, root)
    leaves, separators, stretches = _own_leaves(tree, tx, root, lows, highs)
    # A separator is a lower bound only: below a leaf's first key, the greatest key is in the leaf to the left.
    where = np.maximum(separators.searchsorted(lows, "right") - 1, 0)
    short = np.flatnonzero(_pages(tx)[leaves, NODE_WORDS][where] > lows)
    if len(short):
        lows = lows.copy()
        for leaf in np.unique(where[short]).tolist():
            some = short[where[short] == leaf]
            before = tree.floor(tx.words, root, int(lows[some[0]]))
            if before is not None:
                lows[some] = before[0]
        leaves, separators, stretches = _own_leaves(tree, tx, root, lows, highs)
    found = gather(tree, tx, 0, leaves, separators)
    return root, Entries(found.keys, found.rest, stretches)


def _pages(tx: "Tx") -> Words:
    return np.frombuffer(tx.words, np.uint64).reshape(-1, _PAGE)


def _own_leaves(tree: Tree, tx: "Tx", root: int, lows: Words, highs: Words) -> tuple[Places, Words, int]:
    """Return the leaves where keys of the ranges belong, the key that separates each from its left, and their stretches."""
    nodes, separators, stretches = np.array([root]), np.zeros(1, np.uint64), 1
    for level in range(tx.words[root << 9] >> 16 & 0xFF, 0, -1):
        keys, children, places = gather(tree, tx, level, nodes, separators)
        first = np.maximum(keys.searchsorted(lows, "right") - 1, 0)
        end = np.maximum(keys.searchsorted(highs, "left"), first + 1)
        depth = np.bincount(first, minlength=len(keys) + 1) - np.bincount(end, minlength=len(keys) + 1)
        touched = np.flatnonzero(depth.cumsum())
        nodes = np.array(tx.own_all(tree, children[touched, 0].tolist()))
        _pages(tx).reshape(-1)[places[touched] + FANOUT] = nodes
        separators, stretches = keys[touched], 1 + int(np.count_nonzero(np.diff(touched) > 1))
    return nodes, separators, stretches


def _shape(tree: Tree, level: int) -> tuple[int, int, int]:
    """Return a node's room for keys, the first word of the rest, and the words of that for each key."""
    return (FANOUT, NODE_WORDS + FANOUT, 1) if level else (tree.capacity, tree.values, tree.width)


def gather(tree: Tree, tx: "Tx", level: int, nodes: Places, separators: Words | None = None) -> _Node:
    """Return what is in nodes of one level; with `separators`, those that their parents have for them, in ascending order.

    These are sharper bounds than the first keys of inner nodes.
    """
    room, first, width = _shape(tree, level)
    block = _pages(tx)[nodes]
    counts = block[:, 0] & np.uint64(0xFFFF)
    wrong = (block[:, 0] >> np.uint64(16) != tree.tag << 8 | level) | (counts == 0) | (counts > room)
    if wrong.any():
        tree.enter(tx.words, int(nodes[wrong][0]), level)  # which says what is wrong with it
    if level and separators is not None:
        block[:, NODE_WORDS] = np.maximum(block[:, NODE_WORDS], separators)
    used = np.arange(room, dtype=np.uint64) < counts[:, None]
    keys = block[:, NODE_WORDS : NODE_WORDS + room][used]
    places = (nodes[:, None] * _PAGE + np.arange(NODE_WORDS, NODE_WORDS + room))[used]
    disorder = np.flatnonzero(keys[1:] <= keys[:-1])
    if len(disorder) and separators is not None:
        pfn = int(places[disorder[0] + 1]) // _PAGE
        raise CorruptRecord(f"{tree.name} node", pfn, "keys", expected="ascending ones", actual="a disorder")
    return _Node(keys, block[:, first : first + room * width].reshape(-1, room, width)[used], places)


def replace(tree: Tree, tx: "Tx", root: int, old: Entries, keys: Words, values: Words) -> int:
    """Make the entries that `own_over` found others, with ascending keys between the same neighbours; return the new root."""
    at = keys.searchsorted(old.keys)
    stays = np.append(keys, np.uint64(MAX_KEY))[at] == old.keys
    differs = np.ones(len(keys), bool)
    differs[at[stays]] = (values[at[stays]] != old.values[stays]).any(1)
    keys, values, gone = keys[differs], values[differs], old.keys[~stays]
    if len(keys) + len(gone) > _EACH * old.stretches:
        return apply(tree, tx, root, keys, values, gone)
    for key in gone.tolist():
        root = tree.delete(tx, root, key)
    for key, value in zip(keys.tolist(), values, strict=True):
        root = tree.insert(tx, root, key, value.tobytes())
    return root


def apply(tree: Tree, tx: "Tx", root: int, keys: Words, values: Words, gone: Words) -> int:
    """Set the values of `keys` and delete the keys `gone`, all ascending; return the new root, 0 for an empty tree."""
    if not len(keys) and not len(gone):
        return root
    every = np.concatenate((keys, gone))
    order = every.argsort()
    values = np.concatenate((values, np.zeros((len(gone), tree.width), np.uint64)))
    edits = _Edits(every[order], values[order], order < len(keys))
    nodes = [tx.own(tree, root)] if root else []
    level = tx.words[nodes[0] << 9] >> 16 & 0xFF if root else 0
    if root:
        content, rest = _content(tree, tx, level, nodes, np.zeros(1, np.uint64), edits)
    else:
        content, rest = _merge(_NONE, values[:0], edits)
    while True:
        content, rest = _pack(tree, tx, level, nodes, content, rest)
        if len(content) <= 1:
            return tree.shrink(tx, int(rest[0, 0])) if len(content) else 0
        level, nodes = level + 1, []


def _merge(keys: Words, rest: Words, edits: _Edits) -> tuple[Words, Words]:
    """Return the entries of a leaf after the edits."""
    at = np.minimum(edits.keys.searchsorted(keys), len(edits.keys) - 1)
    stay = edits.keys[at] != keys
    keys = np.concatenate((keys[stay], edits.keys[edits.put]))
    order = keys.argsort(kind="stable")
    return keys[order], np.concatenate((rest[stay], edits.values[edits.put]))[order]


def _content(tree: Tree, tx: "Tx", level: int, nodes: list[int], separators: Words, edits: _Edits) -> tuple[Words, Words]:
    """Return what belongs into owned `nodes`, which lie side by side, after the edits; below them all is done."""
    keys, rest, places = gather(tree, tx, level, np.array(nodes), separators)
    if not level:
        return _merge(keys, rest, edits)
    below = keys[1:].searchsorted(edits.keys, "right")
    groups = [0, *(np.flatnonzero(np.diff(below) > 1) + 1).tolist(), len(below)]  # of edits, by children side by side
    starts = below[groups[:-1]].tolist()
    thin = _shape(tree, level - 1)[0] >> 2
    pieces: list[tuple[Words, Words]] = []
    at = 0  # the first child that is not in `pieces` yet
    for (a, b), first, limit in zip(pairwise(groups), starts, [*starts[1:], len(keys)], strict=True):
        end = int(below[b - 1]) + 1
        part = _Edits(edits.keys[a:b], edits.values[a:b], edits.put[a:b])
        children = [tree.own_child(tx, place) for place in places[first:end].tolist()]
        inner, outer = _content(tree, tx, level - 1, children, keys[first:end], part)
        if 0 < len(inner) <= thin and (end < limit or at < first):
            right = end < limit
            near = end if right else first - 1
            children.append(tree.own_child(tx, int(places[near])))
            more, other, _ = gather(tree, tx, level - 1, np.array(children[-1:]), keys[near : near + 1])
            inner = np.concatenate((inner, more) if right else (more, inner))
            outer = np.concatenate((outer, other) if right else (other, outer))
            first, end = min(first, near), max(end, near + 1)
        pieces += [(keys[at:first], rest[at:first]), _pack(tree, tx, level - 1, children, inner, outer)]
        at = end
    pieces.append((keys[at:], rest[at:]))
    return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])


def _pack(tree: Tree, tx: "Tx", level: int, nodes: list[int], keys: Words, rest: Words) -> tuple[Words, Words]:
    """Fill nodes evenly with these entries, owned `nodes` first; return their first keys and, as rows, their PFNs."""
    room, first, width = _shape(tree, level)
    wanted = min(len(keys), 1) if len(keys) <= room else -(-len(keys) // (room - (room >> 4)))
    for pfn in nodes[wanted:]:
        tx.free_node(pfn)
    pfns = np.array(nodes[:wanted] + [tx.new_node(tree, level) for _ in range(wanted - len(nodes))], np.int64)
    if not wanted:
        return keys, rest[:, :1]
    bounds = np.arange(wanted + 1) * len(keys) // wanted
    sizes = np.diff(bounds)
    row = np.repeat(np.arange(wanted), sizes)
    column = np.arange(len(keys)) - np.repeat(bounds[:-1], sizes)
    block = np.zeros((wanted, _PAGE), np.uint64)
    block[row, NODE_WORDS + column] = keys
    for word in range(width):
        block[row, first + column * width + word] = rest[:, word]
    pages = _pages(tx)
    pages[pfns, NODE_WORDS:] = block[:, NODE_WORDS:]
    pages[pfns, 0] = sizes.astype(np.uint64) | np.uint64(tree.tag << 24 | level << 16)
    return keys[bounds[:-1]], pfns.astype(np.uint64)[:, None]
