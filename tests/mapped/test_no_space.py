"""Stores, and what folds them, in a full pool: errors as promised, everything stored stays, nothing leaks."""

import signal
from contextlib import suppress

import pytest

import onecopy

from .common import PAGE, assert_sound, content
from .programs import run, succeed

PAGES = 64


def fill(fs, left=0):
    """Leave about `left` free pages, as far as stores and writes can use them."""
    fs.create("/fill")
    at = 0
    for pages in (64, 8, 1):
        with suppress(onecopy.NoSpace):
            while True:
                fs.write("/fill", bytes([7]) * pages * PAGE, at * PAGE)
                at += pages
    fs.sync()
    with suppress(onecopy.NoSpace):
        while True:
            fs.write("/fill", bytes([7]) * PAGE, at * PAGE)
            at += 1
    fs.truncate("/fill", (at - left) * PAGE)
    fs.sync()
    fs.sync()


@pytest.fixture
def path(pool_path):
    onecopy.format(pool_path, "4M")
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")
    yield pool_path
    with onecopy.open(pool_path) as fs:
        assert fs.check().findings == []
        assert fs.read("/origin") == content(PAGES)
        fs.unlink("/fill")
        fs.unlink("/a")
        assert_sound(fs)
        assert fs.info().used_pages < PAGES + 20


def test_a_store_without_room_is_a_message_and_a_bus_error(path):
    with onecopy.open(path) as fs:
        fill(fs)
    done = run("""
mapping = fs.map("/a", "r+", granule=1)
for page in range(64):
    mapping[page * PAGE] = 1
    print(page, flush=True)
""", path)  # fmt: skip
    assert done.returncode == -signal.SIGBUS
    assert "no room" in done.stderr and "reserve=True" in done.stderr
    with onecopy.open(path) as fs:  # what was stored before is there
        model = bytearray(content(PAGES))
        for page in map(int, done.stdout.split()):
            model[page * PAGE] = 1
        assert fs.read("/a") == model


def test_a_bus_error_that_the_program_handles(path):
    """The signal comes as the kernel's would: a handler gets it, with the address."""
    with onecopy.open(path) as fs:
        fill(fs)
    done = run("""
mapping = fs.map("/a", "r+", granule=1)
faulthandler.enable()
for page in range(64):
    mapping[page * PAGE] = 1
""", path)  # fmt: skip
    assert done.returncode == -signal.SIGBUS and "Bus error" in done.stderr


def test_reserve_says_so_at_map_time(path):
    with onecopy.open(path) as fs:
        fill(fs, left=20)
        before = fs.read("/a")
        with pytest.raises(onecopy.NoSpace):
            fs.map("/a", "r+", reserve=True)
        assert fs.read("/a") == before and fs.check().findings == []
        with fs.map("/a", "r+") as mapping, pytest.raises(onecopy.NoSpace):
            mapping.make_writable()
        assert fs.read("/a") == before
        fs.truncate("/fill", 0)
        fs.sync()
        mapping = fs.map("/a", "r+", reserve=True)
        fs.truncate("/fill", 0)
        fill(fs)
        mapping[:] = content(PAGES, 4)  # no store fails
        fs.sync()
        mapping.close()
        assert fs.read("/a") == content(PAGES, 4)


def test_sync_and_check_in_a_pool_that_stores_have_filled(path):
    succeed("""
import contextlib
fs.create("/fill"); fs.truncate("/fill", 800 * PAGE)
filling = fs.map("/fill", "r+", granule=1)
page = 0
with contextlib.suppress(onecopy.NoSpace):
    while page < 800:
        filling.make_writable(page * PAGE, page * PAGE + 1)
        filling[page * PAGE] = page % 251
        page += 1
assert page > 500, page
assert fs.check().findings == []
fs.sync(); fs.sync()
assert all(filling[n * PAGE] == n % 251 for n in range(page))
assert fs.read("/fill", 0, page * PAGE)[:: PAGE] == bytes(n % 251 for n in range(page))
fs.punch("/fill", 0, 100 * PAGE)
fs.sync(); fs.sync()
filling.make_writable(0, 50 * PAGE)
filling[0] = 9
filling.close(); fs.close()
""", path)  # fmt: skip


def test_writes_into_a_mapped_file_in_a_full_pool(path):
    with onecopy.open(path) as fs:
        fill(fs, left=10)
        with fs.map("/a", "r+", granule=1) as mapping:
            mapping[3 * PAGE] = 1
            model = bytearray(content(PAGES))
            model[3 * PAGE] = 1
            fill_rest(fs)
            with pytest.raises(onecopy.NoSpace):
                fs.write("/a", bytes(60 * PAGE))
            assert fs.read("/a") == model == mapping[:]
            fs.write("/a", b"in place", 3 * PAGE)
            model[3 * PAGE : 3 * PAGE + 8] = b"in place"
            assert fs.read("/a") == model == mapping[:]
            fs.sync()
            assert fs.check().findings == []
            with pytest.raises(onecopy.NoSpace):
                fs.unshare("/a")
            assert fs.read("/a") == model == mapping[:]
            fs.punch("/a", 0, 30 * PAGE)
            fs.truncate("/a", 50 * PAGE + 5)
            model[: 30 * PAGE] = bytes(30 * PAGE)
            assert fs.read("/a") == model[: 50 * PAGE + 5] == mapping[: 50 * PAGE + 5]
            fs.truncate("/a", 64 * PAGE)


def fill_rest(fs):
    with suppress(onecopy.NoSpace):
        for n in range(1000):
            fs.write("/fill", bytes([n % 256]) * PAGE, (2000 + n) * PAGE)


def test_deleting_makes_room_for_stores_again(path):
    """Frames freed since the last sync are free after the next one; a fault can't sync, so the program does."""
    with onecopy.open(path) as fs:
        fill(fs)
        with fs.map("/a", "r+") as mapping:
            with pytest.raises(onecopy.NoSpace):
                mapping.make_writable()
            fs.truncate("/fill", 0)
            fs.sync()
            mapping.make_writable()
            mapping[:] = content(PAGES, 2)
            assert fs.read("/a") == content(PAGES, 2)


def test_unlinking_a_mapped_file_in_a_full_pool(path):
    with onecopy.open(path) as fs:
        fill(fs, left=40)
        fs.clone("/a", "/b")
        mapping = fs.map("/b", "r+", granule=1)
        for page in range(5):
            mapping[page * PAGE] = 1
        fill_rest(fs)
        fs.unlink("/b")
        assert mapping[0] == 1
        mapping.close()
        assert fs.check().findings == []
