"""Making a pool's first trees, and deriving the run-time file's frame table by walking them.

Every node is verified here, once after each cold open: checksum, own PFN, kind, level (S10).
"""

import os
import stat
import time

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import NODE, SHARED, USED
from onecopy.daxemu.errors import CorruptRecord
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.record import checksum
from onecopy.daxemu.runtime import Runtime
from onecopy.daxemu.units import PAGE
from onecopy.fs import superblock
from onecopy.fs.btree import COUNTS, ENTRIES, EXTENTS, INODES, MAX_KEY, ROOTS, Tree
from onecopy.fs.format import (
    FIRST_FREE,
    INLINE_EXTENTS,
    INODE,
    LIVE_ROOT,
    MAX_INLINE_EXTENTS,
    ROOT_INODE,
    SUBVOLUME,
    TOP,
)  # fmt: skip
from onecopy.fs.format import (
    NODE as NODE_RECORD,
)
from onecopy.fs.superblock import Superblock
from onecopy.fs.tx import live_slot

_CHECKSUM = NODE_RECORD.offset["checksum"]


def make_trees(pool: Pool) -> None:
    """Write the trees of an empty pool (one subvolume, its root directory) and the first superblock."""
    now = time.time_ns()
    directory = INODE.pack(
        stat.S_IFDIR | 0o755, 2, os.geteuid(), os.getegid(), 0, now, now, now, 0, 0, ROOT_INODE, 0, 0, 0, b""
    )
    top = SUBVOLUME.pack(FIRST_FREE + 1, ROOT_INODE + 1, 0, 0, now, 0, 1, 0)
    for pfn, tree, key, value in ((FIRST_FREE, ROOTS, TOP, top), (FIRST_FREE + 1, INODES, ROOT_INODE, directory)):
        page = bytearray(PAGE)
        page[0:8] = (tree.tag << 24 | 1).to_bytes(8, "little")
        page[8:16], page[16:24] = pfn.to_bytes(8, "little"), (1).to_bytes(8, "little")
        page[32:40] = key.to_bytes(8, "little")
        page[tree.values * 8 : tree.values * 8 + len(value)] = value
        page[_CHECKSUM : _CHECKSUM + 8] = checksum(page, _CHECKSUM).to_bytes(8, "little")
        pool.store(pfn * PAGE, page)
        pool.persistence.flush(pfn, 1)
    pool.persistence.fence()
    superblock.write(pool, 1, 1, FIRST_FREE, 0, TOP + 1)


def node_checksum(pool: Pool, pfn: int) -> int:
    """Return what a node's checksum should be."""
    return checksum(pool.bytes[pfn * PAGE : (pfn + 1) * PAGE], _CHECKSUM)


def verify_node(pool: Pool, tree: Tree, pfn: int, level: int | None) -> int:
    """Check a node in full; return its first word. CorruptRecord."""
    if not FIRST_FREE <= pfn < pool.frames:
        raise CorruptRecord(f"{tree.name} pointer", pfn, "PFN", expected=f"{FIRST_FREE} to {pool.frames - 1}", actual=pfn)
    base = tree.enter(pool.words, pfn, level)
    if pool.words[base + 1] != pfn:
        raise CorruptRecord(f"{tree.name} node", pfn, "own PFN", expected=pfn, actual=pool.words[base + 1])
    found = node_checksum(pool, pfn)
    if pool.words[base + 3] != found:
        raise CorruptRecord(f"{tree.name} node", pfn, "checksum", expected=pool.words[base + 3], actual=found)
    return base


