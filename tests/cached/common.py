"""What the tests of the buffer cache share: a look at its frames, and processes that map, store and read as they are told."""

import mmap
import os
from dataclasses import dataclass
from functools import partial

import numpy as np

import onecopy
from onecopy.blkcache import cache as caches
from onecopy.blkcache.device import Conditioned, FileDevice
from onecopy.daxemu import steps

from ..mapped.common import content

PAGE = onecopy.PAGE
HOLDER, RESIDENT, DIRTY, KEPT, WRITABLE = (1 << 31) - 1, 1 << 32, 1 << 33, 1 << 34, 1 << 35
FRAME_STEPS = steps.NATIVE[11:]


@dataclass
class Frames:
    """A cache as its control file has it, and as the kernel has its memory; pages."""

    held: int
    resident: int
    dirty: int
    kept: int
    counted: int
    counted_kept: int
    physical: int
    limit: int
    over: int


def frames(fs: onecopy.FileSystem) -> Frames:
    """Count the words of all devices' frames and copies that there may be."""
    pool = fs._mount.pool
    header = caches.CONTROL.unpack(os.pread(pool._control, caches.CONTROL.size, 0))
    found = [np.zeros(0, np.uint64)]
    with mmap.mmap(pool._control, caches._OWNERS, prot=mmap.PROT_READ) as control:
        words = np.frombuffer(control, np.uint64, offset=caches._WORDS)
        for device in range(caches.DEVICES):
            count = [int(np.frombuffer(header[name], np.uint64)[device]) for name in ("frames", "copies")]
            for first, pages in zip((device * caches.SPAN, device * caches.SPAN + caches.COPIES), count, strict=True):
                found.append(words[first : first + pages].copy())
        del words
    words = np.concatenate(found)

    def number(bits: int) -> int:
        return int(np.count_nonzero(words & np.uint64(bits)))

    physical = os.fstat(pool._frames).st_blocks * 512 // PAGE
    return Frames(
        number(HOLDER), number(RESIDENT), number(DIRTY), number(KEPT),
        header["resident"], header["kept"], physical, header["limit"], header["over"],
    )  # fmt: skip


def assert_settled(fs: onecopy.FileSystem) -> Frames:
    """After a sync, with nobody doing anything: no frame is held, and what is counted is what there is."""
    fs.sync()
    now = frames(fs)
    assert now.held == 0
    assert now.resident == now.physical == now.counted, now
    assert now.kept == now.counted_kept == 0, now
    assert now.physical <= now.limit, now
    return now


def new_pool(path: str, size: str = "32M", *, cache: str = "1M", policy: str = "shared") -> None:
    """Make a cached pool."""
    onecopy.format(path, size, device="cached", cache_size=cache, policy=policy)


def page_of(number: int, seed: int) -> bytes:
    """Return a page that no other number or seed gives."""
    return (number << 32 | seed).to_bytes(8, "little") * (PAGE // 8)


def worker(path, options, line):
    """Do as told: ("map", name, mode), ("store", name, offset, bytes), ("look", name, ranges), ("arm", ...), or a method."""
    mappings = {}
    if "conditions" in options:
        options = {**options, "device": Conditioned(FileDevice(path), path=options["conditions"])}
        del options["conditions"]
    with onecopy.open(path, **options) as fs:
        line.say("open")
        while (request := line.hear()) is not None:
            line.say(obey(fs, mappings, *request))
        for mapping in mappings.values():
            mapping.close()


def obey(fs, mappings, what, *arguments):
    if what == "map":
        name, mode = arguments
        mappings[name] = fs.map(name, mode)
        return len(mappings[name])
    if what == "unmap":
        return mappings.pop(arguments[0]).close()
    if what == "store":
        name, offset, data = arguments
        with memoryview(mappings[name]) as view:
            view[offset : offset + len(data)] = data
        return len(data)
    if what == "look":
        name, ranges = arguments
        with memoryview(mappings[name]) as view:
            return [bytes(view[a:b]) for a, b in ranges]
    if what == "arm":
        return steps.signal_at(*arguments)
    if what == "frames":
        return frames(fs)
    result = getattr(fs, what)(*arguments)
    return result if isinstance(result, (bytes, int, bool, type(None))) else str(result)


def begin(start, path, **options):
    """Start a worker that has the pool open; `conditions`: the path of those of its device."""
    process = start(partial(worker, path, options))
    assert process.hear() == "open"
    return process


def end(*processes):
    for process in processes:
        process.say(None)
        process.result()


__all__ = ["PAGE", "begin", "content", "end", "frames", "new_pool"]
