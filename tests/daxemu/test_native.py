"""The C types: atomic words and regions of mapped pages; that C and Python mean the same records, numbers and bits."""

import mmap
import os
import re
from array import array
from pathlib import Path

import numpy as np
import pytest

from onecopy.blkcache import cache, frames, spaces
from onecopy.daxemu import runtime, units
from onecopy.daxemu._fault import Region, Words, sizes
from onecopy.daxemu.units import PAGE

HEADER = "".join((Path(__file__).parents[2] / "daxemu" / name).read_text(encoding="utf-8") for name in ("_fault.h", "_cache.h"))


def runs(*triples: tuple[int, int, int]) -> bytes:
    return np.array(triples, np.uint64).tobytes()


def is_mapped(address: int) -> bool:
    """Return whether the file of `letters` is mapped at an address of this process."""
    with open("/proc/self/maps") as maps:
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if "letters" in line]
    return any(first <= address < end for first, end in spans)


@pytest.fixture
def letters():
    """A descriptor of a file whose eight pages are full of A, B, C ..."""
    fd = os.memfd_create("letters")
    os.write(fd, b"".join(bytes([letter]) * PAGE for letter in b"ABCDEFGH"))
    yield fd
    os.close(fd)


# ---------------------------------------------------------------- Words


def test_words_load_store_and_swap():
    memory = mmap.mmap(-1, 64)
    words = Words(memory)
    words.store(7, (1 << 64) - 1)
    assert (words.load(0), words.load(7)) == (0, (1 << 64) - 1)
    assert memory[56:] == b"\xff" * 8
    assert not words.swap_if(7, 1, 2)
    assert words.swap_if(7, (1 << 64) - 1, 5)
    assert words.load(7) == 5


@pytest.mark.parametrize("index", [-1, 8, 1 << 40])
def test_words_know_their_bounds(index):
    words = Words(mmap.mmap(-1, 64))
    for access in (lambda: words.load(index), lambda: words.store(index, 0), lambda: words.swap_if(index, 0, 0)):
        with pytest.raises(IndexError, match=f"word {index} of 8"):
            access()


def test_words_keep_their_memory_until_released():
    memory = mmap.mmap(-1, 64)
    words = Words(memory)
    with pytest.raises(BufferError):
        memory.close()
    words.release()
    memory.close()
    for access in (lambda: words.load(0), lambda: words.store(0, 1), lambda: words.swap_if(0, 0, 1)):
        with pytest.raises(ValueError, match="released"):
            access()
    words.release()


def test_words_refuse_what_they_cannot_address():
    with pytest.raises(ValueError, match="8 bytes"):
        Words(memoryview(bytearray(17))[1:])
    with pytest.raises(ValueError, match="8 bytes"):
        Words(memoryview(mmap.mmap(-1, 64))[:12])
    with pytest.raises((BufferError, TypeError)):
        Words(b"not writable")
    with pytest.raises(TypeError):
        Words(mmap.mmap(-1, 64), size=3)


# --------------------------------------------------------------- Region


def test_a_region_is_one_array_over_scattered_pages(letters):
    region = Region(5 * PAGE - 100)
    region.map(letters, runs((0, 3, 1), (2, 6, 2), (4, 0, 1)))
    picture = bytes(memoryview(region))
    assert len(region) == len(picture) == 5 * PAGE - 100
    assert [picture[page * PAGE] for page in range(5)] == [*b"D\0GHA"]
    assert picture[PAGE : 2 * PAGE] == bytes(PAGE)
    region.unmap()


def test_a_region_shows_the_file_not_a_copy(letters):
    region = Region(PAGE)
    region.map(letters, runs((0, 2, 1)))
    view = memoryview(region)
    os.pwrite(letters, b"new", 2 * PAGE)
    assert bytes(view[:4]) == b"newC"


def test_a_region_is_read_only(letters):
    region = Region(PAGE)
    region.map(letters, runs((0, 0, 1)))
    assert memoryview(region).readonly
    assert not np.frombuffer(region, np.uint8).flags.writeable
    with open("/proc/self/maps") as maps:
        first = f"{region.address:x}-"
        assert [line.split()[1] for line in maps if line.startswith(first)] == ["r--s"]


@pytest.mark.parametrize("run", [(0, 0, 0), (3, 0, 1), (0, 0, 4), (2, 0, 2), (1 << 63, 0, 1), (1, 0, (1 << 64) - 1)])
def test_a_region_maps_nothing_beyond_its_end(letters, run):
    region = Region(3 * PAGE)
    with pytest.raises(ValueError, match="outside the region of 3 pages"):
        region.map(letters, runs(run))


def test_a_region_reports_the_kernel_s_error():
    with pytest.raises(OSError, match="Bad file descriptor"):
        Region(PAGE).map(-1, runs((0, 0, 1)))


@pytest.mark.parametrize("arguments", [(-1,), (1, 0), (1, 4095), (1, 3 * PAGE), (1 << 62, PAGE)])
def test_a_region_refuses_impossible_sizes(arguments):
    with pytest.raises(ValueError, match="need length"):
        Region(*arguments)


