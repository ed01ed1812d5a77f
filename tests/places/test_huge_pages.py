"""On a tmpfs with huge pages, mappings take translations of 2 MiB wherever 2 MiB of a file lie in one huge page."""

import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import onecopy

pytestmark = pytest.mark.policies("dax", reason="huge pages are the pool file's; a cache has small ones")

MiB = 1 << 20
HUGE = 2 * MiB


def translated(address: int, length: int) -> int:
    """Return how many bytes of [address, address + length) have translations of 2 MiB."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            low, _, high = name.partition("-")
            inside = int(low, 16) < address + length and address < int(high, 16)
        elif inside and name == "ShmemPmdMapped:":
            found += int(values[0]) * 1024
    return found


def touch(mapping: onecopy.Mapping) -> None:
    """Read a byte of each page."""
    np.frombuffer(memoryview(mapping), np.uint8)[:: onecopy.PAGE].sum()


def touched(mapping: onecopy.Mapping) -> int:
    """Return how many times 2 MiB are translated at once when every page has been read."""
    touch(mapping)
    return translated(mapping.address, len(mapping)) // HUGE


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs with huge pages needs root")
    folder = tmp_path / "mount"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512m,huge=always", "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount a tmpfs with huge pages here: {done.stderr.strip()}")
    try:
        if not gives_huge_pages(folder):
            pytest.skip("the kernel has no huge pages to give")
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def gives_huge_pages(folder: Path) -> bool:
    """Return whether a plain file, mapped and read, gets a translation of 2 MiB."""
    path = folder / "probe"
    path.write_bytes(bytes(3 * HUGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        words = np.frombuffer(mapping, np.uint8)
        words[:: onecopy.PAGE].sum()
        found = translated(words.ctypes.data, len(words))
        del words
    path.unlink()
    return found > 0


@pytest.fixture
def fs(place: Path) -> Iterator[onecopy.FileSystem]:
    path = str(place / "a.pool")
    onecopy.format(path, "256M")
    with onecopy.open(path) as made:
        made.write("/before", b"x" * 5000)  # nothing is aligned by chance
        yield made
        assert made.check().ok
    onecopy.remove(path)


def whole(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    fs.write("/a", os.urandom(5 * MiB + 123))
    return 2


def put(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    (tmp_path / "source").write_bytes(os.urandom(34 * MiB))
    fs.put(tmp_path / "source", "/a")
    return 17


def put_with_holes(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    with (tmp_path / "source").open("wb") as file:
        file.seek(MiB)
        file.write(os.urandom(9 * MiB))
        file.truncate(16 * MiB)
    fs.put(tmp_path / "source", "/a")
    return 4


def put_array(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    np.save(tmp_path / "source.npy", np.arange(MiB))
    fs.put(tmp_path / "source.npy", "/a")
    return 4


def put_tree(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    (tmp_path / "tree").mkdir()
    for n in range(8):
        (tmp_path / "tree" / f"{n}-small").write_bytes(b"x" * 5000 * n)
        (tmp_path / "tree" / f"{n}-large").write_bytes(bytes([n]) * (HUGE + n * 100_000))
    fs.put(tmp_path / "tree", "/tree")
    fs.rename("/tree/6-large", "/a")
    return 1


def by_pieces(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    """Of a file that grows beside another one, by odd pieces: all but the start, when nobody knew how large it would be."""
    piece = os.urandom(100_000)
    for n in range(80):
        fs.write("/a", piece, n * len(piece))
        fs.write("/other", b"y" * 3000, n * 3000)
    return 2


def by_large_pieces(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    for n in range(8):
        fs.write("/a", os.urandom(MiB), n * MiB)
        fs.write("/other", b"y" * 3000, n * 3000)
    return 4


def from_the_middle(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    fs.write("/a", os.urandom(8 * MiB), 5000)
    return 3


def allocated(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    fs.create("/a")
    fs.allocate("/a", 0, 8 * MiB)
    fs.write("/a", os.urandom(8 * MiB))
    return 4


def unshared(fs: onecopy.FileSystem, tmp_path: Path) -> int:
    fs.write("/base", os.urandom(8 * MiB))
    fs.clone("/base", "/a")
    fs.unshare("/a", 0, 8 * MiB)
    return 4


@pytest.mark.parametrize(
    "make",
    [whole, put, put_with_holes, put_array, put_tree, by_pieces, by_large_pieces, from_the_middle, allocated, unshared],
)
def test_files_are_mapped_by_2_mib(
    fs: onecopy.FileSystem, tmp_path: Path, make: Callable[[onecopy.FileSystem, Path], int]
) -> None:
    expected = make(fs, tmp_path)
    fs.clone("/a", "/clone")
    for path in "/a", "/clone":
        for mode in "r", "r+":
            with fs.map(path, mode) as mapping:
                assert touched(mapping) == expected, (path, mode)


def test_what_was_stored_to_is_mapped_by_2_mib_again(fs: onecopy.FileSystem) -> None:
    """A store cuts one translation; when all of the 2 MiB are the file's own, there is one again."""
    fs.write("/a", os.urandom(8 * MiB))
    fs.clone("/a", "/b")
    new = os.urandom(8 * MiB)
    with fs.map("/b", "r+") as mapping, fs.map("/b") as other:
        assert (touched(mapping), touched(other)) == (4, 4)
        mapping[3 * MiB] = new[3 * MiB]
        assert (touched(mapping), touched(other)) == (3, 3)
        mapping[0 : 8 * MiB] = new
        assert (touched(mapping), touched(other)) == (4, 4)
        assert bytes(memoryview(other)) == new
    with fs.map("/b") as mapping:
        assert touched(mapping) == 4
    with fs.map("/a") as mapping:
        assert touched(mapping) == 4


def test_make_writable_maps_by_2_mib(fs: onecopy.FileSystem) -> None:
    fs.write("/a", os.urandom(8 * MiB))
    fs.clone("/a", "/b")
    with fs.map("/b", "r+", reserve=True) as mapping:
        assert touched(mapping) == 4
    fs.create("/hole")
    fs.truncate("/hole", 8 * MiB)
    with fs.map("/hole", "r+") as mapping:
        mapping[0 : 8 * MiB] = os.urandom(8 * MiB)
        assert touched(mapping) == 4


def test_a_hole_cuts_one_translation(fs: onecopy.FileSystem) -> None:
    fs.write("/a", os.urandom(8 * MiB))
    fs.punch("/a", 3 * MiB, 4096)
    fs.sync()
    with fs.map("/a") as mapping:
        assert touched(mapping) == 3


def test_room_of_small_files_is_huge_pages_again(fs: onecopy.FileSystem) -> None:
    """Small files that are deleted one by one leave no parts of huge pages behind, neither as storage nor in the way."""
    fs.sync()
    before = fs.info().backed_bytes
    rng = np.random.default_rng(1)
    for n in range(1000):
        fs.write(f"/{n}", b"x" * 4096 * (1 + n % 9))
    for n in rng.permutation(1000).tolist():
        fs.unlink(f"/{n}")
        if not n % 50:
            fs.sync()
    fs.sync()
    assert fs.info().backed_bytes <= before + 2 * HUGE
    for n in range(6):
        fs.write(f"/large{n}", os.urandom(32 * MiB))
        with fs.map(f"/large{n}") as mapping:
            assert touched(mapping) == 16


def test_a_pool_says_that_it_has_huge_pages(fs: onecopy.FileSystem, pool: onecopy.FileSystem) -> None:
    assert fs.info().huge_pages
    assert pool.info().huge_pages == (os.fstat(pool._mount.pool.fd).st_blksize >= HUGE)
