"""Many processes at once: what each did is there, nothing else is, and the counts agree."""

import os
import random

import pytest

import onecopy

PAGE = onecopy.PAGE


def together(start, count, work):
    """Let `count` processes do `work(fs, number)`, begun at the same time; return what they returned."""

    def run(line, number, path):
        with onecopy.open(path) as fs:
            line.say("ready")
            line.hear()
            return work(fs, number)

    def go(path):
        processes = [start(lambda line, number=number: run(line, number, path)) for number in range(count)]
        for process in processes:
            assert process.hear() == "ready"
        for process in processes:
            process.say()
        return [process.result() for process in processes]

    return go


def test_eight_processes_write_their_own_files(pool, start):
    def work(fs, number):
        rng = random.Random(number)
        data = bytearray()
        for turn in range(40):
            offset, piece = rng.randrange(len(data) + 1), rng.randbytes(rng.randrange(1, 3 * PAGE))
            fs.write(f"/{number}", piece, offset)
            data[offset : offset + len(piece)] = piece
            if turn % 10 == 9:
                assert fs.read(f"/{number}") == data
                fs.sync()
        return bytes(data)

    written = together(start, 8, work)(pool.path)
    assert [pool.read(f"/{number}") for number in range(8)] == written
    assert len(pool.info().users) == 1


def test_two_processes_clone_the_same_source_while_a_third_rewrites_it(pool, start):
    states = [bytes([n]) * 30 * PAGE for n in range(20)]
    pool.write("/source", states[0])

    def work(fs, number):
        if number == 2:
            for state in states:
                fs.write("/new", state)
                fs.rename("/new", "/source")
        else:
            for turn in range(60):
                fs.clone("/source", f"/{number}.{turn}")

    together(start, 3, work)(pool.path)
    for name in pool.listdir("/"):
        assert pool.read(f"/{name}") in states
    assert len(pool.listdir("/")) == 121
    for name in pool.listdir("/"):
        pool.unlink(f"/{name}")
    pool.sync()
    assert pool.info().used_pages < 20


def test_clones_written_at_once_stay_apart(pool, start):
    """S4: each process writes every page of its own clone of one file, in its own order, with its own byte."""
    pages = 64
    pool.write("/base", b"\xff" * pages * PAGE)
    for number in range(6):
        pool.clone("/base", f"/{number}")

    def work(fs, number):
        for page in random.Random(number).sample(range(pages), pages):
            fs.write(f"/{number}", bytes([number]) * PAGE, page * PAGE)
        return fs.read(f"/{number}") == bytes([number]) * pages * PAGE

    assert together(start, 6, work)(pool.path) == [True] * 6
    for number in range(6):
        assert pool.read(f"/{number}") == bytes([number]) * pages * PAGE
    assert pool.read("/base") == b"\xff" * pages * PAGE


def test_names_are_made_by_one(pool, start):
    """Of several processes that make the same name, one succeeds."""

    def work(fs, number):
        won = 0
        for n in range(50):
            try:
                fs.mkdir(f"/{n}")
                fs.write(f"/{n}/owner", b"%d" % number)
                won += 1
            except FileExistsError:
                pass
        return won

    assert sum(together(start, 4, work)(pool.path)) == 50
    assert all(pool.read(f"/{n}/owner") in b"0123" for n in range(50))


@pytest.mark.parametrize("cold", [False, True])
def test_all_open_at_once(new_path, start, cold):
    """The first one builds the run-time file, the others wait for it and find it whole."""
    path = new_path()
    onecopy.format(path, "16M")
    with onecopy.open(path) as fs:
        fs.write("/file", b"content" * PAGE)
        marker = fs.info().uuid
    if cold:
        for name in os.listdir("/dev/shm"):
            if marker in name and not name.endswith(".lock"):
                os.unlink(f"/dev/shm/{name}")

    def work(line):
        line.hear()
        for _ in range(20):
            with onecopy.open(path) as fs:
                assert fs.read("/file", 0, 7) == b"content"
        return fs.closed

    processes = [start(work) for _ in range(5)]
    for process in processes:
        process.say()
    assert [process.result() for process in processes] == [True] * 5
    with onecopy.open(path) as fs:
        assert fs.check().findings == [] and len(fs.info().users) == 1


def test_a_full_pool_is_full_for_all_and_usable_for_all(new_path, start):
    path = new_path()
    onecopy.format(path, "4M")

    def work(fs, number):
        written = 0
        try:
            while True:
                fs.write(f"/{number}", bytes([number]) * PAGE * 4, written)
                written += 4 * PAGE
        except onecopy.NoSpace:
            pass
        assert fs.read(f"/{number}") == bytes([number]) * written
        fs.unlink(f"/{number}")
        return written

    assert sum(together(start, 4, work)(path)) >= 500 * PAGE
    with onecopy.open(path) as fs:
        assert fs.listdir("/") == [] and fs.check().findings == []
        fs.write("/all", b"x" * 800 * PAGE)
