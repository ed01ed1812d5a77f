"""Fixtures of the lowest layer's tests: a pool file without a file system's handle on it, processes."""

from collections.abc import Callable, Iterator

import pytest

import onecopy
from onecopy.daxemu.pool import Pool

from ..multiproc.processes import start

__all__ = ["start"]


@pytest.fixture
def raw(pool_path: str) -> Iterator[Pool]:
    """The pool file of 4 MiB alone, open for writing."""
    onecopy.format(pool_path, "4M")
    pool = Pool(pool_path, writable=True)
    yield pool
    pool.close()


@pytest.fixture
def small(new_path: Callable[[], str]) -> str:
    """The path of a formatted pool of 4 MiB."""
    path = new_path()
    onecopy.format(path, "4M")
    return path
