"""The frame allocator: every frame has one owner at a time, aborted transactions give theirs back, storage follows use."""

import os
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onecopy
from onecopy.blkcache import frames
from onecopy.blkcache.frames import BACKED, DIRTY, FRESH, HELD, MAX_RUN, NODE, USED, cut_runs, free_runs, pack_run, unpack_run
from onecopy.daxemu.units import HUGE, PAGE

RUN = st.tuples(st.integers(0, (1 << 40) - 1), st.integers(1, MAX_RUN))


class Abort(Exception):
    """Ends a transaction without publishing it."""


def used(mount) -> set[int]:
    """Return the frames that are in use."""
    return set(np.flatnonzero(mount.frames.array & USED).tolist())


def assert_counted(mount) -> None:
    assert mount.runtime.get("free") == mount.pool.frames - len(used(mount))


def expand(runs) -> list[int]:
    return [pfn + n for pfn, pages in runs for n in range(pages)]


def take(mount, *sizes: int, reserve: bool = False) -> list[list[tuple[int, int]]]:
    """Take runs of these sizes in one transaction."""
    return mount.run(lambda tx: [tx.frames.take_data(size) for size in sizes], reserve=reserve)


def give_up(mount, runs) -> None:
    """Free runs in one transaction and make sure that they can be used again."""
    mount.run(lambda tx: tx.freed.extend(runs))
    mount.sync()
    mount.run(lambda tx: None)
    with mount.lock:
        mount.limbo.reclaim(mount.live_view().limbo_tail)


# ------------------------------------------------------------ transactions


