"""The mappings of one handle: making them, ending them, folding what was stored through them, and handing them on at fork."""

import errno
import faulthandler
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from onecopy.blkcache.spaces import BEYOND, PFN_MASK
from onecopy.daxemu import _fault
from onecopy.daxemu.errors import NoSpace, OneCopyError, posix
from onecopy.daxemu.mapping import Mapping, Run
from onecopy.daxemu.units import pages_of
from onecopy.fs import content, extents
from onecopy.fs import inode as inodes
from onecopy.fs.inode import Inode
from onecopy.fs.mapped import entry_words
from onecopy.fs.tx import Tx, View

if TYPE_CHECKING:
    from onecopy.fs.mount import Mount

FOLD_AT = 1 << 16  # pages that a process stores to before they are folded, unasked (256 MiB)
_MANY = 20_000  # runs of a file that is mapped page by page, as it is touched
_LOOK = 1000  # milliseconds between two looks whether the handle is still there


class Maps:
    """The mappings of a mount. The transaction lock is held where not said otherwise."""

    def __init__(self, mount: "Mount") -> None:
        self.mount, self.spaces, self.engine = mount, mount.spaces, mount.engine
        self.count: dict[int, int] = {}  # of our mappings, by address space
        self._dropped: deque[int] = deque()  # spaces of mappings that have ended
        self._started = self._folding = False

    # ---------------------------------------------------------- making

    def map(self, find: Callable[[View], Inode], path: str, *, writable: bool, granule: int) -> Mapping:
        """Map the file that `find` returns. NoSpace when /dev/shm is full."""
        mount = self.mount
        view = mount.live_view()
        inode = find(view)
        if inode.content and mount.pool.writable:  # give it a page of its own, which others can map, too
            key = inode.subvolume, inode.number
            mount.run(lambda tx: content.give_pages(tx, inodes.change(tx, *key)))
            view = mount.live_view()
            inode = find(view)
        if inode.content:
            return self._map_content(inode, path)
        pages = pages_of(inode.size)
        mapping = Mapping(inode.size, path)
        if not pages:
            return mapping
        if not self._started:
            self.engine.start()
            _stay_in_front()
            self._started = True
        elif writable or mount.pool.cached:
            self.engine.start()  # somebody may have put a handler in front of ours
        index = self.spaces.ensure(inode.subvolume, inode.number)
        self._attach(index)
        try:
            self._give_entries(index, inode, view, pages, writable=writable or mount.pool.cached)
            mount.pool.give_copies(index, max(pages, self.spaces.pages(index)))
            # We are a mapper now: whatever changes an entry from here on, we are told.
            self.engine.add(mapping, index, writable, granule)
            mapping.attached(self, index, inode.subvolume, inode.number, writable=writable)
            if self.spaces.pages(index):
                self.engine.refresh(mapping)
            else:
                runs = extents.clip(extents.written(extents.stored(view, inode, 0, pages)), 0, pages)
                self._show(mapping, inode, view, [(page, pfn, count) for page, pfn, count, _ in runs])
        except BaseException:
            mapping.forget()
            self._dropped.append(index)
            self.strike()
            raise
        if writable and not self._folding:
            self._fold_by_itself()
        return mapping

    def _show(self, mapping: Mapping, inode: Inode, view: View, runs: list[Run]) -> None:
        """Map runs that only transactions move; too many for the kernel (vm.max_map_count), as they are touched."""
        if len(runs) < _MANY:
            try:
                mapping.show(self.mount.pool.fd, runs)
                return
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
        self._give_entries(mapping.space, inode, view, pages_of(len(mapping)), writable=True)
        self.engine.refresh(mapping)

    def _give_entries(self, index: int, inode: Inode, view: View, pages: int, *, writable: bool) -> None:
        """Give the space the entries it needs: for storing, or because it has some, up to the longest mapping's end."""
        self.spaces.lengthen(index, pages)
        have, length = self.spaces.pages(index), self.spaces.length(index)
        if (writable or have) and have < length:
            try:
                words = entry_words(view, inode, length)
            except MemoryError as error:
                raise OneCopyError(f"no memory for the entries of {length} pages", code=errno.ENOMEM) from error
            self.spaces.enter(index, have, words[have:])

    def _attach(self, index: int) -> None:
        self.count[index] = self.count.get(index, 0) + 1
        self.engine.map_for(index, self.mount.slot.index, True)

    def _map_content(self, inode: Inode, path: str) -> Mapping:
        """Content that lies in the inode has no frame: show a sealed page that holds a copy."""
        mapping = Mapping(inode.size, path)
        with os.fdopen(os.memfd_create("onecopy-inline"), "r+b", buffering=0) as file:
            file.truncate(4096)
            file.write(inode.content or b"")
            mapping.map(file.fileno(), np.array([0, 0, 1], np.uint64).tobytes())
        return mapping

    # ---------------------------------------------------------- looking

    def pfns(self, mapping: Mapping) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        """Return the PFN of each page of the mapping as it is now; 0 = hole, or cut off. Takes the lock."""
        pages = pages_of(len(mapping))
        with self.mount.lock:
            if self.spaces.pages(mapping.space):
                words = self.spaces.entries(mapping.space, 0, pages)
                return np.where(words & np.uint64(BEYOND), np.uint64(0), words & np.uint64(PFN_MASK))
            view = self.mount.live_view()
            table = np.zeros(pages, np.uint64)
            if inodes.exists(view, *mapping.key):
                table[:] = entry_words(view, inodes.load(view, *mapping.key), pages) & np.uint64(PFN_MASK)
            return table

    def make_writable(self, mapping: Mapping, low: int, high: int) -> None:
        """What a store to each page of [low, high) would do. Without the lock. NoSpace."""
        try:
            self.engine.make_private(mapping.space, low, high, True)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NoSpace("the pool has no free page left for a copy of a shared one", path=mapping.path) from error
            raise

    def sync(self) -> None:
        """Fold, and make everything durable. Takes the lock."""
        self.mount.sync_mapped()

    def reduce(self, mapping: Mapping) -> tuple[Any, ...]:
        """Return what pickle needs to map the file anew, by inode: it may have been renamed."""
        mount = self.mount
        mode = "r+" if mount.pool.writable else "r"
        return again, (mount.pool.path, mode, mapping.path, *mapping.key, "r+" if mapping.writable else "r")

    def is_beyond(self, mapping: Mapping, page: int) -> bool:
        """Return whether the file has been cut off before `page`. Without the lock."""
        if self.spaces.pages(mapping.space):
            return bool(self.spaces.entries(mapping.space, page, page + 1)[0] & np.uint64(BEYOND))
        with self.mount.reading(closing=True) as view:
            key = mapping.key
            return inodes.exists(view, *key) and page >= pages_of(inodes.load(view, *key).size)

    # ----------------------------------------------------------- ending

    def ended(self, index: int) -> None:
        """A mapping was closed or collected; in whatever thread, perhaps in the middle of something: never wait."""
        mount = self.mount
        self._dropped.append(index)
        if mount.pid != os.getpid():
            return
        if mount.lock.try_idle():
            self._clear_up(index)
        elif mount.closed:  # nobody will come by again
            threading.Thread(target=self._clear_up_later, args=(index,), name="onecopy-close").start()

    def _clear_up_later(self, index: int) -> None:
        try:
            self.mount.lock.acquire()
        except OSError:
            return  # closed meanwhile: who was faster has detached the mount
        self._clear_up(index)

    def _clear_up(self, index: int) -> None:
        """With the lock, which it gives back."""
        mount = self.mount
        try:
            if mount.slot.fd < 0:
                return  # another mapping's end has done it all
            mount.recover()
            self.strike()
            if mount.pool.writable and self.spaces.is_dirty(index) and not self.spaces.is_mapped(index):
                self.fold()
            self.let_go()
        except OSError:
            pass  # a full pool, say: what was stored is still there, for the next sync
        finally:
            mount.lock.release()

    def let_go(self) -> None:
        """`strike`, and detach the mount with the last mapping, if its handle is closed."""
        self.strike()
        if self.mount.closed and not self.count:
            self.mount.detach()

    def strike(self) -> None:
        """Take our name off spaces whose mappings have ended; end those that nobody maps any more."""
        while self._dropped:
            index = self._dropped.popleft()
            left = self.count.get(index, 0) - 1
            if left > 0:
                self.count[index] = left
                continue
            self.count.pop(index, None)
            self.engine.map_for(index, self.mount.slot.index, False)
            if not self.spaces.is_mapped(index) and self.spaces.is_idle(index):
                self.spaces.end(index)

    @property
    def has_ended(self) -> bool:
        """Whether there are ended mappings to let go of. Without the lock."""
        return bool(self._dropped)

    # ---------------------------------------------------------- folding

    def fold(self) -> None:
        """Make what was stored, by all processes, into any file, extents: one transaction. NoSpace. Takes the lock."""
        if self.spaces.any_entries:
            with self.mount.lock:
                if self.spaces.dirty():
                    self.mount.run(_fold_all, reserve=True, closing=True)
                    self.spaces.end_unmapped()

    def _fold_by_itself(self) -> None:
        self._folding = True
        threading.Thread(target=_fold_often, args=(weakref.ref(self), self.engine), name="onecopy-fold", daemon=True).start()

    # ------------------------------------------------------------- fork

    def become_child(self) -> None:
        """In a forked child, whose slot has our mappings: run a service thread of its own."""
        self.engine.adopt(self.mount.slot.index, self.mount.pool.fd)
        if self._folding:
            self._fold_by_itself()


