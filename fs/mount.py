"""A pool in use: one handle's attachment to pool, run-time file, locks and slot; readers, transactions, sync, mappings.

`reading` gives a view without a lock. `run` gives a transaction under the lock, undone when it fails and repeated once, after a
sync, when space ran out. Whoever gets the lock first finishes or undoes what a dead holder left (`_recover`).
"""

import errno
import os
import weakref
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from onecopy.blkcache.frames import Frames, reserve_of
from onecopy.blkcache.limbo import INTENT_RECLAIM, Limbo
from onecopy.blkcache.options import NO_OPTIONS, CacheOptions, open_pool
from onecopy.blkcache.spaces import Spaces
from onecopy.daxemu import slots
from onecopy.daxemu._fault import Engine
from onecopy.daxemu.errors import NoSpace, OneCopyError, ReadOnly, posix
from onecopy.daxemu.locks import RankedLock, reopen, try_mount
from onecopy.daxemu.mapping import Mapping
from onecopy.daxemu.runtime import W, attach, finish, not_alone, open_lock, runtime_paths
from onecopy.daxemu.slots import Slot
from onecopy.daxemu.steps import reach
from onecopy.fs import rebuild, superblock
from onecopy.fs.inode import Inode
from onecopy.fs.mapped import Changes, Seen
from onecopy.fs.maps import Maps
from onecopy.fs.reading import ASTRAY, Reading, damage
from onecopy.fs.sync import INTENT_SYNC, write_out
from onecopy.fs.tx import Conflict, Tx, View

T = TypeVar("T")

_LIVE, _INTENT, _TAKEN, _HEAD = W["live_generation"], W["intent"], W["taken_generation"], W["limbo_head"]
_LOG = W["log_count"]
_CONFLICTS = 64  # attempts at a transaction that stores conflict with
_RECLAIM_AT = 256  # entries in limbo at which a transaction reclaims first

MOUNTS: "weakref.WeakSet[Mount]" = weakref.WeakSet()  # for fork


