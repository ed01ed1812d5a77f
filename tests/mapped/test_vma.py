"""Stores all over large files: the number of mappings of a process stays below the kernel's limit, and all bytes are right."""

import numpy as np
import pytest

import onecopy

from .common import PAGE, assert_all_ended
from .programs import succeed

STORE_ALL_OVER = """
import numpy as np
pages = int(sys.argv[2])
order = np.random.default_rng(5).permutation(pages)
mapping = fs.map("/a", "r+", granule=int(sys.argv[3]) or None)
words = np.frombuffer(mapping, np.uint64)
reader = np.frombuffer(fs.map("/a"), np.uint64) if sys.argv[4] == "with a reader" else None
highest = 0
def count():
    with open("/proc/self/maps", "rb") as file:
        return sum(1 for _ in file)
for n, page in enumerate(order.tolist()):
    words[page * 512 + 3] = page + 1
    if n % 4096 == 0:
        highest = max(highest, count())
limit = int(open("/proc/sys/vm/max_map_count").read())
assert (words[3::512] == np.arange(1, pages + 1)).all()
assert reader is None or (reader[3::512] == np.arange(1, pages + 1)).all()
assert max(highest, count()) < limit, (highest, count())
fs.clone("/a", "/c")
words[3::512] = 5
assert (np.frombuffer(fs.read("/c"), np.uint64)[3::512] == np.arange(1, pages + 1)).all()
assert (words[3::512] == 5).all()
fs.sync()
print(highest, count(), fs.info().used_pages)
"""


def make(path, pages, shared):
    onecopy.format(path, f"{pages * 3 // 256 + 64}M")
    with onecopy.open(path) as fs:
        fs.create("/origin")
        if shared:
            fs.write("/origin", np.repeat(np.arange(pages, dtype=np.uint64), 512).tobytes())
        fs.truncate("/origin", pages * PAGE)
        fs.clone("/origin", "/a")


def verify(path, pages, shared):
    with onecopy.open(path) as fs:
        want = np.repeat(np.arange(pages, dtype=np.uint64), 512) if shared else np.zeros(pages * 512, np.uint64)
        assert (np.frombuffer(fs.read("/origin"), np.uint64) == want).all()
        want[3::512] = 5
        assert (np.frombuffer(fs.read("/a"), np.uint64) == want).all()
        assert_all_ended(fs)


@pytest.mark.parametrize("reader", ["alone", "with a reader"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("granule", [0, 1])
def test_random_single_page_stores(pool_path, shared, granule, reader):
    make(pool_path, 1500, shared)
    succeed(STORE_ALL_OVER, pool_path, "1500", str(granule), reader)
    verify(pool_path, 1500, shared)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_random_single_page_stores_all_over_a_file_of_more_pages_than_mappings(pool_path, shared):
    make(pool_path, 150_000, shared)
    succeed(STORE_ALL_OVER, pool_path, "150000", "1", "alone")
    verify(pool_path, 150_000, shared)


CROWDED = """
import numpy as np
pages, room = int(sys.argv[2]), int(sys.argv[3])
limit = int(open("/proc/sys/vm/max_map_count").read())
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
def count():
    with open("/proc/self/maps", "rb") as file:
        return sum(1 for _ in file)
total = limit - count() - room
base = libc.mmap(None, total * PAGE, 0, 0x4022, -1, 0)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for n in range(0, total, 2):  # every other page readable: each is a mapping of its own
    libc.mprotect(base + n * PAGE, PAGE, 1)
mapping = fs.map("/a", "r+", granule=1)
words = np.frombuffer(mapping, np.uint64)
for page in np.random.default_rng(5).permutation(pages).tolist():
    words[page * 512 + 3] = page + 1
assert (words[3::512] == np.arange(1, pages + 1)).all()
fs.clone("/a", "/c")
assert (words[3::512] == np.arange(1, pages + 1)).all()
words[3::512] = 5
assert (np.frombuffer(fs.read("/c"), np.uint64)[3::512] == np.arange(1, pages + 1)).all()
assert (words[3::512] == 5).all()
print(count(), limit)
fs.sync()
"""


@pytest.mark.parametrize("room", [3000, 300])
def test_in_a_process_that_has_nearly_all_mappings_that_the_kernel_allows(pool_path, room):
    """The program's own mappings leave few: faults copy more at once, and let translations go."""
    make(pool_path, 1000, True)
    succeed(CROWDED, pool_path, "1000", str(room))
    verify(pool_path, 1000, True)


def test_a_clone_of_a_file_that_is_in_pieces_maps(pool_path):
    """No two neighbouring pages side by side; read and stored to through clones of clones."""
    onecopy.format(pool_path, "64M")
    with onecopy.open(pool_path) as fs:
        pages = 3000
        fs.write("/origin", bytes(pages * PAGE))
        order = np.random.default_rng(1).permutation(pages)
        fs.create("/a")
        for start in range(0, pages, 500):
            for page in order[start : start + 500].tolist():
                fs.clone_range("/origin", page * PAGE, "/a", (pages - 1 - page) * PAGE, PAGE)
        fs.clone("/a", "/b")
        with fs.map("/b", "r+") as mapping:
            words = np.frombuffer(mapping, np.uint64)
            words[::512] = np.arange(pages)
            assert (np.frombuffer(fs.read("/b"), np.uint64)[::512] == np.arange(pages)).all()
            del words
        assert fs.read("/a") == fs.read("/origin") == bytes(pages * PAGE)
        assert_all_ended(fs)
