"""Several processes at once: what sharing must keep whatever the order is. The numbers are the xfstests scenarios.

Every call is atomic, so every job can tell from content alone whether something was torn; nothing here depends on timing.
"""

import errno
import os
import random
import signal

import pytest

import onecopy
from onecopy.daxemu import steps

PAGE = onecopy.PAGE
PAGES = 48
TURNS = 40

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # 3.12 warns of threads, of which we have none


def _uniform(fs, path):
    """Return the one byte that a file of PAGES pages is full of."""
    data = fs.read(path)
    assert len(data) == PAGES * PAGE and data == data[:1] * len(data)
    return data[0]


def _fill(fs, path, value):
    fs.write(path, bytes([value]) * PAGES * PAGE)


@pytest.fixture
def shared(twin):
    """/file1 full of ones, and its clone /file2; contents are checked by the tests themselves."""
    _fill(twin.fs, "/file1", 1)
    twin.fs.clone("/file1", "/file2")
    return twin


def test_generic_161_delete_against_copy_on_write(shared, race):
    def rewrite(fs):
        for page in range(PAGES):
            fs.write("/file2", b"\2" * PAGE, page * PAGE)

    assert race(shared.path, rewrite, lambda fs: fs.unlink("/file1")) == [0, 0]
    assert _uniform(shared.fs, "/file2") == 2
    assert shared.frames() == PAGES


def test_generic_162_163_630_dedupe_against_writes(shared, race):
    def dedupe(fs):
        for turn in range(TURNS):
            fs.dedupe_range("/file1", 0, "/file2", 0, 0)
            fs.dedupe_range("/file1", turn * PAGE, "/file2", turn * PAGE, PAGE)

    def write(fs):
        for turn in range(TURNS):
            fs.write("/file2", b"\1" * PAGE, turn % 7 * PAGE)
            fs.write("/file2", b"\2" * PAGE, turn % 5 * PAGE)
            _fill(fs, "/file2", 1)

    assert race(shared.path, dedupe, write) == [0, 0]
    assert _uniform(shared.fs, "/file1") == _uniform(shared.fs, "/file2") == 1


def test_generic_164_165_clone_against_writes_to_the_source(shared, race):
    def write(fs):
        for turn in range(TURNS):
            _fill(fs, "/file1", 2 + turn)

    def clone(fs):
        for turn in range(TURNS):
            fs.clone("/file1", f"/snap{turn:02}")

    assert race(shared.path, write, clone) == [0, 0]
    seen = [_uniform(shared.fs, f"/snap{turn:02}") for turn in range(TURNS)]
    assert seen == sorted(seen)


def test_generic_166_167_clone_against_reads_of_the_source(shared, race):
    def clone(fs):
        for turn in range(TURNS):
            _fill(fs, "/file1", 2 + turn)
            fs.clone("/file1", f"/snap{turn}")
            fs.unlink(f"/snap{turn}")

    def read(fs):
        oldest = 0
        for _ in range(TURNS):
            data = fs.read("/file1")  # a write in place that goes on may be seen in part, but nothing older, nothing else
            assert len(data) == PAGES * PAGE and oldest <= min(data)
            oldest = min(data)

    assert race(shared.path, clone, read, read) == [0, 0, 0]


def test_generic_168_170_clone_against_writes_to_the_target(shared, race):
    def write(fs):
        for _ in range(TURNS):
            _fill(fs, "/file2", 2)
            assert _uniform(fs, "/file2") in (1, 2)

    def clone(fs):
        for _ in range(TURNS):
            fs.clone_range("/file1", 0, "/file2", 0, 0)
            assert _uniform(fs, "/file2") in (1, 2)

    assert race(shared.path, write, clone, clone) == [0, 0, 0]
    assert _uniform(shared.fs, "/file1") == 1


def test_generic_333_334_clone_against_writes_until_space_ends(make_twin, race):
    """Whoever meets the end of space stops; what there is then is whole, and can be deleted."""
    twin = make_twin("3M")
    empty = twin.used()
    _fill(twin.fs, "/file1", 1)

    def until_full(work):
        turn = 0
        try:
            while True:
                work(turn)
                turn += 1
        except onecopy.NoSpace:
            pass

    def write(fs):
        until_full(lambda turn: fs.write("/file1", bytes([turn % 256]) * PAGE, turn % PAGES * PAGE))

    def clone(fs):
        until_full(lambda turn: fs.clone("/file1", f"/snap{turn}"))

    assert race(twin.path, write, clone) == [0, 0]
    for name in twin.fs.listdir("/"):
        assert len(twin.fs.read(f"/{name}")) == PAGES * PAGE
        twin.fs.unlink(f"/{name}")
    assert twin.used() <= empty + 1


