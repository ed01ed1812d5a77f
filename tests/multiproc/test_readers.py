"""Readers take no lock: whatever others change meanwhile, and however long a reader sleeps, it sees one state (S5)."""

import errno
import fcntl
import os
import threading

import pytest

import onecopy
from onecopy.daxemu import steps
from onecopy.daxemu.runtime import READERS
from onecopy.fs import extents, inode, namei

from .processes import at_step

PAGE = onecopy.PAGE
PAGES = 60

PLACES = {"at a name": (namei, "walk"), "at an inode": (inode, "load"), "at the extents": (extents, "load")}


def pause(line, place: str) -> None:
    """Let this process's next look into the trees at `place` wait, when it is done, until it is told to go on."""
    module, name = PLACES[place]
    real = getattr(module, name)

    def paused(*arguments, **options):
        setattr(module, name, real)
        found = real(*arguments, **options)
        line.say("inside")
        line.hear()
        return found

    setattr(module, name, paused)


def content(letter: str) -> bytes:
    return letter.encode() * PAGES * PAGE


@pytest.fixture
def fs(pool):
    """A pool with a file in many runs, so that it has a tree of extents."""
    pool.write("/file", content("a"))
    for page in range(0, PAGES, 3):
        pool.punch("/file", page * PAGE, PAGE)
        pool.write("/file", b"a" * PAGE, page * PAGE)
        pool.write("/between", b"b", page * PAGE)
    pool.sync()
    return pool


def churn(fs: onecopy.FileSystem, turns: int = 40) -> None:
    """Replace /file and fill the pool with other bytes again and again: frames are freed, synced, and used again."""
    for n in range(turns):
        letter = chr(ord("A") + n % 26)
        fs.write("/new", content(letter))
        fs.rename("/new", "/file")
        fs.write(f"/other{n % 4}", content(letter) * 3)
        fs.sync()
        fs.unlink(f"/other{n % 4}")


@pytest.mark.parametrize("place", PLACES)
def test_a_reader_that_sleeps_inside_sees_what_it_began_with(fs, start, place):
    def work(line):
        with onecopy.open(fs.path) as mine:
            pause(line, place)
            return mine.read("/file") == content("a")

    reader = start(work)
    assert reader.hear() == "inside"
    churn(fs)
    assert fs.info().waiting_pages >= PAGES
    reader.say()
    assert reader.result()
    fs.write("/file", b"", 0)
    fs.sync()
    assert fs.info().waiting_pages == 0


def test_a_stopped_reader_delays_reuse_and_nothing_else(fs, start):
    def work(line):
        with onecopy.open(fs.path) as mine:
            pause(line, "at the extents")
            return mine.read("/file") == content("a")

    reader = start(work)
    reader.hear()
    reader.stop()
    churn(fs)
    with onecopy.open(fs.path) as other:
        other.clone("/file", "/copy")
        assert other.check().findings == []
    reader.resume()
    reader.say()
    assert reader.result()


def test_a_reader_that_dies_inside_delays_nothing(fs, start):
    def work(line):
        with onecopy.open(fs.path) as mine:
            pause(line, "at the extents")
            mine.read("/file")

    reader = start(work)
    reader.hear()
    churn(fs, 3)
    reader.kill()
    fs.info()
    fs.write("/more", b"x")
    fs.sync()
    assert fs.info().waiting_pages == 0


def test_a_pool_full_of_what_a_sleeper_may_read_is_full(fs, start):
    def work(line):
        with onecopy.open(fs.path) as mine:
            pause(line, "at a name")
            return len(mine.read("/large"))

    size = fs.info().free_pages // 2 * PAGE
    fs.write("/large", b"l" * size)
    fs.sync()
    reader = start(work)
    reader.hear()
    fs.unlink("/large")
    with pytest.raises(onecopy.NoSpace):
        fs.write("/new", b"n" * (size + 500 * PAGE))
    reader.say()
    assert reader.result() == size
    fs.write("/new", b"n" * (size + 500 * PAGE))


# ------------------------------------------------------- readers and writers


WRITING = steps.STEPS[: steps.STEPS.index("published") + 1]
SYNCING = steps.STEPS[steps.STEPS.index("sync intended") : steps.STEPS.index("flags cleaned") + 1]


