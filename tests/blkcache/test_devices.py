"""Every block device passes the conformance kit, and the kit notices devices that don't; kinds of devices, and their limits."""

import errno
import os
import resource
import signal
import subprocess

import pytest

import onecopy
from onecopy.blkcache.conformance import Nonconforming, check_block_device, check_read_only
from onecopy.blkcache.device import Conditioned, DaxDevice, FileDevice, RamDevice
from onecopy.daxemu._fault import Device
from onecopy.daxemu.units import PAGE

BLOCKS = 64
SIZE = BLOCKS * PAGE


@pytest.fixture
def file(tmp_path):
    """The path of a file on disk, whose end is a part of a block."""
    path = tmp_path / "device"
    path.write_bytes(b"")
    os.truncate(path, SIZE + 100)
    return path


@pytest.fixture
def shm(new_path):
    """The path of a file in memory."""
    path = new_path()
    with open(path, "wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def loop(tmp_path):
    """A real block device; skipped where that can't be had."""
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    try:
        made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no losetup")
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def buffered(path, monkeypatch):
    """A FileDevice on a file system that offers no O_DIRECT."""

    def refuse(name, flags, *more, real=os.open):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real(name, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        device = FileDevice(path)
    assert not device.direct
    return device


# ------------------------------------------------------------- conformance


def test_a_file(file):
    check_block_device(lambda: FileDevice(file))
    assert os.stat(file).st_size == SIZE + 100


def test_a_file_through_the_page_cache(file, monkeypatch):
    check_block_device(lambda: buffered(file, monkeypatch))


def test_a_block_device(loop):
    with FileDevice(loop) as device:
        assert device.direct
        assert device.blocks == BLOCKS
    check_block_device(lambda: FileDevice(loop))
    check_read_only(FileDevice(loop, writable=False))


def test_memory():
    check_block_device(lambda: RamDevice(SIZE), persistent=False)


def test_direct_access(shm):
    check_block_device(lambda: DaxDevice(shm))


def test_direct_access_to_a_pool(small):
    check_block_device(lambda: DaxDevice(small))


@pytest.mark.parametrize("kind", [FileDevice, DaxDevice])
def test_conditioned(kind, file):
    with Conditioned(kind(file)) as device:
        assert not device.direct_access
    check_block_device(lambda: Conditioned(kind(file)))


def test_conditioned_and_recorded(file, tmp_path):
    def make():
        device = Conditioned(FileDevice(file), latency=1e-6, bandwidth=1 << 40)
        device.journal(tmp_path / "journal")
        return device

    check_block_device(make)


@pytest.mark.parametrize("kind", [FileDevice, DaxDevice])
def test_for_reading_only(kind, file):
    check_read_only(kind(file, writable=False))
    check_read_only(Conditioned(kind(file, writable=False)))


# ------------------------------------------------- the kit notices


class Short(RamDevice):
    """Says that it is larger."""

    def __init__(self):
        super().__init__(SIZE)
        self.blocks += 1


class Elsewhere(RamDevice):
    """Writes to its last block what is for the one before."""

    def write(self, block, buffer):
        super().write(block + (block == self.blocks - 2), buffer)

    def discard(self, block, count):
        """Zeroes one block too many."""
        super().discard(block, count + (count > 0))


class Grows(RamDevice):
    """Takes what is beyond its end."""

    def write(self, block, buffer):
        if 0 <= block < self.blocks:
            super().write(block, buffer)


class Plain(RamDevice):
    """Raises what the native half raises."""

    def read(self, block, buffer):
        self.native.read(block, buffer)


class Stays(RamDevice):
    """Goes on after it was closed."""

    def close(self):
        pass

    def __del__(self):
        super().close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Short, "native has 64 blocks"),
        (lambda: Elsewhere(SIZE), "after a discard of 13 to 16, block 17"),
        (lambda: Grows(SIZE), "write of 1 blocks at 64 of 64: no error"),
        (lambda: Plain(SIZE), "not a OneCopyError"),
        (lambda: Stays(SIZE), "a closed device: no error"),
        (lambda: RamDevice(16 * PAGE), "16 blocks: this check needs 32"),
    ],
)
def test_the_kit_finds(make, message):
    with pytest.raises(Nonconforming, match=message):
        check_block_device(make, persistent=False)


def test_the_kit_finds_what_is_gone_when_closed():
    with pytest.raises(Nonconforming, match="does not hold what was flushed"):
        check_block_device(lambda: RamDevice(SIZE))


# ---------------------------------------------------------- kinds, limits


def test_a_file_cut_short_under_the_device(file):
    with FileDevice(file) as device:
        os.truncate(file, PAGE)
        with pytest.raises(onecopy.DeviceError, match="read of 8192 bytes at block 0 of 64") as caught:
            device.read(0, bytearray(2 * PAGE))
        assert caught.value.errno == errno.EIO


def test_no_room_behind_a_device(file):
    """A limit on the size of files is what a full host looks like, and needs no full host."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, PAGE))
            with FileDevice(file) as device:
                try:
                    device.write(2, bytes(PAGE))
                except onecopy.NoSpace:
                    code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_pipe_is_no_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        for kind in (FileDevice, DaxDevice):
            with pytest.raises(onecopy.OneCopyError) as caught:
                kind(path)
            assert caught.value.errno == errno.EINVAL
    with pytest.raises(IsADirectoryError):
        FileDevice(tmp_path)
    with pytest.raises(onecopy.OneCopyError):
        FileDevice(tmp_path, writable=False)
    with pytest.raises(FileNotFoundError):
        FileDevice(tmp_path / "none")


@pytest.mark.parametrize("size", [-PAGE, 0, 100, PAGE + 1])
def test_a_device_has_whole_blocks(size):
    with pytest.raises(onecopy.OneCopyError) as caught:
        RamDevice(size)
    assert caught.value.errno == errno.EINVAL


def test_an_empty_file_is_no_device(tmp_path):
    (tmp_path / "empty").write_bytes(b"12")
    with pytest.raises(onecopy.OneCopyError, match="0 blocks"):
        FileDevice(tmp_path / "empty")


def test_arrays_outlive_a_device_with_direct_access(shm):
    device = DaxDevice(shm)
    device.write(1, b"a" * PAGE)
    view = device.memory[PAGE : 2 * PAGE]
    device.close()
    assert view == b"a" * PAGE


def test_no_descriptor_is_left(file, tmp_path):
    before = os.listdir("/proc/self/fd")
    for make in (
        lambda: FileDevice(file),
        lambda: DaxDevice(file),
        lambda: RamDevice(SIZE),
        lambda: Conditioned(FileDevice(file)),
    ):
        make().close()
    with Conditioned(FileDevice(file)) as device:
        device.journal(tmp_path / "one")
        device.journal(tmp_path / "two")
    assert device.counters.reads == 0
    del device  # the conditions' memory has one
    assert os.listdir("/proc/self/fd") == before


def test_the_native_device_knows_its_arguments():
    fd = os.memfd_create("x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        Device(-1, 1)
    with pytest.raises(OSError, match="Invalid"):
        Device(fd, -1)
    with pytest.raises(OSError, match="Invalid"):
        Device(fd, 1 << 60)
    device = Device(fd, 1, conditions=None, journal_fd=-1)
    with pytest.raises(TypeError):
        device.read(0, bytes(PAGE))
    os.close(fd)
