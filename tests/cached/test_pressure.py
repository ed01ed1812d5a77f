"""Files larger than the cache, mapped, stored to and read by several processes: the content is right, the memory bounded."""

import os
import random
import threading
from functools import partial

import pytest

import onecopy
from onecopy.blkcache.device import Conditioned, FileDevice

from ..mapped.common import assert_all_ended, assert_sound
from .common import PAGE, assert_settled, begin, content, end, frames, new_pool, page_of

PAGES = 700
LIMIT = 256
PROCESSES = 3
POLICIES = pytest.mark.parametrize("policy", ["shared", "per-inode"])


def busy(path, number, conditions, line):
    """Store to every third page of /a, by mapping and by write, and read all of /origin in between; as often as told."""
    chance = random.Random(number)
    device = Conditioned(FileDevice(path), path=conditions)
    with onecopy.open(path, device=device) as fs, fs.map("/a", "r+") as mapping, fs.map("/origin", "r") as origin:
        line.say("mapped")
        rounds = line.hear()
        for turn in range(1, rounds + 1):
            pages = list(range(number, PAGES, PROCESSES))
            chance.shuffle(pages)
            for page in pages:
                data = page_of(page, turn)
                if page % 5:
                    with memoryview(mapping) as view:
                        view[page * PAGE : (page + 1) * PAGE] = data
                else:
                    fs.write("/a", data, page * PAGE)
                other = chance.randrange(PAGES)
                with memoryview(origin) as view:
                    found = bytes(view[other * PAGE : other * PAGE + 8])
                assert found == content(PAGES)[other * PAGE : other * PAGE + 8]
        line.say("done")
        line.hear()


@POLICIES
@pytest.mark.parametrize("latency", [0, 0.0005])
def test_memory_is_bounded(pool_path, start, policy, latency):
    new_pool(pool_path, policy=policy)
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")
    conditions = f"{pool_path}.conditions"
    device = Conditioned(FileDevice(pool_path), path=conditions, latency=latency)
    try:
        made = [start(partial(busy, pool_path, n, conditions)) for n in range(PROCESSES)]
        assert [process.hear() for process in made] == ["mapped"] * PROCESSES
        rounds = 1 if latency else 2
        for process in made:
            process.say(rounds)
        with onecopy.open(pool_path, device=device) as fs:
            before, most = frames(fs).over, 0
            while not all(process._pipe.poll(0.002) for process in made):
                now = frames(fs)
                most = max(most, now.physical)
                assert now.physical <= LIMIT, now
            assert [process.hear() for process in made] == ["done"] * PROCESSES
            assert frames(fs).over == before
            assert most > LIMIT // 2
            for process in made:
                process.say()
                process.wait()
            expected = b"".join(page_of(page, rounds) for page in range(PAGES))
            assert fs.read("/a", 0, PAGES * PAGE) == expected
            assert fs.read("/origin", 0, PAGES * PAGE) == content(PAGES)
            assert_settled(fs)
            assert_all_ended(fs)
    finally:
        os.unlink(conditions)


