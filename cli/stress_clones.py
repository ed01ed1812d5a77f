"""The operations of the stress test that make files share pages, and those that lead names to other files.

The name of the source is locked for others' renames, its pages are not: the clone must hold what they all held at one moment.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from onecopy.cli.stress_board import Source
from onecopy.cli.stress_hands import BACK_OUT, PAGES, Called, Hands, SkippedOperation
from onecopy.cli.stress_oracle import Violation
from onecopy.cli.stress_page import EMPTY, PAGE, WORDS, Content, page_words


def clone(hands: Hands) -> None:
    """Clone a file that others are storing to, and lead another file's name to the clone."""
    board, fs = hands.board, hands.fs
    source, name = hands.random.sample(range(board.names), 2)
    origin = hands.lead(source)
    hands.lead(name, shared=False)
    if board.size(origin) != PAGES:
        raise SkippedOperation
    place = hands.new_place()
    hands.note("clone", place, 0, PAGES, origin)
    completed = [board.completed(origin, page) for page in range(PAGES)]
    try:
        fs.clone(hands.path(source), hands.new_path)
        cloned = Cloned(Called(fs, hands.path(source)), origin, 0, completed, time.monotonic_ns())
        if fs.stat(hands.new_path).st_size != PAGES * PAGE:  # it was being cut short, or pages were being inserted
            fs.truncate(hands.new_path, PAGES * PAGE)
        _take_over(hands, cloned, Called(fs, hands.new_path), place, 0)
    except OSError as error:
        _drop_new(hands)
        if error.errno not in BACK_OUT:
            raise
        raise SkippedOperation from error
    board.set_inode(place, fs.stat(hands.new_path).st_ino)
    _lead_to(hands, name, place, unlink=False)


@dataclass(frozen=True)
class Cloned:
    """What was cloned: pages from `low` on, of which some versions were complete before; and when the call had returned."""

    source: Called
    place: int
    low: int
    completed: list[int]
    returned: int


def _take_over(hands: Hands, cloned: Cloned, route: Called, place: int, low: int) -> None:
    """Note what pages have become by cloning others, having judged that it is what the others held at one moment."""
    board, oracle, completed = hands.board, hands.oracle, cloned.completed
    origin, origin_low = cloned.place, cloned.low
    words = route.read(low, low + len(completed))
    latest, earliest = (0, 0), (1 << 64, 0)
    seen: list[Content] = []
    for index, first in enumerate(completed):
        page, from_page = low + index, origin_low + index
        how = f"cloned to page {page} of file {board.file(place)}"
        content = oracle.judge(origin, from_page, words[index * WORDS :][:WORDS], first, how)
        if content is None:  # torn: it was being stored to at that moment
            content = Content(hands.stamp(place, page))
            board.begin(place, page, content)
            route.store(page * WORDS, page_words(content))
        else:
            begun, until = oracle.times(origin, from_page, content, first)
            latest, earliest = max(latest, (begun, from_page)), min(earliest, (until, from_page))
            if board.begun(place, page) == board.completed(place, page):
                board.begin(place, page, content)
        board.complete(place, page, content)
        seen.append(content)
    file = board.file(origin)
    for index, words in enumerate(np.split(route.read(low, low + len(seen)), len(seen))):
        how = f"that was cloned from page {origin_low + index} of file {file} is looked at again, when nobody has stored to it"
        oracle.judge(place, low + index, words, board.completed(place, low + index), how)
    if latest[0] <= min(earliest[0], cloned.returned):
        return
    frames = ", ".join(
        f"page {page} is frame {cloned.source.frame(page)} there and {route.frame(page - origin_low + low)} in the clone"
        for page in {earliest[1], latest[1]}
    )
    pages = (file, earliest[1]), (file, latest[1])
    clone = f"a clone of file {file} into file {board.file(place)}"
    if latest[0] > cloned.returned:
        late = (latest[0] - cloned.returned) / 1000
        what = f"holds a store to page {latest[1]} that began {late:.1f} us after the call"
        raise Violation("S4", f"{clone} {what}; {frames}", *pages)
    raise Violation(
        "S3",
        f"{clone} shows no moment: its version of page {earliest[1]} was gone {(latest[0] - earliest[0]) / 1000:.1f} us before "
        f"the version of page {latest[1]} began; {frames}",
        *pages,
    )


