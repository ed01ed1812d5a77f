"""What every block device must keep: `check_block_device` tries it on any implementation."""

import contextlib
import errno
import threading
from collections.abc import Callable

from onecopy.blkcache.device import BlockDevice
from onecopy.daxemu.errors import OneCopyError, ReadOnly
from onecopy.daxemu.units import PAGE

_LEAST = 32  # blocks
_THREADS = 4


class Nonconforming(AssertionError):
    """A block device does not keep what `BlockDevice` promises; the message says what."""


def _expect(true: bool, what: str) -> None:
    if not true:
        raise Nonconforming(what)


def _content(seed: int, blocks: int = 1) -> bytes:
    """Return blocks that differ from each other, and by seed."""
    return b"".join(f"{seed}:{number};".encode().ljust(16, b".") * (PAGE // 16) for number in range(blocks))


def _read(device: BlockDevice, block: int, blocks: int = 1) -> bytes:
    buffer = bytearray(b"?" * (blocks * PAGE))
    device.read(block, buffer)
    return bytes(buffer)


def check_block_device(make: Callable[[], BlockDevice], *, persistent: bool = True) -> None:
    """Try a device of at least 32 blocks; what it holds is lost. Raises Nonconforming.

    `make` opens it, writable, each time the same storage; `persistent=False`: each time a new one.
    """
    with contextlib.closing(make()) as device:
        for check in (_sizes, _reading_and_writing, _buffers, _out_of_range, _nothing, _flush_and_discard, _threads, _memory):
            check(device)
    _closing(make())
    if persistent:
        _reopening(make)


def _sizes(device: BlockDevice) -> None:
    _expect(device.block_size == PAGE, f"block_size is {device.block_size}, not {PAGE}")
    _expect(device.blocks >= _LEAST, f"{device.blocks} blocks: this check needs {_LEAST}")
    _expect(device.native.blocks == device.blocks, f"native has {device.native.blocks} blocks, not {device.blocks}")
    _expect(device.writable, "opened for writing, writable is False")


def _reading_and_writing(device: BlockDevice) -> None:
    last = device.blocks - 1
    for block in (0, 1, last // 2, last):
        device.write(block, _content(block))
    for block in (last, 0, last // 2, 1):
        _expect(_read(device, block) == _content(block), f"block {block} does not hold what was written")
    device.write(4, _content(4, 8))
    _expect(_read(device, 4, 8) == _content(4, 8), "blocks 4 to 11 do not hold what was written")
    device.write(6, _content(6))
    _expect(_read(device, 5) == _content(4, 2)[PAGE:], "a write to block 6 changed block 5")
    _expect(_read(device, 7) == _content(4, 4)[3 * PAGE :], "a write to block 6 changed block 7")
    _expect(_read(device, 6) == _content(6), "block 6, written twice, does not hold what was written last")
    buffer = bytearray(PAGE)
    device.native.read(6, buffer)
    _expect(buffer == _content(6), "native reads other bytes")
    device.native.write(6, _content(66))
    _expect(_read(device, 6) == _content(66), "what native writes is not read")


def _buffers(device: BlockDevice) -> None:
    for shift in (0, 1, 8, 512, PAGE - 1):
        room = bytearray(3 * PAGE)
        room[shift : shift + 2 * PAGE] = _content(shift, 2)
        device.write(10, memoryview(room)[shift : shift + 2 * PAGE])
        _expect(_read(device, 10, 2) == _content(shift, 2), f"written from an address shifted by {shift}: other bytes")
        back = bytearray(b"?" * (4 * PAGE))
        device.read(10, memoryview(back)[shift + 8 : shift + 8 + 2 * PAGE])
        _expect(
            back[shift + 8 : shift + 8 + 2 * PAGE] == _content(shift, 2), f"read to an address shifted by {shift}: other bytes"
        )
        around = back[: shift + 8] + back[shift + 8 + 2 * PAGE :]
        _expect(around == b"?" * (2 * PAGE), f"read to an address shifted by {shift}: bytes around it changed")


def _refused(codes: tuple[int, ...], what: str, request: Callable[..., None], *arguments: object) -> None:
    try:
        request(*arguments)
    except OneCopyError as error:
        _expect(error.errno in codes, f"{what}: errno {error.errno}, not one of {codes}")
        return
    except Exception as error:
        raise Nonconforming(f"{what}: {error!r}, not a OneCopyError") from error
    raise Nonconforming(f"{what}: no error")


def _out_of_range(device: BlockDevice) -> None:
    end = device.blocks
    device.write(end - 1, _content(1))
    beyond, wrong = (errno.EIO, errno.EINVAL), (errno.EINVAL,)
    for block, blocks in ((end, 1), (end - 1, 2), (end + 1, 1), (1 << 50, 1), ((1 << 63) - 1, 1)):
        where = f"{blocks} blocks at {block} of {end}"
        _refused(beyond, f"read of {where}", device.read, block, bytearray(blocks * PAGE))
        _refused(beyond, f"write of {where}", device.write, block, bytes(blocks * PAGE))
        _refused(beyond, f"discard of {where}", device.discard, block, blocks)
    _refused(wrong, "read of block -1", device.read, -1, bytearray(PAGE))
    _refused(wrong, "write of block -1", device.write, -1, bytes(PAGE))
    _refused(wrong, "discard of -1 blocks", device.discard, 0, -1)
    for size in (1, PAGE - 1, PAGE + 512):
        _refused(wrong, f"read of {size} bytes", device.read, 0, bytearray(size))
        _refused(wrong, f"write of {size} bytes", device.write, 0, bytes(size))
    _expect(_read(device, end - 1) == _content(1), "a write that was refused changed the last block")
    _expect(device.blocks == end, "a write that was refused changed the size")


def _nothing(device: BlockDevice) -> None:
    device.write(3, _content(3))
    for block in (0, 3, device.blocks):
        device.read(block, bytearray())
        device.write(block, b"")
        device.discard(block, 0)
    _expect(_read(device, 3) == _content(3), "a request for no blocks changed one")


def _flush_and_discard(device: BlockDevice) -> None:
    device.flush()
    device.write(12, _content(12, 6))
    device.flush()
    _expect(_read(device, 12, 6) == _content(12, 6), "a flush changed what was written")
    device.discard(13, 4)
    for number in range(6):
        found, old = _read(device, 12 + number), _content(12, 6)[number * PAGE : (number + 1) * PAGE]
        ours = 1 <= number <= 4
        _expect(
            found == old or (ours and found == bytes(PAGE)),
            f"after a discard of 13 to 16, block {12 + number} holds other bytes",
        )
    device.write(14, _content(99))
    device.flush()
    _expect(_read(device, 14) == _content(99), "written after a discard: other bytes")


def _threads(device: BlockDevice) -> None:
    """Each thread writes blocks of its own, reads them back, and reads what another writes: a version of its."""
    failures: list[BaseException] = []
    start = threading.Barrier(_THREADS)
    for number in range(_THREADS):
        device.write(number * 4, _content(number * 1000, 4))

    def work(number: int) -> None:
        try:
            start.wait()
            for turn in range(50):
                mine = _content(number * 1000 + turn, 4)
                device.write(number * 4, mine)
                _expect(_read(device, number * 4, 4) == mine, f"thread {number}: other bytes than it wrote, turn {turn}")
                other = (number + 1) % _THREADS
                seen = _read(device, other * 4)
                whose = seen.partition(b":")[0]
                whole = whose.isdigit() and int(whose) // 1000 == other
                _expect(whole, f"thread {number}: block {other * 4} holds {seen[:16]!r}, which nobody wrote there")
                if turn % 10 == 0:
                    device.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _memory(device: BlockDevice) -> None:
    if not device.direct_access:
        return
    memory: memoryview = getattr(device, "memory", memoryview(b""))
    _expect(len(memory) == device.blocks * PAGE, f"memory of {len(memory)} bytes, for {device.blocks} blocks")
    device.write(5, _content(55))
    _expect(memory[5 * PAGE : 6 * PAGE] == _content(55), "memory does not show what was written")
    memory[5 * PAGE : 6 * PAGE] = _content(56)
    _expect(_read(device, 5) == _content(56), "what was stored to memory is not read")


def _closing(device: BlockDevice) -> None:
    device.close()
    device.close()
    requests: tuple[Callable[[], None], ...] = (
        lambda: device.read(0, bytearray(PAGE)), lambda: device.write(0, bytes(PAGE)), device.flush,
    )  # fmt: skip
    for request in requests:
        try:
            request()
        except OSError as error:
            _expect(error.errno == errno.EBADF, f"a request to a closed device: errno {error.errno}, not EBADF")
        else:
            raise Nonconforming("a request to a closed device: no error")


def _reopening(make: Callable[[], BlockDevice]) -> None:
    with contextlib.closing(make()) as device:
        size = device.blocks
        device.write(20, _content(20, 3))
        device.flush()
    with contextlib.closing(make()) as device:
        _expect(device.blocks == size, f"opened again, it has {device.blocks} blocks, not {size}")
        _expect(_read(device, 20, 3) == _content(20, 3), "opened again, it does not hold what was flushed")


def check_read_only(device: BlockDevice) -> None:
    """Try a device that was opened for reading only; it is closed afterwards. Raises Nonconforming."""
    with contextlib.closing(device):
        _expect(not device.writable, "opened for reading, writable is True")
        before = _read(device, 0)
        for what, request, argument in (("write", device.write, _content(7)), ("discard", device.discard, 1)):
            _refused((ReadOnly.code,), f"{what}, opened for reading only", request, 0, argument)
        device.flush()
        _expect(_read(device, 0) == before, "a device opened for reading only changed")