@pytest.mark.parametrize("step", WRITING)
def test_readers_do_not_wait_for_a_writer(fs, start, step):
    """It has stopped in the middle: before it publishes they see the old state, afterwards the new one."""

    def work(line):
        with onecopy.open(fs.path) as mine:
            line.stop_at(step)
            mine.write("/file", b"new" * PAGE, PAGES * PAGE)

    writer = start(work)
    assert writer.hear() == step
    new = step == "published"
    assert fs.read("/file") == content("a") + b"new" * PAGE * new
    assert fs.stat("/file").st_size == (PAGES + 3 * new) * PAGE
    assert fs.listdir("/") == ["between", "file"]
    lock = os.open(f"/proc/self/fd/{fs._mount.lock.fd}", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    writer.say()
    writer.result()
    assert fs.read("/file") == content("a") + b"new" * PAGE


@pytest.mark.parametrize("step", SYNCING)
def test_readers_do_not_wait_for_a_sync(fs, start, step):
    def work(line):
        with onecopy.open(fs.path) as mine:
            mine.write("/file", b"new", 0)
            line.stop_at(step)
            mine.sync()

    syncing = start(work)
    assert syncing.hear() == step
    assert fs.read("/file", 0, 4) == b"newa"
    syncing.say()
    syncing.result()


def test_the_next_writer_waits_for_the_first(fs, start):
    def write(line, letter):
        with onecopy.open(fs.path) as mine:
            line.say("ready")
            line.hear()
            if letter == b"1":
                line.stop_at("live root written")
            line.say("about to write")
            mine.write("/file", letter * PAGE, 0)

    first, second = (start(lambda line, letter=letter: write(line, letter)) for letter in (b"1", b"2"))
    assert (first.hear(), second.hear()) == ("ready", "ready")
    assert (first.ask(), first.hear()) == ("about to write", "live root written")
    assert second.ask() == "about to write"
    first.say()
    first.result()
    second.result()
    assert fs.read("/file", 0, PAGE) == b"2" * PAGE


def test_a_file_that_is_replaced_is_always_one_of_the_two(fs, start):
    """`rename` over it: readers without a lock see the old file or the new one, whole, and never none."""

    def read(line):
        seen = set()
        with onecopy.open(fs.path) as mine:
            line.say("ready")
            while mine.exists("/go"):
                data = mine.read("/file")
                with mine.map("/file") as mapping:
                    picture = mapping[:]
                for found in (data, picture):
                    assert found == found[:1] * len(found)
                    assert len(found) == {b"a": PAGES, b"b": PAGES // 2}[found[:1]] * PAGE
                    seen.add(found[:1])
            return len(seen)

    fs.write("/go", b"")
    readers = [start(read) for _ in range(2)]
    for reader in readers:
        reader.hear()
    for n in range(400):
        letter = "ab"[n % 2]
        fs.write("/new", content(letter)[: len(content(letter)) // (n % 2 + 1)])
        fs.rename("/new", "/file")
        if n % 50 == 0:
            fs.sync()
    fs.unlink("/go")
    assert all(1 <= reader.result() <= 2 for reader in readers)


# ---------------------------------------------------------------- one handle


def run_all(works) -> list[BaseException]:
    """Run functions in threads; return what they raised."""
    errors: list[BaseException] = []

    def run(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_share_a_handle(fs):
    def use(name):
        def work():
            for n in range(30):
                text = f"{name}{n:03}".encode() * PAGE
                fs.write(f"/{name}", text)
                fs.clone(f"/{name}", f"/{name}.{n}")
                with fs.map(f"/{name}", "r+" if n % 3 else "r") as mapping, fs.map(f"/{name}.{n}") as clone:
                    assert mapping[:] == text
                    fs.write(f"/{name}", b"?" * PAGE)
                    if mapping.writable:
                        mapping[2 * PAGE : 3 * PAGE] = b"!" * PAGE
                    assert (
                        mapping[:]
                        == fs.read(f"/{name}")
                        == b"?" * PAGE
                        + text[PAGE : 2 * PAGE]
                        + (b"!" * PAGE if mapping.writable else text[2 * PAGE : 3 * PAGE])
                        + text[3 * PAGE :]
                    )
                    assert clone[:] == fs.read(f"/{name}.{n}") == text
                fs.unlink(f"/{name}.{n}")

        return work

    assert run_all([use(name) for name in "cdefgh"]) == []
    assert fs.listdir("/") == sorted(["between", "file", *"cdefgh"])


def test_more_threads_read_than_a_slot_has_words(fs):
    gate = threading.Barrier(READERS * 3)

    def work():
        gate.wait()
        for _ in range(30):
            assert fs.read("/file") == content("a")
            fs.extents("/file")

    assert run_all([work] * (READERS * 3)) == []


def test_closing_while_others_use_the_handle(pool_path):
    """They get an error that says so, never wrong bytes; nothing hangs."""
    onecopy.format(pool_path, "16M")
    fs = onecopy.open(pool_path)
    fs.write("/file", content("a"))
    started = threading.Barrier(5)

    def use(call):
        def work():
            started.wait()
            while True:
                call()

        return work

    def check_read():
        assert fs.read("/file") == content("a")

    users = [check_read, check_read, lambda: fs.write("/other", b"x" * PAGE), lambda: fs.map("/file").close()]
    errors = run_all([*map(use, users), lambda: (started.wait(), fs.close())])
    assert len(errors) == 4
    for error in errors:
        assert isinstance(error, ValueError) or error.errno == errno.EBADF, error
    with onecopy.open(pool_path) as again:
        assert again.check().findings == []
        assert again.read("/file") == content("a")


def test_a_thread_that_waits_for_a_transaction_of_a_handle_that_closes(pool_path):
    onecopy.format(pool_path, "16M")
    fs = onecopy.open(pool_path)
    inside, waiting, outcomes = threading.Event(), threading.Event(), []

    def wait_and_write():
        inside.wait()
        waiting.set()
        try:
            fs.write("/late", b"x")
            outcomes.append("written")
        except OSError as error:
            outcomes.append(error.errno)

    thread = threading.Thread(target=wait_and_write)
    thread.start()
    at_step("live root written", 1, lambda: (inside.set(), waiting.wait()))
    try:
        fs.write("/first", b"1")
    finally:
        steps.hook = None
    fs.close()
    thread.join()
    with onecopy.open(pool_path) as again:
        assert outcomes == ["written" if again.exists("/late") else errno.EBADF]
        assert again.read("/first") == b"1" and again.check().findings == []
