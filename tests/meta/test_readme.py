"""README's commands work: its Python runs, its shell lines run, its make targets exist, its files are there."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return README's code blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(new_path: Callable[[], str], tmp_path: Path) -> None:
    """One after the other: the later go on with the pool that the first one made."""
    found, path = blocks("python"), new_path()
    assert found
    for code in found:
        script = code.replace("/dev/shm/p.pool", path)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], check=False, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_shell_lines_run(new_path: Callable[[], str], tmp_path: Path) -> None:
    path = new_path()
    (tmp_path / "weights.npy").write_bytes(os.urandom(1 << 16))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "file").write_text("content")
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ onecopy")]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line[2:].replace("/dev/shm/p.pool", path), comments=True)
        program = [sys.executable, "-c", "from onecopy.cli.main import run; run()", *words[1:]]
        done = subprocess.run(program, check=False, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.MULTILINE))))
def test_make_targets_exist(target: tuple[str, str]) -> None:
    name = target[0] or target[1]
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_files_that_documents_name_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:daxemu|blkcache|fs|cli|tests|benchmarks|src)/[\w./]*)`", text):
            assert (ROOT / name).exists(), f"{document} names {name}"


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in README
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
