"""The shared buffer cache: a pool on a device that can only be read and written, in memory in part.

Two files in /dev/shm, beside the run-time file or under a name that several pools share: the *frame file*, which holds the
pages, and the *control file*, one word for each frame, and the counters. daxemu/_cache.h says how they are used; this module
makes them, and `CachedPool` is the pool over them. Everything above sees the same memory, by PFN, as without a cache.

Two policies: "shared" keeps one frame for a block, however many files share it; "per-inode" gives each file that is
mapped copies of its own of pages that it shares, which is what kernels do, and what the first is to be compared with.
"""

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass

from onecopy.blkcache.device import BlockDevice, FileDevice
from onecopy.daxemu import _fault
from onecopy.daxemu.errors import NoSpace, OneCopyError, PoolBusy, RuntimeLost, invalid
from onecopy.daxemu.locks import open_private, reopen
from onecopy.daxemu.persist import Volatile
from onecopy.daxemu.pool import Pool, release
from onecopy.daxemu.record import Record
from onecopy.daxemu.runtime import FOLDER, runtime_paths
from onecopy.daxemu.units import PAGE

DEVICES = 8
SPAN = 1 << 31  # frames of one device: half for its blocks, half for copies that are inodes'
COPIES = 1 << 30
USERS = 512
MAGIC = int.from_bytes(b"onecopyC", "little")
LAYOUT = 1
MIN_FRAMES = 256
DEFAULT_CACHE = 16384  # pages: 64 MiB
_WORDS = 1 << 20
_OWNERS = _WORDS + DEVICES * SPAN * 8
_WINDOWS = _OWNERS + DEVICES * COPIES * 8
_SPACES = 1 << 16
_SIZE = _WINDOWS + DEVICES * _SPACES * 16
_CHUNK = 1 << 20
_AHEAD = 64  # pages read ahead at the most

CONTROL = Record(
    "cache header",
    8760,
    "At the start of a cache's control file. From 1 MiB on: a word for each frame, its owner, each inode's copies.",
    [
        ("magic", "u64", "", "the bytes 'onecopyC'"),
        ("layout", "u64", "", str(LAYOUT)),
        ("limit", "u64", "frames", "that may be in memory"),
        ("hand", "u64", "frames", "where the sweep for victims is"),
        ("inserted", "u64", "frames", "that have come in, ever"),
        ("evicted", "u64", "frames", "that had to go"),
        ("fills", "u64", "frames", "that were read from a device"),
        ("hits", "u64", "", "uses of a frame that was there, as far as they are seen: not those through mappings"),
        ("written", "u64", "frames", "written back"),
        ("errors", "u64", "", "requests that a device refused"),
        ("over", "u64", "", "times that nothing could be evicted, and the limit was passed"),
        ("mains", "u64", "frames", "of the resident ones: used again, or evicted too early"),
        ("users", "u64", "", "one more than the highest user number ever"),
        ("unused", "bytes[16]", "", ""),
        ("identities", f"bytes[{DEVICES * 32}]", "", f"{DEVICES} devices: the pool's uuid, st_dev, st_ino"),
        ("frames", f"bytes[{DEVICES * 8}]", "frames", "of each device; 0: none"),
        ("kept", f"bytes[{DEVICES * 8}]", "frames", "of each: tree nodes that stay until they are written back"),
        ("copies", f"bytes[{DEVICES * 8}]", "frames", "of each that inodes' copies have been given, ever"),
        ("incarnations", f"bytes[{USERS * 8}]", "", "counts the holders of each user number: a word that is held names both"),
        ("promised", f"bytes[{USERS * 8}]", "frames", "that each user may be about to give pages"),
    ],
)


def cache_paths(pool: Pool) -> tuple[str, str]:
    """Return the paths of the control file and the frame file that a pool has for itself alone."""
    base = runtime_paths(pool)[0]
    return base + ".cache", base + ".frames"


FRAME_WORD = (  # as in daxemu/_cache.h
    ("0-11", "who holds it: user number + 1; 0: nobody"),
    ("12-30", "that user's incarnation"),
    ("31", "somebody waits for it"),
    ("32", "resident: it has a page, or, held, the page is what counts"),
    ("33", "dirty: newer than the block"),
    ("34", "kept: a tree node that stays until it is written back"),
    ("35", "writable: some process may have it mapped for storing"),
    ("36", "main: of the part of the cache for what is used again"),
    ("37-38", "uses, counted by reads"),
    ("48-63", "when it came in, or, absent, when it went, in 32nds of the cache"),
)


