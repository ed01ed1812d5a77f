"""fork with mappings that take stores: the child is a full participant at once, whatever others are doing (S3, S5, S8)."""

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

import onecopy

from ..multiproc.processes import fork
from .common import PAGE, asked, assert_all_ended, content, counter

PAGES = 64


class Resources(NamedTuple):
    """What may leak."""

    fds: int
    maps: int
    threads: int
    slots: int
    spaces: int
    held: int


@pytest.fixture
def fs(pool):
    """A pool with /origin and its clone /a."""
    pool.write("/origin", content(PAGES))
    pool.clone("/origin", "/a")
    yield pool
    assert pool.read("/origin") == content(PAGES)
    assert_all_ended(pool)


def child(work, *, outlives=False):
    """Run `work` in a forked child that ends by os._exit, without closing anything; return its pid.

    It dies with its parent, so that a test that fails leaves nobody behind, unless it is to outlive it.
    """
    forker = threading.main_thread().ident
    pid = fork()
    if pid:
        return pid
    status = 1
    try:
        if threading.main_thread().ident == threading.get_ident() == forker and not outlives:  # else: with the thread
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def join(*pids):
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * len(pids)


def put(mapping, offset, data):
    with memoryview(mapping) as view:
        view[offset : offset + len(data)] = data


def test_a_child_stores_at_once_and_exits_without_closing(fs):
    with fs.map("/a", "r+") as mapping, fs.map("/a") as reader:
        put(mapping, 0, b"parent")  # private before the fork
        join(child(lambda: (put(mapping, 6, b" child"), put(mapping, 20 * PAGE, b"shared until now"))))
        assert reader[:12] == mapping[:12] == fs.read("/a", 0, 12) == b"parent child"
        assert reader[20 * PAGE : 20 * PAGE + 16] == b"shared until now"
        put(mapping, 20 * PAGE, b"S")
        assert fs.read("/a", 20 * PAGE, 6) == b"Shared"


def test_stores_of_parent_and_child_are_seen_by_both(fs, start):
    with fs.map("/a", "r+", granule=1) as mapping:

        def work(line):
            found = []
            while (page := line.hear()) is not None:
                found.append(mapping[page * PAGE : page * PAGE + 6])
                put(mapping, (page + 1) * PAGE, b"child!")
                line.say()
            return found

        other = start(work)
        for page in range(0, PAGES, 2):
            put(mapping, page * PAGE, b"parent")
            other.ask(page)
            assert mapping[(page + 1) * PAGE : (page + 1) * PAGE + 6] == b"child!"
        other.say(None)
        assert other.result() == [b"parent"] * (PAGES // 2)


def test_a_clone_made_by_the_child_protects_it_from_the_parent(fs, start):
    """The parent's writable translations, those from before the fork too, are shot down."""
    with fs.map("/a", "r+") as mapping:
        put(mapping, 0, b"before")
        other = start(lambda line: fs.clone("/a", "/clone"))
        other.result()
        put(mapping, 0, b"after!")
        assert fs.read("/clone", 0, 6) == b"before"
        other = start(lambda line: (line.say(), line.hear(), put(mapping, 0, b"child!")))
        other.hear()
        fs.clone("/a", "/clone2")
        other.say()
        other.result()
        assert fs.read("/clone2", 0, 6) == b"after!" and fs.read("/a", 0, 6) == b"child!"


def test_grandchildren(fs):
    with fs.map("/a", "r+") as mapping:

        def descend(depth):
            put(mapping, depth * PAGE, b"%d" % depth)
            if depth < 5:
                join(child(lambda: descend(depth + 1)))
                assert mapping[5 * PAGE] == ord("5")

        descend(0)
        assert [mapping[depth * PAGE] for depth in range(6)] == list(b"012345")


def test_the_parent_dies_and_the_child_goes_on(fs, start):
    def parent(line):
        other = onecopy.open(fs.path)
        mapping = other.map("/a", "r+")
        put(mapping, 0, b"parent")
        pid = child(
            lambda: (line.hear(), put(mapping, 6, b" child"), put(mapping, 9 * PAGE, b"child"), line.say("stored")),
            outlives=True,
        )
        line.say(pid)
        os.kill(os.getpid(), signal.SIGKILL)

    family = start(parent)
    family.hear()
    assert family.wait() == -signal.SIGKILL
    with fs.map("/a", "r+") as mapping:
        put(mapping, 9 * PAGE + 10, b"other")
        family.say()
        assert family.hear() == "stored"
        assert mapping[:12] == b"parent child" and mapping[9 * PAGE : 9 * PAGE + 5] == b"child"
        assert fs.read("/a", 9 * PAGE + 10, 5) == b"other"
    family.wait_for_all()


@pytest.mark.parametrize("where", ["this process", "another process"])
def test_fork_while_others_fault_in_a_loop(fs, start, where):
    """The faults are under way when the page tables are copied, and wait for children that are not there yet."""
    start(lambda line: fork_while_others_fault(fs, start, where)).result()


def fork_while_others_fault(fs, start, where):
    rounds, path = 40, fs.path
    over = threading.Event()

    def fault(done, mapping, other):
        """Fault for ever: after each clone every page is shared again."""
        n = 0
        while not done():
            n += 1
            for page in range(PAGES):
                mapping[page * PAGE + 7] = n % 256
            other.clone("/a", f"/x{os.getpid()}-{threading.get_ident()}-{n}")
            other.unlink(f"/x{os.getpid()}-{threading.get_ident()}-{n}")

    def work(line):
        with onecopy.open(path) as other, other.map("/a", "r+", granule=1) as theirs:
            line.say()
            fault(lambda: asked(line), theirs, other)

    mapping = fs.map("/a", "r+", granule=1)
    if where == "this process":
        thread = threading.Thread(target=fault, args=(over.is_set, mapping, fs))
        thread.start()
    else:
        process = start(work)
        process.hear()
    pids = []
    try:
        for n in range(rounds):
            pids.append(child(lambda n=n: put(mapping, n * PAGE + 100, b"child %d" % n)))
            if n % 3 == 0:
                join(pids.pop())
    finally:
        over.set()
        if where == "this process":
            thread.join()
        else:
            process.say()
            process.result()
    join(*pids)
    for n in range(rounds):
        wanted = b"child %d" % n
        assert mapping[n * PAGE + 100 : n * PAGE + 100 + len(wanted)] == fs.read("/a", n * PAGE + 100, len(wanted)) == wanted
    mapping.close()


def test_children_that_die_at_once_while_others_fault(fs, start):
    start(lambda line: children_that_die_at_once(fs)).result()


def children_that_die_at_once(fs):
    """A slot that has been made for a child, whose child is killed before it does anything."""
    mapping = fs.map("/a", "r+", granule=1)
    for n in range(30):
        pid = fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGKILL)
        put(mapping, n * PAGE, b"%d" % n)
        if n % 7 == 0:
            fs.clone("/a", f"/c{n}")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [mapping[n * PAGE : n * PAGE + len(b"%d" % n)] for n in range(30)] == [b"%d" % n for n in range(30)]
    mapping.close()