class Walk:
    """Visits every node that a superblock reaches, each once, and marks what is used."""

    def __init__(self, pool: Pool, table: npt.NDArray[np.uint8]) -> None:
        self.pool, self.table = pool, table
        self.words = np.frombuffer(pool.words, np.uint64)

    def run(self, block: Superblock) -> None:
        """Mark all that `block` names. CorruptRecord at the first damage."""
        self.table[:FIRST_FREE] = USED
        stack: list[tuple[Tree, int, int | None]] = [(ROOTS, block.roots, None)]
        if block.counts:
            stack.append((COUNTS, block.counts, None))
        while stack:
            tree, pfn, level = stack.pop()
            if pfn < self.pool.frames and self.table[pfn] & NODE:
                tree.enter(self.pool.words, pfn, level)  # shared: below it all has been seen
                continue
            base = verify_node(self.pool, tree, pfn, level)
            self.table[pfn] |= USED | NODE
            below = self.pool.words[base] >> 16 & 0xFF
            if below:
                stack += [(tree, child, below - 1) for child in tree.children(self.pool.words, base)]
            elif tree is not ENTRIES:
                stack += self._leaf(tree, base, pfn)
        self._next("subvolume", ROOTS, block.roots, block.next_subvolume)
        for _, offset in ROOTS.items(self.pool.words, block.roots):
            record = SUBVOLUME.unpack(self.pool.bytes, offset)
            self._next("inode", INODES, record["root"], record["next_inode"])

    def _next(self, what: str, tree: Tree, root: int, number: int) -> None:
        """Hold the number that the next record of a tree gets to be a new one."""
        last = tree.floor(self.pool.words, root, MAX_KEY)
        if last is not None and not last[0] < number < 1 << 63:
            raise CorruptRecord("root", root, f"number of the next {what}", expected=f"above {last[0]}", actual=number)

    def _leaf(self, tree: Tree, base: int, pfn: int) -> list[tuple[Tree, int, int | None]]:
        count = self.pool.words[base] & 0xFFFF
        first = base + tree.values
        values = self.words[first : first + count * tree.width].reshape(count, tree.width)
        if tree is ROOTS:
            return [(INODES, root, None) for root in values[:, SUBVOLUME.word("root")].tolist()]
        if tree is INODES:
            return self._inodes(values, pfn)
        if tree is COUNTS:
            keys = self.words[base + 4 : base + 4 + count]
            self._mark(keys, values[:, 0], SHARED, pfn)
        else:
            self._mark(values[:, 0], values[:, 1] & np.uint64(0xFFFFFFFF), USED, pfn)
        return []

    def _inodes(self, values: npt.NDArray[np.uint64], pfn: int) -> list[tuple[Tree, int, int | None]]:
        found: list[tuple[Tree, int, int | None]] = []
        flags = values[:, INODE.word("flags")]
        roots, modes = values[:, INODE.word("root")], values[:, 0]
        for row in np.flatnonzero(roots).tolist():
            tree = ENTRIES if stat.S_ISDIR(int(modes[row]) & 0xFFFFFFFF) else EXTENTS
            found.append((tree, int(roots[row]), None))
        start = INODE.word("inline")
        for row in np.flatnonzero(flags & np.uint64(INLINE_EXTENTS)).tolist():
            used = min(int(flags[row]) >> 32, MAX_INLINE_EXTENTS)
            triples = values[row, start : start + 3 * used].reshape(used, 3)
            self._mark(triples[:, 1], triples[:, 2] & np.uint64(0xFFFFFFFF), USED, pfn)
        return found

    def _mark(self, starts: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64], bit: int, pfn: int) -> None:
        frames = self.pool.frames
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if not (start >= FIRST_FREE and length and start + length <= frames):
                raise CorruptRecord(
                    "extent or fragment in node", pfn, "frames", expected=f"within {FIRST_FREE} to {frames - 1}",
                    actual=f"{start} and {length} pages",
                )  # fmt: skip
            if length == 1:
                self.table[start] |= bit
            else:
                self.table[start : start + length] |= np.uint8(bit)


def fill(runtime: Runtime, pool: Pool) -> None:
    """Fill a new run-time file from the newest superblock. Caller holds both locks exclusively. CorruptRecord."""
    block = superblock.newest(pool)
    Walk(pool, runtime.table_array).run(block)
    fields = (block.roots, block.counts, block.next_subvolume, 0, b"")
    LIVE_ROOT.pack_into(runtime.bytes, live_slot(block.generation), *fields)
    for name, value in (
        ("live_generation", block.generation),
        ("durable_generation", block.generation),
        ("data_hint", FIRST_FREE),
        ("node_hint", pool.frames - 1),
        ("node_floor", pool.frames),
        ("free", pool.frames - int(np.count_nonzero(runtime.table_array & USED))),
    ):
        runtime.set(name, value)
