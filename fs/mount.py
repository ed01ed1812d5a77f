"""A pool in use: one handle's attachment to pool, run-time file, locks and slot; readers, transactions, sync, mappings.

`reading` gives a view without a lock. `run` gives a transaction under the lock, undone when it fails and repeated once, after a
sync, when space ran out. Whoever gets the lock first finishes or undoes what a dead holder left (`_recover`).
"""

import errno
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from onecopy.blkcache.frames import DIRTY, FRESH, NODE, USED, Frames, Run, cut_runs
from onecopy.blkcache.limbo import INTENT_RECLAIM, Limbo
from onecopy.blkcache.pins import Pins
from onecopy.daxemu import slots
from onecopy.daxemu.errors import NoSpace, OneCopyError, ReadOnly, RuntimeLost, posix
from onecopy.daxemu.locks import RankedLock, reopen, try_mount
from onecopy.daxemu.mapping import Mapping
from onecopy.daxemu.persist import persistence_of
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.runtime import PINS, W, attach, finish, open_lock, runtime_paths
from onecopy.daxemu.slots import Slot
from onecopy.daxemu.steps import reach
from onecopy.fs import counts, extents, rebuild, superblock
from onecopy.fs.format import SUPERBLOCK_PFNS
from onecopy.fs.inode import Inode
from onecopy.fs.reading import ASTRAY, Reading, damage
from onecopy.fs.tx import Tx, View

T = TypeVar("T")

INTENT_SYNC = 2
_LIVE, _INTENT, _TAKEN, _HEAD = W["live_generation"], W["intent"], W["taken_generation"], W["limbo_head"]
_RECLAIM_AT = 256  # entries in limbo at which a transaction reclaims first

MOUNTS: "weakref.WeakSet[Mount]" = weakref.WeakSet()  # for fork