def test_fork_within_a_thread_while_the_main_thread_stores(fs, start):
    start(lambda line: fork_within_a_thread(fs)).result()


def fork_within_a_thread(fs):
    with fs.map("/a", "r+", granule=1) as mapping:
        pids = []

        def forker():
            for n in range(20):
                pids.append(child(lambda n=n: put(mapping, (n + 20) * PAGE, b"child")))

        thread = threading.Thread(target=forker)
        thread.start()
        n = 0
        while thread.is_alive():
            put(mapping, n % 20 * PAGE, b"main")
            n += 1
            if n % 50 == 0:
                fs.clone("/a", f"/c{n}")
        thread.join()
        join(*pids)
        assert [mapping[(n + 20) * PAGE : (n + 20) * PAGE + 5] for n in range(20)] == [b"child"] * 20


# ------------------------------------------------------ multiprocessing


STORE = """
import os
mapping[offset : offset + len(data)] = data
if offset % 2:
    os._exit(0)
"""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(fs, method):
    context = multiprocessing.get_context(method)
    with fs.map("/a", "r+") as mapping:
        put(mapping, 0, b"parent")
        what = [{"mapping": mapping, "offset": n * 8 * PAGE + n, "data": b"process %d" % n} for n in range(1, 4)]
        processes = [context.Process(target=exec, args=(STORE, one)) for one in what]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(60)
        finally:
            for process in processes:
                process.kill()
                process.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]
        for n in range(1, 4):
            assert mapping[n * 8 * PAGE + n : n * 8 * PAGE + n + 9] == b"process %d" % n
        assert mapping[:6] == b"parent"


def unpickle(text, line):
    mapping = pickle.loads(text)
    line.say((mapping[:10], mapping.writable))
    line.hear()
    put(mapping, 10, b"unpickled")
    found = mapping[:30]
    mapping.close()
    return found


def test_a_pickled_mapping_is_mapped_anew(fs, start):
    with fs.map("/a", "r+") as mapping:
        put(mapping, 0, b"0123456789")
        text = pickle.dumps(mapping)
        fs.rename("/a", "/b")
        other = start(partial(unpickle, text))
        assert other.hear() == (b"0123456789", True)
        put(mapping, 20, b"parent")
        other.say()
        found = other.result()
        assert found[:26] == mapping[:26] == b"0123456789unpickled" + content(PAGES)[19:20] + b"parent"
    reader = pickle.dumps(fs.map("/b"))
    fs.rename("/b", "/a")
    fs.unlink("/a")
    with pytest.raises(OSError):
        pickle.loads(reader)


