"""Process slots: who uses the pool, and what generation they are reading.

A slot is alive while its holder keeps an open-file-description lock on one byte of the run-time file: the kernel
drops it when the last process that holds the descriptor dies, so there is no such thing as a stale slot. The
descriptor is the slot's own. Around fork the parent makes the child's slot *before* the child exists and lets it go
after: the child inherits the descriptor, and with it the lock, so it is registered from its first instruction.
"""

import errno
import fcntl
import os
import threading
import time
from collections import deque
from dataclasses import dataclass

from onecopy.daxemu.errors import OneCopyError
from onecopy.daxemu.locks import range_lock, reopen
from onecopy.daxemu.runtime import BELL, MESSAGE, MESSAGES, READERS, SLOT, SLOTS, Runtime, W

IDLE = (1 << 64) - 1  # a reader word that announces nothing; larger than every generation

_LOCK_BASE = 1 << 40  # beyond the file's end: the range is only a name
_LIVE = W["live_generation"]
_MESSAGES_ROOM, _BELLS_ROOM = W["messages_room"], W["bells_room"]


def _word(runtime: Runtime, slot: int, field: str) -> int:
    return (runtime.layout.slots + slot * SLOT.size) // 8 + SLOT.word(field)


def _start_time(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


@dataclass(frozen=True)
class User:
    """One open handle on a pool: process, slot, when it was opened (ns since 1970), and the program's name."""

    pid: int
    slot: int
    opened: int
    program: str


class Slot:
    """This handle's slot. `claim` makes one; `announce`/`retract` bracket lock-free reading."""

    def __init__(self, runtime: Runtime, index: int, fd: int) -> None:
        self.runtime, self.index, self.fd = runtime, index, fd
        first = runtime.layout.readers // 8 + index * READERS
        self._free = deque(range(first, first + READERS))
        self._room = threading.Semaphore(READERS)

    def adopt(self) -> None:
        """In the forked child that the slot was made for: put our process's name on it."""
        words, pid = self.runtime.words, os.getpid()
        words[_word(self.runtime, self.index, "start_time")] = _start_time(pid)
        words[_word(self.runtime, self.index, "pid")] = pid

    def announce(self) -> tuple[int, int]:
        """Begin a lock-free read: return (reader word, generation); frames of it stay until `retract`.

        Argument: we store generation g into our word and then find that g is still live. Both are sequentially
        consistent, so of the two orders one holds. Either the reclaimer's scan of the words comes after our store, and
        it sees g and keeps what g reaches; or it came before our store, hence before our second look, and the
        reclaimer frees only what was unreachable from the generation live at its scan. As g is live at our second
        look and generations only grow, g is that generation or a later one: it reaches none of these frames.
        """
        self._room.acquire()
        word = self._free.pop()
        try:
            return word, self.renew(word)
        except BaseException:
            self.retract(word)
            raise

    def renew(self, word: int) -> int:
        """Announce the generation that is live now in a word that we have; return the generation."""
        atomic, live = self.runtime.atomic, _LIVE
        while True:
            generation = atomic.load(live)
            atomic.store(word, generation)
            if atomic.load(live) == generation:
                return generation

    def retract(self, word: int) -> None:
        """End the read that `announce` began."""
        self.runtime.atomic.store(word, IDLE)
        self._free.append(word)
        self._room.release()

    def release(self) -> None:
        """Free the slot; the caller holds the transaction lock and has unpinned everything."""
        clear(self.runtime, self.index)
        os.close(self.fd)


JANITOR = SLOTS - 1  # the slot of who buries the dead while they hold all the others; never anybody's for long


def claim(runtime: Runtime, first: int = 0, end: int = JANITOR) -> Slot:
    """Take a free slot of [first, end) for this process; the caller holds the transaction lock.

    Raises OneCopyError (ENFILE) when all are taken, by the living or by dead that nobody has reaped.
    """
    fd = reopen(runtime.fd)
    try:
        for index in range(first, end):
            if runtime.words[_word(runtime, index, "pid")]:
                continue
            try:
                range_lock(fd, fcntl.F_OFD_SETLK, _LOCK_BASE + index)
            except BlockingIOError:
                continue
            clear(runtime, index)
            layout = runtime.layout
            runtime.reserve(_MESSAGES_ROOM, layout.messages, (index + 1) * MESSAGES * MESSAGE.size)
            runtime.reserve(_BELLS_ROOM, layout.bells, (index + 1) * BELL.size)
            pid = os.getpid()
            words = runtime.words
            words[_word(runtime, index, "start_time")] = _start_time(pid)
            words[_word(runtime, index, "opened")] = time.time_ns()
            words[_word(runtime, index, "incarnation")] += 1
            runtime.set("slots_used", max(runtime.get("slots_used"), index + 1))
            words[_word(runtime, index, "pid")] = pid
            return Slot(runtime, index, fd)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    raise OneCopyError(f"all {SLOTS} process slots of the pool are in use", path=runtime.pool.path, code=errno.ENFILE)


def clear(runtime: Runtime, index: int) -> None:
    """Make slot `index` free and idle; the caller holds the transaction lock."""
    first = runtime.layout.readers // 8 + index * READERS
    for word in range(first, first + READERS):
        runtime.atomic.store(word, IDLE)
    runtime.words[_word(runtime, index, "pid")] = 0


def taken(runtime: Runtime) -> list[int]:
    """Return the slots that are taken, by the living or the dead."""
    return [i for i in range(runtime.get("slots_used")) if runtime.words[_word(runtime, i, "pid")]]


def dead(runtime: Runtime) -> list[int]:
    """Return the taken slots whose holder is gone; the caller holds the transaction lock."""
    return [i for i in taken(runtime) if range_lock(runtime.fd, fcntl.F_OFD_GETLK, _LOCK_BASE + i) == fcntl.F_UNLCK]


def users(runtime: Runtime) -> list[User]:
    """Return the living handles, this one included."""
    gone = set(dead(runtime))
    found = []
    for index in taken(runtime):
        if index in gone:
            continue
        pid = runtime.words[_word(runtime, index, "pid")]
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                program = file.read().strip()
        except OSError:
            program = "?"
        found.append(User(pid, index, runtime.words[_word(runtime, index, "opened")], program))
    return found


def oldest_reader(runtime: Runtime) -> int:
    """Return the oldest generation that a slot announces, IDLE when none does."""
    first = runtime.layout.readers // 8
    atomic = runtime.atomic
    atomic.load(first)  # orders the plain reads below after everything this process stored before
    words = runtime.words[first : first + runtime.get("slots_used") * READERS]
    return min(words.tolist(), default=IDLE)


def in_use(fd: int) -> bool:
    """Return whether any slot of the run-time file open as `fd` has a living holder."""
    return range_lock(fd, fcntl.F_OFD_GETLK, _LOCK_BASE, SLOTS) != fcntl.F_UNLCK
