"""The point of it all: a page that clones share is in memory once, whoever maps them."""

import os
import re
import struct

import numpy as np
import pytest

import onecopy

PAGE = onecopy.PAGE
PAGES = 300
is_shared = pytest.mark.policies("dax", "shared", reason="each inode has pages of its own: that is what it is there for")


def physical_frames(mapping: onecopy.Mapping) -> list[int]:
    """Return the physical frame behind each page of a mapping, from the kernel; 0 where it does not say."""
    assert len({mapping[page * PAGE] for page in range(PAGES)}) > 1  # touches every page
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(mapping.address // PAGE * 8)
        entries = struct.unpack(f"{PAGES}Q", file.read(PAGES * 8))
    assert all(entry >> 63 for entry in entries), "present"
    return [entry & (1 << 55) - 1 for entry in entries]


def kernel_tells() -> bool:
    """Return whether this process may see physical frame numbers."""
    page = np.ones(PAGE, np.uint8)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(page.ctypes.data // PAGE * 8)
        return bool(struct.unpack("Q", file.read(8))[0] & (1 << 55) - 1)


def memory(mapping: onecopy.Mapping) -> dict[str, int]:
    """Return Rss and Pss of a mapping in KiB, its VMAs added up."""
    total = {"Rss": 0, "Pss": 0}
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = mapping.address <= int(span[1], 16) < mapping.address + len(mapping)
            elif inside and (found := re.match(r"(Rss|Pss): +(\d+) kB", line)):
                total[found[1]] += int(found[2])
    return total


@pytest.fixture
def clones(pool):
    """A pool with a file of PAGES pages, no two alike, and two clones of it; the second is a clone of the first."""
    pool.write("/base", np.repeat(np.arange(PAGES, dtype=np.uint32), PAGE // 4).tobytes())
    pool.clone("/base", "/one")
    pool.clone("/one", "/two")
    return pool


@pytest.fixture
def look(clones, start):
    """Start a process that maps a file and says what `measure` finds each time it is asked."""

    def begin(path, measure):
        def work(line):
            with onecopy.open(clones.path) as fs, fs.map(path) as mapping:
                while True:
                    line.say(measure(mapping))
                    if not line.hear():
                        return

        return start(work)

    return begin


def test_frames_of_the_pool_are_the_same(clones):
    with clones.map("/base") as base, clones.map("/one") as one, clones.map("/two") as two:
        assert base.pfns.tolist() == one.pfns.tolist() == two.pfns.tolist()
        assert len(set(base.pfns.tolist())) == PAGES


@is_shared
@pytest.mark.skipif(not kernel_tells(), reason="needs the right to see physical frame numbers")
def test_two_processes_share_the_physical_frames(clones, look):
    first, second = look("/one", physical_frames), look("/two", physical_frames)
    frames = first.hear()
    assert frames == second.hear() and len(set(frames)) == PAGES
    clones.write("/two", b"another", 7 * PAGE + 5)
    third = look("/two", physical_frames)
    different = [page for page, pair in enumerate(zip(frames, third.hear(), strict=True)) if pair[0] != pair[1]]
    assert different == [7]
    moved = second.ask(True)
    assert [page for page, pair in enumerate(zip(frames, moved, strict=True)) if pair[0] != pair[1]] == [7], "it is live"
    assert third.ask(True) == moved and first.ask(True) == frames


@is_shared
@pytest.mark.skipif(not kernel_tells(), reason="needs the right to see physical frame numbers")
def test_a_store_moves_a_page_of_one_clone_for_all_who_map_it(clones, look):
    first, second = look("/one", physical_frames), look("/two", physical_frames)
    frames = first.hear()
    assert second.hear() == frames
    with clones.map("/two", "r+", granule=1) as mapping:
        mapping[7 * PAGE + 5] ^= 1
        moved = second.ask(True)
        assert [page for page, pair in enumerate(zip(frames, moved, strict=True)) if pair[0] != pair[1]] == [7]
        assert physical_frames(mapping) == moved and first.ask(True) == frames


@is_shared
def test_memory_is_paid_for_by_all_together(clones, look):
    """Without privileges: the kernel divides each page among those who map it."""
    users = [look(path, lambda mapping: (memory(mapping), mapping[:])[0]) for path in ("/base", "/one", "/two")]
    for user in users:
        user.hear()
    for user in users:
        found = user.ask(True)
        assert found["Rss"] == PAGES * PAGE // 1024
        assert found["Pss"] <= found["Rss"] / 3 + 1


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_page_written_through_one_clone_differs_in_that_one_only(clones, mode):
    with clones.map("/one", mode) as one, clones.map("/two", mode) as two:
        before, data = one.pfns, one[:]
        clones.write("/one", b"x" * PAGE, 100 * PAGE)
        assert np.flatnonzero(one.pfns != before).tolist() == [100]
        assert (two.pfns == before).all()
        assert two[:] == data != one[:] == clones.read("/one")


def test_a_page_stored_to_through_one_clone_differs_in_that_one_only(clones):
    with clones.map("/one", "r+", granule=1) as one, clones.map("/two", "r+") as two, clones.map("/base") as base:
        before, data = one.pfns, one[:]
        one[100 * PAGE] ^= 1
        assert np.flatnonzero(one.pfns != before).tolist() == [100]
        assert (two.pfns == before).all() and (base.pfns == before).all()
        assert two[:] == base[:] == data != one[:] == clones.read("/one")
        clones.sync()
        assert np.flatnonzero(one.pfns != before).tolist() == [100]


def test_clones_cost_no_memory_of_the_host(clones):
    clones.sync()
    used, storage = clones.info().used_pages, os.stat(clones.path).st_blocks
    for n in range(50):
        clones.clone("/two", f"/more{n}")
        with clones.map(f"/more{n}") as mapping:
            assert mapping[-1] == clones.read("/base")[-1]
    clones.sync()
    assert clones.info().used_pages - used < 10, "their inodes"
    assert os.stat(clones.path).st_blocks - storage < PAGES * PAGE // 512, "less than one copy for fifty clones"
