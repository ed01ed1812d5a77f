"""Process slots: alive while their holder is, found dead afterwards, and what readers announce in them."""

import errno
import os
import threading

import pytest

import onecopy
from onecopy.daxemu import slots
from onecopy.daxemu.runtime import READERS, SLOTS, W
from onecopy.daxemu.slots import IDLE

from ..multiproc.processes import die


@pytest.fixture
def fs(small):
    with onecopy.open(small) as handle:
        yield handle


@pytest.fixture
def shared(fs):
    """The run-time file of `fs`, with the transaction lock held."""
    with fs._mount.lock:
        yield fs._mount.runtime


def announced(shared) -> list[int]:
    """Return what is announced in all slots."""
    first = shared.layout.readers // 8
    return [word for word in shared.words[first : first + SLOTS * READERS].tolist() if word != IDLE]


def publish(shared, generation: int) -> None:
    shared.atomic.store(W["live_generation"], generation)


def test_a_slot_belongs_to_its_process(fs):
    (user,) = fs.info().users
    assert (user.pid, user.slot) == (os.getpid(), fs._mount.slot.index)
    with open("/proc/self/comm") as file:
        assert user.program == file.read().strip()


def test_slots_are_claimed_in_order_and_used_again(shared):
    first, second = slots.claim(shared), slots.claim(shared)
    assert (first.index, second.index) == (1, 2)
    first.release()
    assert slots.taken(shared) == [0, 2]
    third = slots.claim(shared)
    assert third.index == 1
    for slot in (second, third):
        slot.release()


def test_all_slots_taken_is_enfile(shared, fs, small):
    claimed = [slots.claim(shared) for _ in range(SLOTS - 2)]  # one is ours, one the janitor's
    with pytest.raises(OSError, match="all 512 process slots") as caught:
        slots.claim(shared)
    assert caught.value.errno == errno.ENFILE
    claimed.pop().release()
    slots.claim(shared).release()
    for slot in claimed:
        slot.release()


def test_a_dead_process_s_slot_is_reaped(fs, small, start):
    def open_and_wait(line):
        other = onecopy.open(small)
        line.say(other._mount.slot.index)
        line.hear()
        die()

    process = start(open_and_wait)
    index = process.hear()
    mount = fs._mount
    with mount.lock:
        assert slots.dead(mount.runtime) == []
        assert index in slots.taken(mount.runtime)
    process.say()
    process.wait()
    with mount.lock:
        gone = slots.dead(mount.runtime)
        assert index in gone
        assert [user.slot for user in slots.users(mount.runtime)] == [0]
        assert mount.spaces.reap() == gone
        assert slots.taken(mount.runtime) == [0]
        assert mount.spaces.reap() == []


def test_a_slot_lives_as_long_as_anyone_who_inherited_it(shared, start):
    slot = slots.claim(shared)
    heir = start(lambda line: line.hear())
    os.close(slot.fd)
    assert slot.index not in slots.dead(shared)
    heir.kill()
    assert slot.index in slots.dead(shared)


def test_a_slot_whose_holder_died_while_claiming_is_not_lost(shared):
    """The pid is stored last; whoever finds one finds the slot within `slots_used`."""
    stores = []

    class Recorder:
        def __init__(self, words):
            self.words = words

        def __getitem__(self, at):
            return self.words[at]

        def __setitem__(self, at, value):
            stores.append((at, shared.get("slots_used")))
            self.words[at] = value

    words, shared.words = shared.words, Recorder(shared.words)
    slot = slots.claim(shared)
    shared.words = words
    at, used = stores[-1]
    assert (words[at], used) == (os.getpid(), slot.index + 1)
    slot.release()


# --------------------------------------------------------------- readers


def test_readers_announce_the_live_generation(shared, fs):
    slot, live = fs._mount.slot, shared.get("live_generation")
    word, generation = slot.announce()
    assert generation == live
    assert announced(shared) == [live] and slots.oldest_reader(shared) == live
    slot.retract(word)
    assert announced(shared) == [] and slots.oldest_reader(shared) == IDLE


def test_the_oldest_reader_counts(shared, fs):
    slot, live = fs._mount.slot, shared.get("live_generation")
    held = []
    for generation in (live, live + 1, live + 2):
        publish(shared, generation)
        held.append(slot.announce()[0])
    assert slots.oldest_reader(shared) == live
    slot.retract(held[0])
    assert slots.oldest_reader(shared) == live + 1
    assert slot.renew(held[1]) == live + 2
    assert slots.oldest_reader(shared) == live + 2
    for word in held[1:]:
        slot.retract(word)
    publish(shared, live)


def test_what_is_announced_is_still_live(shared, fs, monkeypatch):
    """A generation that is published between a reader's look and its announcement is noticed."""
    slot, live = fs._mount.slot, shared.get("live_generation")
    atomic = shared.atomic

    class Racing:
        """Publishes once, right before the announcement is stored."""

        load = atomic.load

        def store(self, at, value):
            if value == live:
                atomic.store(W["live_generation"], live + 1)
            atomic.store(at, value)

    monkeypatch.setattr(shared, "atomic", Racing())
    word, generation = slot.announce()
    monkeypatch.undo()
    assert generation == live + 1 and announced(shared) == [live + 1]
    slot.retract(word)
    publish(shared, live)


def test_more_readers_than_words_wait_for_one(fs):
    slot = fs._mount.slot
    held = [slot.announce()[0] for _ in range(READERS)]
    assert len(set(held)) == READERS
    got = threading.Event()

    def read():
        slot.retract(slot.announce()[0])
        got.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert not got.is_set()
    for word in held:
        slot.retract(word)
    thread.join()
    assert got.is_set()


def test_an_interrupted_reader_announces_nothing(fs, monkeypatch):
    """Also when the interrupt comes while it builds its view."""
    mount = fs._mount
    fs.write("/file", b"x")
    mount.view.generation -= 1  # so that a new view must be built
    monkeypatch.setattr("onecopy.fs.reading.View", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(READERS + 1):
        with pytest.raises(KeyboardInterrupt), mount.reading():
            raise AssertionError("there is no view")
    monkeypatch.undo()
    with mount.lock:
        assert announced(mount.runtime) == []
    assert fs.read("/file") == b"x"


def test_a_released_slot_is_idle(shared):
    slot = slots.claim(shared)
    slot.announce()
    assert announced(shared)
    slot.release()
    assert not announced(shared)
