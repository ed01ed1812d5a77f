"""The run-time file: the volatile half ("DRAM") of a pool, shared by its users, rebuilt when lost, never the truth.

It lives in /dev/shm, named after the pool's UUID and inode, with the pool's owner and mode. `Runtime` owns its layout;
what the areas mean is said where they are used: slots in `slots`, frame states and limbo in blkcache, the live root in fs.

    header | state words | slots | reader words | counters | frame table | limbo ring | taken log | entry log |
    messages | bells | hash of the address spaces | address spaces | their windows

A window holds one address space's lock words and DAX entries; see daxemu/_fault.h. Only the header and the words up to the
frame table have storage from the start; the rest gets it as it grows (`reserve`), because a store into a hole of a full
/dev/shm is a SIGBUS.
"""

import errno
import mmap
import os
import struct
from typing import Any

import numpy as np

from onecopy.daxemu._fault import Words
from onecopy.daxemu.errors import NoSpace, OneCopyError, PoolBusy, RuntimeLost
from onecopy.daxemu.locks import RankedLock, has_raw_readers, open_private, try_mount
from onecopy.daxemu.pool import POLICIES, Pool, fallocate, release
from onecopy.daxemu.record import Record
from onecopy.daxemu.units import PAGE

FOLDER = "/dev/shm"
MAGIC = int.from_bytes(b"onecopyR", "little")
LAYOUT = 3
SLOTS = 512
READERS = 8  # concurrent lock-free readers a slot can announce
MESSAGES = 4  # faults, commits and freezes that a slot can have under way
SPACES = 1 << 16  # files that can be mapped
BUCKETS = 1 << 14  # of the hash of the address spaces
WINDOW = 1 << 32  # bytes a space's window takes in the file, nearly all of it hole
LOCKS = 4 << 20  # bytes of lock words, one for 512 pages, at the start of a window
TIMES = 56  # places of the histogram of shootdowns
MAX_PAGES = 1 << 28  # of a file that is mapped for storing: 1 TiB

HEADER = Record(
    "run-time header",
    2048,
    "At the start of the run-time file.",
    [
        ("magic", "u64", "", "the bytes 'onecopyR'; stored last, so a half-built file is not taken for a whole one"),
        ("layout", "u64", "", "number of this layout"),
        ("frames", "u64", "pages", "of the pool"),
        ("uuid", "bytes[16]", "", "of the pool"),
        ("device", "u64", "", "st_dev of the pool file"),
        ("inode", "u64", "", "st_ino of the pool file"),
        ("lock_inode", "u64", "", "st_ino of the lock file: who finds another one would lock alone"),
        ("policy", "u64", "", "0 dax, 1 shared, 2 per-inode: all users of the pool have the same"),
        ("path", "bytes[1976]", "", "where the pool was, so that the files of a pool that is gone can be swept away"),
    ],
)

STATE = Record(
    "state words",
    512,
    "Follows the header. Changed under the transaction lock; `live_generation` alone publishes.",
    [
        ("live_generation", "u64", "", "generation every process sees; storing it is the commit of a transaction"),
        ("durable_generation", "u64", "", "generation the newest superblock names"),
        ("intent", "u64", "", "what a dead holder of the lock left half done: 0 nothing, 1 reclaim, 2 sync"),
        ("intent_value", "u64", "", "reclaim: the limbo head it works towards"),
        ("free", "u64", "pages", "frames without an owner; recounted after a recovery"),
        ("data_hint", "u64", "PFN", "where the search for data frames goes on"),
        ("node_hint", "u64", "PFN", "where the search for node frames goes on, downwards"),
        ("node_floor", "u64", "PFN", "the lowest frame that was given storage for nodes"),
        ("limbo_head", "u64", "", "first entry of the limbo ring"),
        (
            "taken_generation",
            "u64",
            "",
            "generation the taken log belongs to; at most live_generation: nothing to undo",
        ),
        ("taken_count", "u64", "", "entries of the taken log"),
        ("slots_used", "u64", "", "one more than the highest slot ever used"),
        ("limbo_room", "u64", "bytes", "storage of the limbo ring"),
        ("taken_room", "u64", "bytes", "storage of the taken log"),
        ("stale_hints", "u64", "", "1: SHARED is set for frames that are not shared any more; the next sync clears them"),
        ("log_count", "u64", "", "runs of the entry log: what a transaction changes in address spaces"),
        ("log_generation", "u64", "", "generation that the entry log belongs to; at most live_generation: to be applied"),
        ("log_owner", "u64", "", "who commits: slot, and the slot's incarnation from bit 12 on"),
        ("log_room", "u64", "bytes", "storage of the entry log"),
        ("spaces_used", "u64", "", "one more than the highest address space ever used"),
        ("spaces_free", "u64", "", "one more than the first free address space below spaces_used; 0: none"),
        ("spaces_room", "u64", "bytes", "storage of the address spaces"),
        ("buckets_room", "u64", "bytes", "storage of the hash"),
        ("messages_room", "u64", "bytes", "storage of the messages"),
        ("bells_room", "u64", "bytes", "storage of the bells"),
        ("windows_used", "u64", "", "1: there are or were address spaces with entries"),
        ("chains", "u64", "", "odd while the hash chains of the address spaces change"),
        ("unused", "bytes[40]", "", ""),
        ("live_root_0", "bytes[128]", "", "the live root of even generations: fs owns its fields"),
        ("live_root_1", "bytes[128]", "", "the live root of odd generations"),
    ],
)

