"""What the dead leave in address spaces: frames that no entry names, mappings, stores, half-made records (S6, S8)."""

import signal

import numpy as np
import pytest

import onecopy
from onecopy.blkcache import spaces as module
from onecopy.blkcache.frames import HELD, USED
from onecopy.blkcache.spaces import BEYOND, LIVE
from onecopy.daxemu import runtime, steps
from onecopy.daxemu.units import PAGE

from ..multiproc.processes import Lines, die
from .spaces import colliding, frames, free_list, key, known, pinned, words

# --------------------------------------------------------------------- strays


def test_what_no_entry_names_is_found(fs):
    """Frames that a fault took and no entry names: as a fault leaves them that died before its entries."""
    mount = fs._mount
    fs.clone("/a", "/clone")
    fs.sync()
    free = fs.info().free_pages
    with fs.map("/a", "r+", granule=1) as mapping:
        mapping[PAGE] = 1
        (named,) = {int(mapping.pfns[1])}
        with mount.lock:
            assert mount.spaces.strays() == []
            at = int(np.flatnonzero(mount.frames.array == 0)[40])
            assert mount.engine.claim(at, 3, USED | mount.frames.array[named])
            mount.engine.count("held", 3)
            mount.engine.count("strays", 1)
            assert mount.spaces.strays() == [(at, 3)]
        fs.sync()
        assert not (mount.frames.array[at : at + 3] & USED).any()
        assert mapping[PAGE] == 1 and int(mapping.pfns[1]) == named
    assert (fs.info().free_pages, mount.runtime.counter("held"), mount.runtime.counter("strays")) == (free - 1, 0, 0)


@pytest.mark.parametrize("claimed", [(0, 2), (1, 1), None])
def test_what_a_fault_vouches_for_is_no_stray(fs, claimed):
    """A fault's record says what it has taken, or (all ones) that it is about to take something: then wait."""
    mount, layout = fs._mount, fs._mount.runtime.layout
    words = mount.runtime.words
    record = (layout.messages + mount.slot.index * runtime.MESSAGES * runtime.MESSAGE.size) // 8
    count, first = record + runtime.MESSAGE.word("count"), record + runtime.MESSAGE.word("claimed")
    with mount.lock:
        at = int(np.flatnonzero(mount.frames.array == 0)[40])
        held = module.Frames(mount.runtime, mount.pool, mount.engine)
        assert mount.engine.claim(at, 2, HELD)
        mount.engine.count("held", 2)
        words[first], words[count] = (at + claimed[0], claimed[1]) if claimed else (0, (1 << 64) - 1)
        assert mount.spaces.strays() == {(0, 2): [], (1, 1): [(at, 1)], None: None}[claimed]
        words[count] = 0
        assert mount.spaces.strays() == [(at, 2)] and held.held().tolist() == [at, at + 1]
        mount.engine.count("strays", 1)
    fs.sync()
    assert not (mount.frames.array[at : at + 2] & USED).any()


# ------------------------------------------------------------------- the dead


def test_what_only_the_dead_had_mapped_is_free_again(fs, small, start):
    def map_and_die(line):
        other = onecopy.open(small)
        mapping = other.map("/a")
        line.say(len(mapping))
        line.hear()
        die()

    process = start(map_and_die)
    assert process.hear() == 5 * PAGE
    gone, alive = frames(fs, "/a"), fs.map("/b")
    fs.unlink("/a")
    fs.sync()
    assert pinned(fs) == set(gone)
    process.say()
    process.wait()
    info = fs.info()
    assert known(fs._mount.spaces) == {key(fs, "/b"): LIVE}
    assert (info.waiting_pages, info.pinned_pages, len(info.users)) == (0, 0, 1)
    assert not (fs._mount.frames.array[gone] & USED).any()
    alive.close()