@POLICIES
def test_threads_on_a_mapping_larger_than_the_cache(pool_path, policy):
    new_pool(pool_path, policy=policy)
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")
        wrong = []

        def work(number, view):
            chance = random.Random(number)
            for turn in range(2):
                pages = list(range(number, PAGES, 4))
                chance.shuffle(pages)
                for page in pages:
                    view[page * PAGE : (page + 1) * PAGE] = page_of(page, turn)
                for page in pages:
                    if view[page * PAGE : (page + 1) * PAGE] != page_of(page, turn):
                        wrong.append((turn, page))

        with fs.map("/a", "r+") as mapping, memoryview(mapping) as view:
            threads = [threading.Thread(target=work, args=(n, view)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong
        assert fs.read("/a", 0, PAGES * PAGE) == b"".join(page_of(page, 1) for page in range(PAGES))
        assert_settled(fs)
        assert_sound(fs)


class Model:
    """What /a, its clones and /b must hold."""

    def __init__(self, chance):
        self.chance = chance
        self.files = {"/a": bytearray(content(PAGES)), "/b": bytearray(content(PAGES, 1))}

    def place(self, name, most=40):
        pages = len(self.files[name]) // PAGE
        first = self.chance.randrange(max(1, pages - most))
        return first, self.chance.randrange(1, min(most, pages - first) + 1)

    def next(self, number):
        """Return a request, and do it to the model."""
        chance, files = self.chance, self.files
        name = chance.choice(["/a", "/b"])
        data, (first, pages) = files[name], self.place(name)
        low, high = first * PAGE, (first + pages) * PAGE
        kind = chance.choice(
            ["store", "store", "write", "odd write", "clone", "clone_range", "punch", "zero", "collapse", "insert", "truncate",
             "dedupe", "unshare", "sync"]
        )  # fmt: skip
        if kind == "store":
            new = b"".join(page_of(number * 1000 + n, 1) for n in range(pages))
            data[low:high] = new
            return ("store", name, low, new)
        if kind == "write":
            new = b"".join(page_of(number * 1000 + n, 2) for n in range(pages))
            data[low:high] = new
            return ("write", name, new, low)
        if kind == "odd write":
            data[low + 11 : low + 500] = new = page_of(number, 3)[:489]
            return ("write", name, new, low + 11)
        if kind == "clone":
            files[f"/c{number}"] = bytearray(data)
            return ("clone", name, f"/c{number}")
        if kind == "clone_range":
            other = "/b" if name == "/a" else "/a"
            if high <= len(files[other]):
                files[other][low:high] = data[low:high]
                return ("clone_range", name, low, other, low, high - low)
        if kind == "dedupe":
            other = "/b" if name == "/a" else "/a"
            if high <= len(files[other]):
                return ("dedupe_range", name, low, other, low, high - low)
        if kind in ("punch", "zero"):
            data[low:high] = bytes(high - low)
            return (kind, name, low, high - low)
        if kind == "collapse" and len(data) > 500 * PAGE:
            del data[low:high]
            return ("collapse", name, low, high - low)
        if kind == "insert":
            data[low:low] = bytes(high - low)
            return ("insert", name, low, high - low)
        if kind == "truncate":
            size = max(500 * PAGE, len(data) - 333 - pages * PAGE) if len(data) > 500 * PAGE else len(data) + pages * PAGE
            size = min(size, len(data) + pages * PAGE)
            data[size:] = bytes(max(0, size - len(data)))
            return ("truncate", name, size)
        if kind == "unshare":
            return ("unshare", name, low, high - low)
        return ("sync",)


@POLICIES
@pytest.mark.parametrize("seed", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_everything_under_mappings(pool_path, start, policy, seed):
    """Two processes that map two files, and do all that there is to do, in turn; each sees what the other did."""
    new_pool(pool_path, "64M", policy=policy)
    chance = random.Random(seed)
    model = Model(chance)
    with onecopy.open(pool_path) as fs:
        for name, data in model.files.items():
            fs.write(name, data)
    hands = [begin(start, pool_path) for _ in range(2)]
    mapped = {}
    for number in range(250):
        if number % 25 == 0:
            for hand in hands:
                for name in ("/a", "/b"):
                    if (hand, name) in mapped:
                        hand.ask(("unmap", name))
                    mapped[hand, name] = hand.ask(("map", name, "r+"))
        hand = chance.choice(hands)
        before = {name: len(data) for name, data in model.files.items()}
        request = model.next(number)
        if request[0] == "store" and before[request[1]] > mapped[hand, request[1]]:
            end_of = mapped[hand, request[1]]
            if request[2] + len(request[3]) > end_of:
                request = ("write", request[1], request[3], request[2])
        hand.ask(request)
        looker = chance.choice(hands)
        for name in ("/a", "/b"):
            data = model.files[name]
            pages = min(len(data), mapped[looker, name]) // PAGE
            ranges = [(p * PAGE, (p + 1) * PAGE) for p in (chance.randrange(pages) for _ in range(6))]
            assert looker.ask(("look", name, ranges)) == [bytes(data[a:b]) for a, b in ranges], (number, request[:1])
        if number % 50 == 49:
            for name, data in model.files.items():
                assert chance.choice(hands).ask(("read", name, 0, len(data))) == data
                assert looker.ask(("frames",)).physical <= LIMIT
    end(*hands)
    with onecopy.open(pool_path) as fs:
        for name, data in model.files.items():
            assert fs.read(name, 0, len(data)) == data
        assert_settled(fs)
        assert_all_ended(fs)