SLOT = Record(
    "process slot",
    64,
    "One per open handle. Alive while its holder keeps a byte-range lock on the slot's number.",
    [
        ("pid", "u64", "", "of the holder; 0: free"),
        ("start_time", "u64", "clock ticks", "of the holder, from /proc/PID/stat"),
        ("opened", "u64", "ns since 1970", "when the handle was opened"),
        ("incarnation", "u64", "", "counts the holders: a lock word tells the one before from this one by it"),
        ("unused", "bytes[32]", "", ""),
    ],
)

# What the native half reads and writes, too; daxemu/_fault.h declares the same.

SPACE = Record(
    "address space",
    128,
    "One per inode that somebody maps: file pages to DAX entries.",
    [
        ("subvolume", "u64", "", "with `inode` the key"),
        ("inode", "u64", "", "inode number"),
        ("state", "u64", "", "0 free, 1 live, 2 orphan: its inode is deleted"),
        ("pages", "u64", "pages", "entries in the window; 0: none yet, it is only mapped for reading"),
        ("next", "u64", "", "one more than the next address space of the hash chain, or of the free ones"),
        ("length", "u64", "pages", "of the longest mapping"),
        ("dirty", "u64", "", "counts stores to shared pages; 0: none since all was folded"),
        (
            "version",
            "u64",
            "",
            "odd while a commit changes the entries; goes on when the record comes to stand for another inode",
        ),
        ("mappers", "bytes[64]", "", "a bit for each slot that maps it"),
    ],
)

MESSAGE = Record(
    "message",
    192,
    "What a fault, freeze or commit asks other processes to do, and which frames it has claimed.",
    [
        ("futex", "u32", "", "counts answers"),
        ("kind", "u32", "", "1 look the pages up again, 2 write-protect them, 3 apply the entry log"),
        ("space", "u64", "", "address space"),
        ("low", "u64", "", "first page"),
        ("high", "u64", "", "behind the last page"),
        ("claimed", "u64", "PFN", "first frame that a fault has taken and not entered yet"),
        ("count", "u64", "pages", "how many; 2^64-1: about to take some"),
        ("acks", "bytes[128]", "", "16 words; low half: a bit for each slot that has not answered; high half: the number"),
        ("number", "u32", "", "of the message: an answer to an older one does not count"),
        ("unused", "bytes[12]", "", ""),
    ],
)

BELL = Record(
    "bell",
    320,
    "One per slot: which messages wait for its service thread.",
    [
        ("futex", "u32", "", "counts rings"),
        ("unused", "u32", "", ""),
        ("bits", "bytes[256]", "", "a bit for each message"),
        ("unused2", "bytes[56]", "", ""),
    ],
)

RUN = Record(
    "entry log run",
    32,
    "How a transaction changes the entries of one run of pages; ascending by space and page.",
    [
        (
            "space",
            "u64",
            "",
            "address space; bit 32: conflicts with stores made since; 33: zero bytes; 34: folded; 35: frames handed over",
        ),
        ("page", "u64", "", "first page"),
        ("pages", "u64", "pages", "of the run; to zero bytes: the first in bits 16-31, the end in bits 0-15"),
        ("word", "u64", "", "entry of the first page; PFNs count up"),
    ],
)

COUNTERS = Record(
    "counters",
    512,
    "Changed by fault handlers, at any time.",
    [
        ("held", "u64", "pages", "frames that faults have taken and no transaction has folded"),
        ("hint", "u64", "PFN", "where the search of the faults goes on"),
        ("faults", "u64", "", "stores to shared pages"),
        ("copied", "u64", "pages", "copied by them"),
        ("shootdowns", "u64", "", "with at least one process to tell"),
        ("strays", "u64", "pages", "frames that faults have taken and nothing names any more"),
        ("dirty", "u64", "pages", "entries not folded"),
        ("epoch", "u64", "", "counts address spaces with entries that have ended"),
        ("times", "bytes[448]", "", "shootdowns by duration: 56 counters, 4 to a doubling, from 1 us"),
    ],
)