_handles: "weakref.WeakValueDictionary[tuple[int, str, str], Mount]" = weakref.WeakValueDictionary()


def again(pool: str, pool_mode: str, path: str, subvolume: int, inode: int, mode: str) -> Mapping:
    """Map an inode that a mapping in another process showed; all such mappings of a pool share one attachment to it."""
    from onecopy.fs.mount import Mount

    key = os.getpid(), pool, pool_mode
    while True:
        mount = _handles.get(key)
        if mount is None or mount.slot.fd < 0:
            mount = _handles[key] = Mount(pool, writable=pool_mode == "r+")
        try:
            with mount.lock:
                if mount.slot.fd >= 0:
                    return _map_inode(mount, path, subvolume, inode, mode)
        except OSError as error:
            if error.errno != errno.EBADF or mount.slot.fd >= 0:
                raise
        # Its last mapping has ended while we waited for the lock.


def _map_inode(mount: "Mount", path: str, subvolume: int, number: int, mode: str) -> Mapping:
    """Map an inode of an attachment that nobody else uses: as with a closed handle, it ends with its last mapping."""

    def find(view: View) -> Inode:
        if not inodes.exists(view, subvolume, number):
            raise posix(errno.ESTALE, path, "the file was deleted before its mapping was unpickled")
        return inodes.load(view, subvolume, number)

    try:
        mount.recover()
        if mount.pool.writable and find(mount.live_view()).content:  # it was cut off and written anew
            mount.run(lambda tx: content.give_pages(tx, inodes.change(tx, subvolume, number)), closing=True)
        return mount.maps.map(find, path, writable=mode == "r+", granule=0)
    finally:
        mount.closed = True
        mount.maps.let_go()


def _fold_all(tx: Tx) -> None:
    if tx.changes is not None:
        tx.changes.fold_all(tx)


def _fold_often(maps: "weakref.ref[Maps]", engine: Any) -> None:
    pid = os.getpid()
    while os.getpid() == pid:
        try:
            due = engine.wait_dirty(FOLD_AT, _LOOK)
        except ValueError:
            return  # closed
        here = maps()
        if here is None or here.mount.slot.fd < 0:
            return
        if due:
            try:
                here.fold()
            except (OSError, ValueError):
                pass  # full, or closed meanwhile: who syncs will hear of it
        del here


def _stay_in_front() -> None:
    """Let faulthandler, when it is enabled later, not take our faults for crashes: put our handler in front of its again."""
    enable = faulthandler.enable
    if hasattr(enable, "__wrapped__"):
        return

    @wraps(enable)
    def enable_behind(*args: Any, **kwargs: Any) -> None:
        enable(*args, **kwargs)
        _fault.install()

    faulthandler.enable = enable_behind
