"""Exit statuses, and how an error becomes one line that says what, where, and what to do next."""

from __future__ import annotations

import errno
import os
import sys

from typer.exceptions import TyperException

from onecopy.cli import show

DONE = 0
FINDINGS = 1
ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell counts it
PIPE_CLOSED = 141  # 128 + SIGPIPE: how `cat` ends when its reader leaves

# A message of the project's own says what to do; a bare one of the system needs it added.
NEXT_STEPS = {
    errno.ENOENT: "check the name ('onecopy ls' shows what a pool holds)",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.ENOTDIR: "only a directory has names below it",
    errno.EISDIR: "name a file, or add -r to take the directory with all that is in it",
    errno.ENOTEMPTY: "empty it first, or remove it with 'onecopy rm -r'",
    errno.EACCES: "check the owner and the mode",
    errno.EPERM: "check the owner and the mode",
    errno.ELOOP: "check where the symbolic link leads",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def report(kind: str, message: str, *, as_json: bool, **details: object) -> None:
    """Write the error line to stderr, and the error object to stdout when JSON was asked for."""
    if as_json:
        show.json_object(error={"type": kind, "message": message, **details})
    print(f"onecopy: {show.printable(message)}", file=sys.stderr)


def report_usage(error: TyperException, *, as_json: bool) -> None:
    """Report arguments that make no sense, and where their help is."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "onecopy"
    report("UsageError", f"{error.format_message().rstrip('.')}; see '{command} --help'", as_json=as_json)


def report_os_error(error: OSError, *, as_json: bool) -> None:
    """Report an error of the system or of the pool."""
    names = (name for name in (error.filename, error.filename2) if name is not None)
    paths = [str(name) if isinstance(name, int) else os.fsdecode(name) for name in names]  # an int is a descriptor
    message = error.strerror or str(error)
    if paths:
        message = f"{' -> '.join(paths)}: {message}"
    if error.errno in NEXT_STEPS and error.strerror == os.strerror(error.errno):
        message += f"; {NEXT_STEPS[error.errno]}"
    report(
        type(error).__name__,
        message,
        as_json=as_json,
        errno=errno.errorcode.get(error.errno) if error.errno is not None else None,
        paths=paths,
    )
