"""Fixtures of the cache layer's tests: an attachment whose frames the tests may do with as they like."""

from collections.abc import Callable, Iterator

import pytest

import onecopy
from onecopy.blkcache.spaces import Spaces
from onecopy.daxemu.units import PAGE
from onecopy.fs.mount import Mount

from ..multiproc.processes import start

__all__ = ["start"]


@pytest.fixture
def small(new_path: Callable[[], str]) -> str:
    """The path of a formatted pool of 4 MiB: 1,024 frames."""
    path = new_path()
    onecopy.format(path, "4M")
    return path


@pytest.fixture
def mount(small: str) -> Iterator[Mount]:
    """An attachment to the pool `small`."""
    with onecopy.open(small) as fs:
        yield fs._mount


@pytest.fixture
def fs(small: str) -> Iterator[onecopy.FileSystem]:
    """A handle on the pool `small`, with the files /a and /b of five pages each."""
    with onecopy.open(small) as handle:
        for name in "ab":
            handle.write(f"/{name}", name.encode() * 5 * PAGE)
        yield handle
        assert handle.check().findings == []


@pytest.fixture
def spaces(mount: Mount) -> Iterator[Spaces]:
    """The address spaces of an empty pool, with the transaction lock held."""
    with mount.lock:
        yield mount.spaces
