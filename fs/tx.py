"""Views and transactions: how the trees are read without a lock and changed under one.

A `View` is one published generation. A `Tx` is the generation after it in the making: it copies nodes before changing them,
so nothing that a reader can reach ever changes, and `commit` publishes it by storing one word. Until that store
the next holder of the lock undoes everything; after it, everything has happened.
"""

import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from onecopy.blkcache.frames import DIRTY, SHARED, Frames, Run
from onecopy.blkcache.limbo import Limbo
from onecopy.daxemu.errors import CorruptRecord
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.runtime import Runtime, W
from onecopy.daxemu.steps import reach
from onecopy.daxemu.units import pages_of
from onecopy.fs import counts
from onecopy.fs.btree import ROOTS, Tree
from onecopy.fs.format import LIVE_ROOT, SUBVOLUME

if TYPE_CHECKING:
    from onecopy.fs.mapped import Changes, Seen

_LIVE = W["live_generation"]
_SLOTS = (W["live_root_0"] * 8, W["live_root_1"] * 8)
_MAX_NAMES = 1 << 16


class Conflict(Exception):
    """Stores came to pages of a mapped file that a transaction was moving: it has not happened, and may be tried again."""


Name = tuple[int, int, bytes]  # (subvolume, directory's inode number, name)


class Subvolume:
    """A decoded subvolume record (see format.SUBVOLUME) and its number `id`."""

    __slots__ = ("created", "directory", "flags", "id", "inodes", "next_inode", "origin", "parent", "root")

    def __init__(self, number: int, *fields: int) -> None:
        self.id = number
        (
            self.root,
            self.next_inode,
            self.parent,
            self.directory,
            self.created,
            self.origin,
            self.inodes,
            self.flags,
        ) = fields

    def pack(self) -> bytes:
        """Return the record."""
        try:
            return SUBVOLUME.pack(
                self.root, self.next_inode, self.parent, self.directory, self.created, self.origin, self.inodes, self.flags
            )
        except struct.error as error:  # fewer inodes than were removed
            raise CorruptRecord("subvolume", self.root, f"{self.id}", expected="inodes counted", actual=error) from error

    def copy(self) -> "Subvolume":
        """Return a copy that a transaction may change."""
        return Subvolume(
            self.id,
            self.root,
            self.next_inode,
            self.parent,
            self.directory,
            self.created,
            self.origin,
            self.inodes,
            self.flags,
        )


class View:
    """One generation of the trees. What is looked up is remembered; a view is dropped with its generation."""

    seen: "Seen | None" = None  # a reader's: what mapped files hold is newer than the trees say

    def __init__(self, runtime: Runtime, pool: Pool, generation: int) -> None:
        self.generation = generation
        self.words, self.bytes = pool.words, pool.bytes
        self.cached, self.fetch = pool.cached, pool.fetch
        self.table: memoryview = runtime.table
        self.array: npt.NDArray[np.uint8] = runtime.table_array
        fields = LIVE_ROOT.unpack_from(runtime.bytes, _SLOTS[generation & 1])
        self.roots, self.counts, self.next_subvolume, self.limbo_tail = fields[:4]
        self.subvolumes: dict[int, Subvolume] = {}
        self.names: dict[Name, tuple[int, int, int]] = {}  # name -> (target, kind, generation); target 0: nothing

    def subvolume(self, number: int) -> Subvolume | None:
        """Return subvolume `number`, None when there is none (a snapshot's entry of a nested one, or deleted)."""
        found = self.subvolumes.get(number)
        if found is None:
            offset = ROOTS.find(self.words, self.roots, number)
            if offset < 0:
                return None
            found = self.subvolumes[number] = Subvolume(number, *SUBVOLUME.unpack_from(self.bytes, offset))
        return found

    def remember(self, name: Name, target: int, kind: int) -> None:
        """Note what `name` leads to; target 0: nothing.

        Threads of older views share the dictionary with the transaction that makes the next one. They never replace
        an entry, so what a transaction wrote stays, and nobody uses an entry younger than its view.
        """
        if len(self.names) < _MAX_NAMES:
            self.names.setdefault(name, (target, kind, self.generation))


