"""Hands that do things to a pool: in this process or in another one, by the same words."""

import re
from collections.abc import Callable
from typing import Any

import onecopy

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

    def map(self, key: int, path: str) -> Outcome:
        try:
            self.maps[key] = self.fs.map(path)
        except onecopy.NoSpace:
            return "full", None
        except OSError as error:
            return "error", error.errno
        return "ok", self.look(key)

    def look(self, key: int) -> bytes:
        """Return what a mapping shows, after making sure that nobody can store into it (S1)."""
        mapping = self.maps[key]
        if len(mapping):
            assert protections(mapping) == {"r--"}, "S1"
        return mapping[:]

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
        self.process.say(("attempt", (method, *arguments)))
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
