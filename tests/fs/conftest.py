"""A pool beside its model: what every test of sharing is held against."""

import glob
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator

import pytest

import onecopy

PAGE = onecopy.PAGE


class Twin:
    """An open pool and, for each of its files, a bytearray. Operations are applied to both; `verify` compares them."""

    def __init__(self, path: str) -> None:
        self.path, self.fs = path, onecopy.open(path)
        self.files: dict[str, bytearray] = {}
        self._random = random.Random(20190123)

    # ---------------------------------------------------------- operations

    def blob(self, length: int) -> bytes:
        """Return bytes that nobody has had before."""
        return self._random.randbytes(length)

    def write(self, path: str, data: bytes, offset: int = 0) -> None:
        assert self.fs.write(path, data, offset) == len(data)
        self._grown(path, offset)[offset : offset + len(data)] = data

    def fill(self, path: str, offset: int, length: int) -> None:
        """Write new random bytes."""
        self.write(path, self.blob(length), offset)

    def fill_up(self, path: str) -> None:
        """Make `path` as large as the pool has room for, but for a few pages that a small change may need."""
        for pages in (1024, 64, 4):
            while True:
                try:
                    self.fill(path, len(self.files.get(path, b"")), pages * PAGE)
                except onecopy.NoSpace:
                    break

    def truncate(self, path: str, size: int) -> None:
        self.fs.truncate(path, size)
        del self._grown(path, size)[size:]

    def allocate(self, path: str, offset: int, length: int) -> None:
        self.fs.allocate(path, offset, length)
        self._grown(path, offset + length)

    def punch(self, path: str, offset: int, length: int) -> None:
        self.fs.punch(path, offset, length)
        self._clear(path, offset, length)

    def zero(self, path: str, offset: int, length: int) -> None:
        self.fs.zero(path, offset, length)
        self._grown(path, offset + length)
        self._clear(path, offset, length)

    def collapse(self, path: str, offset: int, length: int) -> None:
        self.fs.collapse(path, offset, length)
        del self.files[path][offset : offset + length]

    def insert(self, path: str, offset: int, length: int) -> None:
        self.fs.insert(path, offset, length)
        self.files[path][offset:offset] = bytes(length)

    def unshare(self, path: str, offset: int = 0, length: int | None = None) -> None:
        self.fs.unshare(path, offset, length)

    def create(self, path: str) -> None:
        self.fs.create(path)
        self.files.setdefault(path, bytearray())

    def clone(self, src: str, dst: str) -> None:
        self.fs.clone(src, dst)
        self.files[dst] = bytearray(self.files[src])

    def clone_range(self, src: str, src_offset: int, dst: str, dst_offset: int, length: int) -> None:
        self.fs.clone_range(src, src_offset, dst, dst_offset, length)
        data = self.files[src][src_offset : src_offset + length if length else None]
        if data:  # of nothing, nothing is shared: the target does not grow, either
            self._grown(dst, dst_offset)[dst_offset : dst_offset + len(data)] = data

    def unlink(self, path: str) -> None:
        self.fs.unlink(path)
        del self.files[path]

    def rename(self, src: str, dst: str) -> None:
        self.fs.rename(src, dst)
        self.files[dst] = self.files.pop(src)

    def _grown(self, path: str, size: int) -> bytearray:
        model = self.files.setdefault(path, bytearray())
        model.extend(bytes(max(0, size - len(model))))
        return model

    def _clear(self, path: str, offset: int, length: int) -> None:
        model = self.files[path]
        end = min(offset + length, len(model))
        model[offset:end] = bytes(max(0, end - offset))

    # -------------------------------------------------------------- seeing

    def sharers(self, path: str) -> list[int]:
        """Return, page by page, how many places reach the file's frame; 0 for a hole."""
        return [e.sharers for e in self.fs.extents(path) for _ in range(e.pages)]

    def states(self, path: str) -> list[str]:
        """Return the state of every page: data, unwritten or hole."""
        return [e.state for e in self.fs.extents(path) for _ in range(e.pages)]

    def pfns(self, path: str) -> list[int]:
        """Return the frame of every page; 0 for a hole."""
        return [e.pfn and e.pfn + n for e in self.fs.extents(path) for n in range(e.pages)]

    def frames(self, path: str = "/") -> int:
        """Return how many frames the files below `path` reach, each counted once."""
        return self.fs.du(path).total // PAGE

    def used(self) -> int:
        """Return the pages in use, trees included, once nothing waits to be freed."""
        self.fs.sync()
        info = self.fs.info()
        assert info.waiting_pages == 0
        assert info.used_pages + info.free_pages == info.pages
        return info.used_pages

    # ----------------------------------------------------------- verifying

    def remount(self) -> None:
        """Close the pool and open it as after a reboot: the run-time file is rebuilt from what is in the pool."""
        uuid = self.fs.info().uuid
        self.fs.close()
        for name in glob.glob(f"/dev/shm/onecopy-{uuid}-*"):
            os.unlink(name)
        self.fs = onecopy.open(self.path)

    def compare(self) -> None:
        """Hold every file against its model: size, bytes read, bytes mapped."""
        for path, model in self.files.items():
            assert self.fs.stat(path).st_size == len(model), path
            _same(path, self.fs.read(path), model)
            with self.fs.map(path) as mapping:
                _same(f"the mapping of {path}", mapping[:], model)

    def verify(self) -> None:
        """Compare everything and recount everything, now and after a remount."""
        self.compare()
        assert self.fs.check().findings == []
        self.remount()
        self.compare()
        assert self.fs.check().findings == []


def _same(what: str, found: bytes, wanted: bytearray) -> None:
    if found != wanted:
        first = next((n for n, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(found))
        raise AssertionError(f"{what}: {len(found)} of {len(wanted)} bytes, the first wrong one at page {first / PAGE:.3f}")


@pytest.fixture
def make_twin(new_path: Callable[[], str]) -> Iterator[Callable[..., Twin]]:
    """A maker of empty pools with their models; all are verified at the end."""
    made: list[Twin] = []

    def make(size: int | str = "64M") -> Twin:
        path = new_path()
        onecopy.format(path, size)
        made.append(Twin(path))
        return made[-1]

    yield make
    try:
        for twin in made:
            twin.verify()
    finally:
        for twin in made:
            twin.fs.close()


@pytest.fixture
def twin(make_twin: Callable[..., Twin]) -> Twin:
    """An empty pool of 64 MiB with its model."""
    return make_twin()


Job = Callable[[onecopy.FileSystem], object]


def _run_in_child(path: str, job: Job, gate: int) -> None:
    """In a forked child: open the pool, wait for the gate, do the job, never return. SIGALRM ends one that hangs."""
    code = 1
    try:
        signal.alarm(60)
        with onecopy.open(path) as fs:
            os.read(gate, 1)
            job(fs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture
def race() -> Callable[..., list[int]]:
    """Run jobs at the same time, each in a process of its own with a handle of its own; return their exit statuses."""

    def run(path: str, *jobs: Job) -> list[int]:
        gate, opener = os.pipe()
        children = []
        for job in jobs:
            pid = os.fork()
            if not pid:
                os.close(opener)
                _run_in_child(path, job, gate)
            children.append(pid)
        os.close(gate)
        os.write(opener, bytes(len(jobs)))
        os.close(opener)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]

    return run
