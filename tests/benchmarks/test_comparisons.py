"""The comparisons of many ways: figures that become tables, JSON, pictures and a document. Not how fast anything is."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import onecopy
from onecopy.benchmarks import COMPARISONS, comparison, document, growth, harness, limits, pictures, pressure, ways
from onecopy.benchmarks.comparison import Comparison, Line, Panel
from onecopy.benchmarks.files import BASE, COPIES, MEMMAP, XFS
from onecopy.benchmarks.harness import MiB, Reach

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAM = [sys.executable, "-c", "from onecopy.cli.main import run; run()", "bench"]
can_draw = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


@pytest.fixture
def invented():
    """Two kinds of panels, with a way that is missing, one that misses a figure, and lines that lie on each other."""
    lines = [
        Line("dax", [1.0, 1.0, 1.0], [0.9, 1.0, 1.0], [1.1, 1.0, 1.0], "n^0.00"),
        Line("shared", [None] * 3, skipped="not in this build"),
        Line("XFS", [1.0, 4.0, None], note="n^1.00"),
        Line("Btrfs", [1.0, 4.0, 16.0]),
        Line("somebody's | own", [1.0, 4.0, 16.0]),
    ]
    panels = [
        Panel("Memory", "copies", [1, 4, 16], lines, "clones"),
        Panel("Linear", "us", [1, 4, 16], lines, "clones", log=False),
    ]
    found = Comparison("copies", "How $much$?", "One copy.", "4 MiB", panels, quick=True, machine={"kernel": "6.18"})
    bars = [Panel("Reads", "GB/s", ["first", "again", "third"], lines, better="more")] * 3
    reach = Reach("ratio", "at most", 0.5)
    rows = [
        comparison.aim(panels[0], 4, "dax", "XFS", reach, {}),
        comparison.aim(panels[0], 4, "shared", None, reach, {"shared": "no"}),
    ]
    return [replace(found, rows=rows), replace(found, name="reads", panels=bars)]


@pytest.mark.parametrize("name", COMPARISONS)
def test_each_as_json_table_and_picture(name, tmp_path):
    words = ["--png", str(tmp_path)] if find_spec("matplotlib") else []
    done = subprocess.run([*PROGRAM, name, "--quick", "--json", *words], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    [raw] = printed["comparisons"]
    found = comparison.restored(raw)
    assert asdict(found) == asdict(comparison.restored(json.loads(json.dumps(asdict(found)))))
    assert found.name == name and found.quick and found.question.endswith("?") and found.answer and found.setting
    for panel in found.panels:
        assert panel.lines[0].way == "dax" and all(value is not None for value in panel.lines[0].values)
        assert all(line.skipped or None not in line.values for line in panel.lines)
        assert {len(line.values) for line in panel.lines} == {len(panel.cases)}
    missing = {line.way for panel in found.panels for line in panel.lines if line.skipped}
    assert all(any(reason.startswith(f"{way}: ") for reason in found.skipped()) for way in missing)
    for policy, why in ways.policies().items():
        assert not why or why in "\n".join(found.skipped())
        assert why or policy not in missing
    if words:
        assert pictures.drawn_from(tmp_path / f"{name}.png") == pictures.fingerprint(found)
    if name == "copies" and os.geteuid() == 0:  # others don't see frame numbers
        one_copy_for_many_processes(found)
    text = document.document(document.merge({}, printed))
    assert found.answer in text and f"({name}.png)" in text and "not to be quoted" in text


def one_copy_for_many_processes(found):
    """The main figure, which depends on no clock: dax stays at one copy; what the kernel shares nothing of does not."""
    [row] = [row for row in found.rows if row.question.startswith("dax")]
    assert row.met and row.ours == pytest.approx(1)
    assert found.panels[0].value(COPIES, 2) == pytest.approx(2)
    for policy, times in ((ways.SHARED, 1), (ways.PER_INODE, 2)):
        assert ways.policies()[policy] or found.panels[0].value(policy, 2) == pytest.approx(times, rel=0.02)


def test_alone_as_text():
    file = Path(comparison.__file__).resolve().parent / "reads.py"
    done = subprocess.run([sys.executable, str(file), "--quick"], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert "Reads through a mapping (GB/s; more is better)" in done.stdout
    assert "at least 0.9 times" in done.stdout


def test_a_build_without_a_cache_says_so(monkeypatch):
    monkeypatch.setattr(onecopy, "open", lambda path, mode="r+": None)
    ways.policies.cache_clear()
    try:
        found = ways.policies()
        assert not found["dax"] and all("no policy" in found[policy] for policy in ("shared", "per-inode"))
        with ways.side_by_side(["shared"], MiB, MiB) as places:
            assert places["shared"].missing == found["shared"]
    finally:
        ways.policies.cache_clear()


def test_a_build_with_a_cache_is_asked_for_it(monkeypatch):
    """Policies are passed on as they are called; one that fails is missing, with what it said."""
    real_format, real_open, asked = onecopy.format, onecopy.open, []

    def fake_format(path, size, *, device="direct", cache_size="64M", force=False):
        asked.append((device, cache_size))
        return real_format(path, size, force=force)

    def fake_open(path, mode="r+", policy=None, cache_size=None):
        if policy == "per-inode":
            raise ValueError("no such policy")
        asked.append(policy)
        return real_open(path, mode)

    monkeypatch.setattr(onecopy, "format", fake_format)
    monkeypatch.setattr(onecopy, "open", fake_open)
    ways.policies.cache_clear()
    try:
        found = ways.policies()
        assert not found["shared"] and "no such policy" in found["per-inode"]
        with ways.side_by_side(["shared"], 4 * MiB, MiB, cache_size=2 * MiB) as places, places["shared"].open() as files:
            files.clone(BASE, "clone")
            with files.map("clone") as mapped:
                assert mapped.words.nbytes == MiB
        assert asked[-3:] == [("cached", 2 * MiB), "shared", "shared"]
    finally:
        ways.policies.cache_clear()


@pytest.mark.parametrize("name", ways.NAMES)
def test_all_ways_do_the_same(name):
    with ways.side_by_side([name], 8 * MiB, MiB) as found:
        if found[name].missing:
            pytest.skip(found[name].missing)
        with found[name].open() as files:
            files.clone(BASE, "clone")
            with files.map(BASE) as base, files.map("clone", writable=True) as clone, files.reader("clone") as file:
                assert (base.words == clone.words).all()
                buffer = bytearray(4096)
                assert file.read(memoryview(buffer), 8192) == 4096
                assert buffer == clone.words.tobytes()[8192:12288]
                before = int(base.words[0])
                clone.words[0] = before ^ 1
                clone.sync()
                if name != MEMMAP:
                    assert int(base.words[0]) == before
                assert file.read(memoryview(buffer), 0) == 4096
                assert np.frombuffer(buffer, np.uint64)[0] == before ^ 1
                assert files.held(["clone"]) >= MiB
            files.unlink("clone")


def test_growth():
    assert comparison.exponent([1, 4, 16], [2, 8, 32]) == pytest.approx(1)
    assert comparison.exponent([1, 4, 16], [3, 3, 3]) == pytest.approx(0)
    assert comparison.exponent([1, 4, 16], [2, None, 512]) == pytest.approx(2)
    assert comparison.exponent([1, 4], [None, 5]) is None
    assert comparison.exponent(["a", "b"], [1, 2]) is None
    assert comparison.growth([1, 4, 16], [3, 3.0001, 2.9999]) == "n^0.00"
    assert comparison.growth([1, 4], [None, 5]) == ""
    assert growth.together({"map": [1.0]}, {"map": [2.0]})["map"] == [1.0, 2.0]


def test_figures_have_three_digits():
    found = [comparison.figure(value) for value in (None, 0, 0.01234, 1.234, 12.34, 1234.5, float("inf"))]
    assert found == ["-", "0", "0.0123", "1.23", "12.3", "1,234", "inf"]


def test_lines_are_medians_with_their_middle_half():
    line = comparison.line("dax", ["a", "b", "c"], {"a": [3, 1, 2, 5, 4], "b": [7]}, comparison.times(10))
    assert (line.values, line.low, line.high) == ([30, 70, None], [20, None, None], [40, None, None])


def test_rounds_take_turns_in_both_orders():
    order = []
    works = {way: lambda way=way: order.append(way) or {"t": len(order)} for way in "ab"}
    assert comparison.in_turn(2, works) == {"a": {"t": [1, 4]}, "b": {"t": [2, 3]}}
    assert order == ["a", "b", "b", "a"]


@can_draw
def test_pictures_are_drawn_when_their_data_changed(invented, tmp_path):
    found = document.merge({}, {"quick": True, "machine": {}} | comparison.as_json(invented[:1]))
    assert [path.name for path in document.write(found, tmp_path)] == ["benchmarks.json", "benchmarks.md", "copies.png"]
    assert [path.name for path in document.write(document.load(tmp_path), tmp_path)] == ["benchmarks.json", "benchmarks.md"]
    assert len(document.write(found, tmp_path, redraw=True)) == 3
    (tmp_path / "copies.png").write_bytes(b"nothing")
    assert pictures.drawn_from(tmp_path / "copies.png") is None


@can_draw
def test_pictures(invented, tmp_path):
    for found in invented:
        path = pictures.draw(found, tmp_path / "new")
        assert pictures.drawn_from(path) == pictures.fingerprint(found)
        assert pictures.fingerprint(replace(found, answer="Two.")) != pictures.fingerprint(found)


def test_labels_do_not_cover_each_other():
    placed = pictures._spread([(at, str(at), "") for at in (0.5, 0.5, 0.51, 1.02, 1.02, 0.0)])
    heights = [at for at, _, _ in placed]
    assert all(above - below >= pictures.APART * 0.999 for below, above in pairwise(heights))
    assert max(heights) <= 1.03


def test_without_matplotlib(monkeypatch, tmp_path, invented):
    from onecopy.cli import draw

    monkeypatch.setattr(draw, "available", lambda: False)
    with pytest.raises(OSError, match="onecopy\\[plot\\]"):
        pictures.draw(invented[0], tmp_path)


def test_order_of_reads():
    for case in pressure.CASES:
        order = pressure.order(case, 1024, turn=1)
        assert len(order) == 1024 and set(order) <= set(range(1024))
        assert (order == pressure.order(case, 1024, turn=1)).all()
    assert len(np.unique(pressure.order("zipf", 1024, turn=1))) < 900
    assert (pressure.order("zipf", 1024, turn=1) != pressure.order("zipf", 1024, turn=2)).any()
    assert (pressure.order("mixed", 1024, 1)[:64] == np.arange(64)).all()


@pytest.mark.parametrize(("names", "reason"), [({"geteuid": lambda: 1000}, "only root")], ids=["user"])
def test_without_root_a_limit_is_missing(monkeypatch, names, reason):
    for name, stand_in in names.items():
        monkeypatch.setattr(limits.os, name, stand_in)
    with pytest.raises(harness.SkippedError, match=reason), limits.group():
        pass
    found = pressure._of_way(XFS, MiB, 2 * MiB, 1)
    assert all(reason in line.skipped for line in found.values())


def test_a_limit_holds():
    program = """
