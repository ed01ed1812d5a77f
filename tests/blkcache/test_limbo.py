"""Limbo: a freed frame is handed out again only when no reader, no mapping and no durable root can reach it (S5)."""

import numpy as np
import pytest

from onecopy.blkcache.frames import LIMBO, MAX_RUN, PINNED, USED
from onecopy.blkcache.limbo import INTENT_RECLAIM

from .test_frames import assert_counted, expand, take, used


def free(mount, *runs) -> None:
    """Free runs in one transaction, and reclaim what can be."""
    mount.run(lambda tx: tx.freed.extend(runs))
    reclaim(mount)


def reclaim(mount) -> None:
    with mount.lock:
        mount.limbo.reclaim(mount.live_view().limbo_tail)


def waiting(mount) -> int:
    with mount.lock:
        return mount.limbo.waiting(mount.live_view().limbo_tail)


@pytest.fixture
def runs(mount):
    """Five runs of 1 to 5 frames, in use but not durable."""
    return [run for found in take(mount, 1, 2, 3, 4, 5) for run in found]


def test_what_was_never_durable_is_free_at_once(mount, runs):
    before = used(mount)
    free(mount, *runs)
    assert used(mount) == before - set(expand(runs))
    assert waiting(mount) == 0
    assert_counted(mount)


def test_what_is_durable_waits_for_the_next_sync(mount, runs):
    mount.sync()
    before = used(mount)
    free(mount, *runs[1:4])
    assert used(mount) == before and waiting(mount) == 9
    mount.sync()
    assert used(mount) == before - set(expand(runs[1:4])) and waiting(mount) == 0
    assert_counted(mount)


def test_what_a_reader_can_reach_waits_for_it(mount, runs):
    before = used(mount)
    with mount.reading():
        free(mount, *runs)
        mount.sync()
        assert used(mount) == before and waiting(mount) == 15
        with mount.reading():
            free(mount)
    reclaim(mount)
    assert used(mount) == before - set(expand(runs)) and waiting(mount) == 0


def test_a_later_reader_does_not_keep_it(mount, runs):
    before = used(mount)
    mount.run(lambda tx: tx.freed.extend(runs[:1]))
    with mount.reading():
        mount.run(lambda tx: tx.freed.extend(runs[1:2]))
        reclaim(mount)
        assert used(mount) == before - set(expand(runs[:1]))
    reclaim(mount)
    assert used(mount) == before - set(expand(runs[:2]))


def test_every_reader_gets_what_it_needs(mount):
    """Generations that are read, one by one, hold exactly what was freed after them."""
    runs = [run for found in take(mount, *[2] * 6) for run in found]
    before, readers = used(mount), []
    for run in runs:
        reader = mount.reading()
        reader.__enter__()
        readers.append(reader)
        free(mount, run)
    for gone, reader in enumerate(readers, 1):
        assert used(mount) == before - set(expand(runs[: gone - 1]))
        reader.__exit__(None, None, None)
        reclaim(mount)
    assert used(mount) == before - set(expand(runs))


def pin(mount, runs) -> None:
    mount.frames.array[expand(runs)] |= np.uint8(PINNED)


def test_what_is_pinned_waits_for_its_mapping(mount, runs):
    before = used(mount)
    some = [(runs[4][0] + 1, 2), runs[0]]
    pin(mount, some)
    free(mount, *runs)
    mount.sync()
    pinned = {runs[4][0] + 1, runs[4][0] + 2, runs[0][0]}
    assert used(mount) == before - set(expand(runs)) | pinned and waiting(mount) == 3
    with mount.lock:
        mount.spaces.settle_pins()  # no orphan names them
    assert used(mount) == before - set(expand(runs)) and waiting(mount) == 0
    assert_counted(mount)