def test_generic_415_writes_and_punches_of_clones_against_reads_of_the_source(shared, race):
    def change(number):
        def job(fs):
            fs.clone("/file1", f"/light{number}")
            for page in range(PAGES):
                if page % 2:
                    fs.punch(f"/light{number}", page * PAGE, PAGE)
                else:
                    fs.write(f"/light{number}", bytes([number]) * PAGE, page * PAGE)

        return job

    def read(fs):
        for _ in range(TURNS):
            assert _uniform(fs, "/file1") == 1

    assert race(shared.path, *(change(n) for n in range(3, 6)), read) == [0] * 4
    for number in range(3, 6):
        assert shared.fs.read(f"/light{number}") == (bytes([number]) * PAGE + bytes(PAGE)) * (PAGES // 2)


def test_generic_561_dedupe_against_random_changes(twin, race):
    """Each process keeps a model of a file of its own, full of pages that all of them have; two dedupe all the while."""

    def change(number):
        def job(fs):
            dice, model = random.Random(number), bytearray(PAGES * PAGE)
            fs.write(f"/file{number}", model)
            for _ in range(80):
                page, pages = dice.randrange(PAGES), dice.randrange(1, 6)
                data = bytes([dice.randrange(1, 4)]) * (pages * PAGE)
                model.extend(bytes(max(0, page * PAGE + len(data) - len(model))))
                model[page * PAGE : page * PAGE + len(data)] = data
                fs.write(f"/file{number}", data, page * PAGE)
                assert fs.read(f"/file{number}") == model

        return job

    def dedupe(fs):
        for _ in range(12):
            try:
                fs.dedupe(apply=True)
            except FileNotFoundError:
                pass

    assert race(twin.path, change(0), change(1), change(2), dedupe, dedupe) == [0] * 5
    twin.fs.dedupe(apply=True)
    assert twin.frames() <= 4


def test_generic_733_reads_go_on_while_a_clone_holds_the_lock(shared):
    """Another handle reads while this one is in the middle of cloning a tree; who wanted the lock would never get it."""
    shared.fs.mkdir("/tree")
    for n in range(20):
        shared.fs.clone("/file1", f"/tree/{n}")
    seen = []
    with onecopy.open(shared.path, "r") as reader:

        def read(_):
            steps.hook = None
            seen.extend([_uniform(reader, "/tree/7"), reader.listdir("/")])

        steps.hook = read
        shared.fs.clone_tree("/tree", "/copy")
    assert seen == [1, ["file1", "file2", "tree"]]
    assert shared.fs.listdir("/copy") == shared.fs.listdir("/tree")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("at", ["lock taken", "node copied", "limbo appended", "live root written", "published"])
def test_generic_297_298_a_clone_killed_in_the_middle(shared, race, number, at):
    """All of the copy is there, or nothing; the lock is free, and nothing has leaked."""
    shared.fs.mkdir("/tree")
    for n in range(50):
        shared.fs.clone("/file1", f"/tree/{n}")
        shared.fs.write(f"/tree/{n}", b"\1" * PAGE, n % PAGES * PAGE)
    before = shared.used()

    def clone(fs):
        steps.hook = lambda step: steps.STEPS[step] == at and os.kill(os.getpid(), number)
        fs.clone_tree("/tree", "/copy")

    assert race(shared.path, clone) == [1 if number == signal.SIGINT else -number]
    assert shared.fs.exists("/copy") == (at == "published")
    assert shared.fs.check().findings == []
    if at != "published":
        assert shared.used() == before
        shared.fs.clone_tree("/tree", "/copy")
    assert _uniform(shared.fs, "/copy/49") == 1


def test_generic_297_every_step_of_a_clone_can_be_interrupted(shared):
    """The same in this process: an exception at the n-th step, for every n, until the clone gets through."""
    shared.fs.write("/file2", b"\2" * PAGE, 3 * PAGE)
    before, step = shared.used(), 0
    while not shared.fs.exists("/copy"):
        left = iter(range(step, -1, -1))
        steps.hook = lambda _, left=left: next(left, 1) == 0 and signal.raise_signal(signal.SIGINT)
        try:
            shared.fs.clone("/file2", "/copy")
        except KeyboardInterrupt:
            pass
        finally:
            steps.hook = None
        step += 1
        assert shared.fs.check().findings == []
    assert step > 5
    shared.fs.unlink("/copy")
    assert shared.used() == before


def test_two_names_for_one_clone_only_one_wins(shared, race):
    def clone(number):
        def job(fs):
            try:
                fs.clone("/file1", "/wanted")
                fs.create(f"/won{number}")
            except OSError as error:
                assert error.errno == errno.EEXIST

        return job

    assert race(shared.path, *(clone(n) for n in range(4))) == [0] * 4
    assert len([name for name in shared.fs.listdir("/") if name.startswith("won")]) == 1
    assert shared.sharers("/file1") == [3] * PAGES


@pytest.mark.parametrize("cut", ["/a", "/b"])
def test_a_file_cut_off_between_search_and_sharing_gets_no_page_behind_its_end(pool, cut):
    """The zeros beyond the end compare equal to a page of zeros, but there is no page to share."""
    for path, start in (("/a", b"a"), ("/b", b"b")):
        pool.write(path, start * PAGE + bytes(PAGE))

    def progress(*_: object) -> None:
        if pool.stat(cut).st_size > PAGE:
            pool.truncate(cut, PAGE)

    pool.dedupe(("/a", "/b"), apply=True, progress=progress)
    assert [extent.pages for extent in pool.extents(cut)] == [1]
    assert pool.check().findings == []
