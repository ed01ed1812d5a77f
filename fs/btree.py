"""The copy-on-write B+tree: one implementation for all trees (after Rodeh, "B-trees, shadowing, and clones", TOS 2008).

A node is a page; `words` is the whole pool as 64-bit words, so node PFN p starts at word p * 512 and bisect works in place.
Readers pass a committed root and take no lock: nodes reachable from it never change. Writers pass a transaction, whose
`own` copies a node before its first change and hands the counts of a shared one down; splitting and merging are done on
the way down, so one pass suffices and no parent is visited twice.

Keys are unsigned 64-bit integers; values have a fixed size per tree and are addressed by byte offset into the pool.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onecopy.daxemu.errors import CorruptRecord
from onecopy.daxemu.record import Record
from onecopy.fs.format import COUNT, DIRENT, EXTENT, FANOUT, INODE, KINDS, NODE_MAGIC, NODE_WORDS, SUBVOLUME

if TYPE_CHECKING:
    from onecopy.fs.tx import Tx

MAX_KEY = (1 << 64) - 1
_COUNT = 0xFFFF
_K = NODE_WORDS  # first key, in words from the node's start
_C = NODE_WORDS + FANOUT  # first child
_MAX_LEVEL = 12  # 127^12 keys: deeper than any pool

Words = memoryview  # of the pool, cast to 64-bit words


class Tree:
    """A kind of tree: look-ups and changes given a root PFN (0 = empty). Changes return the new root."""

    def __init__(self, kind: int, value: Record, *, shareable: bool = True) -> None:
        self.kind, self.name, self.value = kind, KINDS[kind], value
        self.shareable = shareable  # False: its nodes always have one reference
        self.tag = NODE_MAGIC << 8 | kind
        self.width = value.size // 8
        self.capacity = (512 - NODE_WORDS) // (1 + self.width)  # entries of a leaf
        self.values = NODE_WORDS + self.capacity  # first value, in words from the node's start

    # ------------------------------------------------------------ reading

    def enter(self, words: Words, pfn: int, level: int | None = None) -> int:
        """Return the first word of node `pfn` after checking that it is one of this tree's, at `level` (S10)."""
        base = pfn << 9
        try:
            head = words[base]
        except IndexError:
            raise CorruptRecord(f"{self.name} pointer", pfn, "PFN", expected="one within the pool", actual=pfn) from None
        found = head >> 16 & 0xFF
        if head >> 24 != self.tag or found > _MAX_LEVEL or (level is not None and found != level):
            want = f"kind {self.kind}" + ("" if level is None else f", level {level}")
            raise CorruptRecord(f"{self.name} node", pfn, "header", expected=want, actual=f"{head:#018x}")
        if not 0 < head & _COUNT <= (FANOUT if found else self.capacity):
            raise CorruptRecord(f"{self.name} node", pfn, "count", expected="one that fits", actual=head & _COUNT)
        return base

    def find(self, words: Words, root: int, key: int) -> int:
        """Return the byte offset of the value of `key`, -1 when there is none."""
        if not root:
            return -1
        base = self._leaf(words, root, key)
        end = base + _K + (words[base] & _COUNT)
        at = bisect_left(words, key, base + _K, end)
        if at < end and words[at] == key:
            return (base + self.values + (at - base - _K) * self.width) * 8
        return -1

    def _leaf(self, words: Words, root: int, key: int) -> int:
        """Return the first word of the leaf where `key` belongs."""
        pfn = root
        try:
            base = root << 9
            head = words[base]
            mark = head >> 16  # magic, kind, level
            if mark >> 8 != self.tag:
                self.enter(words, root)
            while mark & 0xFF:
                pfn = words[bisect_right(words, key, base + _K + 1, base + _K + (head & _COUNT)) + (_C - _K - 1)]
                base = pfn << 9
                head = words[base]
                mark -= 1
                if head >> 16 != mark:
                    self.enter(words, pfn, mark & 0xFF)
            return base
        except IndexError:
            return self.enter(words, pfn)  # which says what is wrong with it

    def alone(self, words: Words, root: int, key: int, pages: int) -> int:
        """Return `find` of a fragment of `pages` at `key` if its leaf shows that no neighbour touches it; else -1."""
        if not root:
            return -1
        base = self._leaf(words, root, key)
        end = base + _K + (words[base] & _COUNT)
        at = bisect_left(words, key, base + _K, end)
        value = base + self.values + (at - base - _K) * self.width
        if at == end or words[at] != key or words[value] != pages:
            return -1
        if at > base + _K:
            if words[at - 1] + words[value - self.width] == key:
                return -1
        elif base != root << 9:
            return -1
        if at + 1 < end:
            if words[at + 1] == key + pages:
                return -1
        elif base != root << 9:
            return -1
        return value * 8

    def slices(self, words: Words, root: int, low: int = 0, high: int = MAX_KEY) -> Iterator[tuple[int, int, int]]:
        """Yield (first word of a leaf, i, j) such that entries [i, j) of the leaves have low <= key < high, in order."""
        if not root:
            return
        stack = [(root, -1)]
        while stack:
            pfn, level = stack.pop()
            base = self.enter(words, pfn, None if level < 0 else level)
            head = words[base]
            count, level = head & _COUNT, head >> 16 & 0xFF
            if level:
                first = bisect_right(words, low, base + _K + 1, base + _K + count) - 1
                last = bisect_left(words, high, base + _K + 1, base + _K + count)
                stack.extend((child, level - 1) for child in words[first + _C - _K : last + _C - _K].tolist()[::-1])
            else:
                i = bisect_left(words, low, base + _K, base + _K + count) - base - _K
                j = bisect_left(words, high, base + _K, base + _K + count) - base - _K
                if i < j:
                    yield base, i, j

    def items(self, words: Words, root: int, low: int = 0, high: int = MAX_KEY) -> Iterator[tuple[int, int]]:
        """Yield (key, byte offset of its value) for low <= key < high, in order."""
        for base, i, j in self.slices(words, root, low, high):
            keys = words[base + _K + i : base + _K + j].tolist()
            first, step = (base + self.values + i * self.width) * 8, self.width * 8
            for n, key in enumerate(keys):
                yield key, first + n * step

    def floor(self, words: Words, root: int, key: int) -> tuple[int, int] | None:
        """Return (greatest key <= `key`, byte offset of its value), None when there is none."""
        if not root:
            return None
        left = 0  # nearest subtree to the left of the path
        base = self.enter(words, root)
        while True:
            head = words[base]
            count, level = head & _COUNT, head >> 16 & 0xFF
            if level:
                at = bisect_right(words, key, base + _K + 1, base + _K + count) - 1
                if at > base + _K:
                    left = words[at + _C - _K - 1]
                base = self.enter(words, words[at + _C - _K], level - 1)
                continue
            at = bisect_right(words, key, base + _K, base + _K + count) - 1
            if at >= base + _K:
                return words[at], (base + self.values + (at - base - _K) * self.width) * 8
            if not left:
                return None
            base, left, key = self.enter(words, left), 0, MAX_KEY

    def children(self, words: Words, base: int) -> list[int]:
        """Return the PFNs of an inner node's children; [] for a leaf."""
        head = words[base]
        return words[base + _C : base + _C + (head & _COUNT)].tolist() if head >> 16 & 0xFF else []

    def leaf_items(self, words: Words, base: int) -> list[tuple[int, int]]:
        """Return (key, byte offset of its value) of a leaf's entries."""
        keys = words[base + _K : base + _K + (words[base] & _COUNT)].tolist()
        return [(key, (base + self.values + n * self.width) * 8) for n, key in enumerate(keys)]

    # ----------------------------------------------------------- changing

    def _full(self, head: int) -> bool:
        return (head & _COUNT) >= (FANOUT if head & 0xFF0000 else self.capacity)

    def update(self, tx: "Tx", root: int, key: int, value: bytes) -> int:
        """Replace the value of `key`, which exists; return the new root."""
        root, offset = self.own_value(tx, root, key)
        tx.bytes[offset : offset + len(value)] = value
        return root

    def own_value(self, tx: "Tx", root: int, key: int) -> tuple[int, int]:
        """Make the path to `key`, which exists, the transaction's own; return (new root, byte offset of the value)."""
        words = tx.words
        root = tx.own(self, root)
        base = root << 9
        head = words[base]
        while head & 0xFF0000:
            at = bisect_right(words, key, base + _K + 1, base + _K + (head & _COUNT)) - 1
            base = self.own_child(tx, at) << 9
            head = words[base]
        at = bisect_left(words, key, base + _K, base + _K + (head & _COUNT))
        if at >= base + _K + (head & _COUNT) or words[at] != key:
            raise CorruptRecord(f"{self.name} node", base >> 9, "key", expected=key, actual="none")
        return root, (base + self.values + (at - base - _K) * self.width) * 8

    def own_path(self, tx: "Tx", root: int, low: int, high: int) -> int:
        """Make every node on the paths to keys of [low, high) this transaction's own; return the new root."""
        if not root:
            return 0
        root = tx.own(self, root)
        stack, words = [root << 9], tx.words
        while stack:
            base = stack.pop()
            head = words[base]
            if head & 0xFF0000:
                end = base + _K + (head & _COUNT)
                first = bisect_right(words, low, base + _K + 1, end) - 1
                last = bisect_left(words, high, base + _K + 1, end)
                stack.extend(self.own_child(tx, at) << 9 for at in range(first, last))
        return root

    def own_child(self, tx: "Tx", at: int) -> int:
        """Own the child behind key word `at` of an owned inner node; return its PFN. It is one level lower (no circles)."""
        words = tx.words
        child = words[at + _C - _K]
        mine = tx.own(self, child)
        level = (words[at >> 9 << 9] >> 16 & 0xFF) - 1
        if words[mine << 9] >> 16 & 0xFF != level:
            self.enter(words, mine, level)
        if mine != child:
            words[at + _C - _K] = mine
        return mine

    def insert(self, tx: "Tx", root: int, key: int, value: bytes) -> int:
        """Set the value of `key`; return the new root."""
        words = tx.words
        if not root:
            root = tx.new_node(self, 0)
            base = root << 9
            words[base] += 1
            words[base + _K] = key
            offset = (base + self.values) * 8
            tx.bytes[offset : offset + len(value)] = value
            return root
        root = tx.own(self, root)
        base = root << 9
        head = words[base]
        if self._full(head):
            top = tx.new_node(self, (head >> 16 & 0xFF) + 1)
            above = top << 9
            words[above] += 1
            words[above + _K], words[above + _C] = words[base + _K], root
            self._split(tx, above, above + _K, key)
            root, base = top, above
            head = words[base]
        while head & 0xFF0000:
            end = base + _K + (head & _COUNT)
            at = bisect_right(words, key, base + _K + 1, end) - 1
            words[at] = min(words[at], key)  # only for the first child: keep its key a lower bound
            child = self.own_child(tx, at) << 9
            head = words[child]
            if self._full(head):
                self._split(tx, base, at, key)
                if key >= words[at + 1]:
                    child = words[at + 1 + _C - _K] << 9
                head = words[child]
            base = child
        end = base + _K + (head & _COUNT)
        at = bisect_left(words, key, base + _K, end)
        first, width = base + self.values, self.width
        here = first + (at - base - _K) * width
        if at == end or words[at] != key:
            if at < end:
                words[at + 1 : end + 1] = words[at:end]
                last = first + (end - base - _K) * width
                words[here + width : last + width] = words[here:last]
            words[at] = key
            words[base] = head + 1
        tx.bytes[here * 8 : here * 8 + len(value)] = value
        return root

    def _split(self, tx: "Tx", parent: int, at: int, key: int) -> None:
        """Split the full, owned child behind key word `at` of `parent`, which has room."""
        words = tx.words
        left = words[at + _C - _K] << 9
        head = words[left]
        count, level = head & _COUNT, head >> 16 & 0xFF
        # Keys that arrive in ascending order leave full nodes behind, not half-full ones.
        keep = count - max(1, count >> 4) if key > words[left + _K + count - 1] else count >> 1
        moved = count - keep
        pfn = tx.new_node(self, level)
        right = pfn << 9
        words[right + _K : right + _K + moved] = words[left + _K + keep : left + _K + count]
        first, width = (_C, 1) if level else (self.values, self.width)
        words[right + first : right + first + moved * width] = words[left + first + keep * width : left + first + count * width]
        words[right] += moved
        words[left] = head - moved
        end = parent + _K + (words[parent] & _COUNT)
        words[at + 2 : end + 1] = words[at + 1 : end]
        words[at + 2 + _C - _K : end + 1 + _C - _K] = words[at + 1 + _C - _K : end + _C - _K]
        words[at + 1], words[at + 1 + _C - _K] = words[right + _K], pfn
        words[parent] += 1

    def delete(self, tx: "Tx", root: int, key: int) -> int:
        """Remove `key`, which exists; return the new root, 0 when the tree is empty now."""
        words = tx.words
        root = tx.own(self, root)
        base = root << 9
        head = words[base]
        while head & 0xFF0000:
            at = bisect_right(words, key, base + _K + 1, base + _K + (head & _COUNT)) - 1
            child = self.own_child(tx, at) << 9
            if (words[child] & _COUNT) <= (FANOUT if words[child] & 0xFF0000 else self.capacity) >> 2:
                child = self._join(tx, base, at, key)
            base = child
            head = words[base]
        end = base + _K + (head & _COUNT)
        at = bisect_left(words, key, base + _K, end)
        if at >= end or words[at] != key:
            raise CorruptRecord(f"{self.name} node", base >> 9, "key", expected=key, actual="none")
        words[at : end - 1] = words[at + 1 : end]
        first, width = base + self.values, self.width
        here, last = first + (at - base - _K) * width, first + (end - base - _K) * width
        words[here : last - width] = words[here + width : last]
        words[base] = head - 1
        return self.shrink(tx, root)

    def shrink(self, tx: "Tx", root: int) -> int:
        """Drop an empty root, or inner roots with one child."""
        words = tx.words
        while True:
            head = words[root << 9]
            if not head & _COUNT:
                tx.free_node(root)
                return 0
            if not head & 0xFF0000 or head & _COUNT > 1:
                return root
            child = words[(root << 9) + _C]
            tx.free_node(root)
            root = child

    def _join(self, tx: "Tx", parent: int, at: int, key: int) -> int:
        """Merge or level the thin child behind `at` with a neighbour; return the first word of the node for `key`."""
        words = tx.words
        count = words[parent] & _COUNT
        if count == 1:
            return words[at + _C - _K] << 9
        if at == parent + _K + count - 1:
            at -= 1
        left, right = self.own_child(tx, at) << 9, self.own_child(tx, at + 1) << 9
        heads = words[left], words[right]
        counts = heads[0] & _COUNT, heads[1] & _COUNT
        inner = bool(heads[0] & 0xFF0000)
        first, width = (_C, 1) if inner else (self.values, self.width)
        if inner:
            words[right + _K] = words[at + 1]  # the separator is the sharper lower bound
        keys = words[left + _K : left + _K + counts[0]].tolist() + words[right + _K : right + _K + counts[1]].tolist()
        rest = (
            words[left + first : left + first + counts[0] * width].tolist()
            + words[right + first : right + first + counts[1] * width].tolist()
        )
        total = len(keys)
        keep = total if total <= (FANOUT if inner else self.capacity) else total >> 1
        self._fill(tx, left, keys[:keep], rest[: keep * width], first)
        words[left] = heads[0] - counts[0] + keep
        if keep < total:
            self._fill(tx, right, keys[keep:], rest[keep * width :], first)
            words[right] = heads[1] - counts[1] + total - keep
            words[at + 1] = keys[keep]
            return right if key >= keys[keep] else left
        tx.free_node(right >> 9)
        end = parent + _K + count
        words[at + 1 : end - 1] = words[at + 2 : end]
        words[at + 1 + _C - _K : end - 1 + _C - _K] = words[at + 2 + _C - _K : end + _C - _K]
        words[parent] -= 1
        return left

    @staticmethod
    def _fill(tx: "Tx", base: int, keys: list[int], rest: list[int], first: int) -> None:
        for at, values in ((base + _K, keys), (base + first, rest)):
            tx.words[at : at + len(values)] = memoryview(array("Q", values))


ROOTS = Tree(1, SUBVOLUME, shareable=False)
INODES = Tree(2, INODE)
ENTRIES = Tree(3, DIRENT)
EXTENTS = Tree(4, EXTENT)
COUNTS = Tree(5, COUNT, shareable=False)
TREES = {tree.kind: tree for tree in (ROOTS, INODES, ENTRIES, EXTENTS, COUNTS)}
