"""The fault handler among other users of signals: each gets what is its own, in whatever order they came."""

import signal

import pytest

import onecopy

from .common import assert_all_ended, content
from .programs import run, succeed


@pytest.fixture
def path(pool_path):
    """A pool with /origin and its clone /a; afterwards it is sound, whatever happened to the program."""
    onecopy.format(pool_path, "64M")
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(64))
        fs.clone("/origin", "/a")
    yield pool_path
    with onecopy.open(pool_path) as fs:
        assert fs.read("/origin") == content(64)
        fs.unlink("/a")
        assert_all_ended(fs)


END = """
mapping.close(); fs.close()
"""


@pytest.mark.parametrize("when", ["before", "after", "before and after", "disabled again", "never"])
def test_faulthandler(path, when):
    before = "faulthandler.enable()\n" if "before" in when else ""
    after = "faulthandler.enable()\n" if "after" in when or when == "disabled again" else ""
    after += "faulthandler.disable()\n" if when == "disabled again" else ""
    text = (
        before
        + 'mapping = fs.map("/a", "r+", granule=1)\nmapping[0] = 1\n'
        + after
        + "spread(mapping); assert_spread(mapping)\n"
    )
    succeed(text + END, path)
    done = run(text + 'print("stored", flush=True)\ncrash()\n', path)
    assert done.returncode == -signal.SIGSEGV and done.stdout == "stored\n"
    assert ("Segmentation fault" in done.stderr) == (when not in ("never", "disabled again"))
    assert done.stderr.count("Fatal Python error") <= 1


def test_faulthandler_enabled_from_the_command_line(path, monkeypatch):
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    text = 'mapping = fs.map("/a", "r+", granule=1)\nspread(mapping); assert_spread(mapping)\n'
    succeed(text + END, path)
    done = run(text + "crash()", path)
    assert done.returncode == -signal.SIGSEGV and "Segmentation fault" in done.stderr


C_HANDLER = """
class Action(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_void_p), ("mask", ctypes.c_ubyte * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)
    ]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
own = libc.mmap(None, PAGE, 1, 0x22, -1, 0)
seen = []
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def handler(number, info, context):
    address = ctypes.cast(info, ctypes.POINTER(ctypes.c_uint64))[2]
    seen.append((number, address))
    libc.mprotect(own, PAGE, 3)
def install():
    action, before = Action(), Action()
    action.handler, action.flags = ctypes.cast(handler, ctypes.c_void_p).value, 4
    assert libc.sigaction(11, ctypes.byref(action), ctypes.byref(before)) == 0
    return before
"""


def test_a_program_s_own_handler_installed_before(path):
    """A garbage collector, say, that protects its pages: its faults come to it, ours don't."""
    succeed(
        C_HANDLER + """
install()
mapping = fs.map("/a", "r+", granule=1)
spread(mapping); assert_spread(mapping)
ctypes.memset(own + 100, 7, 1)
assert seen == [(11, own + 100)] and ctypes.string_at(own + 100, 1) == b"\\7"
libc.mprotect(own, PAGE, 1)
fs.clone("/a", "/c"); spread(mapping, 9); assert_spread(mapping, 9); fs.unlink("/c")
ctypes.memset(own + 101, 7, 1)
assert len(seen) == 2
""" + END, path)  # fmt: skip


def test_a_program_s_own_handler_installed_after_and_chaining(path):
    """It gets all faults first, and passes ours on, as a good handler does; a second mapping puts ours in front again."""
    succeed(
        C_HANDLER + """
mapping = fs.map("/a", "r+", granule=1)
mapping[0] = 1
install()
other = fs.map("/a", "r+", granule=1)
spread(mapping); assert_spread(mapping); other.close()
ctypes.memset(own + 100, 7, 1)
assert seen == [(11, own + 100)]
""" + END, path)  # fmt: skip


def test_on_an_alternate_signal_stack(path):
    succeed("""
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
libc = ctypes.CDLL(None)
def work():
    room = ctypes.create_string_buffer(16384)
    assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 16384)), None) == 0
    spread(mapping, 3)
    stack = Stack(None, 2, 0)
    assert libc.sigaltstack(ctypes.byref(stack), None) == 0
mapping = fs.map("/a", "r+", granule=1)
thread = threading.Thread(target=work); thread.start(); thread.join()
assert_spread(mapping, 3)
fs.clone("/a", "/c"); work(); fs.unlink("/c")
assert_spread(mapping, 3)
""" + END, path)  # fmt: skip


