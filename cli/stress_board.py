"""The board of the stress test: what each page of each file may hold, in memory that all its processes share.

Each page has one writer at a time, who holds a lock on it that the kernel drops when the writer dies. The writer notes what
it is about to do (`begin`: one version more has begun), does it, and notes that it has (`complete`). So whoever reads a page
without a lock knows that what it sees is at least as new as what was complete before, and no newer than what has begun
afterwards. A writer that was killed leaves begun > completed: both are legal, until the next one to take the lock sees which
it is (`settle`).

A *file* is one inode, numbered for ever; a *place* is where on the board it is described. A *name* leads to a place.
The memory has no name in any file system: nothing is left of it, however the processes end.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

from onecopy.cli.stress_page import Content, Stamp

KINDS = (
    *("store", "load", "read", "write", "clone", "clone_range", "dedupe_range", "truncate", "punch", "zero"),
    *("collapse", "insert", "sync", "unlink", "rename", "fork", "map", "open", "check"),
)
VERSIONS = 8  # the last versions of a page that are remembered
LOG = 512  # the last operations of a process that are remembered

# What the processes are to do: work; stop, with the pool open; close it. Then nobody has it open but who verifies.
WORK, REST, LEAVE, QUIET = range(4)
# Words of the header.
PHASE, FILES, WRITERS, KILLED = range(4)
_HEADER = 8
# Words of a row, one for each process that can be running: a worker, or what it has forked.
BEAT, DOING, LOGGED, QUOTA, CHECKED, UNSURE, FULL, BUSY, COUNTS = range(9)
_ROW = COUNTS + len(KINDS)
# Words of a name: how often it was led elsewhere (odd: that is going on), where it led before, where it leads afterwards.
_NAME = 3
# Words of a place: the file's number, its inode, its size in pages as far as all of them may be touched.
_FILE, _INODE, _SIZE, _PLACE = range(4)
# Words of a page: versions begun and completed, then the versions: two stamps, the words of the second, when it began and was
# complete, and for one whose content is that of some other page: place, page, file, version of that.
_BEGUN, _COMPLETED, _FIRST = range(3)
_SPAN, _FROM, _UNTIL, _SOURCE = 4, 5, 6, 7
_VERSION = 10
_PAGE = _FIRST + VERSIONS * _VERSION
# Words of a logged operation.
_ENTRY = 10


class Source(NamedTuple):
    """Where a version's content comes from while it is not known: version `version` of a page, or a later one."""

    place: int
    page: int
    file: int
    version: int


class Version(NamedTuple):
    """One version of a page. Times are nanoseconds, `until` 0 while it is not complete."""

    content: Content
    source: Source | None
    begun: int
    until: int


class Entry(NamedTuple):
    """A logged operation; `ended` 0 while it goes on, or when its process died in it."""

    begun: int
    ended: int
    kind: str
    writer: int
    file: int
    page: int
    pages: int
    other_file: int
    other_page: int
    number: int

    def touches(self, file: int, page: int) -> bool:
        """Return whether the operation has to do with this page, as what it changes or what it takes from."""
        return (self.file == file and self.page <= page < self.page + self.pages) or (
            self.other_file == file and self.other_page <= page < self.other_page + self.pages
        )


