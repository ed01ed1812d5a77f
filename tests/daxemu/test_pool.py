"""The pool file and its persistence: bounds, storage given and given back, what is refused, what counts as durable."""

import errno
import os

import pytest

import onecopy
from onecopy.daxemu import pool as pools
from onecopy.daxemu.persist import FileBacked, Volatile, persistence_of
from onecopy.daxemu.pool import HEADER, Pool
from onecopy.daxemu.record import checksum
from onecopy.daxemu.units import PAGE


def blocks(pool: Pool) -> int:
    """Return how many pages of storage the host gave the pool."""
    return os.fstat(pool.fd).st_blocks * 512 // PAGE


def test_pages_are_addressed_by_frame_number(raw):
    raw.store(700 * PAGE + 8, b"12345678")
    assert raw.words[700 * 512 + 1] == int.from_bytes(b"12345678", "little")
    assert bytes(raw.bytes[700 * PAGE : 700 * PAGE + 24]) == bytes(8) + b"12345678" + bytes(8)
    assert raw.frames == 1024 and len(raw.bytes) == 4 << 20


def test_storage_comes_with_what_is_stored_and_goes_with_punch(raw):
    before = blocks(raw)
    raw.store(500 * PAGE, b"x" * 3 * PAGE)
    raw.back(600, 10)
    assert blocks(raw) == before + 13
    raw.punch(501, 1)
    raw.punch(600, 10)
    assert blocks(raw) == before + 2
    assert bytes(raw.bytes[500 * PAGE : 503 * PAGE]) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    assert os.fstat(raw.fd).st_size == 4 << 20


def test_a_host_without_room_is_nospace(raw, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(pools, "fallocate", full)
    for attempt in (lambda: raw.store(PAGE, b"x"), lambda: raw.back(5, 1)):
        with pytest.raises(onecopy.NoSpace, match="gave no more room"):
            attempt()


def test_a_host_s_other_errors_keep_their_errno(raw, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output") as caught:
        raw.store(PAGE, b"x")
    assert not isinstance(caught.value, onecopy.OneCopyError)


def test_a_pool_opened_for_reading_is_not_writable(small):
    pool = Pool(small, writable=False)
    with pytest.raises(TypeError):
        pool.words[0] = 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        pool.store(PAGE, b"x")
    pool.close()


def test_a_closed_pool_is_not_reachable(small):
    pool = Pool(small, writable=True)
    pool.close()
    with pytest.raises(ValueError, match="released"):
        pool.words[0]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pool.fd)


def header_with(path: str, **changes: object) -> None:
    """Change fields of a pool's header and make its checksum right again."""
    with open(path, "r+b") as file:
        fields = HEADER.unpack(file.read(HEADER.size)) | changes | {"checksum": 0}
        fields["checksum"] = checksum(HEADER.pack(*fields.values()), HEADER.offset["checksum"])
        file.seek(0)
        file.write(HEADER.pack(*fields.values()))


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"magic": 1}, onecopy.NotAPool), ({"version": 1}, onecopy.PoolVersionError), ({"page_size": 512}, onecopy.CorruptRecord),
     ({"frames": 1 << 30}, onecopy.NotAPool)],
)  # fmt: skip
def test_what_is_no_pool_of_ours_is_refused(small, changes, error):
    header_with(small, **changes)
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        Pool(small, writable=True)
    assert set(os.listdir("/proc/self/fd")) <= descriptors  # what earlier tests left to the collector may go meanwhile


@pytest.mark.parametrize("size", ["256K", "0", 255 * PAGE, 1 << 62])
def test_impossible_sizes(new_path, size):
    path = new_path()
    with pytest.raises(onecopy.OneCopyError) as caught:
        onecopy.format(path, size)
    assert caught.value.errno == errno.EINVAL
    assert not os.path.exists(path)


def test_a_pool_appears_whole_or_not_at_all(new_path):
    path = new_path()

    def fill(pool: Pool) -> None:
        assert not os.path.exists(path)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pools.create(path, 4 << 20, 0o600, fill, force=False)
    assert not [name for name in os.listdir(os.path.dirname(path)) if os.path.basename(path) in name]


def test_two_formats_at_once_make_one_pool(new_path):
    path = new_path()

    def fill(pool: Pool) -> None:
        with open(path, "x"):  # the other one was faster
            pass

    with pytest.raises(FileExistsError):
        pools.create(path, 4 << 20, 0o600, fill, force=False)
    assert os.path.getsize(path) == 0


# ----------------------------------------------------------- persistence


def test_memory_needs_no_flushing_and_disks_do(raw, tmp_path):
    assert isinstance(raw.persistence, Volatile)
    with open(tmp_path / "file", "wb") as file:
        on_disk = isinstance(persistence_of(file.fileno()), FileBacked)
    assert on_disk == (os.statvfs(tmp_path).f_fsid != os.statvfs("/dev/shm").f_fsid)


def test_one_fence_writes_back_all_that_was_flushed(monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    persistence = FileBacked(7)
    persistence.fence()
    assert synced == []
    persistence.flush(3, 0)
    persistence.fence()
    assert synced == []
    persistence.flush(3, 1)
    persistence.flush(9, 2)
    persistence.fence()
    assert synced == [7]
    persistence.fence()
    assert synced == [7]


def test_a_fence_that_failed_is_owed(monkeypatch):
    outcomes = [OSError(errno.EIO, "media"), None]

    def sync(fd):
        outcome = outcomes.pop(0)
        if outcome:
            raise outcome

    monkeypatch.setattr(os, "fdatasync", sync)
    persistence = FileBacked(7)
    persistence.flush(3, 1)
    with pytest.raises(OSError, match="media"):
        persistence.fence()
    persistence.fence()
    assert outcomes == []
