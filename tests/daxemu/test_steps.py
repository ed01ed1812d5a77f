"""Steps: each has one name, each is reached somewhere, and a hook hears of it, or a signal comes."""

import ast
import re
import signal
from pathlib import Path

import pytest

import onecopy
from onecopy.daxemu import steps

ROOT = Path(__file__).parents[2]


ODD = {"AT_ENTERED": "changed", "AT_SHOT": "told", "AT_LIVE": "published", "AT_FORGOTTEN": "done"}  # words for C's names


def reached() -> set[str]:
    """Return the names of steps that the sources reach."""
    found = set()
    for layer in ("daxemu", "blkcache", "fs"):
        for path in (ROOT / layer).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach":
                    found.add(node.args[0].value)
    return found


def test_every_step_is_reached_somewhere():
    assert len(set(steps.STEPS)) == len(steps.STEPS)
    assert reached() == set(steps.STEPS)


def test_the_hook_hears_the_number(monkeypatch):
    heard = []
    monkeypatch.setattr(steps, "hook", heard.append)
    for name in steps.STEPS:
        steps.reach(name)
    assert heard == list(range(len(steps.STEPS)))
    with pytest.raises(KeyError):
        steps.reach("no such step")


def test_native_steps_are_those_of_the_header():
    """`AT_HALF` is "half entered", and so on: the same number of them, each reached in C, each at its place."""
    (body,) = re.findall(r"enum {((?:\s*AT_\w+,?)+)\s*};", (ROOT / "daxemu" / "_fault.h").read_text())
    names = re.findall(r"AT_\w+", body)
    assert len(names) == len(steps.NATIVE) == len(set(steps.NATIVE))
    sources = "".join(path.read_text() for path in (ROOT / "daxemu").glob("*.c"))
    assert set(re.findall(r"STEP\((AT_\w+)\)", sources)) == set(names)
    for name, words in zip(names, steps.NATIVE, strict=True):
        word = ODD.get(name, name[3:].lower().split("_")[-1])
        assert word in words


@pytest.mark.parametrize("number", range(7))
def test_a_signal_comes_at_a_native_step(new_path, start, number):
    path, nth = new_path(), number % 3 + 1
    onecopy.format(path, "4M")

    def store(line):
        with onecopy.open(path) as fs:
            fs.write("/file", bytes(5 * onecopy.PAGE))
            fs.clone("/file", "/clone")
            with fs.map("/file", "r+", granule=1) as mapping:
                steps.signal_at("", 0, 0)
                steps.signal_at(steps.NATIVE[number], nth, signal.SIGKILL)
                for page in range(5):
                    mapping[page * onecopy.PAGE] = 1
                    line.say(page)

    process = start(store)
    assert [process.hear() for _ in range(nth - 1)] == list(range(nth - 1))
    assert process.wait() == -signal.SIGKILL


def test_there_is_no_other_native_step():
    with pytest.raises(ValueError, match="not in tuple"):
        steps.signal_at("no such step", 1, signal.SIGKILL)
