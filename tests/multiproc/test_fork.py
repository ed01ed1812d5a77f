"""fork as a normal event: a child is a full user from its first instruction, whatever its parent was doing (S5, S8)."""

import errno
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading

import numpy as np
import pytest

import onecopy
from onecopy.daxemu import slots, steps
from onecopy.daxemu.locks import RankedLock
from onecopy.fs import mount as mounts

from .processes import at_step, die, fork

PAGE = onecopy.PAGE


@pytest.fixture
def fs(pool):
    """A pool with a file of five pages of a."""
    pool.write("/a", b"a" * 5 * PAGE)
    return pool


def churn(fs: onecopy.FileSystem) -> None:
    """Free and fill frames, over and over: whatever may be used again is."""
    for n in range(60):
        fs.write(f"/churn{n % 3}", bytes([n]) * 40 * PAGE)
        if n % 5 == 0:
            fs.sync()
            fs.unlink(f"/churn{n % 3}")


def pids(fs: onecopy.FileSystem) -> list[int]:
    return sorted(user.pid for user in fs.info().users)


# ------------------------------------------------------------ a full user


def test_a_child_uses_its_parent_s_handle(fs, start):
    def work(line):
        line.say(pids(fs))
        for n in range(50):
            fs.write(f"/child{n}", b"c" * PAGE)
            fs.clone("/a", f"/clone{n}")
        return fs.read("/a")

    child = start(work)
    assert child.hear() == sorted([os.getpid(), child.pid])
    for n in range(50):
        fs.write(f"/parent{n}", b"p" * PAGE)
        fs.rename(f"/parent{n}", f"/Parent{n}")
    assert child.result() == b"a" * 5 * PAGE
    assert len(fs.listdir("/")) == 151
    assert pids(fs) == [os.getpid()]


def test_a_child_s_child_too(fs, start):
    def work(line):
        pid = fork()
        if not pid:
            fs.write("/grandchild", b"g")
            os._exit(0)
        os.waitpid(pid, 0)
        return fs.read("/grandchild")

    assert start(work).result() == b"g"


def test_closing_in_the_child_leaves_the_parent_s_handle_open(fs, start):
    assert start(lambda line: fs.close()).result() is None
    fs.write("/a", b"still open")


def test_closing_in_the_parent_leaves_the_child_s_handle_open(pool_path, start):
    onecopy.format(pool_path, "4M")
    fs = onecopy.open(pool_path)
    child = start(lambda line: (line.hear(), fs.write("/a", b"still open"), fs.close()))
    fs.close()
    with pytest.raises(onecopy.PoolBusy):
        onecopy.remove(pool_path)
    child.say()
    child.result()
    with onecopy.open(pool_path) as again:
        assert again.read("/a") == b"still open"


def test_a_child_that_closed_its_handle_does_not_keep_the_pool_busy(pool_path, start):
    onecopy.format(pool_path, "4M")
    fs = onecopy.open(pool_path)
    child = start(lambda line: (fs.close(), line.say(), line.hear()))
    child.hear()
    fs.close()
    onecopy.remove(pool_path)
    child.say()


@pytest.mark.policies("dax", reason="no view of frames outlives the handle's part in a cache")
def test_an_array_over_a_frame_does_not_keep_the_pool_busy(pool_path):
    onecopy.format(pool_path, "4M")
    fs = onecopy.open(pool_path)
    array = np.frombuffer(fs._mount.pool.words, np.uint64)
    fs.close()
    onecopy.remove(pool_path)
    assert array[0] == int.from_bytes(b"onecopy\0", "little")


def test_a_program_that_is_started_does_not_keep_the_pool_busy(pool_path):
    onecopy.format(pool_path, "4M")
    with onecopy.open(pool_path) as fs:
        fs.write("/a", b"a" * PAGE)
        mapping = fs.map("/a")
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as program:
            mapping.close()
            fs.close()
            onecopy.remove(pool_path)
            program.stdin.close()


# ---------------------------------------------------------------- mappings


def test_a_mapping_goes_on_in_the_child_when_the_parent_closes_it(fs, start):
    mapping = fs.map("/a")
    child = start(lambda line: (line.hear(), mapping[:], mapping.close())[1])
    mapping.close()
    fs.unlink("/a")
    churn(fs)
    child.say()
    assert child.result() == b"a" * 5 * PAGE
    assert fs.info().pinned_pages == 0