def test_with_sigsegv_blocked(path):
    """The kernel kills who faults with the signal blocked; make_writable before is the way, and works."""
    succeed("""
mapping = fs.map("/a", "r+", granule=1)
mapping.make_writable()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
spread(mapping); assert_spread(mapping)
fs.clone("/a", "/c")
mapping.make_writable(); spread(mapping, 5); assert_spread(mapping, 5)
fs.unlink("/c")
""" + END, path)  # fmt: skip
    done = run("""
mapping = fs.map("/a", "r+", granule=1)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
mapping[0] = 1
""", path)  # fmt: skip
    assert done.returncode == -signal.SIGSEGV


def test_with_all_other_signals_blocked(path):
    succeed("""
mapping = fs.map("/a", "r+", granule=1)
signal.pthread_sigmask(signal.SIG_BLOCK, set(range(1, 32)) - {signal.SIGSEGV, signal.SIGBUS})
before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
spread(mapping); assert_spread(mapping)
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
""" + END, path)  # fmt: skip


def test_a_timer_s_handler_runs_between_faults(path):
    """And stores itself; system calls that it interrupts go on."""
    succeed("""
mapping = fs.map("/a", "r+", granule=1)
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
    mapping[ticks % 64 * PAGE + 9] = 77
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
n = 0
while ticks < 300:
    n += 1
    spread(mapping, n)
    if n % 20 == 0:
        signal.setitimer(signal.ITIMER_REAL, 0)
        fs.clone("/a", f"/c{n}"); fs.unlink(f"/c{n}")
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
signal.setitimer(signal.ITIMER_REAL, 0)
assert_spread(mapping, n)
assert mapping[9] == 77
""" + END, path)  # fmt: skip


def test_a_fault_elsewhere_ends_the_process_as_ever(path):
    done = run("""
mapping = fs.map("/a", "r+"); mapping[0] = 1
libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p
ctypes.memset(libc.mmap(None, ctypes.c_size_t(PAGE), 1, 0x22, -1, 0), 1, 1)
""", path)  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGSEGV, "")


def test_a_store_to_a_mapping_for_reading_ends_the_process(path):
    done = run("""
mapping = fs.map("/a"); other = fs.map("/a", "r+"); other[0] = 1
ctypes.memset(mapping.address, 1, 1)
""", path)  # fmt: skip
    assert done.returncode == -signal.SIGSEGV


def test_a_sent_sigsegv_is_not_taken_for_a_fault(path):
    done = run('mapping = fs.map("/a", "r+"); mapping[0] = 1; os.kill(os.getpid(), signal.SIGSEGV); print("here")', path)
    assert done.returncode == -signal.SIGSEGV
    assert "here" in succeed("""
signal.signal(signal.SIGSEGV, lambda *_: print("here"))
mapping = fs.map("/a", "r+", granule=1); mapping[0] = 1
os.kill(os.getpid(), signal.SIGSEGV)
spread(mapping); assert_spread(mapping)
""" + END, path)  # fmt: skip


def test_a_touch_behind_a_cut_off_end(path):
    """SIGBUS; through the mapping's own items a typed error instead."""
    for touch in ("ctypes.string_at(mapping.address + 50 * PAGE, 1)", "ctypes.memset(mapping.address + 50 * PAGE, 1, 1)"):
        done = run(f'mapping = fs.map("/a", "r+"); fs.truncate("/a", 10 * PAGE)\n{touch}', path)
        assert done.returncode == -signal.SIGBUS
        with onecopy.open(path) as fs:
            fs.truncate("/a", 64 * onecopy.PAGE)
    succeed("""
mapping = fs.map("/a", "r+"); fs.truncate("/a", 10 * PAGE + 7)
for touch in (lambda: mapping[50 * PAGE], lambda: mapping[:], lambda: mapping.__setitem__(-1, 1), mapping.make_writable,
              lambda: mapping[11 * PAGE : 12 * PAGE], lambda: mapping[::-1]):
    try:
        touch()
    except OSError as error:
        assert error.errno == errno.ENXIO, error
    else:
        raise AssertionError("no error")
assert mapping[10 * PAGE + 7 : 11 * PAGE] == bytes(PAGE - 7)
fs.truncate("/a", 64 * PAGE)
assert mapping[20 * PAGE :] == bytes(44 * PAGE)
spread(mapping); assert_spread(mapping)
""" + END, path)  # fmt: skip
