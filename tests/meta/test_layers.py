"""The structure holds: imports go down only, files have one subject, generated documents are current."""

import ast
from pathlib import Path

import pytest

from onecopy.fs.document import DOCUMENTS

ROOT = Path(__file__).parents[2]
LAYERS = ("daxemu", "blkcache", "fs", "cli")
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Return the layers that a source file imports, also within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.split(".")[1] for name in names if name.startswith("onecopy.") and name.count(".")} & set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_down_only(path: Path) -> None:
    rank = LAYERS.index(path.parent.name)
    above = {name for name in imported(path) if LAYERS.index(name) > rank}
    assert not above, f"{path.name} of {path.parent.name} imports upwards: {above}"


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.name)
def test_the_cli_knows_only_the_public_api(path: Path) -> None:
    assert imported(path) <= {"cli"}


def test_only_the_cli_imports_typer() -> None:
    others = [path for path in SOURCES if path.parent.name != "cli" and "typer" in path.read_text()]
    assert not others


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_have_one_subject(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_documents_are_current(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == DOCUMENTS[name](), "run 'make docs'"


def definitions(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Return the public functions and classes of a module or class body, methods included, functions' own left out."""
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    return found + [inner for node in found if isinstance(node, ast.ClassDef) for inner in definitions(node.body)]


def test_public_functions_have_docstrings() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    assert not [
        f"{path.name}:{node.name}"
        for path, tree in trees.items()
        for node in definitions(tree.body)
        if not ast.get_docstring(node)
    ]
