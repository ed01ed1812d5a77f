"""The demo's processes: each maps, hashes and rewrites clones of its own, all in step with each other.

`Team` starts them and gives every process the same order at the same time; it goes on when all have answered. So no
process rewrites before all have read, and all hold their mappings while memory is measured.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import signal
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import onecopy
from onecopy.cli.demo_input import File
from onecopy.cli.measure import PAGE, Memory, measure, page_tables

REWRITTEN_SHARE = 100  # one page in so many is rewritten
MOST_RUNS = 4096  # in one clone; beyond, runs get longer, since each costs a mapped area of which a process has 65,530

View = NDArray[np.uint8]
Run = tuple[int, int]
"""Part of a file: (offset, length), in bytes."""


def check_mappable(files: int) -> None:
    """Raise OSError (ENOMEM) when so many files take one process more than half of the mappings the kernel allows."""
    allowed = int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    if files > allowed:
        raise OSError(
            errno.ENOMEM,
            f"one process would map {files:,} files, and half of vm.max_map_count is {allowed:,}; "
            "name a smaller tree, let each process have fewer clones, or raise that limit with sysctl",
        )


@dataclass(frozen=True)
class Place:
    """Where clones lie: file NAME of clone K is `<root>/<K>/<NAME>`, on the host or, with `pool`, inside that pool."""

    root: str
    pool: str | None = None


@dataclass(frozen=True)
class Clone:
    """One clone: the name of its directory, and the number that its rewriting depends on."""

    name: str
    number: int


@dataclass(frozen=True)
class Reading:
    """What one process found when it hashed its clones."""

    hashes: int
    wrong: tuple[str, ...]  # the files whose bytes are not what they should be


class Worker:
    """What one process of the demo does with its own clones. A context manager: leaving it lets everything go."""

    def __init__(self, place: Place, files: Sequence[File], clones: Sequence[Clone]) -> None:
        self._place = place
        self._files = files
        self._clones = clones
        self._rewritten: dict[str, list[Run]] = {}
        self._held = ExitStack()
        self._views: list[View] = []
        self._own_tables = page_tables()
        self._fs = onecopy.open(place.pool, "r") if place.pool else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        if self._fs:
            self._fs.close()

    def read(self) -> Reading:
        """Map every file of every own clone, hash what the mapping shows, and keep the mappings.

        What this process has rewritten is turned back on the way into the hash. So the original's hash comes out
        only if the file holds the original's bytes, this process's own changes, and nothing else.
        """
        self.release()
        wrong = []
        for clone, file, path in self._own_files():
            view = self._view(path, file.size)
            if _digest(view, self._rewritten.get(path, []), _key(clone)) != file.digest:
                wrong.append(path)
        return Reading(len(self._clones) * len(self._files), tuple(wrong))

    def measure(self) -> Memory:
        """Measure the memory below the mappings that this process holds; page tables without those it began with."""
        memory = measure([(view.ctypes.data, view.nbytes) for view in self._views])
        return replace(memory, page_tables=memory.page_tables - self._own_tables)

    def rewrite(self) -> int:
        """Change one page in a hundred of every own clone, through the pool's API; return how many bytes that was."""
        if self._place.pool is None:
            raise ValueError("only clones in a pool are rewritten")
        self.release()  # a mapping goes on showing the file as it was when it was mapped
        count = 0
        with onecopy.open(self._place.pool) as fs:
            for clone in self._clones:
                for file, (offset, length) in _runs_to_rewrite(self._files, clone):
                    path = self._path(clone, file)
                    content = np.frombuffer(fs.read(path, offset, length), np.uint8)
                    count += fs.write(path, (content ^ _key(clone)).data, offset)
                    self._rewritten.setdefault(path, []).append((offset, length))
        return count

    def release(self) -> None:
        """Unmap everything."""
        self._views.clear()
        self._held.close()

    def _own_files(self) -> Iterator[tuple[Clone, File, str]]:
        for clone in self._clones:
            for file in self._files:
                yield clone, file, self._path(clone, file)

    def _path(self, clone: Clone, file: File) -> str:
        return f"{self._place.root}/{clone.name}/{file.name}"

    def _view(self, path: str, size: int) -> View:
        """Map a file whole and remember the mapping; a file that has no page to map is read."""
        if self._fs is None:
            if not size:
                return np.fromfile(path, np.uint8)
            view: View = np.memmap(path, np.uint8, mode="r")
        elif self._fs.stat(path).st_blocks:
            view = np.frombuffer(memoryview(self._held.enter_context(self._fs.map(path))), np.uint8)
        else:
            return np.frombuffer(self._fs.read(path), np.uint8)
        self._views.append(view)
        return view


