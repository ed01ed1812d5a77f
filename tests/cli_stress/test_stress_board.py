"""The board, and what its oracle allows: exact while nobody stores, between two versions while somebody does."""

import os

import numpy as np
import pytest

from onecopy.cli.stress_board import CHECKED, PHASE, REST, UNSURE, VERSIONS, WORK, Board, Entry, Source
from onecopy.cli.stress_end import history
from onecopy.cli.stress_oracle import ENDLESS, Oracle, Violation
from onecopy.cli.stress_page import EMPTY, WORDS, Content, Stamp, page_words


@pytest.fixture
def place(board):
    return board.new_place(0)


@pytest.fixture
def oracle(board):
    return Oracle(board, 0)


def stamp(board, place, number, page=2):
    return Content(Stamp(1, number, board.file(place), page))


def store(board, place, number, page=2):
    content = stamp(board, place, number, page)
    board.begin(place, page, content)
    board.complete(place, page)
    return content


def judge(oracle, place, content, first, page=2):
    words = content if isinstance(content, np.ndarray) else page_words(content)
    return oracle.judge(place, page, words, first, "seen")


# ------------------------------------------------------------------ oracle


def test_a_new_file_is_zeros(board, place, oracle):
    assert judge(oracle, place, EMPTY, 0) == EMPTY
    assert board.row(0, CHECKED) == 1


def test_only_the_last_version_is_legal_when_nobody_stores(board, place, oracle):
    old, new = store(board, place, 1), store(board, place, 2)
    assert judge(oracle, place, new, 2) == new
    with pytest.raises(Violation, match=r"^S3: a store that was complete is not seen: page 2 of file 1 seen") as caught:
        judge(oracle, place, old, 2)
    assert caught.value.pages == ((1, 2),)


def test_versions_that_begin_while_reading_are_legal(board, place, oracle):
    old, new = store(board, place, 1), store(board, place, 2)
    assert judge(oracle, place, old, 1) == old
    assert judge(oracle, place, new, 1) == new


def test_a_store_under_way_may_be_seen_word_by_word(board, place, oracle):
    old, new = store(board, place, 1), stamp(board, place, 2)
    board.begin(place, 2, new)
    words = page_words(old).copy()
    words[100:] = page_words(new)[100:]
    assert judge(oracle, place, words, 1) is None
    board.complete(place, 2)
    with pytest.raises(Violation, match=r"word 0 is wrong"):
        judge(oracle, place, words, 2)


def test_a_page_that_a_dead_process_left_is_settled(board, place, oracle):
    old = store(board, place, 1)
    board.begin(place, 2, stamp(board, place, 2))
    assert judge(oracle, place, old, board.completed(place, 2)) == old
    board.settle(place, 2, old)
    with pytest.raises(Violation):
        judge(oracle, place, stamp(board, place, 2), board.completed(place, 2))


def test_bytes_of_another_file_are_a_leak(board, place, oracle):
    other = board.new_place(0)
    strange = Content(Stamp(9, 1, board.file(other), 2))
    with pytest.raises(Violation, match=r"^S4: .*store 1 of writer 9 to page 2 of file 2") as caught:
        judge(oracle, place, strange, 0)
    assert caught.value.pages == ((1, 2), (2, 2))


def test_bytes_of_nobody(board, place, oracle):
    words = page_words(EMPTY).copy()
    words[100:120] = 0xDEAD
    with pytest.raises(Violation, match=r"^S4, S5: bytes that nobody has stored here"):
        judge(oracle, place, words, 0)


def test_a_page_of_another_page_of_the_same_file_is_a_leak(board, place, oracle):
    with pytest.raises(Violation, match=r"^S4"):
        judge(oracle, place, store(board, place, 1, page=3), 0)


def test_too_late_to_tell(board, place, oracle):
    for number in range(VERSIONS):
        store(board, place, number + 1)
    assert judge(oracle, place, Content(Stamp(9, 9, 9, 9)), 0) is None
    assert board.row(0, UNSURE) == 1


def test_a_page_being_cloned_into_may_hold_what_the_source_holds(board, place, oracle):
    target = board.new_place(0)
    first = store(board, place, 1)
    board.begin(target, 2, EMPTY, Source(place, 2, board.file(place), 1))
    second = store(board, place, 2)
    assert judge(oracle, target, EMPTY, 0) == EMPTY
    assert judge(oracle, target, first, 0) == first
    assert judge(oracle, target, second, 0) == second
    board.complete(target, 2, first)
    with pytest.raises(Violation, match=r"^S4"):
        judge(oracle, target, second, 1)
    assert judge(oracle, target, first, 1) == first


def test_the_source_of_a_clone_may_be_forgotten(board, place, oracle):
    target = board.new_place(0)
    board.begin(target, 2, EMPTY, Source(place, 2, board.file(place) + 1, 0))
    assert judge(oracle, target, Content(Stamp(9, 9, 9, 9)), 0) is None


def test_pages_agree(board, place, oracle):
    other = board.new_place(0)
    assert oracle.agree((place, 2, 0), (other, 2, 0))
    store(board, place, 1)
    assert oracle.agree((place, 2, 0), (other, 2, 0))  # before the store
    assert not oracle.agree((place, 2, 1), (other, 2, 0))


