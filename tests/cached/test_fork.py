"""Forked and spawned processes on cached pools, and signals that are not ours."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import onecopy

from ..mapped.common import assert_all_ended
from ..multiproc.processes import fork
from .common import PAGE, assert_settled, content, frames, new_pool, page_of

PAGES = 500


@pytest.fixture(params=["shared", "per-inode"])
def path(pool_path, request):
    new_pool(pool_path, policy=request.param)
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")
    return pool_path


def look_all(view):
    return bytes(view) == content(PAGES)


def test_a_child_uses_what_its_parent_has_mapped(path, start):
    def family(line):
        with onecopy.open(path) as fs, fs.map("/a", "r+") as mapping, memoryview(mapping) as view:
            view[:PAGE] = page_of(1, 1)
            ours, theirs = os.pipe()
            pid = fork()
            if not pid:
                ok = bytes(view[:PAGE]) == page_of(1, 1) and bytes(view[PAGE:]) == content(PAGES)[PAGE:]
                view[PAGE : 2 * PAGE] = page_of(2, 2)
                fs.write("/b", content(30, 3))
                ok = ok and fs.read("/origin", 0, PAGES * PAGE) == content(PAGES)
                os.write(theirs, b"y" if ok else b"n")
                os._exit(0)
            line.say(os.read(ours, 1))
            view[2 * PAGE : 3 * PAGE] = page_of(3, 3)
            os.waitpid(pid, 0)
            expected = page_of(1, 1) + page_of(2, 2) + page_of(3, 3) + content(PAGES)[3 * PAGE :]
            line.say(bytes(view) == expected and fs.read("/a", 0, PAGES * PAGE) == expected)
            line.say(fs.read("/b", 0, 30 * PAGE) == content(30, 3))

    process = start(family)
    assert [process.hear() for _ in range(3)] == [b"y", True, True]
    process.result()
    with onecopy.open(path) as fs:
        assert_settled(fs)
        assert_all_ended(fs)


def test_threads_touch_while_another_forks(path, start):
    def family(line):
        with onecopy.open(path) as fs, fs.map("/a", "r+") as mapping, memoryview(mapping) as view:
            stop, wrong = threading.Event(), []

            def touch(number):
                turn = 0
                while not stop.is_set():
                    turn += 1
                    for page in range(number, PAGES, 3):
                        view[page * PAGE : (page + 1) * PAGE] = page_of(page, turn)
                    for page in range(number, PAGES, 3):
                        if view[page * PAGE : (page + 1) * PAGE] != page_of(page, turn):
                            wrong.append(page)

            threads = [threading.Thread(target=touch, args=(n,)) for n in range(3)]
            for thread in threads:
                thread.start()
            for _ in range(8):
                pid = fork()
                if not pid:
                    for page in range(0, PAGES, 7):
                        word = bytes(view[page * PAGE : page * PAGE + 8])
                        if (
                            word != content(PAGES)[page * PAGE : page * PAGE + 8]
                            and int.from_bytes(word, "little") >> 32 != page
                        ):
                            os._exit(1)
                    os._exit(0)
                line.say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            stop.set()
            for thread in threads:
                thread.join()
            line.say(wrong)

    process = start(family)
    assert [process.hear() for _ in range(8)] == [0] * 8
    assert process.hear() == []
    process.result()
    with onecopy.open(path) as fs:
        assert_settled(fs)
        assert_all_ended(fs)


SPAWNING = """
import multiprocessing, sys
import onecopy

def work(mapping, page):
    with memoryview(mapping) as view:
        view[page * 4096 : (page + 1) * 4096] = bytes([page + 1]) * 4096
        return sum(view)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    with onecopy.open(sys.argv[1]) as fs, fs.map("/a", "r+") as mapping:
        made = [context.Process(target=work, args=(mapping, page)) for page in range(3)]
        for process in made:
            process.start()
        for process in made:
            process.join()
        print([process.exitcode for process in made], [fs.read("/a", n * 4096, 1)[0] for n in range(3)])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(path, tmp_path, method):
    (tmp_path / "program.py").write_text(SPAWNING)
    command = [sys.executable, str(tmp_path / "program.py"), path, method]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "[0, 0, 0] [1, 2, 3]\n", done.stderr


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