def test_what_is_durable_and_pinned_waits_for_both(mount, runs):
    mount.sync()
    pin(mount, runs)
    free(mount, *runs)
    with mount.lock:
        mount.spaces.settle_pins()
    assert waiting(mount) == 15, "unpinned first, durable still"
    assert all(mount.frames.array[pfn] & (USED | LIMBO) == USED | LIMBO for pfn in expand(runs))
    mount.sync()
    assert waiting(mount) == 0


@pytest.mark.parametrize("low", [0, 1, 3])
@pytest.mark.parametrize("high", [3, 4, 5])
def test_only_a_part_is_settled(mount, low, high):
    """Of five frames in a row, all pinned and freed, [low, high) are unpinned."""
    ((run,),) = take(mount, 5)
    before = used(mount)
    pin(mount, [run])
    free(mount, run)
    with mount.lock:
        mount.spaces.settle_pins(run[0] + low, run[0] + high)
    assert before - used(mount) == set(range(run[0] + low, run[0] + high)) and waiting(mount) == 5 - max(0, high - low)
    with mount.lock:
        mount.spaces.settle_pins()
    assert_counted(mount)


def test_the_ring_goes_round(mount):
    capacity = mount.runtime.layout.limbo_capacity
    before, freed = used(mount), 0
    while freed < 3 * capacity:
        for run in take(mount, *[1] * 300):
            freed += 1
            mount.run(lambda tx, run=run: tx.freed.extend(run))
        with mount.lock:
            view = mount.live_view()
            entries = mount.limbo.entries(view.limbo_tail)
        assert len({pfn for _, pfn, _ in entries}) == len(entries) == view.limbo_tail - mount.runtime.get("limbo_head")
    reclaim(mount)
    assert used(mount) == before
    assert_counted(mount)


def test_many_runs_at_once_wrap_around_too(mount):
    before = used(mount)
    for _ in range(5):
        runs = [run for found in take(mount, *[1] * 600) for run in found]
        generation = mount.runtime.get("live_generation") + 1
        with mount.reading():
            mount.run(lambda tx, runs=runs: tx.freed.extend(runs))
            with mount.lock:
                entries = mount.limbo.entries(mount.live_view().limbo_tail)
            assert entries == [(generation, *run) for run in runs]
        reclaim(mount)
        assert used(mount) == before


def test_runs_too_long_for_an_entry_are_cut(mount):
    with mount.lock:
        tail = mount.live_view().limbo_tail
        new = mount.limbo.append([(5, 2 * MAX_RUN + 7)], tail, 9)
        assert mount.limbo.entries(new) == [(9, 5, MAX_RUN), (9, 5 + MAX_RUN, MAX_RUN), (9, 5 + 2 * MAX_RUN, 7)]


@pytest.mark.parametrize("done", range(5))
def test_what_a_dead_process_decided_to_reclaim_is_reclaimed(mount, runs, done):
    """It died with some of it done: what it had freed is left alone, the rest follows; once more changes nothing."""
    before = used(mount)
    mount.run(lambda tx: tx.freed.extend(runs))
    tail = mount.view.limbo_tail
    with mount.lock:
        mount.runtime.set("intent_value", tail)
        mount.runtime.set("intent", INTENT_RECLAIM)
        for run in runs[:done]:
            mount.frames.release(*run)
        mount.recover()
        assert mount.runtime.get("intent") == 0 and mount.runtime.get("limbo_head") == tail
    assert used(mount) == before - set(expand(runs))
    assert_counted(mount)


def test_a_frame_may_be_handed_out_right_after_its_reclaiming(mount, runs):
    """An interrupted reclaim is finished before anybody takes a frame: else it would free what was taken meanwhile."""
    mount.run(lambda tx: tx.freed.extend(runs))
    with mount.lock:
        mount.runtime.set("intent_value", mount.view.limbo_tail)
        mount.runtime.set("intent", INTENT_RECLAIM)
        for run in runs:
            mount.frames.release(*run)
    (again,) = take(mount, 15)
    reclaim(mount)
    assert set(expand(again)) <= used(mount)
