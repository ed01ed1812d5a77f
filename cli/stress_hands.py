"""What the operations of the stress test are made of: locks on the board, two ways to a page, and changes that are announced.

Files have a *solid* part, whose pages are always there, and a *tail* that is truncated and grown again. Who touches the tail
through a mapping holds a lock on it, since a page that is gone would end its process (SIGBUS).
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import onecopy
from onecopy.cli.stress_board import FULL, WRITERS, Board, Entry
from onecopy.cli.stress_oracle import Oracle, Violation
from onecopy.cli.stress_page import PAGE, WORDS, Content, Stamp, Words, page_words

PAGES = 96  # of each file
SOLID = 64
FILES = 4  # and one more for every two processes
MAPPINGS = 6  # that a process holds at most

BACK_OUT = (errno.ENOSPC, errno.EBUSY)  # what a call may say for good reasons, having changed nothing


class SkippedOperation(Exception):
    """Somebody else is at what the operation needs; another one takes its place."""


class Route(Protocol):
    """A way to a file's content; all in words."""

    @property
    def how(self) -> str:
        """How a page was read, for messages."""

    def read(self, low: int, high: int) -> Words:
        """Return pages [low, high), zeros beyond the end of the file."""

    def store(self, at: int, words: Words) -> None:
        """Store words from word `at` of the file on."""


class Called:
    """The way through calls."""

    def __init__(self, fs: onecopy.FileSystem, path: str) -> None:
        self._fs, self.path, self.how = fs, path, "read by a call"

    def read(self, low: int, high: int) -> Words:
        """Return pages [low, high), zeros beyond the end of the file."""
        found = self._fs.read(self.path, low * PAGE, (high - low) * PAGE)
        return np.frombuffer(found.ljust((high - low) * PAGE, b"\0"), np.uint64)

    def store(self, at: int, words: Words) -> None:
        """Store words from word `at` of the file on."""
        self._fs.write(self.path, words.tobytes(), at * 8)

    def frame(self, page: int) -> int:
        """Return the PFN of a page; 0 for a hole."""
        runs = [run for run in self._fs.extents(self.path) if run.file_page <= page < run.file_page + run.pages]
        return runs[0].pfn + page - runs[0].file_page if runs else 0


@dataclass
class Mapped:
    """The way through a mapping, which goes on when the file has lost its name."""

    fs: onecopy.FileSystem
    place: int
    mode: str
    mapping: Any
    view: Words

    @property
    def how(self) -> str:
        """How a page was read, for messages."""
        return f"read through a mapping ({self.mode})"

    def read(self, low: int, high: int) -> Words:
        """Return pages [low, high)."""
        return self.view[low * WORDS : high * WORDS].copy()

    def store(self, at: int, words: Words) -> None:
        """Store words from word `at` of the file on."""
        self.view[at : at + len(words)] = words

    def close(self) -> None:
        """Unmap."""
        del self.view
        self.mapping.close()


