"""Any operation on mapped files, by any process: all see at once what the model says (S3, S4), nothing leaks (S6)."""

import pytest

import onecopy

from .common import assert_all_ended, content
from .model import File, Model


def run(path, start, seed, steps, count):
    onecopy.format(path, "16M")
    with onecopy.open(path) as fs:
        fs.sync()
    model = Model(path, seed, count, start)
    for name, pages in (("/a", 40), ("/b", 3)):
        model.any("write", name, content(pages, seed))
        model.files[name] = File()
        model.files[name].grow(pages * onecopy.PAGE)
        model.files[name].bytes[:] = content(pages, seed)
    try:
        for _ in range(steps):
            model.step()
            model.verify()
        assert model.any("check") == []
        model.end()
        with onecopy.open(path) as fs:
            for name, file in model.files.items():
                assert fs.read(name) == file.bytes[: file.size], name
            assert_all_ended(fs)
    except BaseException as error:
        error.add_note("\n".join(model.log))
        raise


@pytest.mark.parametrize("seed", range(6))
def test_one_process(pool_path, start, seed):
    run(pool_path, start, seed, 120, 1)


@pytest.mark.parametrize("seed", range(6))
def test_three_processes(pool_path, start, seed):
    run(pool_path, start, 100 + seed, 120, 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_long(pool_path, start, seed):
    run(pool_path, start, 1000 + seed, 600, 1 + seed % 4)
