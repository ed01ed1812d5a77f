"""Damaging pools on purpose: the bytes of a closed pool, record by record, and a process to try them in."""

import glob
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import onecopy
from onecopy.daxemu.pool import HEADER
from onecopy.daxemu.record import Record, checksum
from onecopy.fs.format import COUNT, DIRENT, EXTENT, FANOUT, INODE, KINDS, NODE, SUBVOLUME, SUPERBLOCK, SUPERBLOCK_PFNS

PAGE = onecopy.PAGE
KIND = {name.removesuffix(" tree"): kind for kind, name in KINDS.items()}  # root, inode, directory, extent, counts
VALUES = {1: SUBVOLUME, 2: INODE, 3: DIRENT, 4: EXTENT, 5: COUNT}


class Where(NamedTuple):
    """A record on media: what it is, the frame it lies in, and its byte in the pool."""

    record: Record
    pfn: int
    at: int


class Media:
    """The bytes of a closed pool, to be read and changed in memory and written anywhere as a pool."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def page(self, pfn: int) -> memoryview:
        return memoryview(self.data)[pfn * PAGE : (pfn + 1) * PAGE]

    def get(self, where: Where, field: str) -> Any:
        return where.record.unpack(self.data, where.at)[field]

    def put(self, where: Where, field: str, value: int | bytes) -> None:
        """Change a field, and nothing else: see `mend`."""
        record = where.record
        fields = record.unpack(self.data, where.at) | {field: value}
        record.pack_into(self.data, where.at, *fields.values())

    def mend(self, where: Where) -> None:
        """Set the checksum over the record: its own, or that of the node it lies in."""
        owner = where.record if "checksum" in where.record.offset else NODE
        start = where.at if owner is where.record else where.pfn * PAGE
        size = owner.size if owner is not NODE else PAGE
        at = owner.offset["checksum"]
        sound = checksum(memoryview(self.data)[start : start + size], at)
        self.data[start + at : start + at + 8] = sound.to_bytes(8, "little")

    def write(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(self.data)

    # -------------------------------------------------------------- finding

    def header(self) -> Where:
        return Where(HEADER, 0, 0)

    def superblocks(self) -> list[Where]:
        """Return the two slots, the newer first."""
        slots = [Where(SUPERBLOCK, pfn, pfn * PAGE) for pfn in SUPERBLOCK_PFNS]
        return sorted(slots, key=lambda slot: -self.get(slot, "generation"))

    def nodes(self) -> dict[int, tuple[int, int]]:
        """Return frame -> (kind, level) of every node that the newest superblock reaches."""
        newest = self.superblocks()[0]
        found: dict[int, tuple[int, int]] = {}
        stack = [self.get(newest, "roots"), self.get(newest, "counts")]
        while stack:
            pfn = stack.pop()
            if not pfn or pfn in found:
                continue
            head = NODE.unpack(self.page(pfn))
            found[pfn] = head["kind"], head["level"]
            if head["level"]:
                stack += self.children(pfn)
            elif head["kind"] in (KIND["root"], KIND["inode"]):
                stack += [self.get(value, "root") for value in self.values(pfn)]
        return found

    def head(self, pfn: int) -> Where:
        return Where(NODE, pfn, pfn * PAGE)

    def node(self, kind: str, *, leaf: bool = True) -> Where:
        """Return the header of the fullest leaf, or inner node, of a kind of tree."""
        heads = [
            self.head(pfn) for pfn, (number, level) in self.nodes().items() if number == KIND[kind] and (level == 0) == leaf
        ]
        return max(heads, key=lambda head: self.get(head, "count"))

    def child(self, head: Where, number: int) -> int:
        """Return the byte of an inner node's child pointer."""
        return head.at + NODE.size + (FANOUT + number) * 8

    def children(self, pfn: int) -> list[int]:
        head = self.head(pfn)
        first = self.child(head, 0)
        words = memoryview(self.data)[first : first + 8 * self.get(head, "count")].cast("Q")
        return words.tolist()

    def values(self, pfn: int) -> list[Where]:
        """Return the values of a leaf."""
        head = NODE.unpack(self.page(pfn))
        record = VALUES[head["kind"]]
        room = (PAGE - NODE.size) // (8 + record.size)
        first = pfn * PAGE + NODE.size + 8 * room
        return [Where(record, pfn, first + n * record.size) for n in range(head["count"])]

    def value(self, kind: str, wanted: Callable[[dict[str, Any]], bool] = lambda _: True) -> Where:
        """Return the first value of a kind of tree whose fields are as wanted."""
        return next(
            where
            for pfn, (number, level) in sorted(self.nodes().items())
            if number == KIND[kind] and level == 0
            for where in self.values(pfn)
            if wanted(where.record.unpack(self.data, where.at))
        )


