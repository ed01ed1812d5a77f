"""Ranked locks: one holder at a time, in threads and processes; one order; nothing left by the dead or the interrupted."""

import errno
import fcntl
import os
import threading

import pytest

from onecopy.daxemu import locks
from onecopy.daxemu.errors import InvariantError
from onecopy.daxemu.locks import RankedLock, reopen

from ..multiproc.processes import die


@pytest.fixture
def file(tmp_path):
    """A descriptor of an empty file."""
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def lock(file):
    return RankedLock("transaction", file)


def is_free(fd: int) -> bool:
    """Return whether somebody else could lock the file behind `fd` now."""
    other = reopen(fd)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(other)
    return True


def elsewhere(work):
    """Run `work` in another thread; return what it returned."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_it_excludes_other_descriptors_until_the_last_release(lock, file):
    with lock:
        with lock:
            assert lock.held_here and not is_free(file)
        assert lock.held_here and not is_free(file)
    assert not lock.held_here and is_free(file)


def test_it_excludes_other_threads_of_the_same_handle(lock):
    with lock:
        assert not elsewhere(lock.try_idle)
        assert not elsewhere(lambda: lock.held_here)
    assert elsewhere(lambda: lock.try_idle() and (lock.release() or True))


def test_a_process_gets_it_when_its_holder_dies(lock, file, start):
    def hold(line):
        RankedLock("transaction", reopen(file)).acquire()
        line.say("held")
        line.hear()
        die()

    holder = start(hold)
    assert holder.hear() == "held" and not is_free(file)
    waiter = start(lambda line: (line.say("waiting"), RankedLock("transaction", reopen(file)).acquire(), "got it")[-1])
    assert waiter.hear() == "waiting"
    holder.say()
    assert waiter.result() == "got it"
    assert holder.wait() == -9


def test_waiting_out_of_order_is_refused(lock, tmp_path):
    later = RankedLock("transaction", os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT))
    earlier = RankedLock("mount", os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT))
    with earlier, lock:
        pass
    with lock:
        for wanted in (earlier, later):
            with pytest.raises(InvariantError, match=f"{wanted.name} wanted while holding transaction"):
                wanted.acquire()
            assert is_free(wanted.fd)
        later.acquire(ranked=False)
        later.release()
    with later:
        pass
    for one in (later, earlier):
        os.close(one.fd)


def test_trying_takes_it_only_when_nothing_else_is_held(lock, file, tmp_path):
    other = RankedLock("mount", os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT))
    with other:
        assert not lock.try_idle()
    assert lock.try_idle()
    assert not lock.try_idle(), "re-entry would be a second holder of what is being changed"
    lock.release()
    competitor = reopen(file)
    fcntl.flock(competitor, fcntl.LOCK_EX)
    assert not lock.try_idle()
    os.close(competitor)
    assert lock.try_idle()
    lock.release()
    os.close(other.fd)


class Interrupted(BaseException):
    """Stands for a KeyboardInterrupt."""


@pytest.mark.parametrize("attempt", [RankedLock.acquire, RankedLock.try_idle])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupt_while_locking_leaves_nothing_locked(lock, file, monkeypatch, attempt, after):
    def interrupted(self, fd, flags):
        if after:
            fcntl.flock(fd, int(flags))
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(locks.Flock, "lock", interrupted)
        with pytest.raises(Interrupted):
            attempt(lock)
    assert is_free(file) and elsewhere(lambda: lock.try_idle() and (lock.release() or True))
    with lock:
        assert not is_free(file)
    assert is_free(file)


def test_an_interrupt_while_another_thread_has_it_takes_nothing_away(lock, file, monkeypatch):
    class Impatient:
        """The threads' lock, for a thread that is interrupted while it waits."""

        _is_owned = lock._threads._is_owned

        def acquire(self):
            raise Interrupted

    def wait():
        try:
            lock.acquire()
        except Interrupted:
            return "interrupted"

    with lock:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_threads", Impatient())
            assert elsewhere(wait) == "interrupted"
        assert lock.held_here and not is_free(file)
    assert is_free(file)


def test_what_is_to_run_last_runs_once_and_unlocked(lock, file):
    states = []
    with lock, lock:
        lock.on_last_release = lambda: states.append(is_free(file))
    assert states == [True]
    with lock:
        pass
    assert states == [True]


def test_who_waited_for_a_lock_that_is_closed_meanwhile_gets_ebadf(tmp_path):
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    lock = RankedLock("transaction", fd)

    def close():
        lock.fd = -1
        os.close(fd)

    results = []

    def wait():
        waiting.set()
        try:
            lock.acquire()
        except OSError as error:
            results.append(error.errno)

    waiting, thread = threading.Event(), threading.Thread(target=wait)
    with lock:
        thread.start()
        waiting.wait()
        lock.on_last_release = close
    thread.join()
    assert results == [errno.EBADF]


def test_a_reopened_descriptor_is_another_owner(file):
    again = reopen(file)
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert os.path.sameopenfile(file, again)
    assert not os.get_inheritable(again)
    os.close(again)


def test_the_mount_lock_is_shared_or_exclusive(file):
    first, second = reopen(file), reopen(file)
    assert locks.try_mount(first, exclusive=False) and locks.try_mount(second, exclusive=False)
    assert not locks.try_mount(first, exclusive=True)
    assert locks.try_mount(second, exclusive=True), "a failed attempt gives up what it had"
    assert not locks.try_mount(first, exclusive=False)
    os.close(second)
    assert locks.try_mount(first, exclusive=True)
    os.close(first)


def test_a_private_file_is_never_opened_through_a_link(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links") as caught:
        locks.open_private(str(tmp_path / "link"), os.O_RDWR)
    assert caught.value.errno == errno.ELOOP


def test_the_table_of_ranks_is_complete():
    assert [row[0] for row in locks.RANKS] == list(locks.RANK)
    assert all(all(row) for row in locks.RANKS)