@pytest.mark.parametrize("seed", range(5))
def test_a_frame_has_one_owner_at_a_time(mount, seed):
    rng = random.Random(seed)
    always, owned = used(mount), []

    def work(tx):
        for _ in range(rng.randrange(5)):
            if rng.random() < 0.5:
                taken.append((tx.frames.take_node(), 1))
            else:
                taken.extend(tx.frames.take_data(rng.randrange(1, 40)))
        tx.freed.extend(gone)
        if abort:
            raise Abort

    for _ in range(300):
        taken, abort = [], rng.random() < 0.3
        gone = rng.sample(owned, rng.randrange(len(owned) // 2 + 1)) if len(owned) > 20 else []
        try:
            mount.run(work)
        except Abort:
            pass
        except onecopy.NoSpace:
            assert len(used(mount)) > 700
        else:
            owned = [run for run in owned if run not in gone] + taken
            assert max(Counter(expand(owned)).values(), default=1) == 1
        live = set(expand(owned)) | always
        assert live <= used(mount)
        assert_counted(mount)
        if rng.random() < 0.1:
            mount.sync()
            assert used(mount) == live


def test_what_is_handed_out_is_marked(mount):
    def work(tx):
        return tx.frames.take_node(), tx.frames.take_data(3)

    node, (run,) = mount.run(work)
    assert mount.frames.array[node] == USED | FRESH | DIRTY | NODE
    assert mount.frames.array[expand([run])].tolist() == [USED | FRESH | DIRTY] * 3
    mount.sync()
    assert mount.frames.array[[node, *expand([run])]].tolist() == [USED | NODE, USED, USED, USED]


def test_data_grows_up_and_nodes_grow_down(mount):
    (first,), (second,) = take(mount, 7, 9)
    assert second == (first[0] + 7, 9)
    nodes = mount.run(lambda tx: [tx.frames.take_node() for _ in range(100)])
    assert nodes == sorted(nodes, reverse=True) and nodes[-1] > mount.pool.frames - 200


def test_large_runs_start_where_huge_pages_do(new_path):
    path = new_path()
    onecopy.format(path, "16M")
    with onecopy.open(path) as fs:
        (_,), (large,), (_,), (larger,) = take(fs._mount, 5, HUGE, 1, 2 * HUGE)
        assert (large[0] % HUGE, larger[0] % HUGE) == (0, 0)
        assert (large[1], larger[1]) == (HUGE, 2 * HUGE)


@pytest.fixture
def wide(new_path):
    """An attachment to a pool of 32 MiB: 16 times 2 MiB."""
    path = new_path()
    onecopy.format(path, "32M")
    with onecopy.open(path) as fs:
        yield fs._mount


@pytest.mark.parametrize("page", [1, 256, HUGE, 5 * HUGE + 511])
def test_large_runs_lie_as_their_file_does(wide, page):
    ((pfn, pages),) = wide.run(partial(run_for, page, 2 * HUGE))
    assert pages == 2 * HUGE and (pfn - page) % HUGE == 0


def run_for(page, pages, tx):
    return tx.frames.take_data(pages, page=page)


def test_free_pieces_of_a_fragmented_pool_are_used_by_huge_pages(wide):
    """A run that fits nowhere is put together from pieces that begin and end at 2 MiB."""
    frames = wide.frames
    with wide.lock:
        state = frames.array.copy()
        frames.array[:] = USED
        frames.array[100 : 100 + 4 * HUGE] = 0
        assert frames._search(8 * HUGE, 1, 0) == (HUGE, 3 * HUGE)
        assert frames._search(8 * HUGE, 1, 200) == (200, 4 * HUGE - 200)
        frames.array[:] = state


def test_huge_pages_are_given_back_whole(wide, monkeypatch):
    monkeypatch.setattr(wide.pool, "huge_pages", True)
    punched = []
    monkeypatch.setattr(wide.pool, "punch", lambda pfn, pages: punched.append((pfn, pages)))
    frames = wide.frames
    with wide.lock:
        state = frames.array.copy()
        frames.array[HUGE : 2 * HUGE] = BACKED  # in one piece: all of it
        frames.array[2 * HUGE + 3] = BACKED  # what is left of a huge page: with the rest
        frames.array[3 * HUGE : 4 * HUGE] = USED  # a part of one in use: only what is free
        frames.array[3 * HUGE + 5 : 3 * HUGE + 10] = BACKED
        frames.array[5 * HUGE : 6 * HUGE] = BACKED  # the last ones are kept: not cut in two
        frames.give_back(keep=100)
        assert punched == [(HUGE, 2 * HUGE), (3 * HUGE + 5, 5)]
        assert not frames.array[HUGE : 3 * HUGE].any() and (frames.array[5 * HUGE : 6 * HUGE] == BACKED).all()
        frames.array[:] = state


def test_a_fragmented_pool_is_still_of_use(mount):
    small = [run for runs in take(mount, *[3] * 280) for run in runs]
    give_up(mount, small[::2])
    (pieces,) = take(mount, 60)
    assert sorted(pages for _, pages in pieces)[:-1] == [3] * (len(pieces) - 1)
    assert set(expand(pieces)).isdisjoint(expand(small[1::2]))
    assert sum(pages for _, pages in pieces) == 60


def test_a_run_that_fits_is_preferred_to_pieces(mount):
    runs = [run for sizes in take(mount, 2, 5, 2, 20, 2, 900) for run in sizes]
    give_up(mount, [runs[1], runs[3]])
    assert [[pages for _, pages in found] for found in take(mount, 4, 18, 20)] == [[4], [18], [20]]


# ------------------------------------------------------------ out of space


def test_nospace_takes_nothing(mount):
    room = mount.runtime.get("free") - mount.frames.reserve
    before = used(mount)
    with pytest.raises(onecopy.NoSpace, match=f"no {room + 1} free pages left"):
        take(mount, room + 1)
    assert used(mount) == before
    with pytest.raises(onecopy.NoSpace):
        take(mount, room - 5, 6)
    assert used(mount) == before
    assert_counted(mount)


def test_the_reserve_is_for_who_makes_room(mount):
    take(mount, mount.runtime.get("free") - mount.frames.reserve)
    with pytest.raises(onecopy.NoSpace, match="besides 48 kept for deletions"):
        take(mount, 1)
    take(mount, 5, reserve=True)
    mount.run(lambda tx: [tx.frames.take_node() for _ in range(43)], reserve=True)
    assert mount.runtime.get("free") == 0
    for work in (lambda tx: tx.frames.take_node(), lambda tx: tx.frames.take_data(1)):
        with pytest.raises(onecopy.NoSpace):
            mount.run(work, reserve=True)


def test_nodes_may_use_half_of_the_reserve(mount):
    """So that a call that found room for its data does not fail for want of a node."""
    take(mount, mount.runtime.get("free") - mount.frames.reserve)
    mount.run(lambda tx: [tx.frames.take_node() for _ in range(24)])
    with pytest.raises(onecopy.NoSpace):
        mount.run(lambda tx: tx.frames.take_node())


def test_nodes_are_found_wherever_a_frame_is_left(mount):
    runs = [run for runs in take(mount, *[1] * (mount.runtime.get("free") - mount.frames.reserve)) for run in runs]
    give_up(mount, runs[100:110])
    taken = mount.run(lambda tx: [tx.frames.take_node() for _ in range(mount.runtime.get("free"))], reserve=True)
    assert set(expand(runs[100:110])) < set(taken) and len(set(taken)) == len(taken)


# ------------------------------------------------------------------- undo


def abandon(mount) -> None:
    """Leave a transaction as a death would: frames taken, nothing published, nothing undone."""
    with mount.lock:
        tx = mount._begin(reserve=False)
        for size in (1, 30, 2):
            tx.frames.take_data(size)
        for _ in range(70):
            tx.frames.take_node()


def test_what_the_dead_took_comes_back(mount):
    before = used(mount)
    abandon(mount)
    assert len(used(mount)) == len(before) + 103
    with mount.lock:
        mount.frames.undo()
        assert used(mount) == before
        assert_counted(mount)
        states = mount.frames.array.copy()
        mount.frames.undo()
    assert (mount.frames.array == states).all()


def test_undo_does_not_touch_what_a_fault_took(mount):
    """Of a run that the dead had logged, and not taken yet, a write fault may have taken a part since."""
    before = used(mount)
    with mount.lock:
        tx = mount._begin(reserve=False)
        ((pfn, _),) = tx.frames.take_data(6)
        mount.frames.array[pfn : pfn + 6] = 0  # it had not come to that
        assert mount.engine.claim(pfn + 2, 3, HELD)
        mount.engine.count("held", 3)
        mount.frames.undo()
        assert used(mount) == before | {pfn + 2, pfn + 3, pfn + 4}
        assert mount.frames.held().tolist() == [pfn + 2, pfn + 3, pfn + 4] and mount.runtime.counter("held") == 3
        mount.engine.count("strays", 1)
    mount.sync()
    assert used(mount) == before and mount.runtime.counter("held") == 0
    assert_counted(mount)


def test_undo_does_not_touch_what_was_published(mount):
    take(mount, 10)
    mount.run(lambda tx: [tx.frames.take_node() for _ in range(5)])
    before = used(mount)
    with mount.lock:
        mount.frames.undo()
    assert used(mount) == before


def test_an_undo_that_was_cut_short_is_done_again(mount, monkeypatch):
    before = used(mount)
    abandon(mount)
    monkeypatch.setattr(mount.frames, "recount", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), mount.lock:
        mount.frames.undo()
    monkeypatch.undo()
    mount.run(lambda tx: None)
    assert used(mount) == before
    assert_counted(mount)


# ---------------------------------------------------------------- storage


def blocks(mount) -> int:
    return os.fstat(mount.pool.fd).st_blocks * 512 // PAGE


def test_free_frames_give_their_storage_back(mount):
    mount.sync()
    before = blocks(mount)

    def fill(tx):
        (run,) = tx.frames.take_data(500)
        tx.store(run[0], bytes(500 * PAGE))
        return run

    run = mount.run(fill)
    assert blocks(mount) >= before + 500
    give_up(mount, [run])
    backed = np.flatnonzero(mount.frames.array == BACKED)
    assert len(backed) == 256, "a few keep it, for the nodes to come"
    assert blocks(mount) == len(used(mount)) + len(backed), "nothing else has any"


# ------------------------------------------------------------------- runs


@given(RUN)
def test_a_run_fits_a_word(run):
    assert pack_run(*run) < 1 << 64
    assert unpack_run(pack_run(*run)) == run


@given(st.integers(0, 100), st.sampled_from([1, 5, MAX_RUN, MAX_RUN + 1, 2 * MAX_RUN, 3 * MAX_RUN + 2]))
def test_long_runs_are_cut(pfn, pages):
    cut = cut_runs([(7, 1), (pfn, pages), (8, 2)])
    assert (cut[0], cut[-1]) == ((7, 1), (8, 2))
    for at, count in cut[1:-1]:
        assert at == pfn and 0 < count <= MAX_RUN
        pfn, pages = pfn + count, pages - count
    assert pages == 0


@given(st.lists(st.sampled_from([0, BACKED, USED, USED | FRESH, NODE | USED]), max_size=40), st.integers(0, 9))
def test_free_runs_are_found(states, first):
    starts, lengths = free_runs(np.array(states, np.uint8), first)
    found = expand(zip(starts.tolist(), lengths.tolist(), strict=True))
    assert found == [first + n for n, state in enumerate(states) if state in (0, BACKED)]
    assert all(after > start + length for start, length, after in zip(starts, lengths, starts[1:], strict=False))


def test_states_are_single_bits():
    assert sorted(getattr(frames, name) for name in frames.STATES) == [1 << n for n in range(8)]