def test_the_times_of_a_version(board, place, oracle):
    first, second = store(board, place, 1), store(board, place, 2)
    begun, until = oracle.times(place, 2, first, 1)
    later, endless = oracle.times(place, 2, second, 1)
    assert 0 < begun < later < until
    assert endless == ENDLESS
    store(board, place, 3)
    assert oracle.times(place, 2, second, 1)[1] < ENDLESS


# ------------------------------------------------------------------- board


def in_child(work):
    """Return what `work` returns in a forked process, True or False."""
    pid = os.fork()
    if not pid:
        os._exit(bool(work()))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_locks_keep_other_processes_out(board, place):
    assert board.lock_pages(place, 2, 4)
    assert not in_child(lambda: board.lock_pages(place, 3, 5))
    assert in_child(lambda: board.lock_pages(place, 4, 5))
    assert board.lock_name(1, shared=True)
    assert in_child(lambda: board.lock_name(1, shared=True))
    assert not in_child(lambda: board.lock_name(1, shared=False))
    assert in_child(lambda: board.lock_name(0, shared=False))
    board.unlock()
    assert in_child(lambda: board.lock_pages(place, 3, 5) and board.lock_name(1, shared=False))


def test_a_child_s_death_takes_only_its_own_locks(board, place):
    assert board.lock_pages(place, 0, 1)
    assert in_child(lambda: board.lock_pages(place, 1, 2))
    assert not in_child(lambda: board.lock_pages(place, 0, 1))
    assert in_child(lambda: board.lock_pages(place, 1, 2))


def test_places_in_use_are_not_used_again(board):
    first = board.new_place(0)
    board.use(1, first)
    board.leave(0, first)
    board.inherit(1, 2)
    board.leave_all(1)
    assert all(board.new_place(0) != first for _ in range(board.places - 1))
    assert board.new_place(0) is None
    board.leave(2, first)
    file = board.file(first)
    assert board.new_place(0) == first
    assert board.file(first) > file


def test_places_that_names_lead_to_are_not_used_again(board):
    old, new = board.new_place(0), board.new_place(0)
    board.lead(0, old)
    board.led(0, old)
    board.lead(0, new)
    board.leave_all(0)
    assert board.name(0) == (3, old, new)
    found = {board.new_place(0) for _ in range(board.places)}
    assert found == {*range(board.places), None} - {old, new}


@pytest.mark.parametrize("early", [True, False])
def test_a_place_that_is_led_to_at_that_moment_is_not_used_again(board, monkeypatch, early):
    place, look = board.new_place(1), board.name

    def look_while_it_is_led(name):
        seen = look(name)
        if name == (0 if early else board.names - 1) and board.row(1, CHECKED) == 0:
            board.add_row(1, CHECKED)
            board.lead(1, place)
            board.led(1, place)
            board.leave(1, place)
        return seen

    monkeypatch.setattr(board, "name", look_while_it_is_led)
    assert board.new_place(0) != place


def test_a_place_that_a_reader_follows_a_name_to_is_not_used_again(board, monkeypatch):
    place, other, look = board.new_place(1), board.new_place(1), board.name
    board.lead(0, place)
    board.led(0, place)
    board.leave_all(1)

    def look_while_it_is_followed(name):
        if name == 0 and board.row(1, CHECKED) == 0:
            board.add_row(1, CHECKED)
            board.use(2, place)
            board.lead(0, other)
            board.led(0, other)
        return look(name)

    monkeypatch.setattr(board, "name", look_while_it_is_followed)
    assert board.new_place(0) not in (place, other)


def test_a_place_used_again_knows_nothing_of_the_past(board, place):
    store(board, place, 1)
    board.set_size(place, 3)
    board.leave(0, place)
    assert board.new_place(0) == place
    assert (board.begun(place, 2), board.size(place), board.inode(place)) == (0, board.pages, 0)
    assert board.version(place, 2, 0).content == EMPTY


def test_phases_only_go_on(board):
    assert board.header(PHASE) == WORK
    board.enter(REST)
    board.enter(WORK)
    assert board.header(PHASE) == REST


def test_the_history_of_a_page(board):
    def entry(begun, kind, file, page, pages, other=(0, 0)):
        return Entry(begun, 0, kind, 5, file, page, pages, *other, 9)

    board.log(0, entry(3, "store", 7, 1, 2))
    board.log_end(1, board.log(1, entry(1, "clone", 8, 0, 8, (7, 0))))
    board.log(2, entry(2, "store", 7, 3, 1))
    assert [row for row, _ in board.entries(7, 2)] == [1, 0]
    lines = history(board, [(7, 2), (8, 2)])
    assert len(lines) == 2
    assert "clone of pages 0-7 of file 8, from page 0 of file 7" in lines[0] and lines[0].endswith("us")
    assert "writer 5 (worker 0): store of pages 1-2 of file 7" in lines[1] and lines[1].endswith("never ended")


def test_the_log_keeps_the_last_operations(board):
    for number in range(1, 1000):
        board.log(0, Entry(number, 0, "store", 1, 7, 0, 1, 0, 0, number))
    assert [entry.begun for _, entry in board.entries(7, 0)] == [*range(488, 1000)]


def test_it_has_no_name_in_any_file_system():
    with Board(1, 1, 1) as board:
        assert os.readlink(f"/proc/self/fd/{board.fd}").startswith("/memfd:")
        assert WORDS * 8 == 4096
