"""Fixtures of the cache layer's tests: an attachment whose frames the tests may do with as they like."""

from collections.abc import Callable, Iterator

import pytest

import onecopy
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