import mmap, sys
from onecopy.benchmarks import limits
group = limits.Group(sys.argv[1], int(sys.argv[2]))
group.join()
group.limit(8 << 20)
with open(sys.argv[3], "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
    for _ in range(2):
        sum(mapping[::4096])
print(group.used())
"""
    try:
        with limits.group() as group, harness.kernel_filesystem("xfs", 384 * MiB) as xfs:
            if xfs.root is None:
                pytest.skip(xfs.missing)
            path = xfs.root / "file"
            harness.write_random(path, 32 * MiB)
            harness.sync(xfs.root)
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            words = [sys.executable, "-c", program, group.path, str(group.version), str(path)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            assert int(done.stdout) < 12 * MiB
    except harness.SkippedError as reason:
        pytest.skip(str(reason))
    assert not os.path.exists(group.path)


def test_a_process_that_dies_is_a_figure_that_is_missing(monkeypatch):
    @contextmanager
    def dying(*_):
        raise ChildProcessError
        yield

    monkeypatch.setattr(pressure, "workers", dying)
    line = pressure._of_door(ways.Way("shared"), "mapping", None, MiB, 1)
    assert "did not survive" in line.skipped and line.values == [None] * 3


def test_what_was_printed_is_taken_over(invented):
    row = {"benchmark": "put", **asdict(harness.row("q", "p", 1, 2, "us", note="a | b"))}
    printed = {"quick": False, "machine": {"kernel": "1"}, "rows": [row]} | {"comparisons": []}
    found = document.merge({}, printed)
    more = {"quick": True, "machine": {"kernel": "2"}} | comparison.as_json(invented)
    found = document.merge(found, more)
    assert list(found) == ["copies", "reads", "put"]
    assert found["put"]["machine"] == {"kernel": "1"} and len(found["copies"]["rows"]) == 2
    again = document.merge(found, {**printed, "machine": {"kernel": "3"}})
    assert again["put"]["machine"] == {"kernel": "3"} and len(again["put"]["rows"]) == 1
    text = document.document(json.loads(json.dumps(again)))
    assert "a \\| b" in text and "shared: not in this build" in text and "somebody's \\| own" in text
    assert "| - | - |" in text or "| - |" in text


def test_the_document_says_what_was_measured():
    found = document.load(DOCS)
    assert found
    assert (DOCS / document.TEXT).read_text(encoding="utf-8") == document.document(found), "run 'make docs'"


@pytest.mark.parametrize("one", document.comparisons(document.load(DOCS)), ids=lambda one: one.name)
def test_pictures_in_the_document_are_drawn_from_its_data(one):
    assert pictures.drawn_from(DOCS / f"{one.name}.png") == pictures.fingerprint(one), "run 'make docs'"


def test_all_files_of_the_document_are_there():
    found = {path.name for path in DOCS.iterdir()}
    assert found == {document.DATA, document.TEXT, *(f"{one.name}.png" for one in document.comparisons(document.load(DOCS)))}