@dataclass(frozen=True)
class CacheInfo:
    """A buffer cache; counts are pages, of all devices in it, since it was made."""

    path: str
    limit: int
    resident: int
    kept: int
    fills: int
    hits: int
    evictions: int
    written: int
    errors: int
    over: int


class CachedPersistence:
    """What is flushed is written back; a fence waits for the device."""

    def __init__(self, cache: _fault.Cache, device: BlockDevice, refused: Callable[[OSError], OSError]) -> None:
        self._cache, self._device, self._refused, self._pending = cache, device, refused, False

    def flush(self, pfn: int, pages: int) -> None:
        """Write the dirty ones of these pages to the device. OSError (EIO), NoSpace."""
        self._pending = self._pending or pages > 0
        try:
            self._cache.write_back(pfn, pages)
        except OSError as error:
            raise self._refused(error) from error

    def fence(self) -> None:
        """Wait for the media."""
        if self._pending:
            self._device.flush()
            self._pending = False


class CachedPool(Pool):
    """A pool on a block device, through a cache. `connect` makes it whole; the caller holds the transaction lock then."""

    cached = True

    def __init__(
        self, path: str, *, writable: bool, policy: str, limit: int | None = None, name: str | None = None,
        device: BlockDevice | None = None, default: int = DEFAULT_CACHE,
    ) -> None:  # fmt: skip
        super().__init__(path, writable=writable, mapped=False)
        self.policy, self._limit, self._default, self._name = policy, limit, default, name
        self._next = self._ahead = 0  # where the last fetch ended, and how far it read ahead
        try:
            self.device: BlockDevice = device if device is not None else FileDevice(path, writable)
            if self.device.blocks < self.frames or self.frames > COPIES:
                raise invalid(f"a device of {self.device.blocks} blocks for a pool of {self.frames} pages", path)
        except BaseException:
            os.close(self.fd)
            raise

    def connect(self, *, empty: bool) -> None:
        """Attach to the cache, or make it; `empty`: nothing that it holds of this pool counts. RuntimeLost, PoolBusy."""
        base = f"{FOLDER}/onecopy-cache-{self._name}" if self._name else runtime_paths(self)[0]
        control, frames = self._open(base, empty=empty)
        try:
            fcntl.flock(control, fcntl.LOCK_EX)
            try:
                # Somebody may have made it since it was opened, or died over that.
                made = os.pread(control, 8, 0) in (b"", bytes(8))
                if made and empty:
                    self._fill(control, frames)
                number = self._number(control, known=not empty)
                if os.fstat(frames).st_size < DEVICES * SPAN * PAGE:
                    raise RuntimeLost(f"{base}.frames is damaged; delete it and {base}.cache", path=self.path)
            finally:
                fcntl.flock(control, fcntl.LOCK_UN)
            if os.fstat(frames).st_blksize > PAGE:  # a page that is stored to would bring others along, as zeros
                raise OneCopyError(
                    f"{FOLDER} is mounted with huge pages, where a page can't be absent alone; a cache needs huge=never there",
                    path=self.path, code=errno.EOPNOTSUPP,
                )  # fmt: skip
            self.memory = mmap.mmap(frames, self.frames * PAGE, mmap.MAP_SHARED, offset=number * SPAN * PAGE)
            self.header = mmap.mmap(control, _WORDS)
            try:
                mine = os.dup(control)
                try:
                    also = os.dup(frames)
                except OSError:
                    os.close(mine)
                    raise
                self.cache = _fault.Cache(mine, also, self.memory, self.device.native, number, self.policy == "per-inode")
            except OSError as error:
                raise self._unwatched(error) from error
        except BaseException:
            release(*(getattr(self, name) for name in ("header", "memory") if hasattr(self, name)))
            os.close(control)
            os.close(frames)
            raise
        self._control, self._frames = control, frames
        self.cache_path, self.number = base, number
        self.bytes = memoryview(self.memory)
        self.words = self.bytes.cast("Q")
        self.counters = memoryview(self.header).cast("Q")
        if empty and not made:
            self.cache.drop(0, self.frames)
        if self._limit is not None and not made:
            self.counters[CONTROL.word("limit")] = self._limit
            self.cache.shrink()
        self.persistence = CachedPersistence(self.cache, self.device, self._host_full)

    def _unwatched(self, error: OSError) -> OSError:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EINVAL):
            return error
        return OneCopyError(
            f"a cache needs userfaultfd ({error.strerror}): Linux 5.11, in no container that forbids it; or use policy 'dax'",
            path=self.path, code=errno.EOPNOTSUPP,
        )  # fmt: skip

    def _lost(self, base: str) -> RuntimeLost:
        return RuntimeLost(
            f"{base}.cache and .frames do not have what the pool's users have, or the last of them had, in memory: they were "
            f"deleted, or another cache was used (name it: cache=...); "
            f"deleting {runtime_paths(self)[0]} goes back to the last sync",
            path=self.path,
        )

    def _open(self, base: str, *, empty: bool) -> tuple[int, int]:
        if empty and not self._name:
            for ending in (".cache", ".frames"):
                if os.path.lexists(base + ending):
                    os.unlink(base + ending)
        found: list[int] = []
        try:
            for ending in (".cache", ".frames"):
                flags = os.O_RDWR | (os.O_CREAT if empty else 0)
                found.append(open_private(base + ending, flags))
        except OSError as error:
            for fd in found:
                os.close(fd)
            if isinstance(error, FileNotFoundError):
                raise self._lost(base) from error
            raise
        return found[0], found[1]

    def _fill(self, control: int, frames: int) -> None:
        limit = self._limit or self._default
        values = [MAGIC, LAYOUT, limit, *[0] * 10, b"", b"", b"", b"", b"", b"", b""]
        if os.fstat(frames).st_blocks:  # else somebody died over these lines
            raise RuntimeLost(
                f"/dev/shm has a cache's .frames without its .cache ({self._name}): delete that, when nobody uses it",
                path=self.path,
            )
        for fd, size in ((frames, DEVICES * SPAN * PAGE), (control, _SIZE)):
            os.fchmod(fd, (self.status.st_mode & 0o666) | 0o600)
            os.ftruncate(fd, size)
        os.pwrite(control, CONTROL.pack(*values), 0)

    def _number(self, control: int, *, known: bool) -> int:
        """Return which of the cache's devices this pool is; a new one when it is none yet, and need not be `known`."""
        found = CONTROL.unpack(os.pread(control, CONTROL.size, 0).ljust(CONTROL.size, b"\0"))
        if (found["magic"], found["layout"]) != (MAGIC, LAYOUT):
            raise RuntimeLost("the cache's control file is damaged, or another version's", path=self.path)
        identity = self.uuid.bytes + struct.pack("=QQ", self.status.st_dev, self.status.st_ino)
        have = [found["identities"][n * 32 : n * 32 + 32] for n in range(DEVICES)]
        if known and identity not in have:
            raise self._lost(os.readlink(f"/proc/self/fd/{control}").removesuffix(".cache"))
        number = have.index(identity) if identity in have else have.index(bytes(32)) if bytes(32) in have else -1
        if number < 0:
            raise PoolBusy(f"the cache serves {DEVICES} pools already", path=self.path)
        os.pwrite(control, struct.pack("=Q", self.frames), CONTROL.offset["frames"] + number * 8)
        os.pwrite(control, identity, CONTROL.offset["identities"] + number * 32)
        return number

    @property
    def frames_fd(self) -> int:
        """The frame file; what maps it asks the cache for the place."""
        return self._frames

    # ---------------------------------------------------------- storing

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at byte `offset`, in the cache. NoSpace when /dev/shm is full, OSError (EIO)."""
        try:
            self.cache.store(offset, data)
        except OSError as error:
            raise self._host_full(error) from error

    def store_from(self, offset: int, fd: int, at: int, size: int) -> int:
        """Store up to `size` bytes of the host file `fd` from byte `at` on; return how many there were. NoSpace, OSError."""
        done = 0
        while done < size and (data := os.pread(fd, min(_CHUNK, size - done), at + done)):
            self.store(offset + done, data)
            done += len(data)
        return done

    def ready(self, pfn: int, pages: int) -> None:
        """Give frames pages that stay in memory until they are written back. NoSpace when too many do."""
        try:
            self.cache.ready(pfn, pages)
        except OSError as error:
            raise self._host_full(error) from error

    def back(self, pfn: int, pages: int) -> None:
        """Let the device's host keep room for frames [pfn, pfn + pages), where it can. NoSpace."""
        if stat.S_ISREG(self.status.st_mode):
            super().back(pfn, pages)

    def forget(self, pfn: int, pages: int) -> None:
        """Let go of what frames take up in memory; the device's blocks stay as they are."""
        self.cache.drop(pfn, pages)

    def punch(self, pfn: int, pages: int) -> None:
        """Forget frames, in the cache and on the device."""
        self.cache.drop(pfn, pages)
        self.device.discard(pfn, pages)

    def fetch(self, pfn: int, pages: int) -> None:
        """Bring frames into the cache; a use, for the policy. Ahead of who reads in turn, more and more. OSError (EIO)."""
        self._ahead = min(max(4, 2 * self._ahead), _AHEAD) if pfn == self._next else 0
        self._next = pfn + pages
        try:
            self.cache.fetch(pfn, pages, self._ahead)
        except OSError as error:
            raise self._unreadable(error.errno or errno.EIO, pfn, pages) from error

    def read_media(self, pfn: int) -> bytes:
        """Return a page as it is on the device."""
        page = bytearray(PAGE)
        self.device.read(pfn, page)
        return bytes(page)

    def losses(self) -> int:
        """Before the mapping is read: for `raise_lost`."""
        return self.cache.losses()

    def raise_lost(self, since: int) -> None:
        """Raise OSError (EIO) when a block could not be read since `losses` gave that number: zeros were shown for it.

        Also when another thread read it: all threads have seen the zeros, and nobody can tell who looked.
        """
        lost = self.cache.lost(since)
        if lost is not None:
            raise self._unreadable(lost[0], lost[1], 1)

    def _unreadable(self, code: int, pfn: int, pages: int) -> OSError:
        where = f"block {pfn}" if pages == 1 else f"blocks {pfn} to {pfn + pages - 1}"
        return OneCopyError(f"the device could not read {where} ({os.strerror(code)})", path=self.path, code=code)

    # ------------------------------------------------------------- life

    def use(self, engine: _fault.Engine) -> None:
        """Let the engine's faults find their frames here."""
        self.cache.use(engine)

    def info(self) -> CacheInfo:
        """Return the cache's figures."""
        names = ("fills", "hits", "evicted", "written", "errors", "over")
        resident = os.fstat(self._frames).st_blocks // (PAGE // 512)
        first = CONTROL.word("kept")
        kept = sum(self.counters[first : first + DEVICES])
        counts = (self.counters[CONTROL.word(name)] for name in names)
        return CacheInfo(f"{self.cache_path}.frames", self.counters[CONTROL.word("limit")], resident, kept, *counts)

    def give_copies(self, space: int, pages: int) -> None:
        """Policy per-inode: give an address space frames for copies of what it shares, `pages` of them. NoSpace.

        Copies have addresses of their own, beyond the device's blocks, in a row as the file's pages are. When the file has
        grown beyond them, it gets others; what still maps the old ones finds them absent, and looks again.
        """
        if self.policy != "per-inode":
            return
        first, room = self.cache.window(space)
        if first and room >= pages:
            return
        self.end_copies(space)
        taken = self.counters[CONTROL.word("copies") + self.number]
        if taken + pages > SPAN - COPIES:
            raise NoSpace("the cache has no addresses left for files' copies: open the pool anew", path=self.path)
        self.counters[CONTROL.word("copies") + self.number] = taken + pages
        self.cache.set_window(space, taken, pages)

    def end_copies(self, space: int) -> None:
        """Policy per-inode: forget an address space's copies."""
        if self.policy == "per-inode":
            first, pages = self.cache.window(space)
            if first:
                self.cache.set_window(space, 0, 0)
                self.cache.drop_copies(first, pages)
                word = CONTROL.word("copies") + self.number
                if first + pages == self.number * SPAN + COPIES + self.counters[word]:
                    self.counters[word] -= pages  # the last ones that were given: others may have them

    def rest(self) -> None:
        """The last user is about to close the pool: its frames go, but those that could not be written back."""
        self.cache.trim()

    def expect_child(self) -> None:
        """Before a fork: make the child a user of the cache."""
        fd = reopen(self._control)
        try:
            self.cache.expect_child(fd)
        except OSError:
            os.close(fd)
            raise

    def become_child(self, fd: int) -> None:
        """In the forked child: `fd` is the pool file on a description of its own."""
        self.fd = fd

    def close(self, *, unlock: bool = True) -> None:
        """Unmap and close; what was not written back stays in the cache."""
        cache = getattr(self, "cache", None)
        self.persistence = Volatile()  # the other one knows us: an error may look into what goes now
        if cache is not None:
            release(self.counters, self.header)
            release(self.words, self.bytes)
            cache.close()
            release(self.memory)
            os.close(self._control)
            os.close(self._frames)
        self.device.close()
        if unlock:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        os.close(self.fd)
