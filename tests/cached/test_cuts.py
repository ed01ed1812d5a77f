"""Power cuts at every point of a device's journal: what is left opens, and is the last synced state or a later one (S7, S9)."""

import os
import random

import pytest

import onecopy
from onecopy.blkcache.cuts import legal_cuts, read_journal
from onecopy.blkcache.device import Conditioned, FileDevice

from .common import PAGE, new_pool, page_of

FILES = 12


def state(fs):
    """Return all that there is, by name."""
    return {name: fs.read(f"/{name}", 0, 1 << 20) for name in fs.listdir("/")}


def change(fs, chance, number):
    """One transaction, that stores nothing in place."""
    names = sorted(fs.listdir("/"))
    kind = chance.choice(["write", "write", "clone", "unlink", "rename", "truncate"]) if len(names) > 3 else "write"
    name = chance.choice(names) if names else ""
    if kind == "write" or len(names) > FILES:
        fs.write(f"/{number}", b"".join(page_of(number, n) for n in range(chance.randrange(1, 12))))
        if len(names) > FILES:
            fs.unlink(f"/{name}")
    elif kind == "clone":
        fs.clone(f"/{name}", f"/{number}")
    elif kind == "unlink":
        fs.unlink(f"/{name}")
    elif kind == "rename":
        fs.rename(f"/{name}", f"/{number}")
    else:
        fs.truncate(f"/{name}", chance.randrange(1, 3) * PAGE)


def run(path, journal, *, lose, seed):
    """Change the pool at `path`, with syncs; return the media before, all states, and (records, state) of each sync."""
    device = Conditioned(FileDevice(path))
    chance, states, synced = random.Random(seed), [{}], [(0, 0)]
    with open(path, "rb") as file:
        before = file.read()
    device.journal(journal)
    with onecopy.open(path, device=device) as fs:
        device.lose_flushes = lose
        for number in range(60):
            change(fs, chance, number)
            states.append(state(fs))
            if chance.random() < 0.2:
                fs.sync()
                synced.append((len(read_journal(journal)), len(states) - 1))
            if chance.random() < 0.3:  # what is dirty goes by itself, too
                limit = fs._mount.pool.counters[2]
                fs._mount.pool.counters[2] = 256
                fs._mount.pool.cache.shrink()
                fs._mount.pool.counters[2] = limit
        device.journal(None)
    return before, states, synced


def judge(path, image, states, least):
    """Return what is wrong with an image, None when nothing is."""
    with open(path, "r+b") as file:
        file.write(image)
    try:
        with onecopy.open(path, policy="dax") as fs:
            if fs.check().findings:
                return "findings"
            found = state(fs)
    except OSError as error:
        return repr(error)
    finally:
        forget_runtime(path)
    return None if found in states[least:] else "neither the last synced state nor a later one"


def forget_runtime(path):
    status = os.stat(path)
    for name in os.listdir("/dev/shm"):
        if name.startswith("onecopy-") and f"-{status.st_dev:x}.{status.st_ino:x}" in name:
            os.unlink(f"/dev/shm/{name}")


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_cuts(pool_path, new_path, tmp_path, seed):
    new_pool(pool_path, "3M")
    before, states, synced = run(pool_path, tmp_path / "journal", lose=False, seed=seed)
    copy, cuts = new_path(), 0
    with open(copy, "wb") as file:
        file.write(before)
    for cut in legal_cuts(tmp_path / "journal", before, most=4, seed=seed):
        least = max(number for records, number in synced if records <= cut.records)
        wrong = judge(copy, cut.image, states, least)
        assert wrong is None, (cut.records, cut.chosen, wrong)
        cuts += 1
    assert cuts > 100
    assert len(synced) > 5


def test_flushes_that_do_nothing_are_noticed(pool_path, new_path, tmp_path):
    """The same trial fails when the device does not keep its word: so it would notice an order that S7 forbids."""
    new_pool(pool_path, "3M")
    before, states, synced = run(pool_path, tmp_path / "journal", lose=True, seed=1)
    copy, wrong = new_path(), set()
    with open(copy, "wb") as file:
        file.write(before)
    for cut in legal_cuts(tmp_path / "journal", before, most=6):
        least = max(number for records, number in synced if records <= cut.records)
        wrong.add(judge(copy, cut.image, states, least))
        if len(wrong - {None}) > 1:
            break
    assert len(wrong - {None}) > 1