def test_a_mapping_goes_on_in_the_child_when_the_parent_dies(fs, pool_path, start):
    def parent(line):
        other = onecopy.open(pool_path)
        mapping = other.map("/a")
        if not fork():
            os.close(reading)
            line.hear()
            os.write(writing, mapping[:])
            os._exit(0)
        die()

    reading, writing = os.pipe()
    family = start(parent)
    assert family.wait() == -9
    os.close(writing)
    fs.unlink("/a")
    churn(fs)
    family.say()
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"a" * 5 * PAGE
    assert fs.info().pinned_pages == 0


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_mapping_is_live_on_both_sides(fs, start, mode):
    """It shows what is written there and here, and for storing, what is stored; a clone made in between stays as it was."""

    def work(line):
        fs.write("/a", b"child", PAGE)
        if mode == "r+":
            mapping[2 * PAGE] = ord("c")
        line.say()
        line.hear()
        return mapping[:]

    with fs.map("/a", mode) as mapping:
        child = start(work)
        child.hear()
        assert mapping[PAGE : PAGE + 6] == b"childa" and mapping[2 * PAGE] == ord("c" if mode == "r+" else "a")
        before = mapping[:]
        fs.clone("/a", "/clone")
        fs.write("/a", b"parent", 3 * PAGE)
        if mode == "r+":
            mapping[4 * PAGE] = ord("p")
        wanted = mapping[:]
        child.say()
        assert child.result() == wanted == fs.read("/a") != before == fs.read("/clone")


def test_a_mapping_that_ends_in_the_child_stays_pinned_for_the_parent(fs, start):
    mapping = fs.map("/a")
    start(lambda line: mapping.close()).result()
    fs.unlink("/a")
    churn(fs)
    assert mapping[:] == b"a" * 5 * PAGE
    mapping.close()


def test_a_mapping_that_outlives_its_closed_handle_is_pinned_in_the_child(fs, pool_path, start):
    other = onecopy.open(pool_path)
    mapping = other.map("/a")
    other.close()
    child = start(lambda line: (line.hear(), mapping[:])[1])
    mapping.close()
    fs.unlink("/a")
    churn(fs)
    child.say()
    assert child.result() == b"a" * 5 * PAGE


# ------------------------------------------------- in the middle of things


def test_fork_waits_for_another_thread_s_transaction(fs, start, monkeypatch):
    """The thread is in the middle of its transaction until the fork waits for the lock: forced, not hoped for."""
    inside, waiting = threading.Event(), threading.Event()
    forker, acquire = threading.get_ident(), RankedLock.acquire

    def announce(lock, **options):
        if threading.get_ident() == forker:
            waiting.set()
        acquire(lock, **options)

    writer = threading.Thread(target=lambda: fs.write("/a", b"b" * 5 * PAGE + b"c" * 30 * PAGE))
    at_step("frame taken", 1, lambda: (inside.set(), waiting.wait()))
    try:
        writer.start()
        inside.wait()
        monkeypatch.setattr(RankedLock, "acquire", announce)
        child = start(lambda line: (fs.read("/a"), fs.check().findings, fs.write("/child", b"x"))[:2])
        monkeypatch.undo()
    finally:
        steps.hook = None
    writer.join()
    assert child.result() == (b"b" * 5 * PAGE + b"c" * 30 * PAGE, [])
    assert fs.read("/child") == b"x"


@pytest.mark.parametrize("step", ["frame taken", "node copied", "limbo appended", "published"])
def test_fork_within_a_transaction(fs, step):
    """As a signal handler or finalizer may. The child can't finish what its parent does, but may use the pool after it."""
    children = []

    def split():
        pid = fork()
        if pid:
            children.append(pid)
            return
        try:
            fs.write("/child", b"x" * PAGE)
            os._exit(0)
        finally:
            os._exit(1)

    at_step(step, 1, split)
    try:
        fs.write("/a", b"b" * 9 * PAGE)
    finally:
        steps.hook = None
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0]
    assert (fs.read("/a"), fs.read("/child")) == (b"b" * 9 * PAGE, b"x" * PAGE)


