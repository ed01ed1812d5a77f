"""The demo as users run it: what it reports, and what it leaves behind."""

import errno
import json
import os
import pty
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

import onecopy
from onecopy.cli import demo_input, demo_ways
from onecopy.cli.main import app
from onecopy.cli.measure import PAGE

RUN_TIME = "/dev/shm"
CAN_MOUNT = os.geteuid() == 0 and shutil.which("mkfs.xfs", path=f"{os.defpath}:/sbin:/usr/sbin:{os.environ['PATH']}")
needs_xfs = pytest.mark.skipif(not CAN_MOUNT, reason="needs root and mkfs.xfs")


def left_behind(pools):
    """List what is left of pool and scratch folder; a mount or a run-time file (it names its pool) must not be."""
    assert str(pools) not in Path("/proc/self/mounts").read_text()
    for path in Path(RUN_TIME).glob("onecopy-*"):
        with suppress(FileNotFoundError), open(path, "rb") as file:  # other pools come and go meanwhile
            assert os.fsencode(pools) not in file.read(2 * PAGE)
    return os.listdir(pools)


def finish(process, status=0):
    out, err = process.communicate()
    assert process.returncode == status, err
    return json.loads(out) if out else None


def way(report, name):
    return next(way for way in report["ways"] if way["way"] == name)


def test_the_default_input(start, pools, tmp_path):
    report = finish(start("--size", "4M", "--processes", 2, "--clones", 2, "--json"))
    assert (report["schema"], report["ok"], report["clones"], report["processes"]) == (1, True, 2, 2)
    files, one = report["input"]["files"], report["input"]["footprint"]
    assert files > 1000

    plain, kernel, ours = report["ways"]
    assert plain["physical"]["bytes"] >= 2 * one
    assert kernel["physical"]["bytes"] >= 2 * one
    assert ours["read"]["hashes"] == 2 * files
    assert ours["base_hashes"] == files
    # Files that live inside their inode record have no page to map.
    assert 0.9 * one < ours["physical"]["bytes"] <= one
    assert ours["stored"] < 1.2 * one

    rewriting = ours["rewriting"]
    assert 0.019 * report["input"]["bytes"] < rewriting["bytes"] < 0.021 * report["input"]["bytes"]
    assert rewriting["after"]["hashes"] == 2 * files
    grown = rewriting["after"]["physical"]["bytes"] - ours["physical"]["bytes"]
    assert 0.9 * rewriting["bytes"] < grown < 0.05 * one
    assert left_behind(pools) == []
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_tree_and_more_clones_than_processes(start, tree, pools, tmp_path):
    report = finish(start("--input", tree, "--processes", 2, "--clones", 5, "--json"))
    ours = way(report, "onecopy")
    assert report["ok"]
    assert ours["read"]["hashes"] == 5 * report["input"]["files"]
    assert ours["physical"]["bytes"] <= report["input"]["footprint"]
    assert left_behind(pools) == []


def test_a_file_in_words(start, pools, tmp_path):
    (tmp_path / "f").write_bytes(os.urandom(1 << 20))
    process = start("--input", tmp_path / "f", "--processes", 2, "--clones", 2, "--png", "")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    lines = out.decode().splitlines()
    assert "2 clones of an array of 1.0 MiB" in lines[0]
    assert any(line.startswith("verified") and "every one right" in line for line in lines)
    assert not (tmp_path / "demo.png").exists()
    assert left_behind(pools) == []


@needs_xfs
def test_the_kernels_clones_are_measured(start, tree, pools, tmp_path):
    report = finish(start("--input", tree, "--processes", 2, "--clones", 3, "--json"))
    kernel = way(report, "kernel page cache")
    assert kernel["skipped"] is None
    assert kernel["physical"]["source"] != "computed"
    assert kernel["physical"]["bytes"] >= 2.9 * report["input"]["footprint"]
    assert kernel["read"]["hashes"] == 3 * report["input"]["files"]
    assert kernel["read"]["wrong"] == []
    assert left_behind(pools) == []


