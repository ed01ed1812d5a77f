"""What the stress test's board allows a page to hold, and which rule is broken when it holds something else.

The judge is exact where nobody was storing: one content is legal. Between two versions each word may be of either, since a
store of more than a word is not one event, in any file system.
"""

from __future__ import annotations

import numpy as np

from onecopy.cli.stress_board import CHECKED, KILLED, UNSURE, VERSIONS, Board
from onecopy.cli.stress_page import ZERO, Content, Stamp, Words, describe, page_at, page_words, stamp_at

ENDLESS = 1 << 63
_DEEPEST = 3  # clones of a page that is just being cloned into, and so on


class Violation(Exception):
    """A rule is broken. `pages` are those whose history tells why: (file, page)."""

    def __init__(self, rule: str, message: str, *pages: tuple[int, int]) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule, self.message, self.pages = rule, message, pages


class Oracle:
    """Judges what a process sees; counts for its row of the board."""

    def __init__(self, board: Board, row: int) -> None:
        self._board, self.row = board, row

    def judge(self, place: int, page: int, words: Words, first: int, how: str) -> Content | None:
        """Return what a page holds, given that version `first` was complete before it was looked at.

        None when it is between two versions, or when too many began meanwhile to tell. Raises Violation.
        """
        self._board.add_row(self.row, CHECKED)
        legal = self._legal(place, page, first)
        if legal is None:
            self._board.add_row(self.row, UNSURE)
            return None
        for content in reversed(legal):
            if np.array_equal(words, page_words(content)):
                return content
        wrong = np.flatnonzero(~np.any([words == page_words(content) for content in legal], axis=0))
        if not len(wrong):
            return None
        raise self._violation(place, page, words, legal, int(wrong[0]), how)

    def oldest(self, place: int, page: int) -> int:
        """Return the oldest version that is remembered for sure."""
        return max(0, self._board.begun(place, page) - VERSIONS + 2)

    def _legal(self, place: int, page: int, first: int, depth: int = 0) -> list[Content] | None:
        """Return what versions from `first` on hold; None when that is not known any more."""
        board = self._board
        last = board.begun(place, page)
        found: list[Content] = []
        for number in range(first, last + 1):
            version = board.version(place, page, number)
            source = version.source
            if source is None:
                found.append(version.content)
                continue
            if depth == _DEEPEST or board.file(source.place) != source.file:
                return None
            inner = self._legal(source.place, source.page, source.version, depth + 1)
            if inner is None or board.file(source.place) != source.file:
                return None
            found += inner
        # The version after the last one may be being written where the first one of them was.
        return found if board.begun(place, page) - first <= VERSIONS - 2 else None

    def agree(self, one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
        """Return whether two pages, each as (place, page, version complete before), may have been equal meanwhile."""
        here, there = self._legal(*one), self._legal(*other)
        if here is None or there is None:
            self._board.add_row(self.row, UNSURE)
            return True
        return not {*here}.isdisjoint(there) or min(len(here), len(there)) > 1

    def times(self, place: int, page: int, content: Content, first: int) -> tuple[int, int]:
        """Return between which moments, at the most, the page held `content`, which was seen from version `first` on."""
        board = self._board
        begun, until, last = ENDLESS, 0, board.begun(place, page)
        for number in range(first, last + 1):
            version = board.version(place, page, number)
            if version.content == content or version.source:
                begun = min(begun, version.begun)
                until = max(until, (board.version(place, page, number + 1).until if number < last else 0) or ENDLESS)
        if begun == ENDLESS or board.begun(place, page) - first > VERSIONS - 2:
            return 0, ENDLESS
        return begun, until

    # ----------------------------------------------------------- findings

    def _violation(self, place: int, page: int, words: Words, legal: list[Content], wrong: int, how: str) -> Violation:
        file = self._board.file(place)
        stamp = stamp_at(words, wrong)
        rule, what = self._reason(place, page, stamp)
        allowed = " or ".join(dict.fromkeys(map(str, reversed(legal))))
        pages = [(file, page)]
        origin = (stamp.file, stamp.page) if stamp and stamp.writer else page_at(words, wrong)
        if origin and origin != (file, page):
            pages.append(origin)
        return Violation(
            rule,
            f"{what}: page {page} of file {file} {how}: word {wrong} is wrong; found {describe(words)}; legal {allowed}",
            *pages,
        )

    def _reason(self, place: int, page: int, stamp: Stamp | None) -> tuple[str, str]:
        board = self._board
        if stamp is None:
            return "S4, S5", "bytes that nobody has stored here, or part of a store to another page"
        lost = "S3, S8" if board.header(KILLED) else "S3"
        last = board.begun(place, page)
        known = [board.version(place, page, number).content for number in range(self.oldest(place, page), last + 1)]
        if stamp == ZERO or any(stamp in content[:2] for content in known):
            return lost, "a store that was complete is not seen"
        if (stamp.file, stamp.page) == (board.file(place), page):
            return lost, "a store that was complete long ago is not seen, or one is seen that was never made"
        return "S4", "a store to another page is seen"
