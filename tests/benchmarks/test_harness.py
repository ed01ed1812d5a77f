"""What the figures rest on: the order of runs, ratios and aims, and places that are gone afterwards."""

import multiprocessing
import os
from operator import methodcaller
from pathlib import Path

import pytest

from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import MiB, Reach
from onecopy.benchmarks.workers import ask, workers


def test_runs_alternate_and_both_orders_come_up():
    order = []

    def work(name, took):
        return lambda: order.append(name) or [took]

    times = harness.alternate(4, work("a", 1), None, work("b", 2))
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert times == [[1] * 4, [], [2] * 4]


@pytest.mark.parametrize(
    ("reach", "ours", "against", "met"),
    [
        (Reach("ratio", "at most", 3), 9.0, 3.0, True),
        (Reach("ratio", "at most", 3), 9.1, 3.0, False),
        (Reach("ratio", "at least", 0.7), 7.0, 10.0, True),
        (Reach("ratio", "at least", 0.7), 6.9, 10.0, False),
        (Reach("ratio", "at least", 1), 5.0, 0.0, True),
        (Reach("ratio", "at least", 1), 5.0, None, None),
        (Reach("ours", "under", 1), 0.9, None, True),
        (Reach("ours", "under", 1), 1.0, 5.0, False),
        (Reach("ours", "at most", 1.02), 1.02, 1.0, True),
        (Reach("ours", "at most", 1.02), None, 1.0, None),
        (None, 1.0, 2.0, None),
    ],
)
def test_aims(reach, ours, against, met):
    row = harness.row("q", "p", ours, against, "us", reach=reach)
    assert row.met is met
    assert row.ratio == (ours / against if ours and against else None)
    assert bool(row.reach) == (reach is not None)


def test_figures_of_nothing_are_missing():
    assert harness.median([]) is None
    assert harness.speed(1, []) is None
    assert harness.scaled(None, 2) is None
    assert harness.spread(1, a=[], b=[1]) == ""
    assert harness.figure(None) == "-"


@pytest.mark.parametrize(
    ("names", "reason"),
    [({"geteuid": lambda: 1000}, "only root can mount"), ({"program": lambda name: None}, "is not installed")],
    ids=["user", "no mkfs"],
)
def test_without_root_or_tools_a_kernel_file_system_is_missing(monkeypatch, names, reason):
    for name, stand_in in names.items():
        monkeypatch.setattr(harness.os if name == "geteuid" else harness, name, stand_in)
    with harness.kernel_filesystem("xfs", 512 * MiB) as xfs:
        assert xfs.root is None
        assert reason in xfs.missing


def test_without_memory_a_kernel_file_system_is_missing(monkeypatch):
    monkeypatch.setattr(harness, "available_memory", lambda: harness.GiB)
    monkeypatch.setattr(harness, "program", lambda name: "/bin/true")
    monkeypatch.setattr(harness.os, "geteuid", lambda: 0)
    with harness.kernel_filesystem("xfs", 512 * MiB) as xfs:
        assert "of memory" in xfs.missing


def test_a_pool_is_gone_after_an_error():
    with pytest.raises(ZeroDivisionError), harness.open_pool(64 * MiB) as fs:
        path, uuid = fs.path, fs.info().uuid
        assert os.path.exists(path)
        raise ZeroDivisionError
    assert not os.path.exists(os.path.dirname(path))
    assert not list(Path(harness.SHM).glob(f"onecopy-{uuid}*"))


def test_a_kernel_file_system_is_gone_after_an_error():
    with pytest.raises(ZeroDivisionError), harness.kernel_filesystem("xfs", 512 * MiB) as xfs:
        if xfs.root is None:
            pytest.skip(xfs.missing)
        (xfs.root / "file").write_bytes(b"x")
        raise ZeroDivisionError
    assert not xfs.root.parent.exists()
    assert str(xfs.root) not in Path("/proc/self/mounts").read_text()


def test_workers_answer_and_end():
    with workers(methodcaller("send", "done"), [(), ()]) as pipes:
        assert [pipe.recv() for pipe in pipes] == ["done", "done"]
    assert multiprocessing.active_children() == []


def test_a_worker_that_ends_early_is_an_error():
    with pytest.raises(ChildProcessError, match="ended early"), workers(methodcaller("close"), [(), ()]) as pipes:
        ask(pipes, "do")
    assert multiprocessing.active_children() == []
