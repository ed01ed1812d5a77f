"""Devices that are slow, that fail, that stop answering or lie, as one process says and all see."""

import errno
import os
import signal
import threading
import time

import pytest

import onecopy
from onecopy.blkcache.conditions import CONDITIONS, FAILINGS, Conditions, Counters
from onecopy.blkcache.device import Conditioned, FileDevice, RamDevice
from onecopy.daxemu._fault import Device, stall
from onecopy.daxemu.units import PAGE

BLOCKS = 64


@pytest.fixture
def device():
    with Conditioned(RamDevice(BLOCKS * PAGE)) as device:
        yield device


@pytest.fixture
def shared(new_path):
    """A path for conditions."""
    return new_path()


def refused(request, *arguments):
    with pytest.raises(onecopy.DeviceError) as caught:
        request(*arguments)
    assert caught.value.errno == errno.EIO


def wait_for(true):
    """Return when something that another thread or process is bound to do is done."""
    while not true():
        os.sched_yield()


def test_python_and_c_mean_the_same_memory():
    fd = os.memfd_create("x")
    Device(fd, 1, bytearray(CONDITIONS.size))
    with pytest.raises(ValueError, match=str(CONDITIONS.size)):
        Device(fd, 1, bytearray(CONDITIONS.size - 8))
    with pytest.raises(OSError, match="Invalid"):
        stall(bytearray(CONDITIONS.size - 8), False)
    os.close(fd)


def test_failures_are_for_what_they_say(device):
    page = bytearray(PAGE)
    device.write(3, b"3" * PAGE)
    device.fail(3, 5, read=True)
    refused(device.read, 3, page)
    refused(device.read, 2, bytearray(2 * PAGE))
    refused(device.read, 4, page)
    for block in (2, 5):
        device.read(block, page)
    device.write(4, b"4" * PAGE)
    device.discard(5, 1)
    device.flush()
    device.heal()
    device.read(4, page)
    assert page == b"4" * PAGE
    device.fail(4, 5, write=True)
    refused(device.write, 3, bytes(3 * PAGE))
    refused(device.discard, 4, 1)
    device.read(4, page)
    assert page == b"4" * PAGE
    device.read(3, page)
    assert page == b"3" * PAGE
    device.flush()
    device.fail(flush=True)
    refused(device.flush)
    device.heal()
    device.flush()


def test_failures_have_their_limits(device):
    for number in range(FAILINGS):
        device.fail(number, number + 1, read=True)
    with pytest.raises(onecopy.OneCopyError) as caught:
        device.fail(1, 2, read=True)
    assert caught.value.errno == errno.ENOSPC
    refused(device.read, FAILINGS - 1, bytearray(PAGE))
    device.heal()
    device.fail(read=True)
    refused(device.read, BLOCKS - 1, bytearray(PAGE))
    for first, end, what in ((1, 1, {"read": True}), (-1, 1, {"read": True}), (0, 1, {}), (0, 1 << 63, {"write": True})):
        with pytest.raises(onecopy.OneCopyError) as caught:
            device.fail(first, end, **what)
        assert caught.value.errno == errno.EINVAL


def test_requests_are_counted(device):
    device.write(0, bytes(3 * PAGE))
    device.read(1, bytearray(2 * PAGE))
    device.read(1, bytearray(PAGE))
    device.read(1, bytearray())
    device.flush()
    device.discard(0, 2)
    device.fail(0, 1, read=True)
    refused(device.read, 0, bytearray(PAGE))
    refused(device.read, BLOCKS, bytearray(PAGE))  # never arrives
    assert device.counters == Counters(reads=3, writes=1, read_blocks=4, written_blocks=3, flushes=1, discards=1)


def test_latency_is_waited_for(device):
    device.latency = 0.02
    assert device.latency == 0.02
    for request in (lambda: device.read(0, bytearray(PAGE)), lambda: device.write(0, bytes(PAGE)), device.flush):
        before = time.monotonic()
        request()
        assert time.monotonic() - before >= 0.02
    for seconds in (-1, 1e10, float("nan")):
        with pytest.raises(onecopy.OneCopyError):
            device.latency = seconds


