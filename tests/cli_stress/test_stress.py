"""The stress test as users run it: what it reports, what it finds, and what it leaves behind."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import typer

import onecopy
from onecopy.cli.main import app
from onecopy.cli.stress_board import KINDS
from onecopy.cli.stress_ops import OPERATIONS, WEIGHTS
from onecopy.cli.stress_page import PAGE, Content, Stamp, page_words

from .conftest import family

SHM = Path("/dev/shm")


def left_behind(process, before) -> set[str]:
    """Return what is new in shared memory and names the run's process, or its pool."""
    assert not family(process.pid)
    return {name for name in {*os.listdir(SHM)} - before if f"_{process.pid}_" in name}


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out, err


def test_a_short_run(start):
    before = {*os.listdir(SHM)}
    process = start("--operations", 400, "--processes", 3, "--seed", 5, "--json")
    out, err = finish(process)
    assert not err
    report = json.loads(out)
    assert {"schema": 1, "verb": "stress", "ok": True, "seed": 5, "processes": 3, "violations": []}.items() <= report.items()
    assert sum(report["operations"].values()) >= 400
    assert {*report["operations"]} <= {*KINDS}
    assert {*report["operations_per_second"]} == {*report["operations"]}
    assert {"store", "load", "read", "write", "clone_range"} <= {*report["operations"]}
    assert report["pages_checked"] > 1000 and report["kills"] == 0 and report["seconds"] > 0
    assert {"faults", "shootdowns", "shootdown_median_us", "shootdown_p99_us", "skipped", "backed_out"} <= {*report}
    assert not left_behind(process, before)


def test_text_names_the_seed(start):
    out, _ = finish(start("--operations", 50, "--processes", 2))
    assert "no rule was broken" in out
    assert any(line.split()[:1] == ["seed"] and line.split()[1].isdigit() for line in out.splitlines())


def test_calls_alone(start):
    out, _ = finish(start("--operations", 200, "--processes", 2, "--no-mapped", "--json"))
    assert not {"store", "load", "map"} & {*json.loads(out)["operations"]}


def test_some_kinds_only(start):
    out, _ = finish(start("--operations", 40, "--processes", 2, "--only", "write,clone", "--json"))
    assert {*json.loads(out)["operations"]} == {"write", "clone"}


def test_killing(start):
    before = {*os.listdir(SHM)}
    process = start("--seconds", 4, "--processes", 3, "--kill", "--json", "--seed", 2)
    report = json.loads(finish(process)[0])
    assert report["ok"] and report["kills"] > 3
    assert not left_behind(process, before)


@pytest.mark.parametrize("policy", ["shared", "per-inode"])
@pytest.mark.parametrize("kill", [[], ["--kill"]], ids=["", "killing"])
def test_through_a_small_cache(start, policy, kill):
    before = {*os.listdir(SHM)}
    size = ["--operations", 300] if not kill else ["--seconds", 4]
    process = start(*size, "--processes", 3, "--policy", policy, "--cache-size", "1M", "--json", "--seed", 3, *kill)
    report = json.loads(finish(process)[0])
    assert report["ok"] and report["pages_checked"] > 500
    assert not left_behind(process, before)


def test_a_cache_is_of_the_pool_that_is_made(start, pool):
    for option, value in (("--policy", "shared"), ("--cache-size", "1M")):
        assert option in finish(start(pool.path, option, value), status=2)[1]
    assert "policy 'other'" in finish(start("--policy", "other"), status=2)[1]
    assert "at least 256" in finish(start("--cache-size", "1K"), status=2)[1]


def test_in_a_pool_of_the_user(start, pool):
    pool.write("/mine", b"mine")
    finish(start(pool.path, "--operations", 100, "--processes", 2))
    assert pool.listdir("/") == ["mine"]
    assert pool.read("/mine") == b"mine"


# ---------------------------------------------------------------- findings


def forge(pool, process, forged):
    """Store pages behind the board's back, until the run is over."""
    while len(family(process.pid)) < 3:
        time.sleep(0.01)
    time.sleep(1)  # until there is a history
    while process.poll() is None:
        for folder in (name for name in pool.listdir("/") if name.startswith("stress-")):
            for page in range(0, 64, 3):
                try:
                    if pool.exists(f"/{folder}/file-0"):
                        pool.write(f"/{folder}/file-0", forged, page * PAGE)
                except FileNotFoundError:
                    pass
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("forged", "rule"),
    [
        (page_words(Content(Stamp(9999, 1, 9999, 1))).tobytes(), "S4"),
        (b"bytes of nobody." * (PAGE // 16), "S4, S5"),
    ],
    ids=["another file's page", "nobody's bytes"],
)
def test_a_forged_page_is_found(start, pool, forged, rule):
    process = start(pool.path, "--seconds", 60, "--processes", 2, "--json", "--only", "write,read,punch")
    forge(pool, process, forged)
    report = json.loads(finish(process, status=1)[0])
    assert not report["ok"]
    found = next(one for one in report["violations"] if one["rule"] == rule)
    assert "of file" in found["message"] and "legal" in found["message"]
    assert all(" s  writer " in line for one in report["violations"] for line in one["history"])
    assert any(one["history"] for one in report["violations"])
    assert pool.listdir("/") == []
    assert not family(process.pid)


def test_findings_as_text(start, pool):
    process = start(pool.path, "--seconds", 60, "--processes", 2, "--seed", 77, "--only", "write,read")
    forge(pool, process, b"bytes of nobody." * (PAGE // 16))
    out, _ = finish(process, status=1)
    assert "\nS4, S5: " in out
    assert out.rstrip().endswith("again: --seed 77")


# -------------------------------------------------------------- coming, going


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(start, number):
    before = {*os.listdir(SHM)}
    process = start("--seconds", 60, "--processes", 2, "--kill")
    deadline = time.monotonic() + 60
    while len(family(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = finish(process, status=128 + number)
    assert "Traceback" not in err
    assert not left_behind(process, before)


def test_workers_end_when_nobody_watches_over_them(start, pool):
    process = start(pool.path, "--seconds", 60, "--processes", 2)
    while len(family(process.pid)) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while family(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not family(process.pid)


def test_a_worker_that_hangs_is_named(start):
    before = {*os.listdir(SHM)}
    process = start("--seconds", 100, "--processes", 2, "--patience", 1, "--json", "--only", "write,read")
    while len(family(process.pid)) < 3:
        time.sleep(0.01)
    worker = max(family(process.pid))
    os.kill(worker, signal.SIGSTOP)
    report = json.loads(finish(process, status=1)[0])
    found = report["violations"][0]
    assert found["rule"] == "S8" and "has made no progress for 1 s" in found["message"]  # it, or who waits for it
    assert f"process {worker}: " in found["message"] and "stress_work.py" not in found["message"]
    assert not left_behind(process, before)


@pytest.mark.parametrize(
    "args", [["--processes", "0"], ["--seconds", "0"], ["--only", "store,nonsense"], ["/nowhere/p.pool"], ["--size", "x"]]
)
def test_wrong_use(start, args):
    out, err = finish(start(*args), status=2)
    assert not out
    assert err.startswith("onecopy: ") and err.count("\n") == 1


def test_help(start):
    out, _ = finish(start("--help"))
    options = typer.main.get_command(app).commands["stress"].params
    assert all(name in out for option in options for name in option.opts if name.startswith("--"))
    assert "Example: onecopy stress" in out


def test_every_kind_is_known_to_the_board():
    assert {*OPERATIONS} | {"fork"} == {*WEIGHTS} <= {*KINDS}
    assert onecopy.PAGE == PAGE