def test_keep_leaves_the_pool_alone(start, tree, pools, tmp_path):
    report = finish(start("--input", tree, "--processes", 1, "--clones", 1, "--keep", "--json"))
    assert os.listdir(pools) == ["p"]
    with onecopy.open(report["pool"], "r") as fs:
        assert fs.read("/base/tree/tiny") == b"tiny"
        assert fs.readlink("/clone-1/tree/sub/link") == "page"
    onecopy.remove(report["pool"])
    assert left_behind(pools) == []


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("plain copies: map and hash", signal.SIGINT),
        pytest.param("kernel page cache: map and hash", signal.SIGINT, marks=needs_xfs),
        pytest.param("kernel page cache: map and hash", signal.SIGTERM, marks=needs_xfs),
        ("onecopy: put", signal.SIGINT),
        ("onecopy: map and hash", signal.SIGINT),
        ("onecopy: map and hash", signal.SIGTERM),
    ],
)
def test_a_signal_leaves_nothing_behind(start, pools, tmp_path, step, number):
    (tmp_path / "f").write_bytes(os.urandom(16 << 20))
    screen, terminal = pty.openpty()
    process = start("--input", tmp_path / "f", "--processes", 2, "--clones", 2, stderr=terminal)
    os.close(terminal)
    shown = b""
    while step.encode() not in shown:
        shown += os.read(screen, 4096)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    process.communicate()
    os.close(screen)
    assert process.returncode == 128 + number
    assert left_behind(pools) == []


def test_a_pool_that_is_there_already_stays(start, pools, tmp_path):
    (pools / "p").write_text("mine")
    (tmp_path / "f").write_bytes(b"x")
    error = finish(start("--input", tmp_path / "f", "--json"), status=2)["error"]
    assert error["errno"] == "EEXIST"
    assert (pools / "p").read_text() == "mine"
    assert left_behind(pools) == ["p"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--clones", "2", "--processes", "3"],
        ["--input", "/no/such/thing"],
        ["--png", "/no/such/folder/p.png"],
        ["--size", "nonsense"],
        ["--input", "/"],
    ],
)
def test_wrong_use_ends_with_2(start, pools, tmp_path, wrong):
    assert "error" in finish(start(*wrong, "--json"), status=2)
    assert left_behind(pools) == []


def run_here(capsys, *args):
    with pytest.raises(SystemExit) as end:
        app(["demo", "--processes", "1", "--clones", "1", "--png", "", "--json", *map(str, args)])
    return end.value.code, json.loads(capsys.readouterr().out)


def test_a_failed_comparison_ends_with_1(tmp_path, capsys, monkeypatch):
    (tmp_path / "f").write_bytes(b"what was promised")
    named = demo_input.named_input

    def changed_meanwhile(path):
        data = named(path)
        (tmp_path / "f").write_bytes(b"what was cloned..")
        return data

    monkeypatch.setattr(demo_input, "named_input", changed_meanwhile)
    status, report = run_here(capsys, "--input", tmp_path / "f", "--pool", tmp_path / "p")
    assert (status, report["ok"]) == (1, False)
    assert way(report, "onecopy")["read"]["wrong"] == ["/clone-1/array"]
    assert way(report, "onecopy")["base_wrong"] == ["/base/array"]
    assert os.listdir(tmp_path) == ["f"]


def test_without_room_copies_are_computed_and_said_to_be(tmp_path, capsys, monkeypatch):
    (tmp_path / "f").write_bytes(b"x" * 3 * PAGE)
    monkeypatch.setattr(demo_ways, "_shortage", lambda needed, directory: "not today" if needed == 3 * PAGE else None)
    status, report = run_here(capsys, "--input", tmp_path / "f", "--pool", tmp_path / "p")
    assert status == 0
    assert any("not today" in reason for reason in report["skipped"])
    assert way(report, "plain copies")["physical"] == {
        "bytes": 3 * PAGE,
        "source": "computed",
        "pss": None,
        "pss_rounding": None,
        "page_tables": None,
    }


def test_without_room_for_the_pool_nothing_is_begun(tmp_path, capsys, monkeypatch):
    (tmp_path / "f").write_bytes(b"x")
    monkeypatch.setattr(demo_ways, "_shortage", lambda needed, directory: "no room")
    status, report = run_here(capsys, "--input", tmp_path / "f", "--pool", tmp_path / "p")
    assert (status, report["error"]["errno"]) == (2, errno.errorcode[errno.ENOSPC])
    assert os.listdir(tmp_path) == ["f"]


def test_an_xfs_that_cannot_be_made_is_skipped_visibly(tmp_path, capsys, monkeypatch):
    (tmp_path / "f").write_bytes(b"x" * PAGE)
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    status, report = run_here(capsys, "--input", tmp_path / "f", "--pool", tmp_path / "p")
    assert status == 0
    assert any(reason.startswith("page cache of reflinks not measured") for reason in report["skipped"])
    assert way(report, "kernel page cache")["physical"]["source"] == "computed"