def _drop_new(hands: Hands) -> None:
    if hands.fs.exists(hands.new_path):
        hands.fs.unlink(hands.new_path)


def _lead_to(hands: Hands, name: int, place: int, *, unlink: bool) -> None:
    """Lead a name, locked for this process alone, to the new file; what it has led to lives on in mappings."""
    hands.board.lead(name, place)
    if unlink:
        hands.fs.unlink(hands.path(name))
    hands.fs.rename(hands.new_path, hands.path(name))
    hands.board.led(name, place)


def unlink(hands: Hands) -> None:
    """Unlink a file, or rename a new one over it."""
    name = hands.some_name()
    hands.lead(name, shared=False)
    place = hands.new_file()
    gone = hands.chance(0.5)
    hands.note("unlink" if gone else "rename", place, 0, PAGES)
    _lead_to(hands, name, place, unlink=gone)


def clone_range(hands: Hands) -> None:
    """Clone pages to other offsets, of the same file or another."""
    board = hands.board
    source, name = hands.some_name(), hands.some_name()
    origin, place = hands.lead(source), hands.lead(name)
    origin_low, origin_high = hands.some_pages(32)
    count = origin_high - origin_low
    low = hands.random.randint(0, PAGES - count)
    if origin == place and abs(low - origin_low) < count:
        raise SkippedOperation
    hands.lock(place, low, low + count)
    hands.lock_tail(origin, origin_low, origin_high)
    hands.check_there(place, low + count)
    route = Called(hands.fs, hands.path(name))
    before = hands.known(route, place, low, low + count)
    hands.note("clone_range", place, low, low + count, origin, origin_low)
    completed = [board.completed(origin, page) for page in range(origin_low, origin_high)]
    for index, version in enumerate(completed):
        board.begin(place, low + index, EMPTY, Source(origin, origin_low + index, board.file(origin), version))
    try:
        hands.fs.clone_range(hands.path(source), origin_low * PAGE, hands.path(name), low * PAGE, count * PAGE)
    except OSError as error:
        if error.errno not in BACK_OUT:
            raise
        hands.backed_out(route, place, low, before)
        raise SkippedOperation from error
    cloned = Cloned(Called(hands.fs, hands.path(source)), origin, origin_low, completed, time.monotonic_ns())
    _take_over(hands, cloned, route, place, low)
    hands.check(place, low, low + count)


def dedupe_range(hands: Hands) -> None:
    """Share pages of two files, if they are equal at that moment: mostly such as were, a moment ago."""
    board = hands.board
    one, other = hands.some_name(), hands.some_name()
    here, there = hands.lead(one), hands.lead(other)
    low, high = hands.some_pages(32)
    other_low = low if here != there and hands.chance(0.8) else hands.random.randint(0, PAGES - (high - low))
    if here == there and abs(low - other_low) < high - low:
        raise SkippedOperation
    hands.lock_tail(here, low, high)
    hands.lock_tail(there, other_low, other_low + high - low)
    pairs = [((here, page), (there, page - low + other_low)) for page in range(low, high)]
    completed = [((*a, board.completed(*a)), (*b, board.completed(*b))) for a, b in pairs]
    hands.note("dedupe_range", here, low, high, there, other_low)
    length = (high - low) * PAGE
    if not hands.fs.dedupe_range(hands.path(one), low * PAGE, hands.path(other), other_low * PAGE, length):
        return
    for a, b in completed:
        if not hands.oracle.agree(a, b):
            pages = (board.file(here), a[1]), (board.file(there), b[1])
            message = f"page {a[1]} of file {pages[0][0]} was said to equal page {b[1]} of file {pages[1][0]}, and never did"
            raise Violation("S4", message, *pages)