def test_a_region_too_large_for_the_address_space():
    with pytest.raises(OSError, match="allocate"):
        Region(1 << 60)


def test_a_region_is_aligned_as_asked():
    regions = [Region(PAGE, 1 << 21) for _ in range(3)]
    assert [region.address % (1 << 21) for region in regions] == [0, 0, 0]


def test_buffers_keep_a_region_mapped(letters):
    region = Region(2 * PAGE)
    region.map(letters, runs((0, 1, 2)))
    view, values = memoryview(region), np.frombuffer(region, np.uint8)
    with pytest.raises(BufferError, match="2 buffers"):
        region.unmap()
    address = region.address
    del region
    assert bytes(view[:2]) + bytes(values[-2:]) == b"BBCC"
    del view
    assert is_mapped(address)
    del values
    assert not is_mapped(address)


def test_an_unmapped_region_shows_nothing(letters):
    region = Region(PAGE)
    assert not region.closed
    region.unmap()
    region.unmap()
    assert region.closed
    for access in (lambda: memoryview(region), lambda: region.address, lambda: region.map(letters, runs((0, 0, 1)))):
        with pytest.raises(ValueError, match="closed"):
            access()


def test_an_unmapped_region_gives_its_addresses_back(letters):
    region = Region(PAGE)
    region.map(letters, runs((0, 0, 1)))
    address = region.address
    assert is_mapped(address)
    region.unmap()
    assert not is_mapped(address)


def test_an_empty_region():
    region = Region(0)
    assert (len(region), bytes(memoryview(region))) == (0, b"")
    region.map(-1, b"")
    region.unmap()


def test_a_trailing_part_of_a_run_is_not_read():
    region = Region(PAGE)
    region.map(-1, array("Q", [0, 0]).tobytes())
    region.unmap()


# ------------------------------------------------------- what both declare


RECORDS = {
    "space": runtime.SPACE,
    "record": runtime.MESSAGE,
    "bell": runtime.BELL,
    "run": runtime.RUN,
    "counters": runtime.COUNTERS,
    "cache_header": cache.CONTROL,
}
NUMBERS = {
    "PAGE": PAGE,
    "SLOTS": runtime.SLOTS,
    "DEVICES": cache.DEVICES,
    "SPAN": cache.SPAN,
    "COPIES": cache.COPIES,
    "USERS": cache.USERS,
    "RECORDS": runtime.MESSAGES,
    "SPACES": runtime.SPACES,
    "LOCKS": runtime.LOCKS,
    "WINDOW": runtime.WINDOW,
    "MAX_PAGES": runtime.MAX_PAGES,
    "PFN_MASK": spaces.PFN_MASK,
    "PRIVATE": spaces.PRIVATE,
    "DIRTY": spaces.STORED,
    "BEYOND": spaces.BEYOND,
    "KEEP": spaces.KEEP,
    "ZERO": spaces.ZERO,
    "FOLD": spaces.FOLD,
    "HAND": spaces.HAND,
    "USED": frames.USED,
    "BACKED": frames.BACKED,
    "HELD": frames.USED | frames.FRESH | frames.DIRTY | frames.BACKED,
}


def defined(name: str) -> int:
    """Return a number that the header defines."""
    (text,) = re.findall(rf"^#define {name} (.+?)(?:/\*.*)?$", HEADER, re.MULTILINE)
    return eval(re.sub(r"(?<=\d)(ull|u)\b", "", text))


def declared(struct: str) -> list[tuple[str, int]]:
    """Return the fields of a struct of the header, with the bytes each takes."""
    (body,) = re.findall(rf"^struct {struct} {{(.*?)^}};", HEADER, re.MULTILINE | re.DOTALL)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    found = []
    for bits, names in re.findall(r"u?int(\d+)_t ([^;]+);", body):
        for name, count in re.findall(r"(\w+)(?:\[([^\]]+)\])?(?:,|$)", names):
            many = eval(re.sub(r"\b[A-Z]+\b", lambda word: str(defined(word[0])), count).replace("/", "//")) if count else 1
            found.append((name, int(bits) // 8 * many))
    return found


def test_records_are_as_large_here_as_there():
    assert sizes() == tuple(record.size for record in RECORDS.values())


@pytest.mark.parametrize("struct", RECORDS)
def test_records_have_the_same_fields_in_the_same_places(struct):
    offset, found = 0, {}
    for name, size in declared(struct):
        if not name.startswith("unused"):
            found[name] = offset
        offset += size
    record = RECORDS[struct]
    assert offset == record.size
    assert found == {name: at for name, at in record.offset.items() if not name.startswith("unused")}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_the_same(name):
    assert defined(name) == NUMBERS[name]


def test_a_window_has_a_lock_word_for_every_block():
    assert defined("LOCKS") // 8 * defined("BLOCK") == runtime.MAX_PAGES
    assert runtime.LOCKS + runtime.MAX_PAGES * 8 <= runtime.WINDOW
    assert defined("BLOCK") == units.HUGE
