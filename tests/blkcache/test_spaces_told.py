"""A frame that entries have ceased to name is others' only when all who show it have been told (S5)."""

import os
import signal
import threading
import time

import pytest

import onecopy
from onecopy.blkcache.frames import USED
from onecopy.daxemu import steps
from onecopy.daxemu.units import PAGE

from .spaces import frames, key


@pytest.fixture
def stopped(fs, small, start):
    """Call with a path and a store: a process, stopped in a store to the file's first page that it has told nobody about."""

    def make(path):
        def store(line):
            mapping = onecopy.open(small).map(path, "r+", granule=1)
            line.say()
            line.hear()
            steps.signal_at("entries changed", 1, signal.SIGSTOP)
            mapping[0] = 1
            return mapping[0]

        fs.clone(path, "/clone")
        process = start(store)
        process.hear()
        fs.unlink("/clone")  # the entries still say that the pages are shared: a store copies
        return process

    return make


def begin_store(process) -> None:
    process.say()
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])


def assert_kept_until(process, fs, mapping, frame: int, act) -> None:
    """While the store is stopped: the frame stays as it is, whatever `act` and transactions after it free."""

    def run() -> None:
        act()
        for n in range(6):
            for name in "xy":
                fs.write(f"/{name}", bytes([n]) * 40 * PAGE)
            fs.sync()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = time.monotonic() + 1
    try:
        while time.monotonic() < end:
            assert fs._mount.frames.array[frame] & USED
            assert mapping[:PAGE] == b"a" * PAGE
            time.sleep(0.01)
    finally:
        process.resume()
        thread.join(30)
    assert process.result() == 1
    assert mapping[:PAGE] == b"\1" + b"a" * (PAGE - 1)


def begin_before(monkeypatch, process, spaces, name: str) -> list[str]:
    """Let the store begin when the method is called; return where it says that it was."""
    called, method = [], getattr(spaces, name)

    def late(*arguments):
        if not called:
            called.append(name)
            begin_store(process)
        return method(*arguments)

    monkeypatch.setattr(spaces, name, late)
    return called


def test_a_file_is_deleted_while_a_store_is_under_way(fs, stopped, monkeypatch):
    """It begins when what was stored before has been folded."""
    process, mapping, frame = stopped("/a"), fs.map("/a"), frames(fs, "/a")[0]
    called = begin_before(monkeypatch, process, fs._mount.spaces, "pin")
    assert_kept_until(process, fs, mapping, frame, lambda: fs.unlink("/a"))
    assert called
    mapping.close()


def test_pins_are_settled_while_a_store_is_under_way(fs, stopped):
    """To a deleted file, while the mapping of another one ends."""
    process, mapping, other, frame = stopped("/a"), fs.map("/a"), fs.map("/b"), frames(fs, "/a")[0]
    fs.unlink("/a")
    fs.unlink("/b")
    begin_store(process)
    assert_kept_until(process, fs, mapping, frame, lambda: (other.close(), fs.sync()))
    mapping.close()


def test_strays_are_looked_for_while_a_store_is_under_way(fs, stopped):
    """To a page that was frozen for nothing."""
    mount, process = fs._mount, stopped("/a")
    with fs.map("/a", "r+", granule=1) as mapping:
        mapping[0] = ord("a")
        with mount.lock:  # as a transaction does that fails then
            frozen = mount.engine.freeze(mount.spaces.find(*key(fs, "/a")), 0, 1, 1000)
        begin_store(process)
        found = []

        def look():
            with mount.lock:
                found.append(mount.spaces.strays())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            thread.join(0.5)
            assert not found
        finally:
            process.resume()
            thread.join(30)
        assert found == [[(int.from_bytes(frozen, "little") & (1 << 40) - 1, 1)]]
        assert process.result() == 1
    fs.sync()
