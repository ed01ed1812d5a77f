"""The operations of the stress test. Each one raises SkippedOperation when somebody else is at what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onecopy.cli.stress_clones import clone, clone_range, dedupe_range, unlink
from onecopy.cli.stress_hands import PAGES, SOLID, Called, Hands, Mapped, Route, SkippedOperation
from onecopy.cli.stress_oracle import Violation
from onecopy.cli.stress_page import EMPTY, PAGE, WORDS, ZERO, Content, page_words

Operation = Callable[[Hands], None]

# ------------------------------------------------------------ store, load


def store(hands: Hands) -> None:
    """Store words or pages through a mapping."""
    held = hands.mapped("r+")
    low, high = hands.some_pages(20)
    hands.lock(held.place, low, high)
    hands.check_there(held.place, high)
    _overwrite(hands, "store", held, held.place, low, high)


def write(hands: Hands) -> None:
    """Store words or pages by a call."""
    name = hands.some_name()
    place = hands.lead(name)
    low, high = hands.some_pages(20)
    hands.lock(place, low, high)
    hands.make_whole(name, place)
    _overwrite(hands, "write", Called(hands.fs, hands.path(name)), place, low, high)


def _overwrite(hands: Hands, kind: str, route: Route, place: int, low: int, high: int) -> None:
    before = hands.known(route, place, low, high)
    start, end = _words(hands, before)
    hands.note(kind, place, low, high)
    after = []
    for index, content in enumerate(before):
        first, last = max(0, start - index * WORDS), min(WORDS, end - index * WORDS)
        after.append(content.replaced(hands.stamp(place, low + index), first, last))
    words = np.concatenate([page_words(content) for content in after])[start:end]
    hands.change(route, place, low, before, after, lambda: route.store(low * WORDS + start, words))
    hands.check(place, low, high)


def _words(hands: Hands, before: Sequence[Content]) -> tuple[int, int]:
    """Return which words of pages to change: whole pages, or parts at the ends where these are whole contents."""
    start, end = 0, len(before) * WORDS
    if hands.chance(0.4):
        return start, end
    if len(before) == 1:
        start, end = sorted(hands.random.sample(range(WORDS + 1), 2))
        if hands.chance(0.5):
            end = start + 1
        return (start, end) if before[0].whole else (0, WORDS)
    if before[0].whole:
        start = hands.random.randrange(WORDS)
    if before[-1].whole:
        end -= hands.random.randrange(WORDS)
    return start, end


def load(hands: Hands) -> None:
    """Look at pages through a mapping, while others may be changing them."""
    held = hands.mapped()
    low, high = hands.some_pages(20)
    hands.lock_tail(held.place, low, high)
    _look(hands, held, held.place, low, high)


def _look(hands: Hands, held: Mapped, place: int, low: int, high: int) -> None:
    completed = [hands.board.completed(place, page) for page in range(low, high)]
    words = held.read(low, high)
    for index, first in enumerate(completed):
        hands.oracle.judge(place, low + index, words[index * WORDS :][:WORDS], first, held.how)


def read(hands: Hands) -> None:
    """Look at pages by a call, while others may be changing them, and leading the name elsewhere."""
    board, name = hands.board, hands.some_name()
    count, before, place = board.name(name)
    for one in (before, place):
        hands.touch(one)
    if board.name(name)[0] != count:
        raise SkippedOperation
    low, high = hands.some_pages(20)
    pages = range(low, high)
    completed = {(one, page): board.completed(one, page) for one in (before, place) for page in pages}
    route = Called(hands.fs, hands.path(name))
    try:
        words = route.read(low, high)
    except FileNotFoundError:
        hands.check_moved(name, count)
        raise SkippedOperation from None
    places = {before: None, place: None}
    if board.name(name)[0] != count:
        if board.name(name)[0] > count + 2:
            raise SkippedOperation  # it may have led to a third one meanwhile
        count, *now = board.name(name)
        for one in now:
            places.setdefault(one)
            hands.touch(one)
        if board.name(name)[0] != count:
            raise SkippedOperation
    for page in pages:
        seen = words[(page - low) * WORDS :][:WORDS]
        wrong = None
        for one in places:
            first = completed.get((one, page))
            try:
                hands.oracle.judge(one, page, seen, hands.oracle.oldest(one, page) if first is None else first, route.how)
            except Violation as violation:
                wrong = violation
            else:
                break
        else:
            if wrong:
                raise wrong


# ------------------------------------------------- what changes the shape


def truncate(hands: Hands) -> None:
    """Cut the tail of a file short, also in the middle of a page, and let it grow again."""
    name = hands.some_name()
    place, path, low = hands.lead(name), hands.path(name), hands.random.randrange(SOLID, PAGES)
    hands.lock(place, low, PAGES)
    hands.make_whole(name, place)
    route = Called(hands.fs, path)
    before = hands.known(route, place, low, PAGES)
    kept = hands.random.randrange(WORDS) if before[0].whole and hands.chance(0.6) else 0
    after = [before[0].replaced(ZERO, kept, WORDS), *[EMPTY] * (PAGES - low - 1)]
    hands.note("truncate", place, low, PAGES)
    size = low * PAGE + kept * 8

    def cut() -> None:
        hands.board.set_size(place, low)
        try:
            hands.fs.truncate(path, size)
        except OSError:
            hands.board.set_size(place, PAGES)
            raise

    hands.change(route, place, low, before, after, cut)
    found = hands.fs.stat(path).st_size
    if found != size:
        raise Violation(
            "S3", f"file {hands.board.file(place)} was cut to {size} bytes and has {found}", (hands.board.file(place), low)
        )
    hands.check(place, low, PAGES)
    hands.fs.truncate(path, PAGES * PAGE)
    hands.board.set_size(place, PAGES)
    hands.check(place, low, PAGES)


def punch(hands: Hands) -> None:
    """Make a range a hole, also one that begins or ends in the middle of a page."""
    _clear(hands, "punch")


def zero(hands: Hands) -> None:
    """Make a range zeros that stay allocated."""
    _clear(hands, "zero")


def _clear(hands: Hands, kind: str) -> None:
    name = hands.some_name()
    place = hands.lead(name)
    low, high = hands.some_pages(32)
    hands.lock(place, low, high)
    hands.make_whole(name, place)
    route = Called(hands.fs, hands.path(name))
    before = hands.known(route, place, low, high)
    start, end = _words(hands, before)
    after = []
    for index, content in enumerate(before):
        after.append(content.replaced(ZERO, max(0, start - index * WORDS), min(WORDS, end - index * WORDS)))
    hands.note(kind, place, low, high)
    work = hands.fs.punch if kind == "punch" else hands.fs.zero
    offset, length = low * PAGE + start * 8, (end - start) * 8
    hands.change(route, place, low, before, after, lambda: work(hands.path(name), offset, length))
    hands.check(place, low, high)


def collapse(hands: Hands) -> None:
    """Cut pages out of a file, so that what follows moves up."""
    _shift(hands, "collapse")


def insert(hands: Hands) -> None:
    """Insert pages into a file, so that what follows moves down."""
    _shift(hands, "insert")


def _shift(hands: Hands, kind: str) -> None:
    name = hands.some_name()
    place, path = hands.lead(name), hands.path(name)
    count = hands.random.randint(1, 8)
    low = hands.random.randrange(PAGES - count)
    hands.lock(place, low, PAGES)
    hands.make_whole(name, place)
    route = Called(hands.fs, path)
    before = hands.known(route, place, low, PAGES)
    hands.note(kind, place, low, PAGES)
    after = [*before[count:], *[EMPTY] * count] if kind == "collapse" else [*[EMPTY] * count, *before[:-count]]
    work = hands.fs.collapse if kind == "collapse" else hands.fs.insert

    def shift() -> None:
        hands.board.set_size(place, PAGES - count)
        try:
            work(path, low * PAGE, count * PAGE)
        except OSError:
            hands.board.set_size(place, PAGES)
            raise

    hands.change(route, place, low, before, after, shift)
    hands.fs.truncate(path, PAGES * PAGE)
    hands.board.set_size(place, PAGES)
    hands.check(place, low, PAGES)


# ------------------------------------------------------------------ whole


def sync(hands: Hands) -> None:
    """Make the pool durable, or what one mapping shows."""
    own = [one for one in hands.held if one.fs is hands.fs]  # a mapping whose handle is closed lives on, but can't sync
    if own and hands.chance(0.5):
        hands.random.choice(own).mapping.sync()
    else:
        hands.fs.sync()


def remap(hands: Hands) -> None:
    """Map a file anew, or let a mapping go."""
    if hands.held and hands.chance(0.4):
        hands.unmap()
    else:
        hands.map(hands.some_name(), hands.random.choice(("r", "r+", "r+")))


def reopen(hands: Hands) -> None:
    """Close the pool and open it anew; mappings stay."""
    import onecopy

    hands.fs.close()
    hands.fs = onecopy.open(hands.pool)


def check(hands: Hands) -> None:
    """Recount everything, while the others wait."""
    report = hands.fs.check()
    if not report.ok:
        raise Violation("S6", "; ".join(finding.message for finding in report.findings[:5]))


_OPERATIONS: dict[str, tuple[int, Operation]] = {
    "store": (300, store),
    "load": (200, load),
    "read": (150, read),
    "write": (120, write),
    "clone": (25, clone),
    "clone_range": (50, clone_range),
    "dedupe_range": (40, dedupe_range),
    "truncate": (25, truncate),
    "punch": (25, punch),
    "zero": (25, zero),
    "collapse": (10, collapse),
    "insert": (10, insert),
    "sync": (15, sync),
    "unlink": (12, unlink),
    "map": (30, remap),
    "open": (2, reopen),
    "check": (1, check),
}
OPERATIONS = {kind: operation for kind, (_, operation) in _OPERATIONS.items()}
WEIGHTS = {kind: weight for kind, (weight, _) in _OPERATIONS.items()} | {"fork": 6}
"""How often each kind of operation is chosen; a worker itself knows how to fork."""
MAPPED = ("store", "load", "map")