def _key(clone: Clone) -> np.uint8:
    """What a clone's rewritten bytes are combined with by exclusive or: doing it twice gives the original."""
    return np.uint8(1 + clone.number % 255)


def _digest(view: View, rewritten: Sequence[Run], key: np.uint8) -> bytes:
    """Hash a file as it was before the rewriting; the runs are in order and don't overlap."""
    hasher = hashlib.sha256()
    done = 0
    for offset, length in rewritten:
        hasher.update(view[done:offset].data)
        done = offset + length
        hasher.update((view[offset:done] ^ key).data)
    hasher.update(view[done:].data)
    return hasher.digest()


def _runs_to_rewrite(files: Sequence[File], clone: Clone) -> Iterator[tuple[File, Run]]:
    """Choose one page in a hundred, evenly spread over all files, and at least one; clones take different pages."""
    ends = list(accumulate(file.pages for file in files))
    total = ends[-1]
    pages = -(-total // (REWRITTEN_SHARE * MOST_RUNS))
    stride = min(REWRITTEN_SHARE * pages, total)
    for page in range(clone.number * pages % stride, total, stride):
        index = bisect_right(ends, page)
        file = files[index]
        offset = (page - (ends[index] - file.pages)) * PAGE
        yield file, (offset, min(pages * PAGE, file.size - offset))


@dataclass(frozen=True)
class _Failure:
    """What a process sends instead of an answer when it can't go on."""

    message: str


def _serve(pipe: Connection[Any, Any], place: Place, files: Sequence[File], clones: Sequence[Clone]) -> None:
    """Be one process of a team: carry out orders until the team's owner closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the owner decides what it means
    try:
        with Worker(place, files, clones) as worker:
            pipe.send(None)
            while True:
                pipe.send(getattr(worker, pipe.recv())())
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        pipe.send(_Failure(f"{type(error).__name__}: {error}"))


class Team:
    """Processes that work on clones in step. A context manager: at its end no process is left."""

    def __init__(self, place: Place, files: Sequence[File], clones: Sequence[Clone], processes: int) -> None:
        self._job = (place, files, clones, processes)
        self._members: list[tuple[multiprocessing.process.BaseProcess, Connection[Any, Any]]] = []

    def __enter__(self) -> Self:
        place, files, clones, processes = self._job
        # Forked from a server that has only imported this module, they start fast and have nothing of ours mapped.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        try:
            for number in range(processes):
                pipe, theirs = context.Pipe()
                job = (theirs, place, files, clones[number::processes])
                process = context.Process(target=_serve, args=job, daemon=True)
                process.start()
                theirs.close()
                self._members.append((process, pipe))
            self._answers()
        except BaseException:
            self._end(by_force=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(by_force=kind is not None)

    def ask(self, order: str) -> list[Any]:
        """Have every process call this method of its Worker; return the answers when all have finished.

        Raises OSError when a process failed or died.
        """
        for _, pipe in self._members:
            with suppress(BrokenPipeError):  # it has ended; what it sent last says why
                pipe.send(order)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for process, pipe in self._members:
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                answer = _Failure(f"it ended with status {process.exitcode}")
            if isinstance(answer, _Failure):
                raise OSError(errno.ECHILD, f"process {process.pid} of the demo failed: {answer.message}")
            answers.append(answer)
        return answers

    def _end(self, *, by_force: bool) -> None:
        for process, pipe in self._members:
            pipe.close()
            if by_force:
                process.kill()
        for process, _ in self._members:
            process.join()
        self._members.clear()
