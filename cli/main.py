"""The program `onecopy`: its verbs put together, and one place where errors become exit statuses."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from onecopy.cli import bench, demo, errors, files, pool, seeing, share, stress, subvolume, transfer


class Verbs(TyperGroup):
    """The group of all verbs. Whatever they raise ends here, as a line on stderr and an exit status."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run one verb and exit."""
        if "_ONECOPY_COMPLETE" in os.environ:  # the shell asks what could come next; typer answers
            return super().main(args, *rest, **extra)
        args = sys.argv[1:] if args is None else list(args)
        as_json = "--json" in takewhile(lambda arg: arg != "--", args)
        _prepare_streams()
        try:
            status = self._run(args, as_json=as_json)
            sys.stdout.flush()
        except OSError as error:  # stdout itself: its reader has left, or its disk is full
            # What is still buffered goes nowhere, or the interpreter would try, and fail, once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = errors.PIPE_CLOSED
            if not isinstance(error, BrokenPipeError):
                errors.report_os_error(error, as_json=False)
                status = errors.ERROR
        sys.exit(status)

    def _run(self, args: list[str], *, as_json: bool) -> int:
        try:
            with self.make_context("onecopy", args) as ctx:
                self.invoke(ctx)
            return errors.DONE
        except typer.Exit as end:
            return end.exit_code
        except TyperException as error:
            errors.report_usage(error, as_json=as_json)
            return errors.ERROR
        except KeyboardInterrupt:
            errors.report("KeyboardInterrupt", "interrupted", as_json=as_json)
            return errors.INTERRUPTED
        except BrokenPipeError:
            raise
        except OSError as error:
            errors.report_os_error(error, as_json=as_json)
            return errors.ERROR
        except Exception as error:  # left alone it would end with status 1, which means findings
            traceback.print_exc()
            errors.report(type(error).__name__, f"{error}; this is a bug, please report it", as_json=as_json)
            return errors.ERROR


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the program runs
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's character set lacks must not stop us
        sys.stdout.reconfigure(errors="backslashreplace")


app = typer.Typer(
    cls=Verbs,
    help="Files that share pages by reflink, on a pool that emulates an NVDIMM: a shared page is in memory once.",
    epilog="Exit status: 0 done, 1 findings (damage, a failed comparison), 2 wrong use or an error.",
)
for module in (pool, transfer, files, share, subvolume, seeing):
    app.add_typer(module.verbs)
for program in (demo, stress, bench):
    program.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        import onecopy

        print(f"onecopy {onecopy.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run() -> None:
    """Be the console script."""
    app(prog_name="onecopy")
