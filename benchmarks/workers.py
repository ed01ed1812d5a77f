"""Other processes of a benchmark: started, told what to do through pipes, and gone afterwards."""

from __future__ import annotations

import errno
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

Pipe: TypeAlias = "Connection[Any, Any]"
Target = Callable[..., None]
"""What a worker does, with its pipe and what else was given; it returns when the pipe's other end is closed."""


@contextmanager
def workers(target: Target, arguments: Sequence[tuple[object, ...]]) -> Iterator[list[Pipe]]:
    """Start a process for each tuple of arguments; give their pipes when all have started. They end with the context.

    A worker that ended early shows as a ChildProcessError.
    """
    context = multiprocessing.get_context("spawn")  # a fork would begin with what we have mapped
    pipes: list[Pipe] = []
    with ExitStack() as started:
        try:
            for some in arguments:
                ours, theirs = context.Pipe()
                pipes.append(ours)
                process = context.Process(target=_work, args=(target, theirs, *some), daemon=True)
                process.start()
                started.callback(process.join)
                theirs.close()
            for pipe in pipes:
                pipe.recv()
            yield pipes
        except (EOFError, ConnectionError) as error:
            raise ChildProcessError(errno.ECHILD, "a process of the benchmark has ended early") from error
        finally:
            for pipe in pipes:  # all of them, before the first is waited for: it makes them end
                pipe.close()


def ask(pipes: Sequence[Pipe], *messages: object) -> list[Any]:
    """Send each worker its message, or all of them the only one; wait until each has answered, return the answers."""
    for number, pipe in enumerate(pipes):
        pipe.send(messages[number if len(messages) > 1 else 0])
    return [pipe.recv() for pipe in pipes]


def _work(target: Target, pipe: Pipe, *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us, too; who started us decides what it means
    try:
        pipe.send("started")
        target(pipe, *arguments)
    except (EOFError, ConnectionError):
        pass
