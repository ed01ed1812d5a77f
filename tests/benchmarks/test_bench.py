"""The comparisons as users run them: rows with all their fields, and nothing left behind. Not how fast anything is."""

import ast
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import onecopy.benchmarks
from onecopy.benchmarks import NAMES, harness

FOLDER = Path(onecopy.benchmarks.__file__).parent
PROGRAM = [sys.executable, "-c", "from onecopy.cli.main import run; run()", "bench"]
FIELDS = {field.name for field in dataclasses.fields(harness.Row)}
NUMBERS = (int, float)


def start(*words, **options):
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TERM": "xterm"}, **options
    )


def finish(process, status=0):
    out, err = process.communicate()
    assert process.returncode == status, err
    assert left_behind(process.pid) == []
    return out, err


def left_behind(pid):
    """Folders of a benchmark's process in /dev/shm, run-time files of pools in them, and what it has mounted."""
    mark = f"{harness.SHM}/onecopy_bench_{pid}_"
    found = [name for name in os.listdir(harness.SHM) if f"{harness.SHM}/{name}".startswith(mark)]
    for path in Path(harness.SHM).glob("onecopy-*"):
        try:
            with open(path, "rb") as file:
                head = file.read(4096)
        except FileNotFoundError:  # another test's
            continue
        found += [path.name] if mark.encode() in head else []
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if mark in line]
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        found += [line for line in path.read_text().splitlines() if mark in line]
    return found


def check(row):
    assert row.keys() == FIELDS
    assert row["question"] and row["unit"]
    for name in ("ours", "against", "ratio"):
        assert row[name] is None or (isinstance(row[name], NUMBERS) and row[name] >= 0)
    assert row["ours"] is not None or row["skipped"]
    if row["met"] is None:
        assert not row["reach"] or row["skipped"]
    else:
        assert row["reach"] and row["ours"] is not None


def test_every_file_is_on_the_list():
    parts = {
        "comparison",
        "document",
        "files",
        "growth",
        "harness",
        "limits",
        "pictures",
        "traces",
        "ways",
        "workers",
        "__init__",
    }
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, *parts}


@pytest.mark.parametrize("name", NAMES)
def test_each_asks_a_question(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    assert ast.get_docstring(tree).partition("\n")[0].endswith("?")


def test_list():
    out, _ = finish(start(*PROGRAM, "--list"))
    assert [line.split()[0] for line in out.splitlines()] == list(NAMES)
    out, _ = finish(start(*PROGRAM, "--list", "--json", "put"))
    found = json.loads(out)
    assert found["schema"] == 1
    assert [one["name"] for one in found["benchmarks"]] == ["put"]


def test_a_name_that_is_none_of_them():
    out, err = finish(start(*PROGRAM, "put", "nonsense"), status=2)
    assert out == ""
    assert "nonsense" in err and "Traceback" not in err


def test_the_quick_ones_as_json():
    names = ["clone", "snapshot", "put", "memory", "stores", "first_store"]
    out, err = finish(start(*PROGRAM, *names, "--quick", "--json"))
    assert err == ""  # progress is for terminals
    found = json.loads(out)
    assert (found.pop("schema"), found.pop("verb"), found.pop("quick")) == (1, "bench", True)
    rows = found.pop("rows")
    assert found.pop("machine").keys() >= {"kernel", "cores", "load before"}
    assert found.pop("comparisons") == []
    assert not found
    assert list(dict.fromkeys(row.pop("benchmark") for row in rows)) == names
    for row in rows:
        check(row)


def test_as_a_table():
    out, err = finish(start(*PROGRAM, "first_read", "map_fragmented", "--quick"))
    assert err == ""
    assert "every byte" in out and "at least 0.9 times" in out
    assert "the same for each VMA" in out and "reported" in out


@pytest.mark.parametrize(
    "name",
    ["clone_fragmented", "directory", "open_pool", "dedupe", "private_store", "shootdown", "parallel_stores", "replacement"],
)
def test_each_file_runs_alone(name):
    out, err = finish(start(sys.executable, str(FOLDER.resolve() / f"{name}.py"), "--quick", "--json"))
    assert err == ""
    found = json.loads(out)
    assert (found["schema"], found["quick"]) == (1, True)
    for row in found["rows"]:
        check(row)


def test_alone_as_text():
    out, err = finish(start(sys.executable, str(FOLDER.resolve() / "map_fragmented.py"), "--quick"))
    assert err == ""
    assert "us for each VMA" not in out and "the same for each VMA" in out


@pytest.mark.parametrize("name", ["memory", "dedupe", "shootdown"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_interrupted(name, number):
    process = start(*PROGRAM, name)
    deadline = time.monotonic() + 20
    while len(left_behind(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_behind(process.pid)
    process.send_signal(number)
    finish(process, status=128 + number)


def test_what_this_machine_cannot_do_is_skipped(monkeypatch):
    from onecopy.benchmarks import dedupe, snapshot, stores

    monkeypatch.setattr(harness, "program", lambda name: None)
    rows = snapshot.measure(quick=True) + stores.measure(quick=True)
    assert all(row.ours for row in rows)
    assert all(row.against is None and "not installed" in row.skipped for row in rows)
    monkeypatch.setattr(harness, "available_memory", lambda: 0)
    for row in dedupe.measure(quick=True):
        assert row.ours is None and row.met is None
        assert "of memory" in row.skipped
