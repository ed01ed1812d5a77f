"""The check: recounts everything from the trees, with nothing of the code that keeps the counts, and compares (S6).

Findings have permanent codes. It reads the pool page by page with numpy and struct and goes on after damage where it can.
"""

import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onecopy.daxemu.errors import CorruptRecord
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.record import Record, checksum
from onecopy.daxemu.units import PAGE, pages_of
from onecopy.fs import superblock
from onecopy.fs.format import (
    COUNT,
    DIRENT,
    EXTENT,
    FIRST_FREE,
    INLINE,
    INLINE_DATA,
    INLINE_EXTENTS,
    INODE,
    KINDS,
    MAX_INLINE_EXTENTS,
    NODE,
    NODE_MAGIC,
    ROOT_INODE,
    SUBVOLUME,
    TOP,
)  # fmt: skip

if TYPE_CHECKING:
    pass

CODES = {
    "superblock": "a superblock slot is damaged (the other one serves)",
    "no-superblock": "neither superblock slot is valid",
    "node": "a tree node's header, PFN, level or count is wrong",
    "checksum": "a tree node's checksum is wrong",
    "order": "keys of a node are not ascending or outside of its parent's range",
    "pointer": "a PFN lies outside of the pool",
    "overlap": "extents of a file overlap, or frames serve as a node and as data",
    "references": "a fragment's stored count differs from the references found (S6)",
    "fragments": "equal neighbouring fragments, or one with fewer than two references",
    "frames": "the frame table differs from what the trees reach (S6)",
    "pages": "an inode's page count differs from its extents",
    "inode": "an inode's fields contradict each other",
    "links": "an inode's link count differs from the names found",
    "name": "a directory entry leads nowhere or its records are damaged",
    "orphan": "an inode has no name",
    "entries": "an address space shows other frames than the extents, or holds shared ones private (S2)",
    "subvolume": "a subvolume's record contradicts the trees",
}

_TREE = {name: kind for kind, name in KINDS.items()}
_VALUES: dict[int, Record] = {
    _TREE["root tree"]: SUBVOLUME, _TREE["inode tree"]: INODE, _TREE["directory tree"]: DIRENT,
    _TREE["extent tree"]: EXTENT, _TREE["counts tree"]: COUNT,
}  # fmt: skip
_Array = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a code of `CODES`, where, at which PFN (0: none), what was expected and found."""

    code: str
    where: str
    pfn: int
    expected: str
    actual: str

    @property
    def message(self) -> str:
        """Return the finding in words."""
        return f"{CODES[self.code]}: {self.where}: expected {self.expected}, found {self.actual}"


@dataclass
class CheckReport:
    """The findings, and how much was looked at."""

    findings: list[Finding] = field(default_factory=list)
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True without findings."""
        return not self.findings


