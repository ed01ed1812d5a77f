"""Hands that do things to a pool: in this process or in another one, by the same words."""

import errno
import re
import signal
from collections.abc import Callable
from typing import Any

import onecopy
from onecopy.daxemu import steps

from ..multiproc.processes import Line, Process, at_step, die
from .reference import Outcome


class Hands:
    """One handle on a pool, and what it has mapped."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.maps: dict[int, onecopy.Mapping] = {}
        self.fs = onecopy.open(path)

    def attempt(self, method: str, *arguments: Any) -> Outcome:
        """Call a method of the handle; return how it went, with NoSpace and damage told from other errors."""
        try:
            if method == "dedupe":
                self.fs.dedupe(*arguments, apply=True)
                return "ok", None
            return "ok", getattr(self.fs, method)(*arguments)
        except onecopy.NoSpace:
            return "full", None
        except OSError as error:
            assert not isinstance(error, onecopy.CorruptRecord | onecopy.InvariantError), error
            return "error", error.errno

    def map(self, key: int, path: str, mode: str) -> Outcome:
        """Map a file; return how long the mapping is."""
        try:
            self.maps[key] = self.fs.map(path, mode)
        except onecopy.NoSpace:
            return "full", None
        except OSError as error:
            return "error", error.errno
        return "ok", len(self.maps[key])

    def look(self, key: int, size: int) -> bytes:
        """Return the first bytes that a mapping shows, after a look that there are no more, and how they are protected (S1)."""
        mapping = self.maps[key]
        if len(mapping):
            assert protections(mapping) <= ({"r--", "rw-"} if mapping.writable else {"r--"}), "S1"
        if size < len(mapping):
            try:
                raise AssertionError(f"byte {size}, which has been cut off, is {mapping[size]}")
            except OSError as error:
                assert error.errno == errno.ENXIO
        return mapping[:size]

    def store(self, key: int, offset: int, data: bytes) -> Outcome:
        """Store into a mapping. Room is asked for first: without, the process would get a SIGBUS."""
        mapping = self.maps[key]
        try:
            mapping.make_writable(offset, offset + len(data))
        except onecopy.NoSpace:
            return "full", None
        mapping[offset : offset + len(data)] = data
        return "ok", None

    def store_and_die(self, key: int, offset: int, value: int, step: str) -> bool:
        """Store a byte, and die at a step of the fault. True: there was none."""
        mapping = self.maps[key]
        steps.signal_at(step, 1, signal.SIGKILL)
        mapping[offset] = value
        steps.signal_at("", 0, 0)
        return True

    def unmap(self, key: int) -> None:
        self.maps.pop(key).close()

    def reopen(self) -> None:
        """Close the handle and open another one; mappings stay."""
        self.fs.close()
        self.fs = onecopy.open(self.path)

    def close(self) -> None:
        for key in list(self.maps):
            self.unmap(key)
        self.fs.close()

    def open(self) -> None:
        self.fs = onecopy.open(self.path)

    def die_at(self, step: str, arrival: int) -> None:
        """Let this process die at that arrival at a step."""
        if step in steps.NATIVE:
            steps.signal_at(step, arrival, signal.SIGKILL)
        else:
            at_step(step, arrival, die)


def protections(mapping: onecopy.Mapping) -> set[str]:
    """Return how the pages of a mapping are protected, from the kernel."""
    found = set()
    with open("/proc/self/maps") as file:
        for line in file:
            span = re.match(r"([0-9a-f]+)-([0-9a-f]+) (...)", line)
            assert span
            if int(span[1], 16) < mapping.address + len(mapping) and int(span[2], 16) > mapping.address:
                found.add(span[3])
    return found


class Distant:
    """Hands in another process: the same methods, sent there."""

    def __init__(self, path: str, near: list[Hands]) -> None:
        self.process = Process(lambda line: _serve(line, path, near))
        self.process.hear()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self.process.ask((method, arguments))

    def attempt_and_die(self, method: str, *arguments: Any) -> Outcome | None:
        """`attempt`, by a process that is going to die; None when it has."""
        return self.do_and_die("attempt", method, *arguments)

    def do_and_die(self, *call: Any) -> Any:
        """Do something that the process may die over; None when it has."""
        self.process.say((call[0], call[1:]))
        try:
            return self.process.hear()
        except AssertionError:
            if self.process.wait() != -9:
                raise
            return None

    def end(self) -> None:
        self.process.kill()


def _serve(line: Line, path: str, near: list[Hands]) -> None:
    for hands in near:  # inherited, and not ours to use
        hands.close()
    hands = Hands(path)
    line.say()
    while True:
        method, arguments = line.hear()
        line.say(getattr(hands, method)(*arguments))