class Mount:
    """One handle's attachment to a pool. Not for use by callers of the package: see `filesystem.FileSystem`."""

    def __init__(self, path: str, *, writable: bool, cache: CacheOptions = NO_OPTIONS) -> None:
        self.closed, self.pid = False, os.getpid()
        self.lost = False  # in a child that could not become a user of the pool
        self._running = False  # within `run`, between the first change and the last
        self.options = cache
        self.pool = open_pool(path, writable=writable, options=cache)
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
        try:
            if not empty and self._is_stale():
                self.runtime.close()
                if not try_mount(self.pool.fd, exclusive=True):
                    raise not_alone(self.pool, "the pool file was replaced while processes use it; end them")
                os.unlink(self.runtime.path)
                self.runtime, empty = attach(self.pool, self.lock)
            self.pool.connect(empty=empty)
            if empty:
                self._fill()
            self._claim_slot()
        except BaseException:
            self.runtime.close()
            raise
        self.seen = Seen(self.spaces)
        self.maps = Maps(self)
        self.view = View(self.runtime, self.pool, self.runtime.atomic.load(_LIVE))
        self.view.seen = self.seen
        self.child_slot: Slot | None = None
        self.child_pool_fd = -1

    def _claim_slot(self) -> None:
        """Take a slot; where the dead have left none, as the janitor first."""
        try:
            self.slot: Slot = slots.claim(self.runtime)
        except OneCopyError:
            janitor = slots.claim(self.runtime, slots.JANITOR, slots.JANITOR + 1)
            self._take_office(janitor)
            self.engine.close()
            janitor.release()
            self.slot = slots.claim(self.runtime)
        try:
            self._take_office(self.slot)
        except BaseException:
            if hasattr(self, "engine"):  # else it could not be made
                self.engine.close()
            self.slot.release()
            raise

    def _take_office(self, slot: Slot) -> None:
        """As the holder of `slot`: finish what the dead left, and reap them."""
        runtime, pool = self.runtime, self.pool
        offsets = runtime.layout.native()
        self.engine = Engine(runtime.memory, pool.memory, runtime.fd, pool.frames_fd, slot.index, reserve_of(pool), offsets)
        pool.use(self.engine)
        self.frames = Frames(runtime, pool, self.engine)
        self.limbo = Limbo(self.frames)
        self.spaces = Spaces(self.frames, self.limbo, self.engine)
        self.recover()
        self.spaces.reap()

    def _fill(self) -> None:
        try:
            with self.pool.heard():
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
        self.recover()
        self.spaces.reap()
        self.maps.strike()

    # -------------------------------------------------- reading, changing

    def reading(self, *, closing: bool = False) -> Reading:
        """Return a context manager that gives the live view. `closing`: for a mapping that outlives its handle."""
        return Reading(self, closing=closing)

    def run(self, work: Callable[[Tx], T], *, reserve: bool = False, closing: bool = False) -> T:
        """Run `work(tx)` in a transaction and publish it; all or nothing. `work` may be called a second time.

        `reserve`: it makes room, so it may use the frames kept for that. `closing`: for a mapping that outlives its handle.
        Raises ReadOnly, NoSpace, OneCopyError (EBUSY) when stores keep coming to what is to be moved, what `work` raises.
        """
        if not closing:
            self.check_open()
        if not self.pool.writable:
            raise ReadOnly("the pool is open for reading only", path=self.pool.path)
        with self.lock:
            room, conflicts = False, 0
            while True:
                losses = self.pool.losses()
                tx = self._begin(reserve=reserve)
                pid = os.getpid()
                try:
                    self._running = True
                    result = work(tx)
                    self.pool.raise_lost(losses)
                    if os.getpid() != pid:
                        raise OneCopyError("a transaction begun before fork can't be finished by the child", code=errno.EPERM)
                    self.view = tx.commit()
                    self.view.seen = self.seen
                    return result
                except NoSpace:
                    self._abort()
                    if room:
                        raise
                    room = True
                    self._make_room()
                except Conflict as conflict:
                    self._abort()
                    conflicts += 1
                    if conflicts == _CONFLICTS:
                        raise OneCopyError(
                            f"{conflicts} times stores through mappings came to the pages to be moved: "
                            "let the processes that store there pause, and try again",
                            path=self.pool.path, code=errno.EBUSY,
                        ) from conflict  # fmt: skip
                except BaseException as error:
                    if os.getpid() == pid:
                        self._abort()
                        self.pool.raise_lost(losses)  # which is why what it read made no sense
                    if isinstance(error, ASTRAY):
                        raise damage(error) from error
                    raise
                finally:
                    self._running = False

    def _begin(self, *, reserve: bool) -> Tx:
        reach("lock taken")
        words = self.runtime.words
        live = words[_LIVE]
        if words[_INTENT] or words[_LOG] or words[_TAKEN] > live:
            self.recover()
        view = self.view
        if view.generation != live:
            view = self.view = View(self.runtime, self.pool, live)
            view.seen = self.seen
        if self.maps.has_ended:
            self.maps.strike()
        if view.limbo_tail - words[_HEAD] >= _RECLAIM_AT:
            self.limbo.reclaim(view.limbo_tail)
        tx = Tx(self.view, self.runtime, self.pool, self.frames, self.limbo, reserve=reserve)
        if self.spaces.any:
            tx.changes = Changes(self.spaces)
        return tx

    def _abort(self) -> None:
        """Undo, unless the exception came after the transaction had been published."""
        if self.runtime.words[_LOG]:
            self.engine.redo()  # forgets it: it has not been published
        self.frames.undo()
        self.view = View(self.runtime, self.pool, self.runtime.atomic.load(_LIVE))
        self.view.seen = self.seen

    def recover(self) -> None:
        """Finish or undo what a dead holder of the lock left. The caller holds it."""
        if self._running:
            raise OneCopyError(
                "called within a transaction, by a signal handler or finalizer of its thread", code=errno.EDEADLK
            )
        words, intent = self.runtime.words, self.runtime.words[_INTENT]
        if words[_LOG]:
            self.engine.redo()
        self.spaces.settle_chains()
        if intent == INTENT_RECLAIM:
            self.limbo.finish()
            self.frames.recount()
        elif intent == INTENT_SYNC and self.pool.writable:
            write_out(self)
            self.frames.recount()
        if words[_TAKEN] > words[_LIVE]:
            self.frames.undo()

    def _make_room(self) -> None:
        self.spaces.reap()
        write_out(self)
        self.limbo.reclaim(self.view.limbo_tail)
        if self.pool.cached:
            self.frames.give_back()  # also what nodes that came to nothing keep in memory
        self.frames.recount()

    # ------------------------------------------------------------- sync

    def sync(self) -> None:
        """Make everything stored and published durable. Nothing for a handle that only reads."""
        self.check_open()
        self.sync_mapped()

    def sync_mapped(self) -> None:
        """`sync`, also for a mapping that outlives its handle."""
        if not self.pool.writable:
            return
        with self.lock:
            self.recover()
            self.maps.strike()
            self.spaces.reap()
            self.maps.fold()
            self.spaces.end_unmapped()
            self._sweep()
            write_out(self)

    def _sweep(self) -> None:
        """Take back the frames that faults have taken and nobody names."""
        counted = self.runtime.counter("strays")
        if counted:
            strays = self.spaces.strays()
            if strays is None:
                return  # another time
            if strays:
                self.run(lambda tx: tx.take_back(strays), reserve=True, closing=True)
            self.engine.count("strays", -counted)

    # ---------------------------------------------------------- mapping

    def map(self, find: Callable[[View], Inode], path: str, *, writable: bool = False, granule: int = 0) -> Mapping:
        """Map the file that `find` returns; see Maps.map."""
        self.check_open()
        with self.lock, self.pool.heard():
            self.recover()
            self.maps.strike()
            return self.maps.map(find, path, writable=writable, granule=granule)

    # ------------------------------------------------------------- fork

    def prepare_child(self) -> None:
        """Before a fork, with the lock: make the child's slot; the fork makes it a mapper: before_fork in _guard.c."""
        self.spaces.reap()
        self.child_slot = slots.claim(self.runtime)
        try:  # the mount lock, too, on a description of the child's own: the parent's is unlocked when the parent closes
            self.child_pool_fd = reopen(self.pool.fd, os.O_RDWR if self.pool.writable else os.O_RDONLY)
            try_mount(self.child_pool_fd, exclusive=False)
            self.pool.expect_child()
        except OSError:  # the process gave up the privileges that it opened the pool with
            self.child_pool_fd = -1
        self.engine.expect_child(self.child_slot.index, self.child_slot.fd, self.child_pool_fd)

    def forget_child(self) -> None:
        """In the parent, after the fork: the child alone keeps what was made for it."""
        self.child_slot = None  # the descriptors were closed when the fork was done

    def become_child(self) -> None:
        """In the forked child: take over the slot made for us; give every lock a descriptor of its own.

        Where that can't be, `pid` stays the parent's, and the slot is let go: nobody shall wait for its answers. See `lose`.
        """
        slot, self.child_slot = self.child_slot, None
        if slot is None:
            return
        try:
            lock_fd = reopen(self.lock.fd) if self.child_pool_fd >= 0 else -1
        except OSError:
            lock_fd = -1
        if lock_fd < 0:
            os.close(slot.fd)
            return
        pool_fd = self.child_pool_fd
        for fd in (self.pool.fd, self.lock.fd, self.slot.fd):
            os.close(fd)
        self.slot = slot
        self.pool.become_child(pool_fd)
        self.lock = RankedLock("transaction", lock_fd)
        slot.adopt()
        self.pid = os.getpid()
        self.maps.become_child()

    def lose(self) -> None:
        """In a forked child that nobody prepared: the handle is closed, and what it had mapped is gone.

        Nobody would tell us when a page moves: we would read other files' bytes, or store to what a clone has come to share.
        """
        self.closed = self.lost = True
        if self.slot.fd >= 0:
            self.engine.lose()
            # What hangs on descriptors that we share with the parent would outlive it: stores would wait for its slot's
            # answers, and everybody for a lock that it held when it died.
            os.close(self.slot.fd)
            os.close(self.lock.fd)
            self.slot.fd = self.lock.fd = -1

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
                self.maps.let_go()

    def abandon(self) -> None:
        """Let go without a sync, for a handle that was forgotten; never waits."""
        if not self.closed and self.pid == os.getpid() and self.lock.try_idle():
            try:
                self.closed = True
                self.maps.let_go()
            finally:
                self.lock.release()

    def detach(self) -> None:
        """Give up the slot and close the files: the handle is closed, its last mapping has ended. The lock is held."""
        if self.slot.fd >= 0:
            if slots.taken(self.runtime) == [self.slot.index]:
                self.pool.rest()
            self.engine.close()
            self.slot.release()
            self.slot.fd = -1
            MOUNTS.discard(self)
            # The lock is released by closing its descriptor last; see `RankedLock.release`.
            self.lock.on_last_release = self._close_files

    def _close_files(self) -> None:
        nothing = np.empty(0, np.uint8)
        self.frames.array = self.view.array = nothing  # or the table would stay mapped until the collector comes by
        self.runtime.close()
        # A thread may be waiting for this lock: it must not find another file under the number.
        fd, self.lock.fd = self.lock.fd, -1
        os.close(fd)
        self.pool.close()
