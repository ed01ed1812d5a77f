"""The program in a process of its own: start-up, signals, pipes, terminals, completion; and the help of every verb."""

import errno
import json
import os
import pty
import shlex
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import onecopy
from onecopy.cli.main import app


def all_verbs(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_verbs(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


GROUP = typer.main.get_command(app)
VERBS = dict(all_verbs(GROUP))


def test_version(cli):
    assert cli("--version") == f"onecopy {onecopy.__version__}\n"


def test_help_lists_every_verb(cli):
    text = cli("--help")
    assert all(verb in text for verb in GROUP.commands)


def test_help_starts_without_numpy():
    code = "import sys\nfrom onecopy.cli.main import app\ntry: app(['--help'])\nfinally: print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json_and_help_with_an_example_that_parses(cli, verb):
    command = VERBS[verb]
    assert ["--json"] in [parameter.opts for parameter in command.params]
    assert "Example" in cli(*verb.split(), "--help")
    words = shlex.split(command.epilog.removeprefix("Example: "))
    assert words[: 1 + len(verb.split())] == ["onecopy", *verb.split()]
    end = next((index for index, word in enumerate(words) if word in ("|", "||")), len(words))
    command.make_context(verb, words[1 + len(verb.split()) : end]).close()


def test_the_console_script_starts_the_program(program, pool):
    with program("ls", pool.path, "--json") as process:
        found, _ = process.communicate()
    assert json.loads(found)["verb"] == "ls"
    assert process.returncode == 0


def test_a_reader_that_leaves_ends_the_verb_quietly(program, pool):
    pool.write("/big", b"x" * (4 << 20))
    for index in range(200):
        pool.write(f"/{'x' * 200}{index}", b"")
    for verb in (["cat", pool.path, "/big"], ["ls", pool.path]):
        with program(*verb) as process:
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_an_error(program, pool, flags):
    pool.write("/file", b"")
    with program("ls", pool.path, *flags, redirect=">/dev/full") as process:
        assert process.stderr.read().decode() == f"onecopy: {os.strerror(errno.ENOSPC)}\n"
    assert process.returncode == 2


@pytest.mark.parametrize(("path", "status"), [("/", 0), ("/none", 2)])
def test_streams_that_the_caller_closed_change_no_status(program, pool, path, status):
    with program("ls", pool.path, path, redirect=">&- 2>&-") as process:
        assert process.communicate() == (b"", b"")
    assert process.returncode == status


def test_ctrl_c_ends_a_verb_that_waits(program, pool):
    pool.write("/big", b"x" * (4 << 20))
    with program("cat", pool.path, "/big") as process:
        process.stdout.read(1)  # more than a pipe holds is left, so that the verb now waits for us
        process.send_signal(signal.SIGINT)
        _, line = process.communicate()
    assert line == b"onecopy: interrupted\n"
    assert process.returncode == 130


def read_terminal(fd):
    """Return what is written to a terminal until its other side is closed."""
    text = b""
    while True:
        try:
            text += os.read(fd, 65536)
        except OSError as error:  # EIO: nobody has the other side open any more
            assert error.errno == errno.EIO
            return text.decode()


@pytest.fixture
def terminal():
    """The two sides of a pseudo-terminal: ours, and the one for the program (closed by `read_terminal`'s caller)."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_progress_is_drawn_on_a_terminal_only(program, pool, tmp_path, terminal):
    source = tmp_path / "source"
    source.write_bytes(b"x" * (8 << 20))
    ours, theirs = terminal
    with program("put", pool.path, source, "/file", stderr=theirs) as process:
        os.close(theirs)
        drawn = read_terminal(ours)
        assert process.stdout.read() == b""
    assert process.returncode == 0
    assert "put" in drawn and "8.0 MiB of 8.0 MiB" in drawn
    with program("put", pool.path, source, "/again") as process:
        assert process.communicate() == (b"", b"")


def test_ctrl_c_during_put_leaves_nothing_behind(program, pool_path, tmp_path, terminal):
    onecopy.format(pool_path, "2G")
    source = tmp_path / "source"
    with source.open("wb") as file:
        for _ in range(512):
            file.write(b"x" * (1 << 20))
    ours, theirs = terminal
    with program("put", pool_path, source, "/file", stderr=theirs) as process:
        os.close(theirs)
        os.read(ours, 1)  # the bar is there, so the copy is on its way
        process.send_signal(signal.SIGINT)
        assert read_terminal(ours).endswith("onecopy: interrupted\r\n")
    assert process.returncode == 130
    with onecopy.open(pool_path) as fs:
        assert fs.listdir("/") == []
        assert fs.check().ok


def test_tables_on_a_terminal_show_names_as_they_are(program, pool, terminal):
    pool.write("/[red]:smile:", b"")
    pool.write("/new\nline\x1b[31m", b"")
    ours, theirs = terminal
    with program("ls", "-l", pool.path, stdout=theirs) as process:
        os.close(theirs)
        text = read_terminal(ours)
    assert process.returncode == 0
    assert "[red]:smile:" in text
    assert r"new\nline\x1b[31m" in text


def test_odd_names_stay_on_their_line(cli, pool):
    names = ["new\nline", "\x1b[31mred", "byte\udcff", "[red]", "äöü"]
    for name in names:
        pool.write(f"/{name}", b"")
    assert sorted(cli("ls", pool.path).splitlines()) == sorted([r"new\nline", r"\x1b[31mred", r"byte\xff", "[red]", "äöü"])
    assert len(cli("ls", "-l", pool.path).splitlines()) == 1 + len(names)
    assert sorted(entry["name"] for entry in cli.json("ls", pool.path)["entries"]) == sorted(names)


def test_names_outside_the_character_set_of_the_terminal(program, pool):
    pool.write("/ä\u4e2d", b"")
    with program("ls", pool.path, env={"PYTHONIOENCODING": "latin-1"}) as process:
        assert process.communicate() == ("ä\\u4e2d\n".encode("latin-1"), b"")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(program, shell):
    # typer would otherwise ask which shell it runs in, and the tests may run in none
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    with program("--show-completion", shell, env=environment) as process:
        script, _ = process.communicate()
    assert b"_ONECOPY_COMPLETE=complete_" + shell.encode() in script
    assert process.returncode == 0


def test_completion_offers_verbs_and_names_inside_the_pool(pool):
    def complete(*words):
        asked = {
            "_ONECOPY_COMPLETE": "complete_bash",
            "COMP_WORDS": shlex.join(words),
            "COMP_CWORD": f"{len(words) - 1}",
        }
        return CliRunner().invoke(app, env=asked, prog_name="onecopy").stdout.split()

    pool.mkdir("/dir/below", parents=True)
    pool.write("/data", b"")
    pool.write("/other", b"")
    pool.write("/d\nd", b"")
    assert complete("onecopy", "sn") == ["snapshot"]
    assert complete("onecopy", "cat", pool.path, "/d") == ["/data", "/dir/"]
    assert complete("onecopy", "cat", pool.path, "/dir/") == ["/dir/below/"]
    assert complete("onecopy", "clone", pool.path, "/data", "/o") == ["/other"]
    assert complete("onecopy", "cat", pool.path + ".none", "/d") == []