class Checker:
    """One check of one generation. `unsynced`: nodes whose checksum is not set yet."""

    def __init__(self, pool: Pool, unsynced: npt.NDArray[np.bool_] | None = None) -> None:
        self.pool, self.unsynced = pool, unsynced
        self.words: _Array = np.frombuffer(pool.words, np.uint64)
        self.report = CheckReport()
        self.references = np.zeros(pool.frames + 1, np.int64)
        self.is_node = np.zeros(pool.frames, bool)
        self.is_data = np.zeros(pool.frames, bool)
        self.counted: Counter[str] = Counter()
        self.leaves: dict[tuple[int, int], list[tuple[int, _Array, _Array]]] = {}  # by kind and root, see `tree`

    def found(self, code: str, where: str, pfn: int, expected: object, actual: object) -> None:
        """Note a finding."""
        self.report.findings.append(Finding(code, where, pfn, str(expected), str(actual)))

    # ------------------------------------------------------------- trees

    def tree(self, kind: int, root: int, where: str) -> list[tuple[int, _Array, _Array]]:
        """Return the leaves of a tree as (PFN, keys, values); every node's references are counted once, at its parent.

        `self.references[root]` is the caller's to count. A tree seen before is not walked again.
        """
        if (kind, root) in self.leaves:
            return self.leaves[kind, root]
        leaves: list[tuple[int, _Array, _Array]] = []
        stack: list[tuple[int, int | None, int, int]] = [(root, None, 0, (1 << 64) - 1)]
        while stack:
            pfn, level, low, high = stack.pop()
            node = self.node(kind, pfn, level, where)
            if node is None:
                continue
            level, keys, rest, first_visit = node
            if len(keys) > 1 and not (keys[1:] > keys[:-1]).all():
                self.found("order", where, pfn, "ascending keys", "a disorder")
            checked = keys if level == 0 else keys[1:]
            if len(checked) and not (low <= int(checked[0]) and int(checked[-1]) <= high):
                self.found("order", where, pfn, f"keys from {low} to {high}", f"{int(checked[0])} to {int(checked[-1])}")
            if level:
                if first_visit:
                    inside = rest[rest < self.pool.frames].astype(np.int64)
                    np.add.at(self.references, inside, 1)
                edges = [low, *keys[1:].tolist(), high + 1]
                stack += [(int(c), level - 1, edges[n], edges[n + 1] - 1) for n, c in reversed(list(enumerate(rest)))]
            else:
                leaves.append((pfn if first_visit else -pfn, keys, rest))
        self.leaves[kind, root] = [(-abs(pfn), keys, rest) for pfn, keys, rest in leaves]  # from now on, seen before
        return leaves

    def node(self, kind: int, pfn: int, level: int | None, where: str) -> tuple[int, _Array, _Array, bool] | None:
        """Return (level, keys, children or rows of values, first visit) of a node; None, noted, when it is damaged."""
        where = f"{KINDS[kind]} of {where}"
        if not FIRST_FREE <= pfn < self.pool.frames:
            self.found("pointer", where, pfn, f"{FIRST_FREE} to {self.pool.frames - 1}", pfn)
            return None
        header = NODE.unpack(self.pool.bytes, pfn * PAGE)
        expected = {"magic": NODE_MAGIC, "kind": kind, "pfn": pfn}
        if level is not None:
            expected["level"] = level
        for name, value in expected.items():
            if header[name] != value:
                self.found("node", where, pfn, f"{name} {value}", header[name])
                return None
        count, depth = int(header["count"]), int(header["level"])
        width = 1 if depth else _VALUES[kind].size // 8
        room = (PAGE - NODE.size) // 8 // (1 + width)
        if not 0 < count <= room or depth > 12:
            self.found("node", where, pfn, f"1 to {room} keys", f"{count} keys, level {depth}")
            return None
        first = not self.is_node[pfn]
        if first:
            self.is_node[pfn] = True
            self.counted["nodes"] += 1
            if self.unsynced is None or not self.unsynced[pfn]:
                actual = checksum(self.pool.bytes[pfn * PAGE : (pfn + 1) * PAGE], NODE.offset["checksum"])
                if header["checksum"] != actual:
                    self.found("checksum", where, pfn, header["checksum"], actual)
        base = pfn * PAGE // 8 + NODE.size // 8
        rest = self.words[base + room : base + room + count * width]
        return depth, self.words[base : base + count], rest if depth else rest.reshape(count, width), first

    # ------------------------------------------------------------ content

    def run(self, roots: int, counts: int) -> CheckReport:
        """Check everything reachable from the two roots."""
        self.references[roots] += 1
        subvolumes: dict[int, dict[str, Any]] = {}
        for _, keys, rows in self.tree(_TREE["root tree"], roots, "the pool"):
            for key, row in zip(keys.tolist(), rows, strict=True):
                record = SUBVOLUME.unpack(row.tobytes())
                subvolumes[key] = record
                if record["root"] < self.pool.frames:
                    self.references[record["root"]] += 1
        named: Counter[int] = Counter()
        for number, record in subvolumes.items():
            self.counted["subvolumes"] += 1
            named.update(self.subvolume(number, record, subvolumes))
        if TOP not in subvolumes:
            self.found("subvolume", "the root tree", roots, f"subvolume {TOP}", "none")
        for number in subvolumes:
            if number != TOP and named[number] != 1:
                self.found("subvolume", f"subvolume {number}", 0, "one name", f"{named[number]}")
        self.fragments(counts)
        both = np.flatnonzero(self.is_node & self.is_data)
        if len(both):
            self.found("overlap", "the pool", int(both[0]), "nodes and data apart", f"{len(both)} frames are both")
        self.counted["used_pages"] = int(np.count_nonzero(self.is_node | self.is_data)) + FIRST_FREE
        self.report.counted = dict(self.counted)
        return self.report

    def subvolume(self, number: int, record: dict[str, Any], others: dict[int, dict[str, Any]]) -> list[int]:
        """Check one subvolume's inodes and names; return the subvolumes that it names."""
        where = f"subvolume {number}"
        inodes: dict[int, dict[str, Any]] = {}
        for pfn, keys, rows in self.tree(_TREE["inode tree"], int(record["root"]), where):
            for key, row in zip(keys.tolist(), rows, strict=True):
                inodes[key] = INODE.unpack(row.tobytes())
                self.inode(f"{where}, inode {key}", pfn, inodes[key])
        if len(inodes) != record["inodes"]:
            self.found("subvolume", where, 0, f"{record['inodes']} inodes", len(inodes))
        if inodes and max(inodes) >= record["next_inode"]:
            self.found("subvolume", where, 0, f"inode numbers below {record['next_inode']}", max(inodes))
        names: Counter[int] = Counter()
        folders: Counter[int] = Counter()
        inner: list[int] = []
        for key, inode in inodes.items():
            if inode["attributes"]:
                names[int(inode["attributes"])] += 1
                if inode["attributes"] not in inodes:
                    self.found("inode", f"{where}, inode {key}", 0, "attributes in an inode", inode["attributes"])
            if not stat.S_ISDIR(int(inode["mode"])):
                continue
            entries = self.directory(f"{where}, directory {key}", int(inode["root"]))
            if len(entries) != inode["size"]:
                self.found("inode", f"{where}, directory {key}", 0, f"{inode['size']} names", len(entries))
            for name, target, kind in entries:
                if kind == 4:
                    if target in others and others[target]["parent"] == number:
                        inner.append(target)
                        if others[target]["directory"] != key:
                            self.found("subvolume", f"subvolume {target}", 0, f"directory {key}", others[target]["directory"])
                    continue
                child = inodes.get(target)
                if child is None or (stat.S_IFMT(int(child["mode"])) >> 12) != {1: 8, 2: 4, 3: 10}.get(kind):
                    self.found("name", f"{where}, directory {key}, {os.fsdecode(name)!r}", 0, f"inode {target} of kind {kind}",
                               "none" if child is None else oct(int(child["mode"])))  # fmt: skip
                    continue
                names[target] += 1
                if kind == 2:
                    folders[key] += 1
                    if child["parent"] != key:
                        self.found("inode", f"{where}, directory {target}", 0, f"parent {key}", child["parent"])
        for key, inode in inodes.items():
            links = 2 + folders[key] if stat.S_ISDIR(int(inode["mode"])) else names[key]
            if key != ROOT_INODE and not names[key]:
                self.found("orphan", f"{where}, inode {key}", 0, "a name", "none")
            elif links != inode["links"]:
                self.found("links", f"{where}, inode {key}", 0, links, inode["links"])
        self.counted["inodes"] += len(inodes)
        return inner

    def inode(self, where: str, pfn: int, inode: dict[str, Any]) -> None:
        """Check one inode; count what it refers to, if its leaf is visited for the first time (`pfn` > 0)."""
        flags, used, root = int(inode["flags"]), int(inode["inline_used"]), int(inode["root"])
        inline = inode["inline"]
        is_directory = stat.S_ISDIR(int(inode["mode"]))
        if bool(root) + bool(flags & INLINE_DATA) + bool(flags & INLINE_EXTENTS) > 1:
            self.found("inode", where, abs(pfn), "one home for the content", f"root {root}, flags {flags}")
        room = {INLINE_DATA: INLINE, INLINE_EXTENTS: MAX_INLINE_EXTENTS}.get(flags, 0)
        if used > room or flags & ~(INLINE_DATA | INLINE_EXTENTS):
            self.found("inode", where, abs(pfn), "known flags, and content that fits the record", f"flags {flags}, {used} used")
        if root and pfn > 0 and root < self.pool.frames:
            self.references[root] += 1
        if is_directory:
            return
        extents: list[tuple[int, int, int, int]] = []
        if flags & INLINE_DATA:
            if used > INLINE or used != inode["size"]:
                self.found("inode", where, abs(pfn), f"{inode['size']} bytes inline", used)
        elif flags & INLINE_EXTENTS:
            step = 8 + EXTENT.size
            for n in range(min(used, MAX_INLINE_EXTENTS)):
                key = int.from_bytes(inline[n * step : n * step + 8], "little")
                extents.append((key, *EXTENT.unpack_from(inline, n * step + 8)))
            self.extents(where, abs(pfn), extents, count=pfn > 0)
        elif root:
            new = (_TREE["extent tree"], root) not in self.leaves
            for leaf, keys, rows in self.tree(_TREE["extent tree"], root, where):
                values = rows.tolist()
                some = [(k, v[0], v[1] & 0xFFFFFFFF, v[1] >> 32) for k, v in zip(keys.tolist(), values, strict=True)]
                self.extents(where, abs(leaf), some, count=new and leaf > 0)
                extents += some
        pages = sum(e[2] for e in extents)
        if pages != inode["pages"]:
            self.found("pages", where, 0, pages, inode["pages"])
        end = max((page + count for page, _, count, _ in extents), default=0)
        if end > pages_of(inode["size"]):
            self.found("inode", where, 0, f"no pages behind its {inode['size']} bytes", f"{end} pages")
        for (page, _, count, _), after in pairwise(extents):
            if page + count > after[0]:
                self.found("overlap", where, 0, f"an extent behind page {page + count - 1}", f"one at {after[0]}")

    def extents(self, where: str, pfn: int, extents: list[tuple[int, int, int, int]], *, count: bool) -> None:
        """Mark the frames of extents, and count their references."""
        for page, first, pages, flags in extents:
            if not (first >= FIRST_FREE and 0 < pages <= self.pool.frames - first):
                self.found("pointer", f"{where}, page {page}", pfn, "frames within the pool", f"{first} and {pages} pages")
                continue
            if flags & ~1:
                self.found("inode", f"{where}, page {page}", pfn, "flags 0 or 1", flags)
            self.is_data[first : first + pages] = True
            if count:
                self.references[first : first + pages] += 1
                self.counted["extents"] += 1

    def directory(self, where: str, root: int) -> list[tuple[bytes, int, int]]:
        """Return a directory's (name, target, kind)."""
        if not root:
            return []
        found: list[tuple[bytes, int, int]] = []
        name, missing, target, kind, last = b"", 0, 0, 0, 0
        for pfn, keys, rows in self.tree(_TREE["directory tree"], root, where):
            for key, row in zip(keys.tolist(), rows, strict=True):
                if missing > 0:
                    if key != last + 1:
                        self.found("name", where, abs(pfn), f"record {last + 1:#x} of a name", f"{key:#x}")
                        missing = 0
                        continue
                    name += row.tobytes()[:missing]
                    missing -= DIRENT.size
                else:
                    record = DIRENT.unpack(row.tobytes())
                    target, kind, size = int(record["target"]), int(record["kind"]), int(record["length"])
                    name, missing = bytes(record["name"])[:size], size - 22
                    if not size or kind not in (1, 2, 3, 4):
                        self.found("name", where, abs(pfn), "a name of a known kind", f"{size} bytes of kind {kind}")
                        missing = 0
                        continue
                last = key
                if missing <= 0:
                    found.append((name, target, kind))
                    hashed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
                    if key >> 8 != hashed:
                        self.found("name", f"{where}, {os.fsdecode(name)!r}", abs(pfn), f"key {hashed << 8:#x}", f"{key:#x}")
        if len({name for name, _, _ in found}) != len(found):
            self.found("name", where, root, "every name once", "a repetition")
        return found

    # ------------------------------------------------------------- counts

    def fragments(self, root: int) -> None:
        """Compare the stored fragments with the references counted."""
        stored = np.ones(self.pool.frames + 1, np.int64)
        if root:
            self.references[root] += 1
            last_end, last_count = 0, 0
            for pfn, keys, rows in self.tree(_TREE["counts tree"], root, "the pool"):
                for key, (pages, count) in zip(keys.tolist(), rows.tolist(), strict=True):
                    where = f"fragment {key}"
                    if not (key >= FIRST_FREE and 0 < pages <= self.pool.frames - key):
                        self.found("pointer", where, abs(pfn), "frames within the pool", f"{pages} pages")
                        continue
                    if count < 2 or (key == last_end and count == last_count):
                        self.found("fragments", where, abs(pfn), "a maximal one, 2 references", f"{count} references")
                    if key < last_end:
                        self.found("fragments", where, abs(pfn), f"one behind {last_end}", key)
                    stored[key : key + pages] = min(count, np.iinfo(np.int64).max)
                    last_end, last_count = key + pages, count
                    self.counted["fragments"] += 1
        actual = np.maximum(self.references, 1)
        wrong = np.flatnonzero(stored != actual)
        for pfn in wrong[:100].tolist():
            self.found("references", f"frame {pfn}", pfn, int(actual[pfn]), int(stored[pfn]))


def check_pool(path: str) -> CheckReport:
    """Check the durable tree of a pool file, also of one that can't be opened. NotAPool, PoolVersionError, CorruptRecord."""
    pool = Pool(path, writable=False)
    try:
        checker = Checker(pool)
        for pfn in (1, 2):
            try:
                superblock.read_slot(pool, pfn)
            except CorruptRecord as error:
                blank = not any(pool.bytes[pfn * PAGE : (pfn + 1) * PAGE])
                if not blank:
                    checker.found("superblock", f"slot at PFN {pfn}", pfn, error.expected, error.actual)
        try:
            block = superblock.newest(pool)
        except CorruptRecord as error:
            checker.found("no-superblock", "the pool", error.pfn, error.expected, error.actual)
            return checker.report
        return checker.run(block.roots, block.counts)
    finally:
        pool.close()