def test_bandwidth_is_for_all_requests_together(device):
    device.bandwidth = 16 * PAGE * 20
    assert device.bandwidth == 16 * PAGE * 20
    before = time.monotonic()
    threads = [threading.Thread(target=device.read, args=(0, bytearray(8 * PAGE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - before >= 0.1
    device.bandwidth = 0
    device.read(0, bytearray(PAGE))
    with pytest.raises(onecopy.OneCopyError):
        device.bandwidth = -1


def test_a_slow_request_lets_other_threads_run(device):
    device.stall()
    ran = threading.Event()
    thread = threading.Thread(target=lambda: (device.read(0, bytearray(PAGE)), ran.set()))
    thread.start()
    wait_for(lambda: device.counters.reads == 1)
    assert device.conditions.stalled
    assert not ran.is_set()
    device.resume()
    thread.join()
    assert ran.is_set()


def test_a_stalled_request_sleeps(device):
    """It is in the kernel's futex wait, not running: and signals don't get it out."""
    device.stall()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        device.read(0, bytearray(PAGE))
        os._exit(7)
    wait_for(lambda: device.counters.reads == 1)
    for _ in range(3):
        os.kill(pid, signal.SIGUSR1) if _is_asleep(pid) else None
        wait_for(lambda: _is_asleep(pid))
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    device.resume()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def _is_asleep(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def test_a_stalled_process_can_be_killed(device):
    device.stall()
    pid = os.fork()
    if not pid:
        device.flush()
        os._exit(7)
    wait_for(lambda: device.counters.flushes == 1)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    device.resume()
    device.flush()


def test_children_share_conditions(device, start):
    def child(line):
        with pytest.raises(onecopy.DeviceError):
            device.read(1, bytearray(PAGE))
        device.heal()
        device.latency = 1e-3
        line.say("healed")

    device.fail(1, 2, read=True)
    assert start(child).hear() == "healed"
    device.read(1, bytearray(PAGE))
    assert device.latency == 1e-3
    assert device.counters.reads == 2


def test_others_attach_by_path(shared, tmp_path, start):
    image = tmp_path / "image"
    image.write_bytes(bytes(BLOCKS * PAGE))

    def other(line):
        with Conditioned(FileDevice(image), path=shared) as theirs:
            line.say((theirs.latency, theirs.bandwidth))
            line.hear()
            line.say(theirs.counters.reads)
            try:
                theirs.read(2, bytearray(PAGE))
            except onecopy.DeviceError:
                line.say("failed")

    with Conditioned(FileDevice(image), path=shared, latency=1e-6, bandwidth=1 << 40) as device:
        process = start(other)
        assert process.hear() == (1e-6, 1 << 40)
        device.read(0, bytearray(PAGE))
        Conditions(shared).fail(2, 3, read=True)
        assert process.ask() == 1
        assert process.hear() == "failed"
        assert device.counters.reads == 2
    assert os.path.exists(shared)


@pytest.mark.parametrize("content", [b"short", b"x" * PAGE, bytes(PAGE + 1)])
def test_another_file_is_not_taken_for_conditions(shared, content):
    with open(shared, "wb") as file:
        file.write(content)
    with pytest.raises(onecopy.OneCopyError) as caught:
        Conditions(shared)
    assert caught.value.errno == errno.EINVAL
    with open(shared, "rb") as file:
        assert file.read() == content


def test_a_link_is_not_followed_to_conditions(shared, tmp_path):
    os.symlink(tmp_path / "elsewhere", shared)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            Conditions(shared)
        assert not (tmp_path / "elsewhere").exists()
    finally:
        os.unlink(shared)


def test_fork_by_plain_pids_leaves_the_device_usable(device):
    pid = os.fork()
    if not pid:
        device.write(5, b"5" * PAGE)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    page = bytearray(PAGE)
    device.read(5, page)
    assert page == b"5" * PAGE
    assert device.counters.writes == 1