W = {name: (HEADER.size + offset) // 8 for name, offset in STATE.offset.items() if offset % 8 == 0}


def runtime_paths(pool: Pool) -> tuple[str, str]:
    """Return the paths of the run-time file and of the lock file beside it."""
    base = f"{FOLDER}/onecopy-{pool.uuid}-{pool.status.st_dev:x}.{pool.status.st_ino:x}"
    return base, base + ".lock"


class Layout:
    """Byte offsets of the areas, for a pool of `frames` pages."""

    def __init__(self, frames: int) -> None:
        def align(offset: int) -> int:
            return -(-offset // PAGE) * PAGE

        self.slots = align(HEADER.size + STATE.size)
        self.readers = align(self.slots + SLOTS * SLOT.size)
        self.counters = align(self.readers + SLOTS * READERS * 8)
        self.table = align(self.counters + COUNTERS.size)
        self.limbo = align(self.table + frames)
        self.limbo_capacity = frames + 1  # entries: there can be no more freed runs than frames
        self.taken = align(self.limbo + self.limbo_capacity * 16)
        self.log = align(self.taken + (frames + 1) * 8)
        self.log_capacity = 2 * frames + 1024  # runs
        self.messages = align(self.log + self.log_capacity * RUN.size)
        self.bells = align(self.messages + SLOTS * MESSAGES * MESSAGE.size)
        self.buckets = align(self.bells + SLOTS * BELL.size)
        self.spaces = align(self.buckets + BUCKETS * 8)
        self.windows = align(self.spaces + SPACES * SPACE.size)
        self.size = self.windows + SPACES * WINDOW

    def native(self) -> bytes:
        """Return the offsets that the native half wants, in its order."""
        words = ("live_generation", "free", "node_floor", "log_count", "log_generation", "log_owner", "spaces_used")
        areas = (self.table, self.spaces, self.messages, self.bells, self.counters, self.log, self.windows)
        return struct.pack("=15Q", self.slots + SLOT.offset["incarnation"], *areas, *(W[word] * 8 for word in words))


class Runtime:
    """The mapped run-time file of one handle; owns `fd`. Made by `attach`; `words` and `bytes` view it, `atomic` orders."""

    def __init__(self, pool: Pool, fd: int, path: str, lock: RankedLock) -> None:
        self.fd, self.path, self.lock, self.pool = fd, path, lock, pool
        self.layout = Layout(pool.frames)
        try:
            self.memory = mmap.mmap(fd, self.layout.windows)  # each window is mapped when it is needed
        except BaseException:
            os.close(fd)
            raise
        self.bytes = memoryview(self.memory)
        self.words = self.bytes.cast("Q")
        self.atomic = Words(self.memory)
        table = self.bytes[self.layout.table : self.layout.table + pool.frames]
        self.table = table  # one byte a frame, see blkcache.frames
        self.table_array = np.frombuffer(table, np.uint8)

    def get(self, name: str) -> int:
        """Return a state word."""
        return self.words[W[name]]

    def set(self, name: str, value: int) -> None:
        """Store a state word; the caller holds the transaction lock."""
        self.words[W[name]] = value

    def counter(self, name: str) -> int:
        """Return a counter that fault handlers change."""
        return self.words[self.layout.counters // 8 + COUNTERS.word(name)]

    def shootdown_time(self, part: float) -> float | None:
        """Return the microseconds within which `part` (0 to 1) of the shootdowns were over; None without any."""
        first = self.layout.counters // 8 + COUNTERS.word("times")
        times = self.words[first : first + TIMES].tolist()
        wanted, seen = part * sum(times), 0
        for place, count in enumerate(times):
            seen += count
            if count and seen >= wanted:
                return round(float((4 + (place + 1) % 4) << (place + 1) // 4) / 4, 2)  # where the place ends
        return None

    def reserve(self, room: int, area: int, need: int) -> None:
        """Give [area, area + need) storage; word `room` says how much it has. NoSpace when /dev/shm is full.

        The caller holds the transaction lock.
        """
        have = self.words[room]
        if need > have:
            want = max(need, have + 16 * PAGE)
            want = -(-want // PAGE) * PAGE
            try:
                fallocate(self.fd, 0, area, want)
            except OSError as error:
                raise NoSpace(f"{FOLDER} has no room for the run-time file ({error.strerror})", path=self.path) from error
            self.words[room] = want

    def close(self) -> None:
        """Unmap and close; closing twice is nothing."""
        if self.fd < 0:
            return
        self.atomic.release()
        self.table_array = np.empty(0, np.uint8)
        release(self.table, self.words, self.bytes, self.memory)
        os.close(self.fd)
        self.fd = -1


def _create(pool: Pool, path: str, lock_fd: int) -> int:
    """Make an empty run-time file; its magic is stored by `finish`. Caller holds both locks exclusively."""
    if os.path.lexists(path):
        os.unlink(path)
    fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    layout = Layout(pool.frames)
    try:
        try:
            os.fchmod(fd, (pool.status.st_mode & 0o666) | 0o600)
            if os.geteuid() == 0:
                os.fchown(fd, pool.status.st_uid, pool.status.st_gid)
            os.ftruncate(fd, layout.size)
            fallocate(fd, 0, 0, layout.limbo)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise NoSpace(f"{FOLDER} has no room for the run-time file", path=path) from error
        status = pool.status
        header: list[Any] = [
            0,
            LAYOUT,
            pool.frames,
            pool.uuid.bytes,
            status.st_dev,
            status.st_ino,
            os.fstat(lock_fd).st_ino,
            POLICIES.index(pool.policy),
            os.fsencode(pool.path),
        ]
        if len(header[-1]) >= HEADER.size - HEADER.offset["path"]:
            header[-1] = b""  # too long to note: such a file is never swept
        os.pwrite(fd, HEADER.pack(*header), 0)
        os.pwrite(fd, b"\xff" * (SLOTS * READERS * 8), layout.readers)  # no reader anywhere
    except BaseException:
        os.close(fd)
        os.unlink(path)
        raise
    return fd


def open_lock(pool: Pool, path: str) -> int:
    """Open the lock file, made with the pool's owner and mode when missing."""
    try:
        return open_private(path, os.O_RDWR)
    except FileNotFoundError:
        fd = open_private(path, os.O_RDWR | os.O_CREAT)
        os.fchmod(fd, (pool.status.st_mode & 0o666) | 0o600)
        if os.geteuid() == 0:
            os.fchown(fd, pool.status.st_uid, pool.status.st_gid)
        return fd
    except PermissionError as error:
        raise _no_permission(path) from error


def _no_permission(path: str) -> PermissionError:
    return PermissionError(
        errno.EACCES,
        "a reader, too, registers in the pool's run-time file, and this user may not write there; "
        "ask the owner of the pool for write permission, or copy the pool",
        path,
    )


_EXCLUSIVE = "the pool is being formatted or repaired, or open as a raw device; try again when that is done"


def not_alone(pool: Pool, lost: str) -> OneCopyError:
    """Return the error for who must make a run-time file and did not get the mount lock; `lost`: if users hold it."""
    if not try_mount(pool.fd, exclusive=False):
        return PoolBusy(_EXCLUSIVE, path=pool.path)
    if has_raw_readers(pool.fd):
        return PoolBusy(
            "the pool is open as a raw device, and its run-time file must be built first; close that", path=pool.path
        )
    return RuntimeLost(lost, path=pool.path)


def attach(pool: Pool, lock: RankedLock) -> tuple[Runtime, bool]:
    """Attach to the pool's run-time file, or make an empty one; True with it when it must be filled (see `finish`).

    The caller holds the transaction lock `lock`, on the file that `runtime_paths` names. Afterwards the mount lock is
    held shared, or exclusively while the file is to be filled.

    Raises PoolBusy while the pool is formatted or repaired, RuntimeLost when the run-time file was deleted under
    living users: making a second one would make a second truth.
    """
    path, _ = runtime_paths(pool)
    fd = -1
    try:
        fd = open_private(path, os.O_RDWR)
        header = HEADER.unpack(os.pread(fd, HEADER.size, 0).ljust(HEADER.size, b"\0"))
        whole = header["magic"] == MAGIC and header["layout"] == LAYOUT and header["frames"] == pool.frames
        if whole and (os.fstat(lock.fd).st_ino != header["lock_inode"] or os.fstat(fd).st_size < Layout(pool.frames).size):
            whole = False
        if not whole:
            os.close(fd)
            fd = -1
    except FileNotFoundError:
        pass
    except PermissionError as error:
        raise _no_permission(path) from error
    if fd >= 0:
        if not try_mount(pool.fd, exclusive=False):
            os.close(fd)
            raise PoolBusy(_EXCLUSIVE, path=pool.path)
        return Runtime(pool, fd, path, lock), False
    if not try_mount(pool.fd, exclusive=True):
        raise not_alone(
            pool,
            f"the run-time file {path} or its lock file was deleted or damaged while processes use the pool; "
            "end them ('fuser' on the pool names them), then open it again",
        )
    return Runtime(pool, _create(pool, path, lock.fd), path, lock), True


def finish(runtime: Runtime) -> None:
    """Declare a newly filled run-time file whole and let others in. Caller holds both locks exclusively."""
    runtime.words[HEADER.word("magic")] = MAGIC
    # Between the two halves of this conversion another process may hold the mount lock exclusively, but only
    # after it got the transaction lock, which we hold: so nobody can.
    try_mount(runtime.pool.fd, exclusive=False)
