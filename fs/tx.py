"""Views and transactions: how the trees are read without a lock and changed under one.

A `View` is one published generation. A `Tx` is the generation after it in the making: it copies nodes before changing them,
so nothing that a reader can reach ever changes, and `commit` publishes it by storing one word. Until that store
the next holder of the lock undoes everything; after it, everything has happened.
"""

import struct

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

_LIVE = W["live_generation"]
_SLOTS = (W["live_root_0"] * 8, W["live_root_1"] * 8)
_MAX_NAMES = 1 << 16

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

    def __init__(self, runtime: Runtime, pool: Pool, generation: int) -> None:
        self.generation = generation
        self.words, self.bytes = pool.words, pool.bytes
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

    def __init__(self, view: View, runtime: Runtime, pool: Pool, frames: Frames, limbo: Limbo, *, reserve: bool) -> None:
        # Not View.__init__: a transaction starts from what its view already knows.
        self.generation = view.generation + 1
        self.words, self.bytes, self.table, self.array = view.words, view.bytes, view.table, view.array
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

    def own(self, tree: Tree, pfn: int) -> int:
        """Return the PFN of a node that this transaction may change: `pfn` itself, or its copy.

        A node with several references is copied for one of them: it loses that reference, and everything below it gains
        one, now being reachable from two nodes. A node that was shared until lately hands its hint down instead: the
        durable root may still name it twice, and `extents.pieces` must see that below the copy, too.
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
        if shared:
            counts.add(self, pfn, 1, -1)
            counts.share_children(self, tree, copy)
        else:
            if hint:
                counts.hint_children(self, tree, copy)
            self.freed.append((pfn, 1))
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
        self.runtime.atomic.store(_LIVE, self.generation)
        reach("published")
        view = View(self.runtime, self.pool, self.generation)
        view.subvolumes = self.subvolumes
        if len(self.names) < _MAX_NAMES:  # else the next view starts a dictionary of its own
            view.names = self.names
        return view


def live_slot(generation: int) -> int:
    """Return the byte offset, in the run-time file, of the live root of `generation`."""
    return _SLOTS[generation & 1]
