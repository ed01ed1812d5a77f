"""Power cuts: what the superblock names is on media before it (S7), and any cut leaves the last synced tree (S9)."""

import random

import numpy as np
import pytest

import onecopy
from onecopy.daxemu import steps
from onecopy.fs import mount, superblock
from onecopy.fs.check import Checker
from onecopy.fs.format import SUPERBLOCK, SUPERBLOCK_PFNS

PAGE = onecopy.PAGE


class Media:
    """Persistence that keeps what is durable: pages as they were at the fence that followed their flush.

    Of everything else, any aligned word may be on media or not: `cut` decides by chance.
    """

    def __init__(self, fs: onecopy.FileSystem) -> None:
        self.pool = fs._mount.pool
        self.words = np.frombuffer(self.pool.words, np.uint64).reshape(-1, PAGE // 8)
        self.durable = self.words.copy()
        self.flushed: set[int] = set()
        self.superblocks = 0
        self._store, self.pool.store = self.pool.store, self.store
        self._persistence, self.pool.persistence = self.pool.persistence, self

    def flush(self, pfn: int, pages: int) -> None:
        self._persistence.flush(pfn, pages)
        self.flushed.update(range(pfn, pfn + pages))

    def fence(self) -> None:
        pfns = list(self.flushed)
        self.durable[pfns] = self.words[pfns]
        self.flushed.clear()
        self._persistence.fence()

    def store(self, offset: int, data) -> None:
        """The pool's `store`. Before a superblock is stored, all that it names is on media (S7)."""
        if offset // PAGE in SUPERBLOCK_PFNS:
            fields = SUPERBLOCK.unpack(data)
            checker = Checker(self.pool)
            assert checker.run(fields["roots"], fields["counts"]).findings == []
            named = np.flatnonzero(checker.is_node | checker.is_data)
            late = named[(self.durable[named] != self.words[named]).any(1)]
            assert not len(late), f"S7: PFNs {late.tolist()}"
            self.superblocks += 1
        self._store(offset, data)

    def cut(self, rng: random.Random) -> bytes:
        """Return what may be on media if the power fails now."""
        image = self.durable.copy()
        for pfn in np.flatnonzero((self.durable != self.words).any(1)).tolist():
            share = rng.choice([0, 0.5, 1])
            arrived = np.array([rng.random() < share for _ in range(PAGE // 8)])
            image[pfn][arrived] = self.words[pfn][arrived]
        return image.tobytes()


class Workload:
    """Random changes to files that keep their names, with all the contents that each has had since the last sync."""

    def __init__(self, fs: onecopy.FileSystem, seed: int) -> None:
        self.fs, self.rng = fs, random.Random(seed)
        self.made = 0
        fs.create_subvolume("/sub")
        for page in range(0, 24, 2):
            fs.write("/sub/runs", self.rng.randbytes(PAGE), page * PAGE)  # more extents than an inode holds
        fs.write("/sub/tail", self.rng.randbytes(3 * PAGE))
        fs.sync()
        self.synced, self.since = self.contents(), dict[str, list[bytes]]()

    def step(self) -> None:
        """Make one change, unless the pool is too full for it."""
        path, offset = self.rng.choice(self.files()), self.rng.randrange(8) * PAGE
        self.made += 1
        new = f"/new{self.made}"
        changes = [
            lambda: self.fs.clone(path, new),
            lambda: self.fs.write(new, self.rng.randbytes(self.rng.randrange(1, 6 * PAGE))),
            lambda: self.fs.snapshot("/sub", new),
            lambda: self.fs.punch(path, offset, self.rng.randrange(1, 3 * PAGE)),
            lambda: self.fs.truncate(path, offset),
            lambda: self.remove(new),
            lambda: self.remove(new),
            *[lambda: self.fs.write(path, self.rng.randbytes(self.rng.choice([8, 100, PAGE, 2 * PAGE])), offset)] * 5,
        ]
        try:
            self.rng.choice(changes)()
        except onecopy.NoSpace:
            self.remove(new)
        for name in (path, new):
            if name in self.files():
                self.since.setdefault(name, []).append(self.fs.read(name))

    def remove(self, new: str) -> None:
        """Remove the oldest of what was made, or nothing."""
        made = [name for name in self.fs.listdir("/") if name.startswith("new") and f"/{name}" != new]
        if made:
            self.fs.rmtree(f"/{made[0]}") if made[0] in self.folders() else self.fs.unlink(f"/{made[0]}")

    def folders(self) -> list[str]:
        return [entry.name for entry in self.fs.scandir("/") if entry.kind != "file"]

    def files(self) -> list[str]:
        return [f"{folder.rstrip('/')}/{name}" for folder, _, names in self.fs.walk("/") for name in names]

    def contents(self) -> dict[str, bytes]:
        return contents_of(self.fs)

    def noted(self) -> None:
        """Note that everything is durable."""
        self.synced, self.since = self.contents(), {}


def contents_of(fs: onecopy.FileSystem) -> dict[str, bytes]:
    """Return all files with what is in them."""
    return {
        path: fs.read(path) for folder, _, names in fs.walk("/") for path in (f"{folder.rstrip('/')}/{name}" for name in names)
    }


def assert_old_or_stored(found: dict[str, bytes], synced: dict[str, bytes], since: dict[str, list[bytes]]) -> None:
    """The synced files are there, and each word of them is as it was or as their own later stores made it."""
    assert list(found) == list(synced)
    for path, data in found.items():
        assert len(data) == len(synced[path])
        words = [_words(one, len(data)) for one in (data, synced[path], *since.get(path, []))]
        fine = np.zeros(len(words[0]), bool)
        for allowed in words[1:]:
            fine |= words[0] == allowed
        assert fine.all(), f"{path}: words {np.flatnonzero(~fine).tolist()} were never there"


def _words(data: bytes, size: int) -> np.ndarray:
    """Return the words of a file, cut or filled up to `size` bytes and whole words."""
    return np.frombuffer(data[:size].ljust(-(-size // 8) * 8, b"\0"), np.uint64)


def opened(path: str, image: bytes) -> tuple[dict[str, bytes], int]:
    """Return the files in an image of a pool, after checking it, and its generation."""
    with open(path, "wb") as file:
        file.write(image)
    assert onecopy.check(path).findings == []
    with onecopy.open(path) as fs:
        assert fs.check().findings == []
        generation = superblock.newest(fs._mount.pool).generation
        contents = contents_of(fs)
    onecopy.remove(path)
    return contents, generation


@pytest.fixture
def media(pool_path, monkeypatch):
    monkeypatch.setattr(mount, "_RECLAIM_AT", 1)  # frames are used again as soon as they may be
    onecopy.format(pool_path, "1M")
    with onecopy.open(pool_path) as fs:
        yield fs, Media(fs)


def run(media, new_path, seed: int, changes: int, cuts: float) -> None:
    """Make changes and sync now and then; cut the power at random steps of all that."""
    fs, device = media
    workload, rng = Workload(fs, seed), random.Random(-seed)
    images: list[bytes] = []

    def maybe_cut(_: int) -> None:
        if rng.random() < cuts:
            images.append(device.cut(rng))

    steps.hook = maybe_cut
    try:
        for turn in range(changes):
            before = superblock.newest(device.pool).generation
            syncing = turn % 7 == 6
            previous = workload.contents()
            workload.step()
            if syncing:
                fs.sync()
            newest = superblock.newest(device.pool).generation
            for image in images:
                found, generation = opened(new_path(), image)
                assert before <= generation <= newest
                if generation == before:
                    assert_old_or_stored(found, workload.synced, workload.since)
                elif found != workload.contents():  # synced within the step, to make room, before its change
                    assert_old_or_stored(found, previous, workload.since)
            images.clear()
            if syncing:
                workload.noted()
            elif newest != before:
                workload.synced = previous
    finally:
        steps.hook = None
    assert device.superblocks >= changes // 7


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_leaves_the_last_synced_tree(media, new_path, seed):
    run(media, new_path, seed, 70, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_power_cuts_at_length(media, new_path, seed):
    run(media, new_path, seed, 350, 0.3)


def test_without_a_sync_nothing_that_is_durable_changes(media):
    """But for file bytes stored in place, of which there are none here."""
    fs, device = media
    fs.write("/a", b"a" * 5 * PAGE)
    fs.sync()
    durable = device.durable.copy()
    for n in range(12):
        fs.clone("/a", f"/{n}")
        fs.write(f"/{n}", b"x" * PAGE, PAGE)
        fs.rename("/a", "/b")
        fs.rename("/b", "/a")
    checker = Checker(device.pool)
    block = superblock.newest(device.pool)
    assert checker.run(block.roots, block.counts).findings == []
    named = np.flatnonzero(checker.is_node | checker.is_data)
    assert (device.words[named] == durable[named]).all()


def test_a_torn_superblock_leaves_the_other_one(media, new_path):
    fs, device = media
    fs.write("/a", b"old")
    fs.sync()
    fs.write("/a", b"new")
    images = []
    store = device.pool.store

    def torn(offset, data):
        store(offset, data)
        if offset // PAGE in SUPERBLOCK_PFNS:
            for word in range(SUPERBLOCK.size // 8):
                image = device.durable.copy()
                image[offset // PAGE, :word] = device.words[offset // PAGE, :word]
                images.append(image.tobytes())

    device.pool.store = torn
    fs.sync()
    assert len(images) == SUPERBLOCK.size // 8
    for image in images:
        path = new_path()
        with open(path, "wb") as file:
            file.write(image)
        with onecopy.open(path) as after:
            assert after.read("/a") == b"old"
        onecopy.remove(path)
