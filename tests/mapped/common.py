"""What the tests of mapped stores share: contents to tell pages apart by, and what must hold when all mappings have ended."""

import os
import random

import onecopy

from ..multiproc.processes import Line

PAGE = onecopy.PAGE


def content(pages: int, seed: int = 0) -> bytes:
    """Return bytes that differ from page to page and from seed to seed."""
    return random.Random(seed * 1_000_003 + pages).randbytes(pages * PAGE)


def counter(fs: onecopy.FileSystem, name: str) -> int:
    """Return a counter of the run-time file."""
    return int(fs._mount.runtime.counter(name))


def assert_sound(fs: onecopy.FileSystem) -> None:
    """The check finds nothing, and after a sync each frame is free or reached: none is left in between (S6)."""
    assert fs.check().findings == []
    fs.chmod("/", 0o755)  # without any change a sync would have nothing to do
    fs.sync()
    fs.sync()
    report, info = fs.check(), fs.info()
    assert report.findings == []
    assert info.used_pages == report.counted["used_pages"], "frames that nothing reaches"
    assert (info.used_pages + info.free_pages, info.waiting_pages, info.pinned_pages) == (info.pages, 0, 0)


def assert_all_ended(fs: onecopy.FileSystem) -> None:
    """`assert_sound`, and nobody but this handle is there, with no address space and no frame held by a fault."""
    assert_sound(fs)
    spaces = fs._mount.spaces
    left = [(spaces.key(n), spaces.state(n), spaces.is_mapped(n), spaces.is_dirty(n)) for n in spaces.with_entries()]
    assert left == [], "address spaces (key, state, mapped, dirty)"
    assert (counter(fs, "held"), counter(fs, "strays")) == (0, 0)
    assert {user.pid for user in fs.info().users} == {os.getpid()}


def asked(line: Line) -> bool:
    """Return whether the test has said something to this process."""
    return line._pipe.poll()
