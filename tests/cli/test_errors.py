"""Errors: one line, one object, one exit status."""

import errno
import os

import pytest
from typer.testing import CliRunner

import onecopy
from onecopy.cli.main import app

READERS = [
    ["info"],
    ["ls"],
    ["stat", "/f"],
    ["cat", "/f"],
    ["du"],
    ["extents", "/f"],
    ["dedupe"],
    ["subvolume", "list"],
]
WRITERS = [["mkdir", "/d"], ["rm", "/f"], ["mv", "/f", "/g"], ["ln", "/f", "/g"], ["clone", "/f", "/g"]]


def with_pool(verb, path):
    """Put the pool behind the name of the verb."""
    words = 2 if verb[0] == "subvolume" else 1
    return [*verb[:words], path, *verb[words:]]


@pytest.mark.parametrize("verb", READERS + WRITERS)
def test_no_such_pool(cli, tmp_path, verb):
    error = cli.fails(*with_pool(verb, tmp_path / "none"))
    assert (error["errno"], error["paths"]) == ("ENOENT", [str(tmp_path / "none")])


@pytest.mark.parametrize("verb", READERS + WRITERS)
def test_not_a_pool(cli, tmp_path, verb):
    (tmp_path / "text").write_text("something else\n" * 1000)
    assert cli.fails(*with_pool(verb, tmp_path / "text"))["type"] == "NotAPool"
    assert cli.fails(*with_pool(verb, tmp_path))["type"] == "NotAPool"


def test_what_is_not_a_pool_points_to_format(cli, tmp_path):
    (tmp_path / "text").write_text("something else\n" * 1000)
    assert "onecopy format" in cli.fails("ls", tmp_path / "text")["message"]


@pytest.mark.parametrize("verb", [["ls", "relative"], ["put", "x", "relative"], ["clone", "/a", "b"], ["rm", "/a", "b"]])
def test_paths_inside_a_pool_start_at_its_root(cli, pool, verb):
    error = cli.fails(*with_pool(verb, pool.path))
    assert error["type"] == "UsageError"
    assert "start with '/'" in error["message"]


@pytest.mark.parametrize("args", [["nonsense"], ["ls"], ["ls", "--nonsense", "p"], ["--nonsense"]])
def test_wrong_use_points_to_the_help(cli, args):
    error = cli.fails(*args)
    assert error["type"] == "UsageError"
    assert "--help'" in error["message"]


@pytest.mark.parametrize("args", [[], ["subvolume"]])
def test_a_missing_verb_points_to_the_help(cli, args):
    assert cli(*args, status=2) == ""
    assert cli.err == f"onecopy: Missing command; see '{' '.join(['onecopy', *args])} --help'\n"


@pytest.mark.parametrize(
    ("offset", "data", "kind"),
    [(8, b"\xff\0\0\0", "PoolVersionError"), (17, b"\x77", "CorruptRecord")],
    ids=["another format", "damaged header"],
)
def test_a_header_that_is_wrong_is_named(cli, pool_path, offset, data, kind):
    onecopy.format(pool_path, "64M")
    with open(pool_path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    assert cli.fails("ls", pool_path)["type"] == kind


def test_a_truncated_pool_is_not_a_pool(cli, pool_path):
    onecopy.format(pool_path, "64M")
    os.truncate(pool_path, 32 << 20)
    error = cli.fails("ls", pool_path)
    assert error["type"] == "NotAPool"
    assert "truncated" in error["message"]


@pytest.mark.parametrize(
    "error",
    [
        onecopy.ReadOnly("the pool was opened for reading", path="/d"),
        onecopy.RuntimeLost("the run-time file is gone", path="/dev/shm/p"),
        onecopy.InvariantError("S6", "counted 3 owners, found 2"),
        PermissionError(errno.EACCES, "Permission denied", "/d"),
        OSError(errno.ELOOP, "Too many levels of symbolic links", "/a", None, "/b"),
        OSError(errno.EBADF, "Bad file descriptor", 7),
        OSError("without a number"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_of_the_system_is_one_line(cli, pool, monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(onecopy.FileSystem, "mkdir", refuse)
    found = cli.fails("mkdir", pool.path, "/d")
    assert found["type"] == type(error).__name__
    assert found["errno"] == (errno.errorcode[error.errno] if error.errno else None)
    assert found["paths"] == [str(name) for name in (error.filename, error.filename2) if name]
    assert cli.err == f"onecopy: {found['message']}\n"


def test_an_error_line_shows_odd_names_as_escapes(cli, pool):
    name = "/a\n\x1b[31m\udcff\u202e"
    error = cli.fails("cat", pool.path, name)
    assert error["paths"] == [name]
    assert cli.err.startswith(r"onecopy: /a\n\x1b[31m\xff\u202e: ")


def test_interruption_ends_with_130(cli, pool, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(onecopy.FileSystem, "mkdir", interrupt)
    assert cli("mkdir", pool.path, "/d", status=130) == ""
    assert cli.err == "onecopy: interrupted\n"
    assert cli.json("mkdir", pool.path, "/d", status=130)["error"]["type"] == "KeyboardInterrupt"


def test_a_bug_is_no_finding(cli, pool, monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(onecopy.FileSystem, "mkdir", fail)
    result = CliRunner().invoke(app, ["mkdir", pool.path, "/d"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("onecopy: division by zero; this is a bug, please report it\n")