class Board:
    """The board. Made before the processes are forked; each of them uses it as it is."""

    def __init__(self, rows: int, names: int, pages: int) -> None:
        self.rows, self.names, self.pages = rows, names, pages
        self.places = 2 * names + 8 * rows
        self._row_at = _HEADER
        self._name_at = self._row_at + rows * _ROW
        self._user_at = self._name_at + names * _NAME
        self._place_at = self._user_at + rows * self.places
        self._page_at = self._place_at + self.places * _PLACE
        self._log_at = self._page_at + self.places * pages * _PAGE
        size = (self._log_at + rows * LOG * _ENTRY) * 8
        self.fd = os.memfd_create("onecopy-stress", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._memory = mmap.mmap(self.fd, size)
        self.words = memoryview(self._memory).cast("Q")
        self.started = time.monotonic_ns()
        self.maker = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.words.release()
        self._memory.close()
        os.close(self.fd)

    # -------------------------------------------------------------- locks

    def _lock(self, start: int, count: int, *, shared: bool = False) -> bool:
        try:
            fcntl.lockf(self.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, count, start)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def lock_pages(self, place: int, low: int, high: int, *, shared: bool = False) -> bool:
        """Lock pages [low, high) if nobody else has any of them; they are this process's until `unlock`."""
        return self._lock(1 + self.names + place * self.pages + low, high - low, shared=shared)

    def lock_name(self, name: int, *, shared: bool) -> bool:
        """Lock what a name leads to, if nobody else has, until `unlock`."""
        return self._lock(1 + name, 1, shared=shared)

    def unlock(self) -> None:
        """Give back all locks of this process."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN)

    @contextmanager
    def _numbers(self) -> Iterator[None]:
        fcntl.lockf(self.fd, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, 0)

    # --------------------------------------------------------------- rows

    def header(self, word: int) -> int:
        """Return a word of the header."""
        return self.words[word]

    def add_header(self, word: int) -> int:
        """Count a word of the header up, and return the new value, which nobody else gets."""
        with self._numbers():
            self.words[word] += 1
            return self.words[word]

    def enter(self, phase: int) -> None:
        """Let a phase begin, unless it, or a later one, has."""
        self.words[PHASE] = max(self.words[PHASE], phase)

    def row(self, row: int, word: int) -> int:
        """Return a word of a row."""
        return self.words[self._row_at + row * _ROW + word]

    def set_row(self, row: int, word: int, value: int) -> None:
        """Set a word of one's own row."""
        self.words[self._row_at + row * _ROW + word] = value

    def add_row(self, row: int, word: int, count: int = 1) -> None:
        """Add to a word of one's own row."""
        self.words[self._row_at + row * _ROW + word] += count

    def total(self, word: int) -> int:
        """Return the sum of a word over all rows."""
        return sum(self.row(row, word) for row in range(self.rows))

    # -------------------------------------------------------------- names

    def name(self, name: int) -> tuple[int, int, int]:
        """Return (how often it was led elsewhere, place before, place afterwards); the places are equal but while it is led."""
        at = self._name_at + name * _NAME
        return self.words[at], self.words[at + 1], self.words[at + 2]

    def lead(self, name: int, place: int) -> None:
        """Note that `name`, locked, is about to be led to `place`."""
        at = self._name_at + name * _NAME
        self.words[at + 2] = place
        self.words[at] += 1

    def led(self, name: int, place: int) -> None:
        """Note that `name` leads to `place` now."""
        at = self._name_at + name * _NAME
        self.words[at + 1] = self.words[at + 2] = place
        self.words[at] += 1

    # ------------------------------------------------------------- places

    def file(self, place: int) -> int:
        """Return the number of the file described at `place`."""
        return self.words[self._place_at + place * _PLACE + _FILE]

    def inode(self, place: int) -> int:
        """Return the inode number of the file at `place`."""
        return self.words[self._place_at + place * _PLACE + _INODE]

    def set_inode(self, place: int, inode: int) -> None:
        """Note the inode number of a new file."""
        self.words[self._place_at + place * _PLACE + _INODE] = inode

    def size(self, place: int) -> int:
        """Return how many pages of the file may be touched through a mapping; not all: it is being cut short, or was."""
        return self.words[self._place_at + place * _PLACE + _SIZE]

    def set_size(self, place: int, pages: int) -> None:
        """Note the size in pages, before it shrinks and after it has grown."""
        self.words[self._place_at + place * _PLACE + _SIZE] = pages

    def use(self, row: int, place: int) -> None:
        """Keep `place` from being used for another file, until `leave`."""
        self.words[self._user_at + row * self.places + place] = 1

    def leave(self, row: int, place: int) -> None:
        """Let go of a place."""
        self.words[self._user_at + row * self.places + place] = 0

    def inherit(self, parent: int, row: int) -> None:
        """Use in `row` all that `parent` uses."""
        for place in range(self.places):
            self.words[self._user_at + row * self.places + place] = self.words[self._user_at + parent * self.places + place]

    def leave_all(self, row: int) -> None:
        """Let go of all that `row`, whose process is gone, has used."""
        for place in range(self.places):
            self.leave(row, place)

    def _used(self) -> set[int]:
        at, places = self._user_at, self.places
        return {index % places for index, used in enumerate(self.words[at : at + self.rows * places].tolist()) if used}

    def new_place(self, row: int) -> int | None:
        """Describe a new file, all zeros; None when all places are in use."""
        with self._numbers():
            # Who leads a name to a place uses it until then, and who follows a name uses the place and then looks whether the
            # name still leads there. So a place is free only if nobody uses it before and after no name leads to it.
            used = self._used()
            names = [self.name(name) for name in range(self.names)]
            used |= {place for count, *places in names if count for place in places} | self._used()
            for place in range(self.places):
                if place in used:
                    continue
                self.use(row, place)
                self.words[FILES] += 1
                at = self._place_at + place * _PLACE
                self.words[at + _FILE], self.words[at + _INODE], self.words[at + _SIZE] = self.words[FILES], 0, self.pages
                first = self._page_at + place * self.pages * _PAGE
                self._memory[first * 8 : (first + self.pages * _PAGE) * 8] = bytes(self.pages * _PAGE * 8)
                return place
        return None

    # -------------------------------------------------------------- pages

    def _page(self, place: int, page: int) -> int:
        return self._page_at + (place * self.pages + page) * _PAGE

    def begun(self, place: int, page: int) -> int:
        """Return the number of the last version that has begun."""
        return self.words[self._page(place, page) + _BEGUN]

    def completed(self, place: int, page: int) -> int:
        """Return the number of the last version that is complete."""
        return self.words[self._page(place, page) + _COMPLETED]

    def version(self, place: int, page: int, number: int) -> Version:
        """Return a version; it is that of another number when more than VERSIONS have begun since."""
        at = self._page(place, page) + _FIRST + number % VERSIONS * _VERSION
        where = self.words[at + _SOURCE]  # first: `complete` stores the content before it clears this
        word = self.words[at : at + _VERSION].tolist()
        content = Content(_stamp(word[0], word[1]), _stamp(word[2], word[3]), word[_SPAN] & 0xFFFF, word[_SPAN] >> 16)
        source = Source((where >> 16) - 1, where & 0xFFFF, *word[_SOURCE + 1 :]) if where else None
        return Version(content, source, word[_FROM], word[_UNTIL])

    def _set(self, at: int, content: Content) -> None:
        words = self.words
        words[at], words[at + 1] = _pair(content.base)
        words[at + 2], words[at + 3] = _pair(content.over)
        words[at + _SPAN] = content.low | content.high << 16

    def begin(self, place: int, page: int, content: Content, source: Source | None = None) -> None:
        """Note that the page, which this process has locked, is about to hold `content`, or what `source` says."""
        start, words = self._page(place, page), self.words
        number = words[start + _BEGUN] + 1
        at = start + _FIRST + number % VERSIONS * _VERSION
        self._set(at, content)
        words[at + _FROM], words[at + _UNTIL] = time.monotonic_ns(), 0
        words[at + _SOURCE] = (source.place + 1) << 16 | source.page if source else 0
        words[at + _SOURCE + 1], words[at + _SOURCE + 2] = (source.file, source.version) if source else (0, 0)
        words[start + _BEGUN] = number

    def complete(self, place: int, page: int, content: Content | None = None) -> None:
        """Note that the page holds what was announced, or, where a source was, `content`, which has come of it."""
        start, words = self._page(place, page), self.words
        number = words[start + _BEGUN]
        at = start + _FIRST + number % VERSIONS * _VERSION
        if content is not None:  # in place of a source; readers go by that as long as there is one
            self._set(at, content)
            words[at + _SOURCE] = 0
        words[at + _UNTIL] = time.monotonic_ns()
        words[start + _COMPLETED] = number

    def settle(self, place: int, page: int, content: Content) -> None:
        """Note that a page, locked, whose writer has died, was seen to hold `content`."""
        self.begin(place, page, content)
        self.complete(place, page)

    # ---------------------------------------------------------------- log

    def log(self, row: int, entry: Entry) -> int:
        """Note an operation that begins now; return its number, for `log_end`."""
        number = self.row(row, LOGGED)
        at = self._log_at + (row * LOG + number % LOG) * _ENTRY
        numbers = (entry.begun, 0, KINDS.index(entry.kind), *entry[3:])
        for index, value in enumerate(numbers):
            self.words[at + index] = value
        self.set_row(row, LOGGED, number + 1)
        return number

    def log_end(self, row: int, number: int) -> None:
        """Note that an operation has ended."""
        self.words[self._log_at + (row * LOG + number % LOG) * _ENTRY + 1] = time.monotonic_ns()

    def entries(self, file: int, page: int) -> list[tuple[int, Entry]]:
        """Return (row, operation) of all remembered that have to do with a page, in the order in which they began."""
        found = []
        for row in range(self.rows):
            for number in range(min(LOG, self.row(row, LOGGED))):
                at = self._log_at + (row * LOG + number) * _ENTRY
                word = self.words[at : at + _ENTRY].tolist()
                entry = Entry(word[0], word[1], KINDS[word[2]], *word[3:])
                if entry.touches(file, page):
                    found.append((row, entry))
        return sorted(found, key=lambda one: one[1].begun)


def _stamp(first: int, second: int) -> Stamp:
    return Stamp(first >> 32, first & 0xFFFFFFFF, second >> 16, second & 0xFFFF)


def _pair(stamp: Stamp) -> tuple[int, int]:
    return stamp.writer << 32 | stamp.number, stamp.file << 16 | stamp.page
