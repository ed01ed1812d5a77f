"""What people and programs see: tables, JSON objects, progress bars.

Results go to stdout. Bars go to stderr, and only to a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from datetime import datetime

SCHEMA = 1

Progress = Callable[[int, int, str], None]

# rich lays out about two rows in a millisecond; a fragmented file has tens of thousands of them.
RICH_ROWS = 1000


def json_object(**fields: object) -> None:
    """Print one JSON object on one line, with the number of the schema that its fields follow.

    Bytes of a name that are not UTF-8 come out as Python itself spells them: `\\udcff` is byte 0xff.
    """
    print(json.dumps({"schema": SCHEMA, **fields}))


def printable(text: str) -> str:
    """Return `text` with control characters, line breaks and bytes that are not UTF-8 written as escapes.

    A name may hold any of them, and must neither steer the terminal nor break the line it stands on.
    """
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # surrogateescape: one byte of the name
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def size(count: int, *, raw: bool = False) -> str:
    """Return a number of bytes for people, or its digits when `raw`."""
    import onecopy

    return str(count) if raw else onecopy.format_size(count)


def when(nanoseconds: int) -> str:
    """Return a time since 1970 as local date and time."""
    return datetime.fromtimestamp(nanoseconds // 10**9).isoformat(" ", "seconds")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their headers; a header that starts with `>` stands over right-aligned cells."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty() and len(cells) <= RICH_ROWS:
        _rich_table(headers, cells)
    else:
        _plain_table(headers, cells)


def _rich_table(headers: Sequence[str], cells: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        right = header.startswith(">")
        grid.add_column(header.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in cells:
        grid.add_row(*row)
    # A name such as "[red]" or ":smile:" is a name, not mark-up.
    Console(markup=False, emoji=False, highlight=False).print(grid)


def _plain_table(headers: Sequence[str], cells: list[list[str]]) -> None:
    titles = [header.removeprefix(">") for header in headers]
    _aligned([titles, *cells], right={index for index, header in enumerate(headers) if header.startswith(">")})


def _aligned(lines: Sequence[Sequence[str]], right: Set[int] = frozenset()) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print named values, one on each line."""
    _aligned([(name, printable(str(value))) for name, value in pairs])


@contextmanager
def progress(title: str) -> Iterator[Progress | None]:
    """Give a callback that draws a bar on stderr; None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(printable(title), total=None, amount="")

        def advance(done: int, total: int, unit: str) -> None:
            amount = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            bars.update(task, completed=done, total=total, amount=amount)

        yield advance