def test_a_read_begun_before_fork_ends_in_the_parent_only(fs, start):
    """The child's end of it must not withdraw what protects the parent's."""
    with fs._mount.reading() as view:

        def work(line):
            with pytest.raises(OSError, match="begun before fork") as caught:
                reading.__exit__(None, None, None)
            return caught.value.errno, fs.read("/a", 0, 3)

        reading = fs._mount.reading()
        reading.__enter__()
        assert start(work).result() == (errno.EPERM, b"aaa")
        assert slots.oldest_reader(fs._mount.runtime) == view.generation
        reading.__exit__(None, None, None)


@pytest.mark.parametrize("call", ["write", "sync", "map", "info", "check"])
def test_a_signal_handler_can_not_change_the_pool_within_a_transaction(fs, call):
    """It runs in the thread that holds the lock, so waiting would be for ever, and going on would break the transaction."""
    calls = {
        "write": lambda: fs.write("/handler", b"x"),
        "sync": fs.sync,
        "map": lambda: fs.map("/a"),
        "info": fs.info,
        "check": fs.check,
    }
    outcomes = []

    def handler():
        try:
            calls[call]()
        except OSError as error:
            outcomes.append(error.errno)
        assert fs.read("/a", 0, 1) == b"a"

    at_step("node copied", 2, handler)
    try:
        fs.write("/b", b"b" * 9 * PAGE)
    finally:
        steps.hook = None
    assert outcomes == [errno.EDEADLK]
    assert fs.read("/b") == b"b" * 9 * PAGE and not fs.exists("/handler")


# ------------------------------------------------------- when it can't be


def assert_shut(line, fs, mapping) -> None:
    """What a child has of a handle that could not be carried over: errors, and of what was mapped nothing at all.

    What it would see there could not be kept up to date, and a signal is better than old bytes.
    """
    for call in (lambda: fs.write("/a", b"x"), lambda: fs.read("/a"), lambda: fs.map("/a")):
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF
    line.say("shut")
    line.hear()
    if fork() == 0:
        faulthandler.disable()
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        print(memoryview(mapping)[0])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGSEGV
    mapping.close()
    gc.collect()
    fs.close()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_without_a_free_slot_the_child_s_handle_is_closed(fs, start, mode):
    mapping, taken = fs.map("/a", mode), []
    with fs._mount.lock, pytest.raises(OSError, match="slots"):
        while True:
            taken.append(slots.claim(fs._mount.runtime))
    child = start(lambda line: assert_shut(line, fs, mapping))
    assert child.hear() == "shut"
    with fs._mount.lock:
        for slot in taken:
            slot.release()
    fs.write("/a", b"the parent's goes on")
    assert mapping[:20] == b"the parent's goes on"
    child.say()
    child.result()
    fs.write("/a", b"the parent's went on")
    assert mapping[:20] == b"the parent's went on"
    mapping.close()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_child_without_the_privileges_to_open_the_pool_again(fs, start, monkeypatch, mode):
    """Its locks would be its parent's, so it must not use them."""
    mapping = fs.map("/a", mode)
    monkeypatch.setattr(mounts, "reopen", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
    child = start(lambda line: assert_shut(line, fs, mapping))
    assert child.hear() == "shut"
    monkeypatch.undo()
    mapping.close()
    fs.unlink("/a")
    churn(fs)
    child.say()
    child.result()
    assert fs.info().pinned_pages == 0


# ---------------------------------------------------------- multiprocessing


USE = """
import onecopy
with onecopy.open({path!r}) as fs:
    fs.write("/from" + {name!r}, fs.read("/a"))
    with fs.map("/a") as mapping:
        assert mapping[:] == fs.read("/a")
"""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(fs, pool_path, method):
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=exec, args=(USE.format(path=pool_path, name=str(n)), {})) for n in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [fs.read(f"/from{n}") for n in range(2)] == [b"a" * 5 * PAGE] * 2


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_handle_that_is_sent_to_another_process_is_opened_there(fs, mode):
    with onecopy.open(fs.path, mode) as handle, pickle.loads(pickle.dumps(handle)) as other:
        assert (other.path, other.mode, other is handle) == (handle.path, mode, False)
        assert other.read("/a") == b"a" * 5 * PAGE and len(pids(fs)) == 3
        if mode == "r":
            with pytest.raises(onecopy.ReadOnly):
                other.write("/a", b"x")