class Hands:
    """A process of the stress test, as its operations see it."""

    def __init__(self, board: Board, row: int, pool: str, directory: str, seed: int) -> None:
        self.board, self.pool, self.directory, self.seed = board, pool, directory, seed
        self.held: list[Mapped] = []
        self.fs = onecopy.open(pool)
        self.become(row)

    def become(self, row: int) -> None:
        """Be the process of this row: at the beginning, and after a fork."""
        self.row = row
        self.writer = self.board.add_header(WRITERS)
        self.random = random.Random(f"{self.seed} {row} {self.writer}")
        self.oracle = Oracle(self.board, row)
        self.new_path = f"{self.directory}/new-{row}"
        if self.fs.exists(self.new_path):  # what the last process of this row was making when it was killed
            self.fs.unlink(self.new_path)
        self._number = 0
        self._touched: set[int] = set()
        self._logged: int | None = None

    def path(self, name: int) -> str:
        """Return the path that goes with a name of the board."""
        return f"{self.directory}/file-{name}"

    def some_name(self) -> int:
        """Return any name."""
        return self.random.randrange(self.board.names)

    def some_pages(self, most: int, low: int = 0, high: int = PAGES) -> tuple[int, int]:
        """Return up to `most` pages of [low, high), mostly few."""
        count = min(high - low, most, 1 + int(self.random.expovariate(0.4)))
        first = self.random.randint(low, high - count)
        return first, first + count

    def chance(self, probability: float) -> bool:
        """Return whether to do what is done now and then."""
        return self.random.random() < probability

    # ------------------------------------------------- beginning and end

    def note(self, kind: str, place: int, low: int, high: int, other: int | None = None, other_low: int = 0) -> None:
        """Log that this operation is about to change, or share, pages of a file."""
        file, other_file = self.board.file(place), 0 if other is None else self.board.file(other)
        entry = Entry(time.monotonic_ns(), 0, kind, self.writer, file, low, high - low, other_file, other_low, self._number + 1)
        self._logged = self.board.log(self.row, entry)

    def noted(self) -> None:
        """Log that the operation has been done; what was not done, or was cut short, stays without an end."""
        if self._logged is not None:
            self.board.log_end(self.row, self._logged)

    def let_go(self) -> None:
        """Give back all that an operation has taken."""
        self.board.unlock()
        for place in self._touched - {one.place for one in self.held}:
            self.board.leave(self.row, place)
        self._touched.clear()
        self._logged = None

    def touch(self, place: int) -> None:
        """Keep a place as it is until the end of the operation, or as long as a mapping of its file is held."""
        self.board.use(self.row, place)
        self._touched.add(place)

    # -------------------------------------------------------------- locks

    def lead(self, name: int, *, shared: bool = True) -> int:
        """Lock a name; return where the file that it leads to is described. It is whole, unless it is being cut short."""
        board = self.board
        if not board.lock_name(name, shared=shared):
            raise SkippedOperation
        if board.name(name)[0] % 2:  # who was leading it elsewhere has died
            if not board.lock_name(name, shared=False):
                raise SkippedOperation
            if board.name(name)[0] % 2:
                self.settle_name(name)
        place = board.name(name)[1]
        self.touch(place)
        self.check_inode(name, place)
        return place

    def check_inode(self, name: int, place: int) -> None:
        """Check that a locked name leads to the file that it should."""
        inode, expected = self.fs.stat(self.path(name)).st_ino, self.board.inode(place)
        if inode != expected:
            file = self.board.file(place)
            others = [self.board.file(one) for one in range(self.board.places) if self.board.inode(one) == inode]
            what = f"file {others[0]}" if others else "no file that is known"
            raise Violation(
                "S3",
                f"{self.path(name)} leads to inode {inode}, {what}, not to inode {expected}, file {file}",
                *((one, 0) for one in (file, *others)),
            )

    def settle_name(self, name: int) -> None:
        """Find out where a locked name leads, whose last leader has died on the way."""
        board, path = self.board, self.path(name)
        _, before, after = board.name(name)
        try:
            inode = self.fs.stat(path).st_ino
        except FileNotFoundError:
            place = self.new_file()
            self.fs.rename(self.new_path, path)
            board.led(name, place)
            return
        for place in (after, before):
            if inode == board.inode(place):
                board.led(name, place)
                return
        raise Violation(
            "S8",
            f"{path} is neither the file it was nor the one it was to be: inode {inode}, not "
            f"{board.inode(before)} or {board.inode(after)}",
        )

    def new_file(self) -> int:
        """Make a file of zeros at `new_path`; return where it is described."""
        place = self.new_place()
        self.fs.create(self.new_path, exist_ok=False)
        self.fs.truncate(self.new_path, PAGES * PAGE)
        self.board.set_inode(place, self.fs.stat(self.new_path).st_ino)
        return place

    def new_place(self) -> int:
        """Return where a new file is described; its pages are complete, and zeros."""
        place = self.board.new_place(self.row)
        if place is None:
            raise SkippedOperation
        self._touched.add(place)
        return place

    def lock(self, place: int, low: int, high: int, *, shared: bool = False) -> None:
        """Lock pages [low, high), or skip the operation."""
        if not self.board.lock_pages(place, low, high, shared=shared):
            raise SkippedOperation

    def lock_tail(self, place: int, low: int, high: int) -> None:
        """Lock those of pages [low, high) that may go, for reading, and see that they are there."""
        if high > SOLID:
            self.lock(place, max(low, SOLID), high, shared=True)
            self.check_there(place, high)

    def check_there(self, place: int, high: int) -> None:
        """Skip the operation unless all pages below `high`, locked, are there."""
        if self.board.size(place) < high:
            raise SkippedOperation

    def make_whole(self, name: int, place: int) -> None:
        """Give a file that someone has cut short, and died, its size again."""
        if self.board.size(place) != PAGES:
            self.lock(place, SOLID, PAGES)
            if self.board.size(place) != PAGES:
                self.fs.truncate(self.path(name), PAGES * PAGE)
                self.board.set_size(place, PAGES)

    # -------------------------------------------------------------- pages

    def stamp(self, place: int, page: int) -> Stamp:
        """Return a new stamp for a page."""
        self._number += 1
        return Stamp(self.writer, self._number, self.board.file(place), page)

    def known(self, route: Route, place: int, low: int, high: int) -> list[Content]:
        """Return what the pages, locked, hold, having judged it; one that a dead process has left torn is overwritten."""
        words = route.read(low, high)
        return [self._known(route, place, page, words[(page - low) * WORDS :][:WORDS]) for page in range(low, high)]

    def _known(self, route: Route, place: int, page: int, words: Words) -> Content:
        board = self.board
        completed = board.completed(place, page)
        content = self.oracle.judge(place, page, words, completed, f"{route.how} while nobody stored")
        if content is None:
            content = Content(self.stamp(place, page))
            board.begin(place, page, content)
            route.store(page * WORDS, page_words(content))
            board.complete(place, page)
        elif board.begun(place, page) != completed:
            board.settle(place, page, content)
        return content

    def change(
        self,
        route: Route,
        place: int,
        low: int,
        before: Sequence[Content],
        after: Sequence[Content],
        work: Callable[[], object],
    ) -> None:
        """Turn locked pages from `low` on from `before` to `after` by doing `work`; it changes all of them, or backs out."""
        board, pages = self.board, range(low, low + len(after))
        for page, content in zip(pages, after, strict=True):
            board.begin(place, page, content)
        try:
            work()
        except OSError as error:
            if error.errno not in BACK_OUT:
                raise
            self.backed_out(route, place, low, before)
            raise SkippedOperation from error
        for page in pages:
            board.complete(place, page)

    def backed_out(self, route: Route, place: int, low: int, before: Sequence[Content]) -> None:
        """Check that a call that has failed has changed nothing, and note so."""
        self.board.add_row(self.row, FULL)
        words = route.read(low, low + len(before))
        for index, content in enumerate(before):
            if not np.array_equal(words[index * WORDS :][:WORDS], page_words(content)):
                file = self.board.file(place)
                raise Violation("S8", f"a call that failed has changed page {low + index} of file {file}", (file, low + index))
            self.board.settle(place, low + index, content)

    def check(self, place: int, low: int, high: int) -> None:
        """Now and then look at locked pages again, through whatever other way there is."""
        if not self.chance(0.5):
            return
        ways: list[Route] = [one for one in self.held if one.place == place and self.board.size(place) >= high]
        for name in range(self.board.names):
            if (
                self.board.name(name)[1] == place
                and self.board.lock_name(name, shared=True)
                and self.board.name(name)[1] == place
            ):
                if self.board.name(name)[0] % 2 == 0:
                    ways.append(Called(self.fs, self.path(name)))
                break
        if ways:
            self.known(self.random.choice(ways), place, low, high)

    # ----------------------------------------------------------- mappings

    def mapped(self, mode: str | None = None) -> Mapped:
        """Return a mapping, of this mode (any: None): mostly one that is there, now and then a new one."""
        fitting = [one for one in self.held if mode in (None, one.mode)]
        if not fitting or self.chance(0.05):
            return self.map(self.some_name(), mode or self.random.choice(("r", "r+")))
        return self.random.choice(fitting)

    def map(self, name: int, mode: str) -> Mapped:
        """Map the file that a name leads to, without a lock: it may lead elsewhere at the same moment."""
        board = self.board
        count, before, place = board.name(name)
        self.touch(place)
        if before != place or count % 2 or board.name(name)[0] != count:
            raise SkippedOperation
        while len(self.held) >= MAPPINGS:
            self.unmap()
        granule = self.random.choice((1, 4, 16, 64)) if mode == "r+" and self.chance(0.2) else None
        try:
            mapping: Any = self.fs.map(self.path(name), mode, granule=granule)
        except FileNotFoundError:
            self.check_moved(name, count)
            raise SkippedOperation from None
        if board.name(name)[0] != count or len(mapping) < PAGES * PAGE:  # another file, or cut short at that moment
            mapping.close()
            raise SkippedOperation
        held = Mapped(self.fs, place, mode, mapping, np.frombuffer(memoryview(mapping), np.uint64, PAGES * WORDS))
        self.held.append(held)
        return held

    def check_moved(self, name: int, count: int) -> None:
        """Check that a name that was not found was being led elsewhere since its count was `count`."""
        if count % 2 == 0 and self.board.name(name)[0] == count:
            raise Violation("S8", f"{self.path(name)} is not there, and nobody has touched its name")

    def unmap(self) -> None:
        """Let any mapping go."""
        gone = self.held.pop(self.random.randrange(len(self.held)))
        gone.close()
        self._touched.add(gone.place)

    def close(self) -> None:
        """Let everything go."""
        while self.held:
            self.unmap()
        self.let_go()
        self.fs.close()


def lay_out(board: Board, pool: str, directory: str, seed: int) -> None:
    """Make the files that the names of the board lead to at the beginning."""
    with onecopy.open(pool) as fs:
        fs.mkdir(directory)
    hands = Hands(board, 0, pool, directory, seed)
    for name in range(board.names):
        place = hands.new_file()
        board.lead(name, place)
        hands.fs.rename(hands.new_path, hands.path(name))
        board.led(name, place)
    hands.close()