class Mount:
    """One handle's attachment to a pool. Not for use by callers of the package: see `filesystem.FileSystem`."""

    def __init__(self, path: str, *, writable: bool) -> None:
        self.closed, self.pid = False, os.getpid()
        self._running = False  # within `run`, between the first change and the last
        self.pool = Pool(path, writable=writable)
        lock_fd = -1
        try:
            lock_fd = open_lock(self.pool, runtime_paths(self.pool)[1])
            self.lock = RankedLock("transaction", lock_fd)
            with self.lock:
                self._attach()
        except BaseException:
            if lock_fd >= 0:
                os.close(lock_fd)
            self.pool.close()
            raise
        MOUNTS.add(self)

    def _attach(self) -> None:
        self.runtime, empty = attach(self.pool, self.lock)
        if not empty and self._is_stale():
            self.runtime.close()
            if not try_mount(self.pool.fd, exclusive=True):
                raise RuntimeLost("the pool file was replaced while processes use it; end them", path=self.pool.path)
            os.unlink(self.runtime.path)
            self.runtime, empty = attach(self.pool, self.lock)
        try:
            self.frames = Frames(self.runtime, self.pool)
            self.limbo = Limbo(self.frames)
            self.pins = Pins(self.frames, self.limbo)
            if empty:
                self._fill()
            else:
                self._recover()
            self.pins.reap()
            self.slot: Slot = slots.claim(self.runtime)
        except BaseException:
            self.runtime.close()
            raise
        self.view = View(self.runtime, self.pool, self.runtime.atomic.load(_LIVE))
        # Of each mapping, the runs it pins. Keys are never used again: one may still be waiting in `_dropped`.
        self.mappings: dict[int, tuple[list[Run], list[int]]] = {}  # the runs, and their places in our pin list
        self._free_places: list[int] = []
        self._used_places = 0  # the list's length, free places included
        self._keys = itertools.count()
        self._dropped: deque[int] = deque()
        self.child_slot: Slot | None = None
        self.child_pool_fd = -1

    def _fill(self) -> None:
        try:
            rebuild.fill(self.runtime, self.pool)
        except BaseException:
            os.unlink(self.runtime.path)
            raise
        finish(self.runtime)

    def _is_stale(self) -> bool:
        """True when the pool file's content was replaced (restored from a copy) since the run-time file was made."""
        if self.runtime.get("intent") == INTENT_SYNC:
            return False  # its superblock may be one ahead: the sync is about to be finished
        return superblock.newest(self.pool).generation != self.runtime.get("durable_generation")

    def check_open(self) -> None:
        """Raise EBADF when the handle is closed."""
        if self.closed:
            raise posix(errno.EBADF, self.pool.path, "this handle on the pool has been closed")

    def live_view(self) -> View:
        """Return the live generation; the caller holds the lock."""
        return View(self.runtime, self.pool, self.runtime.atomic.load(_LIVE))

    def settle(self) -> None:
        """Finish what the dead left and let go of ended mappings; the caller holds the lock."""
        self._recover()
        self.pins.reap()
        if self._dropped:
            self._unpin()

    # -------------------------------------------------- reading, changing

    def reading(self) -> Reading:
        """Return a context manager that gives the live view."""
        return Reading(self)

    def run(self, work: Callable[[Tx], T], *, reserve: bool = False) -> T:
        """Run `work(tx)` in a transaction and publish it; all or nothing. `work` may be called a second time.

        `reserve`: it makes room, so it may use the frames kept for that. Raises ReadOnly, NoSpace, what `work` raises.
        """
        self.check_open()
        if not self.pool.writable:
            raise ReadOnly("the pool is open for reading only", path=self.pool.path)
        with self.lock:
            for last in (False, True):
                tx = self._begin(reserve=reserve)
                pid = os.getpid()
                try:
                    self._running = True
                    result = work(tx)
                    if os.getpid() != pid:
                        raise OneCopyError("a transaction begun before fork can't be finished by the child", code=errno.EPERM)
                    self.view = tx.commit()
                    return result
                except NoSpace:
                    self._abort()
                    if last:
                        raise
                    self._make_room()
                except BaseException as error:
                    if os.getpid() == pid:
                        self._abort()
                    if isinstance(error, ASTRAY):
                        raise damage(error) from error
                    raise
                finally:
                    self._running = False
        raise AssertionError("unreachable")

    def _begin(self, *, reserve: bool) -> Tx:
        reach("lock taken")
        words = self.runtime.words
        live = words[_LIVE]
        if words[_INTENT] or words[_TAKEN] > live:
            self._recover()
        view = self.view
        if view.generation != live:
            view = self.view = View(self.runtime, self.pool, live)
        if self._dropped:
            self._unpin()
        if view.limbo_tail - words[_HEAD] >= _RECLAIM_AT:
            self.limbo.reclaim(view.limbo_tail)
        return Tx(self.view, self.runtime, self.pool, self.frames, self.limbo, reserve=reserve)

    def _abort(self) -> None:
        """Undo, unless the exception came after the transaction had been published."""
        self.frames.undo()
        self.view = View(self.runtime, self.pool, self.runtime.atomic.load(_LIVE))

    def _recover(self) -> None:
        """Finish or undo what a dead holder of the lock left. The caller holds it."""
        if self._running:
            raise OneCopyError(
                "called within a transaction, by a signal handler or finalizer of its thread", code=errno.EDEADLK
            )
        words, intent = self.runtime.words, self.runtime.words[_INTENT]
        if intent == INTENT_RECLAIM:
            self.limbo.finish()
            self.frames.recount()
        elif intent == INTENT_SYNC and self.pool.writable:
            self._sync()
            self.frames.recount()
        if words[_TAKEN] > words[_LIVE]:
            self.frames.undo()

    def _make_room(self) -> None:
        self.pins.reap()
        self._sync()
        self.limbo.reclaim(self.view.limbo_tail)
        self.frames.recount()

    # ------------------------------------------------------------- sync

    def sync(self) -> None:
        """Make everything published durable. Nothing for a handle that only reads."""
        self.check_open()
        if not self.pool.writable:
            return
        with self.lock:
            self._recover()
            if self._dropped:
                self._unpin()
            self._sync()

    def _sync(self) -> None:
        runtime, pool, array = self.runtime, self.pool, self.frames.array
        generation = runtime.atomic.load(_LIVE)
        view = View(runtime, pool, generation)
        if generation == runtime.get("durable_generation") and runtime.get("intent") != INTENT_SYNC:
            return
        runtime.set("intent", INTENT_SYNC)
        reach("sync intended")
        for pfn in np.flatnonzero((array & (USED | NODE | FRESH)) == USED | NODE | FRESH).tolist():
            pool.words[pfn * 512 + 3] = rebuild.node_checksum(pool, pfn)
        reach("checksums set")
        dirty = (array & (USED | DIRTY)) == USED | DIRTY
        edges = np.flatnonzero(np.diff(dirty, prepend=False, append=False)).tolist()
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            pool.persistence.flush(first, end - first)
        pool.persistence.fence()  # S7: before the superblock names it
        reach("pages flushed")
        current = superblock.newest(pool)
        if current.generation != generation:
            slot = next(pfn for pfn in SUPERBLOCK_PFNS if pfn != current.pfn)
            superblock.write(pool, slot, generation, view.roots, view.counts, view.next_subvolume)
        runtime.set("durable_generation", generation)
        reach("durable noted")
        self.limbo.committed(view.limbo_tail)
        if runtime.get("stale_hints"):
            counts.refresh_hints(view)
            runtime.set("stale_hints", 0)
        reach("flags cleaned")
        runtime.set("intent", 0)
        self.limbo.reclaim(view.limbo_tail)
        self.frames.give_back()

    # ---------------------------------------------------------- mapping

    def map(self, find: Callable[[View], Inode], path: str) -> Mapping:
        """Map the file that `find` returns, as it is now, read-only; its frames are pinned until the mapping ends."""
        self.check_open()
        with self.lock:
            self._recover()
            if self._dropped:
                self._unpin()
            view = View(self.runtime, self.pool, self.runtime.atomic.load(_LIVE))
            inode = find(view)
            if inode.content:
                return self._map_content(inode, path)
            pages = -(-inode.size // 4096)
            found = extents.clip(extents.written(extents.load(view, inode, 0, pages)), 0, pages)
            runs = [(page, pfn, count) for page, pfn, count, _ in found]
            mapping = Mapping(inode.size, runs, path)
            key = next(self._keys)
            pinned = cut_runs([(pfn, pages) for _, pfn, pages in mapping.runs])
            places = self._take_places(len(pinned))
            self.mappings[key] = pinned, places
            try:
                self.pins.add(self.slot.index, pinned, places)
                mapping.attach(self.pool, lambda _: self._ended(key))
            except BaseException:
                self._dropped.append(key)
                self._unpin()
                raise
            return mapping

    def _take_places(self, count: int) -> list[int]:
        """Return free places of our pin list. OneCopyError (ENOMEM) when it has too few."""
        free, used = self._free_places, self._used_places
        if count > len(free) + PINS - used:
            raise OneCopyError(f"{used - len(free) + count} mapped runs; a process can pin {PINS}", code=errno.ENOMEM)
        self._used_places = max(used, used + count - len(free))
        places = [free.pop() for _ in range(min(count, len(free)))]
        return places + list(range(used, used + count - len(places)))

    def _map_content(self, inode: Inode, path: str) -> Mapping:
        """Content that lies in the inode has no frame: show a sealed page that holds a copy."""
        with os.fdopen(os.memfd_create("onecopy-inline"), "r+b", buffering=0) as file:
            file.truncate(4096)
            file.write(inode.content or b"")
            mapping = Mapping(inode.size, [], path)
            mapping.map(file.fileno(), np.array([0, 0, 1], np.uint64).tobytes())
        return mapping

    def _ended(self, key: int) -> None:
        """A mapping was closed or collected; in whatever thread, perhaps in the middle of something: never wait."""
        self._dropped.append(key)
        if self.pid == os.getpid() and self.lock.try_idle():
            try:
                self._recover()
                self._unpin()
            finally:
                self.lock.release()

    def _unpin(self) -> None:
        """Take the ended mappings' runs off our list. The caller holds the lock, with no transaction begun."""
        gone: list[Run] = []
        free: list[int] = []
        while self._dropped:
            runs, places = self.mappings.pop(self._dropped.popleft(), ([], []))
            gone += runs
            free += places
        self.pins.drop(self.slot.index, gone, free)
        self._free_places += free
        if self.closed and not self.mappings:
            self._detach()

    # ------------------------------------------------------------- fork

    def prepare_child(self) -> None:
        """Before a fork, with the lock: make the child's slot, with our pins."""
        self.pins.reap()
        slot = slots.claim(self.runtime)
        try:
            self.pins.copy(self.slot.index, slot.index)
        except BaseException:
            slot.release()
            raise
        self.child_slot = slot
        try:  # the mount lock, too, on a description of the child's own: the parent's is unlocked when the parent closes
            self.child_pool_fd = reopen(self.pool.fd, os.O_RDWR if self.pool.writable else os.O_RDONLY)
            try_mount(self.child_pool_fd, exclusive=False)
        except OSError:  # the process gave up the privileges that it opened the pool with
            self.child_pool_fd = -1

    def forget_child(self) -> None:
        """In the parent, after the fork: the child alone keeps what was made for it."""
        if self.child_slot is not None:
            os.close(self.child_slot.fd)
            self.child_slot = None
            if self.child_pool_fd >= 0:
                os.close(self.child_pool_fd)

    def become_child(self) -> None:
        """In the forked child: take over the slot made for us; give every lock a descriptor of its own.

        Where that can't be, `pid` stays the parent's and the descriptors stay open: what is mapped stays pinned.
        """
        slot, self.child_slot = self.child_slot, None
        if slot is None or self.child_pool_fd < 0:
            return
        try:
            lock_fd = reopen(self.lock.fd)
        except OSError:
            return
        pool_fd = self.child_pool_fd
        for fd in (self.pool.fd, self.lock.fd, self.slot.fd):
            os.close(fd)
        self.pool.fd, self.slot = pool_fd, slot
        self.pool.persistence = persistence_of(pool_fd)
        self.lock = RankedLock("transaction", lock_fd)
        slot.adopt()
        self.pid = os.getpid()

    # ---------------------------------------------------------- closing

    def close(self) -> None:
        """Sync and detach; mappings stay valid, and the attachment stays until the last of them has ended."""
        if self.closed:
            return
        try:
            self.sync()
        finally:
            with self.lock:
                self.closed = True
                if self._dropped:
                    self._unpin()
                elif not self.mappings:
                    self._detach()

    def abandon(self) -> None:
        """Let go without a sync, for a handle that was forgotten; never waits."""
        if not self.closed and self.lock.try_idle():
            try:
                self.closed = True
                if self._dropped:
                    self._unpin()
                elif not self.mappings:
                    self._detach()
            finally:
                self.lock.release()

    def _detach(self) -> None:
        if self.slot.fd >= 0:
            self.slot.release()
            self.slot.fd = -1
            MOUNTS.discard(self)
            # The lock is released by closing its descriptor last; see `RankedLock.release`.
            self.lock.on_last_release = self._close_files

    def _close_files(self) -> None:
        self.runtime.close()
        # A thread may be waiting for this lock: it must not find another file under the number.
        fd, self.lock.fd = self.lock.fd, -1
        os.close(fd)
        self.pool.close()
