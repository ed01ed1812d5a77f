"""Steps: each has one name, each is reached somewhere, and a hook hears of it."""

import ast
from pathlib import Path

import pytest

from onecopy.daxemu import steps

ROOT = Path(__file__).parents[2]


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
