"""A model of files and mappings, and processes that do to a pool what the model says: any of them, in turn.

After each operation all processes look at all their mappings: they must show the model's bytes (S3, S4), whoever stored.
"""

import random
import zlib
from collections.abc import Callable
from typing import Any

import onecopy

from ..multiproc.processes import Line, Process
from .common import PAGE

LIMIT = 48  # pages of the largest small file


class File:
    """An inode: its bytes, those of the last page behind the end included, which a mapping can store to."""

    def __init__(self) -> None:
        self.size, self.bytes = 0, bytearray()

    def copy(self) -> "File":
        new = File()
        new.size, new.bytes = self.size, bytearray(self.bytes)
        return new

    def grow(self, size: int) -> None:
        """Make it at least `size` long: zeros where it was not."""
        if size > self.size:
            self.bytes[self.size :] = bytes(-(-size // PAGE) * PAGE - self.size)
            self.size = size

    def cut(self, size: int) -> None:
        self.bytes[size:] = bytes(-(-size // PAGE) * PAGE - size)
        self.size = size


def work(line: Line, path: str) -> None:
    """What each process does: one request after the other."""
    with onecopy.open(path) as fs:
        maps: dict[int, onecopy.Mapping] = {}
        while (request := line.hear()) is not None:
            what, *arguments = request
            try:
                line.say(("did", _do(fs, maps, what, arguments)))
            except OSError as error:
                line.say(("error", error.errno, str(error)))
        for mapping in maps.values():
            mapping.close()


def _do(fs: onecopy.FileSystem, maps: dict[int, onecopy.Mapping], what: str, arguments: Any) -> Any:
    if what == "map":
        number, path, mode, options = arguments
        maps[number] = fs.map(path, mode, **options)
    elif what == "unmap":
        maps.pop(arguments[0]).close()
    elif what == "store":
        number, offset, data = arguments
        with memoryview(maps[number]) as view:
            view[offset : offset + len(data)] = data
    elif what == "look":
        found = {}
        for number, size in arguments[0].items():
            with memoryview(maps[number]) as view:
                found[number] = zlib.crc32(view[:size])
        return found
    elif what == "dedupe":
        fs.dedupe(apply=True)
    elif what == "check":
        return fs.check().findings
    else:
        return getattr(fs, what)(*arguments)
    return None


class Model:
    """Files by name, mappings by number, and the processes that have them."""

    def __init__(self, path: str, seed: int, count: int, start: Callable[[Callable[[Line], Any]], Process]) -> None:
        self.path, self.random, self.start = path, random.Random(seed), start
        self.files: dict[str, File] = {}
        self.maps: dict[int, tuple[int, File, int, bool]] = {}  # number: (process, file, length, writable)
        self.processes = [start(self._work) for _ in range(count)]
        self.number, self.log = 0, list[str]()

    def _work(self, line: Line) -> None:
        work(line, self.path)

    def ask(self, process: int, *request: Any) -> Any:
        shown = [repr(part)[:40] for part in request]
        if request[0] not in ("look", "read"):
            self.log.append(f"{process}: {' '.join(shown)}")
        answer = self.processes[process].ask(request)
        assert answer[0] == "did", answer
        return answer[1]

    def any(self, *request: Any) -> Any:
        """Have any process do it."""
        return self.ask(self.random.randrange(len(self.processes)), *request)

    def verify(self) -> None:
        for process in range(len(self.processes)):
            sizes = {n: min(m[1].size, m[2]) for n, m in self.maps.items() if m[0] == process}
            found = self.ask(process, "look", sizes)
            for number, size in sizes.items():
                file = self.maps[number][1]
                assert found[number] == zlib.crc32(file.bytes[:size]), f"mapping {number}, {size} bytes, of process {process}"
        for name, file in self.files.items():
            assert self.any("read", name) == file.bytes[: file.size], name

    def end(self) -> None:
        for process in self.processes:
            process.say(None)
            process.hear()
            assert process.wait() == 0

    # ---------------------------------------------------------- operations

    def step(self) -> None:
        """Do something."""
        names = [name for name in dir(self) if name.startswith("do_")]
        weights = [6 if name == "do_store" else 3 if name in ("do_map", "do_clone", "do_clone_range") else 1 for name in names]
        getattr(self, self.random.choices(names, weights)[0])()

    def _path(self) -> str:
        return self.random.choice(sorted(self.files))

    def _range(self, size: int) -> tuple[int, int]:
        """Return an offset below `size` and a length that ends at most there; often whole pages."""
        offset = self.random.randrange(size)
        length = self.random.randrange(1, min(size - offset, self.random.choice([100, PAGE, 9 * PAGE, size])) + 1)
        if self.random.random() < 0.5 and size >= PAGE:
            offset = offset // PAGE * PAGE
            length = min(-(-length // PAGE) * PAGE, size - offset)
        return offset, length

    def do_store(self) -> None:
        usable = [n for n, m in self.maps.items() if m[3] and min(m[1].size, m[2])]
        if usable:
            number = self.random.choice(usable)
            process, file, length, _ = self.maps[number]
            offset, count = self._range(min(file.size, length))
            data = self.random.randbytes(count)
            self.ask(process, "store", number, offset, data)
            file.bytes[offset : offset + count] = data

    def do_store_behind_the_end(self) -> None:
        for number, (process, file, length, writable) in self.maps.items():
            behind = min(len(file.bytes), length)
            if writable and file.size < behind and self.random.random() < 0.5:
                data = self.random.randbytes(behind - file.size)
                self.ask(process, "store", number, file.size, data)
                return

    def do_write(self) -> None:
        if len(self.files) < 8 and self.random.random() < 0.3:
            self.number += 1
            path = f"/f{self.number}"
            self.files[path] = File()
        else:
            path = self._path()
        file = self.files[path]
        offset, count = self._range(LIMIT * PAGE)
        data = self.random.randbytes(count)
        self.any("write", path, data, offset)
        file.grow(offset + count)
        file.bytes[offset : offset + count] = data

    def _clear(self, what: str, grows: bool) -> None:
        path = self._path()
        file = self.files[path]
        if file.size:
            offset, count = self._range(LIMIT * PAGE)
            self.any(what, path, offset, count)
            if grows:
                file.grow(offset + count)
            end = min(offset + count, file.size)
            file.bytes[offset:end] = bytes(max(0, end - offset))

    def do_punch(self) -> None:
        self._clear("punch", False)

    def do_zero(self) -> None:
        self._clear("zero", True)

    def do_allocate(self) -> None:
        path = self._path()
        offset, count = self._range(LIMIT * PAGE)
        self.any("allocate", path, offset, count)
        self.files[path].grow(offset + count)

    def do_truncate(self) -> None:
        path = self._path()
        file, size = self.files[path], self.random.randrange(LIMIT * PAGE)
        self.any("truncate", path, size)
        if size < file.size:
            file.cut(size)
        file.grow(size)

    def do_collapse(self) -> None:
        path = self._path()
        file = self.files[path]
        pages = file.size // PAGE
        if pages > 2:
            first = self.random.randrange(pages - 1)
            count = self.random.randrange(1, pages - first)
            self.any("collapse", path, first * PAGE, count * PAGE)
            if first + count < -(-file.size // PAGE):
                del file.bytes[first * PAGE : (first + count) * PAGE]
                file.size -= count * PAGE

    def do_insert(self) -> None:
        path = self._path()
        file = self.files[path]
        if 0 < file.size < LIMIT * PAGE * 2:
            first, count = self.random.randrange(-(-file.size // PAGE)), self.random.randrange(1, 9)
            self.any("insert", path, first * PAGE, count * PAGE)
            file.bytes[first * PAGE : first * PAGE] = bytes(count * PAGE)
            file.size += count * PAGE

    def do_unshare(self) -> None:
        self.any("unshare", self._path())

    def do_clone(self) -> None:
        if len(self.files) < 12:
            self.number += 1
            source = self._path()
            self.any("clone", source, f"/f{self.number}")
            self.files[f"/f{self.number}"] = self.files[source].copy()

    def do_clone_range(self) -> None:
        source, target = self._path(), self._path()
        a, b = self.files[source], self.files[target]
        pages = a.size // PAGE
        if pages < 2:
            return
        first = self.random.randrange(pages)
        count = self.random.randrange(1, pages - first + 1)
        to = self.random.randrange(LIMIT)
        if a is b and abs(first - to) < count:
            return
        self.any("clone_range", source, first * PAGE, target, to * PAGE, count * PAGE)
        data = a.bytes[first * PAGE : (first + count) * PAGE]
        b.grow((to + count) * PAGE)
        b.bytes[to * PAGE : (to + count) * PAGE] = data

    def do_dedupe(self) -> None:
        self.any("dedupe")

    def do_dedupe_range(self) -> None:
        """Of two ranges at the same place: those of clones are often equal."""
        source, target = self._path(), self._path()
        a, b = self.files[source], self.files[target]
        pages = min(a.size, b.size) // PAGE
        if a is not b and pages:
            first = self.random.randrange(pages)
            offset, end = first * PAGE, self.random.randrange(first + 1, pages + 1) * PAGE
            equal = a.bytes[offset:end] == b.bytes[offset:end]
            assert self.any("dedupe_range", source, offset, target, offset, end - offset) == equal

    def do_copy(self) -> None:
        """Write what another file has: pages for dedupe to find."""
        source, target = self._path(), self._path()
        a, b = self.files[source], self.files[target]
        if a is not b and a.size:
            data = bytes(a.bytes[: a.size])
            self.any("write", target, data)
            b.grow(len(data))
            b.bytes[: len(data)] = data

    def do_rename(self) -> None:
        if len(self.files) > 3:
            source, target = self._path(), self._path()
            self.any("rename", source, target)
            self.files[target] = self.files.pop(source)

    def do_unlink(self) -> None:
        if len(self.files) > 3:
            path = self._path()
            self.any("unlink", path)
            del self.files[path]

    def do_sync(self) -> None:
        self.any("sync")

    def do_check(self) -> None:
        assert self.any("check") == []

    def do_map(self) -> None:
        path = self._path()
        file = self.files[path]
        if len(self.maps) < 10 and file.size > 120:
            self.number += 1
            process, mode = self.random.randrange(len(self.processes)), self.random.choice(["r", "r+", "r+"])
            options = {"granule": self.random.choice([None, 1, 4, 512]), "reserve": self.random.random() < 0.1}
            self.ask(process, "map", self.number, path, mode, options)
            self.maps[self.number] = (process, file, file.size, mode == "r+")

    def do_unmap(self) -> None:
        if self.maps:
            number = self.random.choice(sorted(self.maps))
            self.ask(self.maps.pop(number)[0], "unmap", number)

    def do_kill(self) -> None:
        """A process is killed between two operations: another one comes."""
        process = self.random.randrange(len(self.processes))
        if self.random.random() < 0.3:
            self.log.append(f"{process}: killed")
            self.processes[process].kill()
            self.maps = {n: m for n, m in self.maps.items() if m[0] != process}
            self.processes[process] = self.start(self._work)
