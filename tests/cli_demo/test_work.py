"""The processes of the demo: what they verify, what they rewrite, and how they end."""

import multiprocessing
import os
import shutil
import signal

import pytest

import onecopy
from onecopy.cli import demo_input, demo_work
from onecopy.cli.demo_input import File
from onecopy.cli.demo_work import Clone, Place, Team, Worker
from onecopy.cli.measure import PAGE


@pytest.fixture
def copies(tmp_path, tree):
    """Make two plain copies of the tree; give their place and the files."""
    for name in ("one", "two"):
        shutil.copytree(tree, tmp_path / "copies" / name / "tree")
    return Place(str(tmp_path / "copies")), demo_input.named_input(str(tree)).files


@pytest.fixture
def clones(tmp_path, tree):
    """Make two clones of the tree in a pool; give their place and the files."""
    pool = str(tmp_path / "p")
    onecopy.format(pool, "64M")
    with onecopy.open(pool) as fs:
        fs.mkdir("/one")
        fs.mkdir("/two")
        fs.put(str(tree), "/one/tree")
        fs.clone_tree("/one/tree", "/two/tree")
    yield Place("", pool), demo_input.named_input(str(tree)).files
    onecopy.remove(pool)


ONE, TWO = Clone("one", 1), Clone("two", 2)


def test_true_copies_pass(copies):
    place, files = copies
    with Worker(place, files, [ONE, TWO]) as worker:
        reading = worker.read()
        assert (reading.hashes, reading.wrong) == (2 * len(files), ())
        frames = worker.measure().frames
        if frames is not None:
            assert frames.size == 2 * sum(file.pages for file in files)


def test_one_changed_bit_is_found(copies):
    place, files = copies
    path = os.path.join(place.root, "two", "tree", "sub", "page")
    with open(path, "r+b") as file:
        content = file.read(1)
        file.seek(0)
        file.write(bytes([content[0] ^ 1]))
    with Worker(place, files, [ONE, TWO]) as worker:
        assert worker.read().wrong == (path,)


def test_each_sees_its_own_rewriting_and_nobody_elses(clones):
    place, files = clones
    with Worker(place, files, [ONE]) as first, Worker(place, files, [TWO]) as second:
        assert first.rewrite() > 0
        assert first.read().wrong == ()
        assert second.read().wrong == ()
        assert second.rewrite() > 0
        assert first.read().wrong == ()
        assert second.read().wrong == ()
    with Worker(place, files, [ONE, TWO]) as stranger:
        assert {path.split("/")[1] for path in stranger.read().wrong} == {"one", "two"}


def test_a_strangers_store_into_a_rewritten_clone_is_found(clones):
    place, files = clones
    with Worker(place, files, [ONE]) as worker, onecopy.open(place.pool) as stranger:
        worker.rewrite()
        stranger.write("/one/tree/sub/page", b"!", 99)
        assert worker.read().wrong == ("/one/tree/sub/page",)


def input_of(*sizes):
    return [File(str(number), "", size, b"") for number, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(1,), (0, 1), (PAGE * 1000, 5, 0, PAGE + 1, PAGE * 50), (7,) * 99, (PAGE * 900_000,)])
def test_one_page_in_a_hundred_and_at_least_one_is_rewritten(sizes):
    files = input_of(*sizes)
    total = sum(file.pages for file in files)
    for number in (1, 2, 250):
        runs = list(demo_work._runs_to_rewrite(files, Clone("", number)))
        pages = sum(-(-length // PAGE) for _, (_, length) in runs)
        assert 1 <= pages <= total / 100 + 1 + total // 400_000
        assert pages >= total // 100
        assert len(runs) <= demo_work.MOST_RUNS + 1
        assert all(length > 0 and offset + length <= file.size for file, (offset, length) in runs)


def test_two_clones_rewrite_different_pages():
    files = input_of(PAGE * 1000)
    first, second = ({run for _, run in demo_work._runs_to_rewrite(files, clone)} for clone in (ONE, TWO))
    assert not first & second


def test_a_team_works_in_step_and_leaves_no_process(copies):
    place, files = copies
    with Team(place, files, [ONE, TWO], 2) as team:
        assert [reading.hashes for reading in team.ask("read")] == [len(files)] * 2
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_ends_the_team(copies):
    place, files = copies
    with pytest.raises(OSError, match="ended with status -9"), Team(place, files, [ONE, TWO], 2) as team:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        team.ask("read")
    assert multiprocessing.active_children() == []


def test_a_process_that_fails_says_why(copies):
    place, files = copies
    missing = Place(place.root + "/nowhere")
    with pytest.raises(OSError, match="FileNotFoundError"), Team(missing, files, [ONE, TWO], 2) as team:
        team.ask("read")
    assert multiprocessing.active_children() == []


def test_too_many_files_to_map_are_refused():
    demo_work.check_mappable(1000)
    with pytest.raises(OSError, match="max_map_count"):
        demo_work.check_mappable(100_000_000)
