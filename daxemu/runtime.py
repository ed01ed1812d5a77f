"""The run-time file: the volatile half ("DRAM") of a pool, shared by its users, rebuilt when lost, never the truth.

It lives in /dev/shm, named after the pool's UUID and inode, with the pool's owner and mode. `Runtime` owns its layout;
what the areas mean is said where they are used: slots in `slots`, frame states and limbo in blkcache, the live root in fs.

    header | state words | slots | reader words | frame table | limbo ring | taken log | pins

Only the header and the words up to the frame table have storage from the start; the rest gets it as it grows
(`reserve`), because a store into a hole of a full /dev/shm is a SIGBUS.
"""

import errno
import mmap
import os
from typing import Any

import numpy as np

from onecopy.daxemu._fault import Words
from onecopy.daxemu.errors import NoSpace, PoolBusy, RuntimeLost
from onecopy.daxemu.locks import RankedLock, open_private, try_mount
from onecopy.daxemu.pool import Pool, fallocate, release
from onecopy.daxemu.record import Record
from onecopy.daxemu.units import PAGE

FOLDER = "/dev/shm"
MAGIC = int.from_bytes(b"onecopyR", "little")
LAYOUT = 1
SLOTS = 512
READERS = 8  # concurrent lock-free readers a slot can announce
PINS = 1 << 17  # runs a slot can pin

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
        ("path", "bytes[1984]", "", "where the pool was, so that the files of a pool that is gone can be swept away"),
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
        ("unused", "bytes[136]", "", ""),
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
        ("pins", "u64", "runs", "entries of the slot's pin list"),
        ("pins_room", "u64", "bytes", "storage of the slot's pin list"),
        ("unused", "bytes[24]", "", ""),
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
        self.table = align(self.readers + SLOTS * READERS * 8)
        self.limbo = align(self.table + frames)
        self.limbo_capacity = frames + 1  # entries: there can be no more freed runs than frames
        self.taken = align(self.limbo + self.limbo_capacity * 16)
        self.pins = align(self.taken + (frames + 1) * 8)
        self.size = align(self.pins + SLOTS * PINS * 8)


class Runtime:
    """The mapped run-time file of one handle. Made by `attach`; `words` and `bytes` view it, `atomic` orders."""

    def __init__(self, pool: Pool, fd: int, path: str, lock: RankedLock) -> None:
        self.fd, self.path, self.lock, self.pool = fd, path, lock, pool
        self.layout = Layout(pool.frames)
        self.memory = mmap.mmap(fd, self.layout.size)
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
            raise PoolBusy("the pool is being formatted or repaired; try again when that is done", path=pool.path)
        return Runtime(pool, fd, path, lock), False
    if not try_mount(pool.fd, exclusive=True):
        raise RuntimeLost(
            f"the run-time file {path} or its lock file was deleted or damaged while processes use the pool; "
            "end them ('fuser' on the pool names them), then open it again",
            path=pool.path,
        )
    return Runtime(pool, _create(pool, path, lock.fd), path, lock), True


def finish(runtime: Runtime) -> None:
    """Declare a newly filled run-time file whole and let others in. Caller holds both locks exclusively."""
    runtime.words[HEADER.word("magic")] = MAGIC
    # Between the two halves of this conversion another process may hold the mount lock exclusively, but only
    # after it got the transaction lock, which we hold: so nobody can.
    try_mount(runtime.pool.fd, exclusive=False)
