"""Fixtures: pools that leave nothing behind, whatever a test does to them."""

import os
import secrets
from collections.abc import Callable, Iterator

import pytest

import onecopy

SHM = "/dev/shm"
_CACHE = 1024  # pages: less than most tests store


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--policy shared`: pools that tests make in their own process are used through a small cache."""
    parser.addoption("--policy", choices=("dax", "shared", "per-inode"), default="dax", help="of the pools that tests make")


@pytest.fixture(scope="session", autouse=True)
def _policy(request: pytest.FixtureRequest) -> Iterator[None]:
    policy = request.config.getoption("--policy")
    if policy == "dax":
        yield
        return
    from onecopy.fs import lifecycle

    plain = lifecycle._cache_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lifecycle,
            "_cache_of",
            lambda device, size, kind: (policy, _CACHE) if (device, size, kind) == ("direct", None, None) else plain(device, size, kind),
        )
        yield


def forget(path: str) -> None:
    """Delete a pool and its run-time files, also when it is damaged, in use, or gone."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    marker = f"-{status.st_dev:x}.{status.st_ino:x}"
    for name in os.listdir(SHM):
        if name.startswith("onecopy-") and name.split(marker)[-1] in ("", ".lock", ".cache", ".frames") and marker in name:
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