class Tx(View):
    """The next generation. The caller holds the transaction lock from before the first call until after the last."""

    changes: "Changes | None" = None  # what it does to mapped files, when there are any

    def __init__(self, view: View, runtime: Runtime, pool: Pool, frames: Frames, limbo: Limbo, *, reserve: bool) -> None:
        # Not View.__init__: a transaction starts from what its view already knows.
        self.generation = view.generation + 1
        self.words, self.bytes, self.table, self.array = view.words, view.bytes, view.table, view.array
        self.cached, self.fetch = view.cached, view.fetch
        self.roots, self.counts, self.next_subvolume, self.limbo_tail = (
            view.roots, view.counts, view.next_subvolume, view.limbo_tail,
        )  # fmt: skip
        self.subvolumes, self.names = dict(view.subvolumes), view.names
        self.runtime, self.pool, self.frames, self.limbo = runtime, pool, frames, limbo
        self.freed: list[Run] = []
        self._changed: set[int] = set()
        self.in_place: list[tuple[int, memoryview, int]] = []
        self.inode_moves = 0  # changes when an inode's record may have moved within its tree
        self._reserve = reserve
        frames.begin(self.generation, reserve=reserve)

    # ------------------------------------------------------------- nodes

    def new_node(self, tree: Tree, level: int) -> int:
        """Take a frame for an empty node of `tree`; return its PFN."""
        pfn = self.frames.take_node()
        base = pfn << 9
        words = self.words
        words[base] = tree.tag << 24 | level << 16
        words[base + 1], words[base + 2], words[base + 3] = pfn, self.generation, 0
        return pfn

    def own(self, tree: Tree, pfn: int, later: tuple[list[tuple[int, int]], list[int]] | None = None) -> int:
        """Return the PFN of a node that this transaction may change: `pfn` itself, or its copy.

        A node with several references is copied for one of them: it loses that reference, and everything below it gains
        one, now being reachable from two nodes. A node that was shared until lately hands its hint down instead: the
        durable root may still name it twice, and `extents.pieces` must see that below the copy, too. `later`: lists of
        what is to be handed down by the caller, see `own_all`.
        """
        words, base = self.words, pfn << 9
        try:
            hint = self.table[pfn] & SHARED
            shared = hint and tree.shareable and counts.references(self, pfn) > 1
            if words[base + 2] == self.generation and not shared:
                return pfn
            if words[base] >> 24 != tree.tag:
                tree.enter(words, pfn)
        except IndexError:
            tree.enter(words, pfn)
        mine = self.frames.take_node()
        copy = mine << 9
        # All but the generation, which `take_node` has set: a death must at no point leave another one there.
        words[copy], words[copy + 1] = words[base], mine
        words[copy + 3 : copy + 512] = words[base + 3 : base + 512]
        reach("node copied")
        if shared and later:
            later[0].append((pfn, mine))
        elif shared:
            counts.add(self, pfn, 1, -1)
            counts.share_children(self, tree, copy)
        else:
            if hint and later:
                later[1].append(mine)
            elif hint:
                counts.hint_children(self, tree, copy)
            self.freed.append((pfn, 1))
        return mine

    def own_all(self, tree: Tree, pfns: list[int]) -> list[int]:
        """`own` different nodes of one level of an extent or counts tree, handing down counts and hints of all at once."""
        later = list[tuple[int, int]](), list[int]()
        mine = [self.own(tree, pfn, later) for pfn in pfns]
        counts.share_many(self, tree, *later)
        return mine

    def free_node(self, pfn: int) -> None:
        """Let go of a node that has no reference left."""
        self.freed.append((pfn, 1))

    # -------------------------------------------------------------- data

    def store(self, pfn: int, data: bytes | memoryview, offset: int = 0) -> None:
        """Store file content into frames that this transaction may change, from `offset` bytes into the first."""
        self.pool.store((pfn << 12) + offset, data)
        reach("data stored")

    def store_in_place(self, pfn: int, data: memoryview, offset: int) -> None:
        """Store into frames that others can read already, from `offset` bytes into the first: as `commit`'s last act.

        Only then can nothing fail any more, and a failure before leaves every byte as it was. `data` must stay as it is.
        """
        self.in_place.append((pfn, data, offset))

    def take_back(self, strays: list[Run]) -> None:
        """Free frames that write faults have taken and nothing names; through limbo, as readers may be looking at them."""
        self.frames.adopt(strays)
        self.freed += strays

    # -------------------------------------------------------- subvolumes

    def change(self, subvolume: Subvolume) -> Subvolume:
        """Return the subvolume's record to change in this transaction; `commit` writes it."""
        if subvolume.id in self._changed:
            return self.subvolumes[subvolume.id]
        mine = self.subvolumes[subvolume.id] = subvolume.copy()
        self._changed.add(subvolume.id)
        return mine

    def remember(self, name: Name, target: int, kind: int) -> None:
        """Note what `name` leads to from this generation on."""
        self.names[name] = (target, kind, self.generation)

    def add_subvolume(self, subvolume: Subvolume) -> None:
        """Insert a new subvolume's record."""
        self.roots = ROOTS.insert(self, self.roots, subvolume.id, subvolume.pack())
        self.subvolumes[subvolume.id] = subvolume

    def remove_subvolume(self, number: int) -> None:
        """Remove a subvolume's record; its inode tree has been dropped."""
        self.roots = ROOTS.delete(self, self.roots, number)
        self.subvolumes.pop(number, None)
        self._changed.discard(number)

    # ------------------------------------------------------------ ending

    def commit(self) -> View:
        """Publish; return the view of the new generation."""
        for number in self._changed:
            self.roots = ROOTS.update(self, self.roots, number, self.subvolumes[number].pack())
        self.limbo_tail = self.limbo.append(self.freed, self.limbo_tail, self.generation)
        self.frames.settle_room(reserve=self._reserve)
        reach("limbo appended")
        for pfn, data, offset in self.in_place:
            self.array[pfn : pfn + pages_of(offset + len(data))] |= np.uint8(DIRTY)
            self.store(pfn, data, offset)
        # The slot of our parity holds the generation before our view's: no reader that will succeed is using it, since
        # `announce` and the reader's own check see that live_generation has moved past it.
        fields = (self.roots, self.counts, self.next_subvolume, self.limbo_tail, b"")
        LIVE_ROOT.pack_into(self.runtime.bytes, _SLOTS[self.generation & 1], *fields)
        reach("live root written")
        if self.changes is None or not self.changes.write_log(self):
            self.runtime.atomic.store(_LIVE, self.generation)
        elif self.changes.engine.commit(self.generation) >= 0:  # publishes, and changes the entries
            raise Conflict
        reach("published")
        if self.changes is not None:
            self.changes.published()
        view = View(self.runtime, self.pool, self.generation)
        view.subvolumes = self.subvolumes
        if len(self.names) < _MAX_NAMES:  # else the next view starts a dictionary of its own
            view.names = self.names
        return view


def live_slot(generation: int) -> int:
    """Return the byte offset, in the run-time file, of the live root of `generation`."""
    return _SLOTS[generation & 1]
