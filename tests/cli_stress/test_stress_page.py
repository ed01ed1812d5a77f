"""Pages that say who stored them, word by word."""

import numpy as np
import pytest

from onecopy.cli.stress_page import EMPTY, PAGE, WORDS, ZERO, Content, Stamp, describe, page_at, page_words, stamp_at

ONE = Stamp(writer=3, number=7, file=11, page=5)
OTHER = Stamp(writer=4, number=1, file=12, page=6)


def test_every_group_of_words_carries_the_stamp():
    words = page_words(Content(ONE))
    assert words.nbytes == PAGE
    assert all(stamp_at(words, index) == ONE for index in range(WORDS))
    assert page_at(words, 1) == (11, 5)
    assert page_at(words, 0) is None


def test_zeros_are_a_stamp_of_nobody():
    assert not page_words(EMPTY).any()
    assert stamp_at(page_words(EMPTY), 9) == ZERO


def test_no_two_words_are_equal():
    words = page_words(Content(ONE))
    assert len({*words.tolist()}) == WORDS


@pytest.mark.parametrize("other", [ONE._replace(number=8), ONE._replace(writer=4), ONE._replace(number=6, writer=4)], ids=str)
def test_each_word_differs_from_store_to_store(other):
    """A store of any single word can be told from none."""
    assert (page_words(Content(ONE)) != page_words(Content(other))).all()
    assert (page_words(Content(ONE)) != 0).all()


def test_a_word_out_of_place_is_noticed():
    words = page_words(Content(ONE)).copy()
    words[8:16] = words[16:24].copy()
    assert stamp_at(words, 8) is None
    assert stamp_at(words, 16) == ONE


def test_a_changed_bit_is_noticed():
    for index in (0, 1, 2, 3, WORDS - 1):
        words = page_words(Content(ONE)).copy()
        words[index] ^= np.uint64(1 << 40)
        assert stamp_at(words, index) is None


def test_part_of_a_page_can_be_replaced():
    content = Content(ONE).replaced(OTHER, 8, 16)
    words = page_words(content)
    assert not content.whole
    assert [stamp_at(words, index) for index in (0, 7, 8, 15, 16)] == [ONE, ONE, OTHER, OTHER, ONE]
    assert describe(words) == f"words 0-7: {ONE}; words 8-15: {OTHER}; words 16-511: {ONE}"
    assert content.replaced(OTHER, 0, WORDS) == Content(OTHER)


def test_zeros_over_zeros_are_the_same_content():
    assert EMPTY.replaced(ZERO, 3, 9) == EMPTY


def test_single_words_are_named():
    words = page_words(EMPTY).copy()
    words[[0, 1]] = page_words(Content(ONE))[[0, 1]]
    text = describe(words)
    assert "words 0-0: of store 7 of writer 3; words 1-1: of a store to page 5 of file 11; words 2-3: zero" in text


def test_pages_of_many_runs_are_cut_short():
    words = page_words(Content(ONE)).copy()
    for start in range(0, WORDS, 8):
        words[start : start + 4] = page_words(Content(OTHER))[start : start + 4]
    assert describe(words).endswith("and 117 more runs")