def _furnish(fs: onecopy.FileSystem) -> None:
    """Everything that a pool can hold, with every tree two levels high, in few frames."""
    fs.mkdir("/d/e", parents=True)
    fs.write("/inline", b"within the inode")
    fs.write("/d/one", os.urandom(3 * PAGE + 17))
    fs.write("/" + "a long name " * 20, b"its name takes several records")
    fs.symlink("d/one", "/link")
    fs.setxattr("/d/one", "user.kind", b"x" * 300)
    for number in range(110):
        fs.link("/inline", f"/d/e/{number}")
    for number in range(9):
        fs.create(f"/many{number}")
    fs.write("/mixed", os.urandom(400 * PAGE))
    fs.clone("/mixed", "/mixed2")
    for page in range(0, 400, 2):
        fs.punch("/mixed2", page * PAGE, PAGE)
    fs.allocate("/mixed", 400 * PAGE, 2 * PAGE)
    fs.create_subvolume("/sub")
    fs.write("/sub/file", os.urandom(2 * PAGE))
    fs.snapshot("/sub", "/snap")


@pytest.fixture(scope="session")
def _sound() -> bytes:
    """The bytes of a closed pool of 4 MiB that holds some of everything."""
    path = f"/dev/shm/test-{os.getpid()}-sound.pool"
    onecopy.format(path, "4M")
    try:
        with onecopy.open(path) as fs:
            _furnish(fs)
            fs.sync()
            fs.write("/inline", b"the second superblock slot is used, too")
        assert onecopy.check(path).ok
        with open(path, "rb") as file:
            data = file.read()
        Workout(path).run()  # imports what is imported late, once for all children
        return data
    finally:
        onecopy.remove(path)


@pytest.fixture
def sound(_sound: bytes) -> Callable[[], Media]:
    """A maker of a sound pool's bytes."""
    return lambda: Media(_sound)


@pytest.fixture
def media(sound: Callable[[], Media]) -> Media:
    """A sound pool's bytes, to be damaged."""
    return sound()


# ------------------------------------------------------------- trying it out


