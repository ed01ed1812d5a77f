"""What the stress test stores: pages in which each group of four words says who stored it, as what, and where.

A page is known by its `Content`: one stamp, and possibly a second one (or zeros) over some of its words. Every byte of it
follows from that. So a reader can tell what it sees, word by word, also in a page that is torn or comes from somewhere else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
WORDS = PAGE // 8
LANE = 4  # words of an identity: writer and number, file and page, checksum, complement of the first

Words = NDArray[np.uint64]

_ALL = (1 << 64) - 1
# A word is found where it was stored, or it is recognised as out of place.
_SALT: Words = np.arange(WORDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Stamp(NamedTuple):
    """One store of one page: who (0: nobody, these are zeros), the how manieth of that writer, into which file and page."""

    writer: int = 0
    number: int = 0
    file: int = 0
    page: int = 0

    def __str__(self) -> str:
        if not self.writer:
            return "zeros"
        return f"store {self.number} of writer {self.writer} to page {self.page} of file {self.file}"


ZERO = Stamp()


class Content(NamedTuple):
    """All bytes of a page: `base`, but words [low, high) are those of `over`."""

    base: Stamp = ZERO
    over: Stamp = ZERO
    low: int = 0
    high: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is all of one stamp, so that part of it may be replaced."""
        return self.low == self.high

    def replaced(self, over: Stamp, low: int, high: int) -> Content:
        """Return this content, which is whole unless all of it goes, with other words in [low, high)."""
        if over == self.base and self.whole:
            return self  # zeros over zeros: equal bytes have equal contents
        return Content(over) if (low, high) == (0, WORDS) else Content(self.base, over, low, high)

    def __str__(self) -> str:
        return str(self.base) if self.whole else f"{self.base}, with words {self.low}-{self.high - 1} of {self.over}"


EMPTY = Content()


def _checksum(first: int, second: int) -> int:
    mixed = ((first + 1) * 0xC2B2AE3D27D4EB4F ^ second * 0x165667B19E3779F9) & _ALL
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & _ALL
    return mixed ^ mixed >> 32


def _identity(stamp: Stamp) -> tuple[int, int, int, int]:
    """Return four words, each of which differs from store to store: one that stores a single word must not go unseen."""
    first = stamp.writer << 32 | stamp.number
    second = _checksum(first, 0) >> 40 << 40 | stamp.file << 16 | stamp.page
    return first, second, _checksum(first, second), first ^ _ALL


@lru_cache(maxsize=2048)
def stamp_words(stamp: Stamp) -> Words:
    """Return the words of a page that holds this stamp alone; not to be changed."""
    if not stamp.writer:
        return np.zeros(WORDS, np.uint64)
    return np.tile(np.array(_identity(stamp), np.uint64), WORDS // LANE) ^ _SALT


def page_words(content: Content) -> Words:
    """Return the words of a page; not to be changed."""
    words = stamp_words(content.base)
    if content.whole:
        return words
    words = words.copy()
    words[content.low : content.high] = stamp_words(content.over)[content.low : content.high]
    return words


def stamp_at(words: Words, index: int) -> Stamp | None:
    """Return the stamp that the group of words around `index` carries; None when it is neither one nor zeros."""
    start = index - index % LANE
    group = words[start : start + LANE]
    if not group.any():
        return ZERO
    first, second, check, complement = (group ^ _SALT[start : start + LANE]).tolist()
    if check != _checksum(first, second) or complement != first ^ _ALL:
        return None
    return Stamp(first >> 32, first & 0xFFFFFFFF, second >> 16 & 0xFFFFFF, second & 0xFFFF)


def page_at(words: Words, index: int) -> tuple[int, int] | None:
    """Return the (file, page) that the word at `index` was stored to, if that is one of those that say so."""
    word = int(words[index] ^ _SALT[index])
    return (word >> 16 & 0xFFFFFF, word & 0xFFFF) if index % LANE == 1 and words[index] else None


def _word(words: Words, index: int) -> str:
    """Say what one word is, by itself."""
    word = int(words[index] ^ _SALT[index])
    if not words[index]:
        return "zero"
    if index % LANE == 1:
        return f"of a store to page {word & 0xFFFF} of file {word >> 16 & 0xFFFFFF}"
    if index % LANE == 2:
        return f"checksum {word:#x}"
    first = word if index % LANE == 0 else word ^ _ALL
    return f"of store {first & 0xFFFFFFFF} of writer {first >> 32}"


def describe(words: Words) -> str:
    """Say in words what a page holds: the runs of its stamps, for a message."""
    found: list[tuple[str, int]] = []
    for start in range(0, WORDS, LANE):
        stamp = stamp_at(words, start)
        for index in range(start, start + LANE):
            text = _word(words, index) if stamp is None else str(stamp)
            if not found or found[-1][0] != text:
                found.append((text, index))
    ends = [start for _, start in found[1:]] + [WORDS]
    runs = [f"words {start}-{end - 1}: {text}" for (text, start), end in zip(found, ends, strict=True)]
    return "; ".join(runs if len(runs) <= 12 else [*runs[:11], f"and {len(runs) - 11} more runs"])
