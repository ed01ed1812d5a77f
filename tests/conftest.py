"""Fixtures: pools that leave nothing behind, whatever a test does to them."""

import os
import secrets
from collections.abc import Callable, Iterator

import pytest

import onecopy

SHM = "/dev/shm"


def forget(path: str) -> None:
    """Delete a pool and its run-time files, also when it is damaged, in use, or gone."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    marker = f"-{status.st_dev:x}.{status.st_ino:x}"
    for name in os.listdir(SHM):
        if name.startswith("onecopy-") and name.removesuffix(".lock").endswith(marker):
            os.unlink(os.path.join(SHM, name))
    os.unlink(path)


@pytest.fixture
def new_path() -> Iterator[Callable[[], str]]:
    """A maker of fresh pool paths in /dev/shm."""
    made: list[str] = []

    def make() -> str:
        made.append(f"{SHM}/test-{os.getpid()}-{secrets.token_hex(4)}.pool")
        return made[-1]

    yield make
    for path in made:
        forget(path)


@pytest.fixture
def pool_path(new_path: Callable[[], str]) -> str:
    """A path in /dev/shm for a pool that does not exist yet."""
    return new_path()


@pytest.fixture
def pool(pool_path: str) -> Iterator[onecopy.FileSystem]:
    """An open, empty pool of 64 MiB, checked at the end."""
    onecopy.format(pool_path, "64M")
    fs = onecopy.open(pool_path)
    yield fs
    if not fs.closed:
        findings = fs.check().findings
        fs.close()
        assert not findings


@pytest.fixture(scope="session", autouse=True)
def _nothing_left() -> Iterator[None]:
    """No run leaves anything in /dev/shm."""
    before = set(os.listdir(SHM))
    yield
    mine = {name for name in set(os.listdir(SHM)) - before if name.startswith((f"test-{os.getpid()}-",))}
    assert not mine, f"left behind in {SHM}: {sorted(mine)}"
