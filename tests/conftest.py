"""Fixtures: pools that leave nothing behind, whatever a test does to them."""

import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import onecopy
from onecopy.daxemu.pool import POLICIES
from onecopy.fs import lifecycle

SHM = "/dev/shm"
_CACHE = 1024  # pages: less than most tests store


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--policy shared`: pools that tests make in their own process are used through a small cache."""
    parser.addoption(
        "--policy", choices=POLICIES, help="of the pools that tests make; dax, and of some tests all, when left out"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `every_policy` run once for each, unless one is asked for."""
    if metafunc.config.getoption("--policy") is None and metafunc.definition.get_closest_marker("every_policy"):
        metafunc.fixturenames.append("policy")
        metafunc.parametrize("policy", POLICIES, indirect=True)


@pytest.fixture(scope="session", autouse=True)
def _in_force(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The policy in force, alone in a list: what is formatted without a word about a device gets it."""
    in_force = [request.config.getoption("--policy") or "dax"]
    plain = lifecycle._cache_of

    def cached(*wanted: Any) -> tuple[str, int]:
        return (in_force[0], _CACHE) if in_force != ["dax"] and wanted == (None, None, None) else plain(*wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "_cache_of", cached)
        yield in_force


@pytest.fixture(autouse=True)
def policy(request: pytest.FixtureRequest, _in_force: list[str]) -> Iterator[str]:
    """The policy of the pools that this test makes in its own process."""
    before = _in_force[0]
    _in_force[0] = getattr(request, "param", before)
    wanted = request.node.get_closest_marker("policies")
    try:
        if wanted is not None and _in_force[0] not in wanted.args:
            pytest.skip(f"policy {_in_force[0]}: {wanted.kwargs['reason']}")
        yield _in_force[0]
    finally:
        _in_force[0] = before


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
