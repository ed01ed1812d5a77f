"""A process killed at any step of filling, evicting, writing back or storing frames: no completed operation is lost (S8)."""

import os
import random
import signal

import numpy as np
import pytest

import onecopy
from onecopy.daxemu.steps import signal_at

from ..mapped.common import assert_all_ended
from ..multiproc.processes import fork
from .common import FRAME_STEPS, PAGE, assert_settled, begin, content, end, new_pool, page_of

PAGES = 400  # of each file: more than the cache has


def operations(seed):
    """A row of operations on /a (a clone of /origin) and /b: mapped stores, writes and reads, more than fits."""
    chance, rows = random.Random(seed), [("map", "/a", "r+"), ("map", "/b", "r+")]
    for number in range(60):
        name, page = chance.choice(("/a", "/b")), chance.randrange(PAGES - 24)
        kind = chance.choice(("store", "store", "write", "read", "few"))
        if kind == "read":
            rows.append(("look", name, [(page * PAGE, (page + 24) * PAGE)]))
        elif kind == "few":
            rows.append(("write", name, page_of(number, seed)[:100], page * PAGE + 8))
        elif kind == "store":
            rows.append(("store", name, page * PAGE, b"".join(page_of(number * 1000 + n, seed) for n in range(8))))
        else:
            rows.append(("write", name, b"".join(page_of(number * 1000 + n, seed) for n in range(16)), page * PAGE))
        if number == 30:
            rows.append(("sync",))
    return rows


def apply(model, row):
    """Do to the model what a row does to the pool."""
    if row[0] == "store":
        _, name, offset, data = row
    elif row[0] == "write":
        _, name, data, offset = row
    else:
        return
    model[name][offset : offset + len(data)] = data


def assert_content(read, model, maybe):
    """Each 8-byte word is as in `model`, or as the operation that was cut short would have made it."""
    for name, expected in model.items():
        found, old, new = (np.frombuffer(data, np.uint64) for data in (read(name), expected, maybe[name]))
        wrong = np.flatnonzero((found != old) & (found != new))
        assert not len(wrong), f"{name}: {len(wrong)} words from page {wrong[0] * 8 // PAGE} to {wrong[-1] * 8 // PAGE}"


def some(nths):
    """Return pairs of a step and how often it is reached first; many are for the slow run."""
    return [
        pytest.param(step, nth, marks=() if (n + m) % 2 == 0 else pytest.mark.slow)
        for n, step in enumerate(FRAME_STEPS)
        for m, nth in enumerate(nths)
    ]


@pytest.mark.parametrize("policy", ["shared", "per-inode"])
@pytest.mark.parametrize(("step", "nth"), some([1, 2, 5, 11, 17, 30]))
def test_killed_at(pool_path, start, step, nth, policy):
    new_pool(pool_path, policy=policy)
    model = {"/origin": bytearray(content(PAGES)), "/b": bytearray(content(PAGES, 1))}
    with onecopy.open(pool_path) as fs:
        for name, data in model.items():
            fs.write(name, data)
        fs.clone("/origin", "/a")
        model["/a"] = bytearray(model["/origin"])
    survivor, victim = begin(start, pool_path), begin(start, pool_path)
    for row in (("map", "/a", "r+"), ("store", "/a", 0, page_of(1, 77)), ("write", "/b", page_of(2, 77), 5 * PAGE)):
        survivor.ask(row)
        apply(model, row)
    rows, done = operations(nth), 0
    for row in rows[:2]:
        victim.ask(row)
    victim.ask(("arm", step, nth, signal.SIGKILL))
    try:
        for row in rows[2:]:
            victim.ask(row)
            apply(model, row)
            done += 1
    except (AssertionError, OSError):
        assert victim.wait() == -signal.SIGKILL
    maybe = {name: bytearray(data) for name, data in model.items()}
    if done < len(rows) - 2:
        apply(maybe, rows[2 + done])
    else:
        end(victim)
    ranges = [(0, PAGES * PAGE)]
    seen = {"/a": survivor.ask(("look", "/a", ranges))[0], "/b": survivor.ask(("read", "/b", 0, PAGES * PAGE))}
    seen["/origin"] = survivor.ask(("read", "/origin", 0, PAGES * PAGE))
    assert_content(seen.__getitem__, model, maybe)
    survivor.ask(("store", "/a", 7 * PAGE, page_of(3, 77)))
    survivor.ask(("write", "/b", page_of(4, 77), 9 * PAGE))
    for name, page, number in (("/a", 7, 3), ("/b", 9, 4)):
        seen[name] = seen[name][: page * PAGE] + page_of(number, 77) + seen[name][(page + 1) * PAGE :]
    survivor.kill()  # with dirty frames in the cache
    with onecopy.open(pool_path) as fs:
        for name, expected in seen.items():  # what was seen once stays
            assert fs.read(name, 0, PAGES * PAGE) == expected
        assert_settled(fs)
        assert_all_ended(fs)
    onecopy.remove(pool_path)
    assert not os.path.exists(pool_path)


def test_parent_killed_while_its_forked_child_lives(pool_path, start):
    """The child has a description of the control file of its own: the parent's word for a frame ends with the parent."""
    new_pool(pool_path)
    with onecopy.open(pool_path) as fs:
        fs.write("/a", content(PAGES))

    ours, theirs = os.pipe()

    def family(line):
        os.close(theirs)
        with onecopy.open(pool_path) as fs:
            if not fork():
                line._pipe.close()
                os.read(ours, 1)  # until the test ends
                os._exit(0)
            line.say("forked")
            line.hear()
            signal_at("frame filled", 1, signal.SIGSTOP)
            fs.read("/a", 0, 40 * PAGE)

    process = start(family)
    assert process.hear() == "forked"
    process.say()
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    process.kill()
    other = begin(start, pool_path)
    try:
        other.say(("read", "/a", 0, 40 * PAGE))
        assert other._pipe.poll(20), "waits for a frame that a dead process holds"
        assert other.hear() == content(PAGES)[: 40 * PAGE]
        end(other)
    finally:
        os.close(theirs)
        os.close(ours)