def test_a_child_that_has_ended_is_waited_for_once(fs):
    """Until somebody reaps it, it counts as a mapper; its slot's next holder is waited for again."""
    with fs.map("/a", "r+", granule=1) as mapping:
        first = counter(fs, "shootdowns")
        join(child(lambda: None))
        for page in range(20):
            put(mapping, page * PAGE, b"x")
        assert counter(fs, "shootdowns") == first + 1
        with onecopy.open(fs.path) as other, other.map("/a") as reader:  # has buried it, and has its slot
            for page in range(20, 30):
                put(mapping, page * PAGE, b"x")
                assert reader[page * PAGE] == ord("x")
        assert counter(fs, "shootdowns") == first + 11


# ----------------------------------------------------------- what stays


def resources(fs):
    """Return what this process and the pool have in use, once the threads that are about to end have."""
    for thread in threading.enumerate():
        if thread.name == "onecopy-fold":
            thread.join(20)
    gc.collect()
    fs.sync()  # reaps the children, and what they and we have stored is folded
    with open("/proc/self/maps") as file:
        maps = sum(1 for _ in file)
    slots, spaces = len(fs.info().users), fs._mount.runtime.get("spaces_used")
    return Resources(len(os.listdir("/proc/self/fd")), maps, threading.active_count(), slots, spaces, counter(fs, "held"))


def cycle(fs, n, *, forks):
    """Map, store, clone now and then, fork as asked, and let go of everything."""
    mapping = fs.map("/a", "r+", granule=1)
    put(mapping, n % PAGES * PAGE, b"%d" % n)
    if n % 10 == 0:
        fs.clone("/a", "/c")
        other = fs.map("/c", "r+")
        put(mapping, 0, b"x")
        put(other, 0, b"y")
        fs.unlink("/c")
        other.close()
    pid = child(lambda: put(mapping, 5 * PAGE, b"c")) if forks and n % forks == 0 else 0
    mapping.close()
    if pid:
        join(pid)


@pytest.mark.parametrize(
    ("rounds", "forks", "opens"),
    [
        pytest.param(300, 3, True, id="300, a fork in three"),
        pytest.param(10_000, 0, False, id="10,000", marks=pytest.mark.slow),
        pytest.param(10_000, 10, False, id="10,000, a fork in ten", marks=pytest.mark.slow),
        pytest.param(10_000, 10, True, id="10,000, a fork in ten, opened each time", marks=pytest.mark.slow),
    ],
)
def test_many_cycles_leave_nothing_behind(fs, rounds, forks, opens):
    """No descriptor, VMA, thread, slot, address space or frame: the pool is opened in each round, or stays open."""
    baseline = None
    for n in range(rounds):
        if opens:
            with onecopy.open(fs.path) as other:
                cycle(other, n, forks=forks)
        else:
            cycle(fs, n, forks=forks)
        if n == 20:
            baseline = resources(fs)
    now = resources(fs)
    print(f"from {baseline} to {now}")
    assert now.maps <= baseline.maps + 20
    assert all(now[place] <= baseline[place] for place in range(len(now)) if now._fields[place] != "maps"), (now, baseline)
    assert (now.slots, now.held) == (1, 0), now
    fs.unlink("/a")
    fs.sync()
    assert fs.info().used_pages < PAGES + 20


def test_a_child_s_exit_lets_go_of_what_only_it_mapped(fs, start):
    fs.write("/only", content(100, 3))
    fs.sync()
    used = fs.info().used_pages
    fs.write("/file", content(100, 4))

    def work(line):
        mapping = fs.map("/file", "r+")
        line.say()
        line.hear()
        put(mapping, 0, b"x")

    other = start(work)
    other.hear()
    fs.unlink("/file")
    other.say()
    other.result()
    assert np.frombuffer(fs.read("/only"), np.uint8)[0] == content(100, 3)[0]
    fs.sync()
    fs.sync()
    assert fs.info().used_pages <= used


def test_a_child_without_a_slot_does_not_pass_for_its_parent(fs, start):
    """It has inherited the descriptors of the parent's slot and lock: nobody must wait for either as long as it lives."""

    def work(line):
        mapping = fs.map("/a")
        fs._mount.prepare_child = lambda: (_ for _ in ()).throw(OSError)  # as if no slot were free
        line.say(child(signal.pause, outlives=True))
        with fs._mount.lock:
            line.say()
            line.hear()
        return len(mapping)

    def store(line):
        with fs.map("/a", "r+") as mapping:
            line.hear()
            mapping[0] = 1
            fs.sync()
            line.say(mapping[0])

    process, storer = start(work), start(store)
    pid = process.hear()
    try:
        process.hear()
        process.kill()
        storer.say()
        assert storer._pipe.poll(10), "the store waits"
    finally:
        os.kill(pid, signal.SIGKILL)
    assert storer.hear() == 1
    storer.wait()
