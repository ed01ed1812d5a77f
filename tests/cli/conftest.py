"""Running verbs: in this process for speed, in one of their own where signals, pipes or terminals matter."""

import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from onecopy.cli.main import app

# Output that is not buffered would hide what goes wrong when the buffers are written at the end.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"TERM": "xterm"}
VERBS = typer.main.get_command(app)  # built once; CliRunner.invoke would build it for each call
PROGRAM = [sys.executable, "-c", "from onecopy.cli.main import run; run()"]


class Cli:
    """Calls verbs in this process. `err` is what the last one wrote to stderr."""

    err = ""

    def __call__(self, *args, status=0):
        """Run a verb, hold it to its exit status and return its stdout."""
        return self.raw(*args, status=status).decode()

    def raw(self, *args, status=0):
        with CliRunner().isolation() as (out, err, _):
            with pytest.raises(SystemExit) as end:
                VERBS.main([str(arg) for arg in args])
            sys.stdout.flush()
            sys.stderr.flush()
            found, self.err = out.getvalue(), err.getvalue().decode()
        assert end.value.code == status, self.err or found
        assert "Traceback" not in self.err
        return found

    def json(self, *args, status=0):
        """Run a verb with --json and return its one object, without the schema number."""
        found = json.loads(self(*args, "--json", status=status))
        assert found.pop("schema") == 1
        return found

    def fails(self, *args):
        """Run a verb that has to fail, with and without --json; hold stderr to one line; return the error object."""
        assert self(*args, status=2) == ""
        line = self.err
        found = self.json(*args, status=2)
        assert list(found) == ["error"]
        assert self.err == line
        assert line.startswith("onecopy: ") and line.count("\n") == 1 and line.endswith("\n")
        return found["error"]


@pytest.fixture
def cli():
    return Cli()


@pytest.fixture
def program():
    """Start verbs in processes of their own; whatever still runs at the end is killed."""
    started = []

    def start(*args, redirect="", env=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        """Start a verb, with variables added to the environment and with redirections as a shell writes them."""
        command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *PROGRAM, *map(str, args)]
        process = subprocess.Popen(command, env=ENVIRONMENT | (env or {}), stdout=stdout, stderr=stderr)
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()