class Workout:
    """Uses all of a pool that may be damaged. Only OSErrors may come out; `seen` has their types and the check's codes."""

    def __init__(self, path: str) -> None:
        self.path, self.seen = path, set[str]()

    def attempt(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return work(*arguments, **options)
        except OSError as error:
            assert error.errno, "an OSError without errno"
            self.seen.add(type(error).__name__)
            return None

    def check(self, check: Callable[[], onecopy.CheckReport]) -> None:
        report = self.attempt(check)
        for finding in report.findings if report else ():
            assert finding.message
            self.seen.add(finding.code)

    def run(self) -> list[str]:
        """Use the pool through handles opened now."""
        self.check(lambda: onecopy.check(self.path))
        paths: list[str] = []
        for mode, work in (("r", self.look), ("r+", self.change)):
            fs = self.attempt(onecopy.open, self.path, mode)
            if fs is not None:
                self.check(fs.check)
                work(fs, paths)
                self.attempt(fs.close)
        return sorted(self.seen)

    def run_open(self, meanwhile: dict[int, bytes]) -> list[str]:
        """Use it through a handle opened before these frames change."""
        paths: list[str] = []
        fs = onecopy.open(self.path)
        with open(self.path, "r+b") as file:
            for pfn, page in meanwhile.items():
                file.seek(pfn * PAGE)
                file.write(page)
        self.check(fs.check)
        self.look(fs, paths)
        self.change(fs, paths)
        self.attempt(fs.close)
        return sorted(self.seen)

    def look(self, fs: onecopy.FileSystem, paths: list[str]) -> None:
        """Read everything that the names lead to, of each directory's the first ones; collect the paths."""
        paths.append("/")
        for folder, folders, files in self.attempt(lambda: list(fs.walk("/"))) or ():
            paths += [f"{folder.rstrip('/')}/{name}" for name in (folders + files)[:10]]
        for path in paths:
            status = self.attempt(fs.lstat, path)
            for work in (fs.listxattr, fs.readlink, fs.listdir, fs.extents):
                self.attempt(work, path)
            for at in (0, status.st_size - 100 if status else 0):
                self.attempt(fs.read, path, max(at, 0), 3 * PAGE)
            self.attempt(fs.seek, path, 0, "hole")
            mapping = self.attempt(fs.map, path)
            if mapping is not None:
                self.attempt(mapping.__getitem__, slice(0, PAGE))
                mapping.close()
        for path in paths[:6]:
            self.attempt(fs.read, path)
        for work in (fs.info, fs.du, fs.list_subvolumes, fs.dedupe):
            self.attempt(work)

    def change(self, fs: onecopy.FileSystem, paths: list[str]) -> None:
        """Change and remove everything."""
        self.attempt(fs.snapshot, "/sub", "/snap2")
        self.attempt(fs.clone_tree, "/d", "/d2")
        self.attempt(fs.clone_tree, "/d", "/d/e/within")
        self.attempt(fs.mkdir, "/x")
        self.attempt(fs.clone_tree, "/x", "/d/e/x")
        self.attempt(fs.rename, "/x", "/d/e/y")
        for number, path in enumerate(paths):
            self.attempt(fs.clone, path, f"/clone{number}")
            self.attempt(fs.write, path, b"x" * PAGE, 100)
            self.attempt(fs.punch, path, PAGE, PAGE)
            self.attempt(fs.setxattr, path, "user.other", b"y")
        self.attempt(fs.dedupe, apply=True)
        self.attempt(fs.sync)
        for path in paths:
            self.attempt(fs.truncate, path, 10)
            self.attempt(fs.unlink, path)
        self.attempt(fs.rmtree, "/")
        self.check(fs.check)


def _limits() -> None:
    signal.alarm(60)
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[5]) * PAGE + (2 << 30)
    resource.setrlimit(
        resource.RLIMIT_DATA, (most, most)
    )  # not RLIMIT_AS: what is mapped of a cache's files is nearly all hole
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@pytest.fixture
def fails() -> Callable[..., int | None]:
    """Call what must raise an OSError; return its errno."""

    def call(work: Callable[..., Any], *arguments: Any, **options: Any) -> int | None:
        with pytest.raises(OSError) as caught:
            work(*arguments, **options)
        return caught.value.errno

    return call


@pytest.fixture
def in_child() -> Callable[[Callable[[], Any]], Any]:
    """Run work in a forked child and return its result; an exception, a signal or a hang there fails the test here."""

    def run(work: Callable[[], Any]) -> Any:
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                _limits()
                answer = ["returned", work()]
            except BaseException:
                answer = ["raised", traceback.format_exc()]
            try:
                os.write(writer, json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, f"ended by signal {-code}"
        how, what = json.loads(answer)
        assert how == "returned", what
        return what

    return run


def _forget(path: str) -> None:
    """Delete a pool that nobody uses, and its run-time files, whatever is in it."""
    status = os.stat(path)
    for name in glob.glob(f"/dev/shm/onecopy-*-{status.st_dev:x}.{status.st_ino:x}*"):
        os.unlink(name)
    os.unlink(path)


@pytest.fixture
def workout(new_path: Callable[[], str], in_child: Callable[..., Any]) -> Callable[..., set[str]]:
    """Try a damaged pool in a child, cold; return the errors' names and the check's codes.

    `meanwhile`: frames that change only when the pool has been opened.
    """

    def run(media: Media, meanwhile: dict[int, bytes] | None = None) -> set[str]:
        path = new_path()
        media.write(path)
        work = Workout(path)
        try:
            return set(in_child(work.run if meanwhile is None else lambda: work.run_open(meanwhile)))
        finally:
            _forget(path)

    return run