HEAD = """
import faulthandler, mmap, os, signal, sys, tempfile, ctypes
import onecopy
{before}
fs = onecopy.open({path!r})
m = fs.map("/a", "r+")
{after}
view = memoryview(m)
assert bytes(view) == fs.read("/a", 0, len(m))
view[5 * 4096] = 7
"""
ENABLE = "faulthandler.enable()"


@pytest.mark.parametrize(("before", "after"), [("", ""), (ENABLE, ""), ("", ENABLE), (ENABLE, ENABLE)])
def test_a_bus_error_that_is_not_ours(path, before, after):
    program = HEAD.format(path=path, before=before, after=after) + """
f = tempfile.TemporaryFile()
f.truncate(8192)
other = mmap.mmap(f.fileno(), 8192)
f.truncate(0)
print("here", flush=True)
other[0]
"""  # fmt: skip
    done = run(program)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "here\n"), done.stderr
    assert ("Fatal Python error: Bus error" in done.stderr) == bool(before or after)


@pytest.mark.parametrize("touch", ["view[499 * 4096]", "view[499 * 4096] = 1"])
@pytest.mark.parametrize("enabled", ["", ENABLE])
def test_touching_beyond_the_end(path, touch, enabled):
    program = (
        HEAD.format(path=path, before=enabled, after="")
        + f"""
fs.truncate("/a", 450 * 4096)
view[449 * 4096]
print("here", flush=True)
{touch}
"""
    )
    done = run(program)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "here\n"), done.stderr


def test_touching_what_has_grown_again(path):
    program = (
        HEAD.format(path=path, before="", after="")
        + """
for turn in range(3):
    fs.truncate("/a", 450 * 4096)
    fs.truncate("/a", 500 * 4096)
    assert view[449 * 4096 + 5] == fs.read("/a", 449 * 4096 + 5, 1)[0]
    assert view[480 * 4096] == 0
    view[480 * 4096] = turn + 1
    assert fs.read("/a", 480 * 4096, 1) == bytes([turn + 1])
print("done")
"""
    )
    done = run(program)
    assert done.stdout == "done\n", done.stderr


def test_a_handler_of_the_programs(path):
    """Who sets a handler of his own afterwards, and passes on what he does not know, sees no fault of ours."""
    program = (
        HEAD.format(path=path, before="", after="")
        + """
seen = []
signal.signal(signal.SIGBUS, lambda *a: seen.append(a))
os.kill(os.getpid(), signal.SIGBUS)
assert len(seen) == 1
n = fs.map("/origin", "r+")
with memoryview(n) as other:
    assert bytes(other) == fs.read("/origin", 0, len(n))
print("done", len(seen))
"""
    )
    done = run(program)
    assert done.stdout == "done 1\n", done.stderr


def test_a_child_of_a_stranger_is_refused(path):
    """A fork past Python: nobody prepared the child, so it can read nothing that is not true; it ends, and hangs nobody."""
    program = (
        HEAD.format(path=path, before="", after="")
        + """
libc = ctypes.CDLL(None)
pid = libc.fork()
if pid == 0:
    signal.alarm(20)
    ctypes.string_at(ctypes.addressof(ctypes.c_char.from_buffer(view)), 4096)
    os._exit(0)
print(os.waitpid(pid, 0)[1] & 0x7F in (signal.SIGSEGV, signal.SIGBUS), flush=True)
assert bytes(view) == fs.read("/a", 0, len(m))
view[9 * 4096] = 1
fs.sync()
print("done")
"""
    )
    done = run(program)
    assert done.stdout == "True\ndone\n", done.stderr
    with onecopy.open(path) as fs:
        assert frames(fs).held == 0