def test_what_the_dead_stored_is_folded_and_its_space_ends(fs, small, start):
    def store_and_die(line):
        other = onecopy.open(small)
        mapping = other.map("/a", "r+")
        mapping[PAGE] = 1
        die()

    fs.clone("/a", "/clone")
    start(store_and_die).wait()
    assert fs.read("/a", PAGE, 2) == b"\1a"
    fs.sync()
    assert known(fs._mount.spaces) == {} and fs.info().dirty_pages == 0
    assert fs.read("/a", PAGE, 2) == b"\1a" and fs.read("/clone") == b"a" * 5 * PAGE


@pytest.mark.parametrize("step", ["block locked", "frames claimed", "pages copied"])
def test_who_died_before_it_had_stored_leaves_nothing(fs, small, start, step):
    """Its space may be marked as stored to, but no entry is: one sync ends it, and the next has nothing to do."""

    def store_and_die(line):
        mapping = onecopy.open(small).map("/a", "r+")
        steps.signal_at(step, 1, signal.SIGKILL)
        mapping[PAGE] = 1

    fs.clone("/a", "/clone")
    assert start(store_and_die).wait() == -9
    fs.sync()
    assert known(fs._mount.spaces) == {} and fs.read("/a") == fs.read("/clone")
    generation = fs.info().generation
    fs.sync()
    assert fs.info().generation == generation
    assert fs.info().used_pages == fs.check().counted["used_pages"]


@pytest.mark.parametrize("at", ["settle", "recount", "end_unmapped"])
def test_a_reap_that_was_cut_short_is_done_again(fs, small, start, monkeypatch, at):
    def map_and_die(line):
        mapping = onecopy.open(small).map("/a")
        fs.unlink("/a")
        fs.close()  # so that only one slot remains
        assert mapping
        die()

    start(map_and_die).wait()
    mount = fs._mount
    assert pinned(fs) != set()
    where = {"settle": mount.limbo, "recount": mount.frames, "end_unmapped": mount.spaces}[at]
    monkeypatch.setattr(where, at, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), mount.lock:
        mount.spaces.reap()
    monkeypatch.undo()
    fs.info()
    assert pinned(fs) == set() and len(fs.info().users) == 1


def assert_survived(small, start, work) -> None:
    """Let a process die at each line of `work(spaces, lines)` in turn; whoever comes next finds records that are whole."""
    with onecopy.open(small) as fs:
        spaces, number, gone = fs._mount.spaces, 0, False
        with fs._mount.lock:
            numbers = colliding(spaces, 5)
            others = [spaces.ensure(1, n) for n in numbers[3:]]
            for index in others:
                spaces.engine.map_for(index, fs._mount.slot.index, True)
        while not gone:
            number += 1

            def attempt(line, number=number):
                other = onecopy.open(small)._mount
                with other.lock:
                    work(other.spaces, numbers[:3], Lines(number))
                other.lock.acquire()
                line.say("did not die")
                line.hear()

            process = start(attempt)
            try:
                gone = process.hear() == "did not die"
                process.kill()
            except AssertionError:
                assert process.wait() == -9
            with fs._mount.lock:
                fs._mount.recover()
                spaces.reap()
                assert known(spaces) == dict.fromkeys([spaces.key(index) for index in others], LIVE)
                assert [spaces.find(1, n) for n in numbers] == [-1, -1, -1, *others]
                assert len(set(free_list(spaces)) & set(others)) == 0
                again = [spaces.ensure(1, n) for n in numbers[:3]]
                assert len({*again, *others}) == 5
                assert [spaces.find(1, n) for n in numbers] == [*again, *others]
                for index in again:
                    spaces.end(index)
        assert number > 15
        for index in others:
            spaces.engine.map_for(index, fs._mount.slot.index, False)


def test_a_death_at_any_line_of_making_a_space(small, start):
    def work(spaces, numbers, lines):
        spaces.ensure(1, numbers[0])
        with lines:
            spaces.ensure(1, numbers[1])

    assert_survived(small, start, work)


def test_a_death_at_any_line_of_ending_a_space(small, start):
    def work(spaces, numbers, lines):
        indexes = [spaces.ensure(1, number) for number in numbers]
        spaces.enter(indexes[1], 0, words(5, 0, BEYOND))
        spaces.orphan(indexes[1])
        with lines:
            spaces.end(indexes[1])

    assert_survived(small, start, work)
