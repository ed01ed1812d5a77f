"""The end of the stress test: every page of every file against the board, the pool's own check, and the report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onecopy
from onecopy.cli import show
from onecopy.cli.stress_board import BEAT, BUSY, CHECKED, COUNTS, FULL, KILLED, KINDS, PHASE, QUIET, UNSURE, Board
from onecopy.cli.stress_hands import PAGES, Called, Hands
from onecopy.cli.stress_ops import MAPPED
from onecopy.cli.stress_oracle import Violation
from onecopy.cli.stress_work import Job, report

COUNTERS = ("faults", "shootdowns", "shootdown_median_us", "shootdown_p99_us")
_MOST_FINDINGS = 20


def verify(board: Board, job: Job, pipe: int) -> None:
    """Open the pool, wait until all workers are gone, and verify everything; say through the pipe what is found."""
    row = job.processes * 2
    hands = Hands(board, row, job.pool, job.directory, job.seed)
    os.write(pipe, b"{}\n")
    while board.header(PHASE) < QUIET and os.getppid() == board.maker:
        board.add_row(row, BEAT)
        time.sleep(0.01)
    end = End(hands, pipe)
    end.look("at the end", mapped=not job.kinds.isdisjoint(MAPPED))
    end.recount()
    hands.fs.sync()
    info = hands.fs.info()
    os.write(pipe, json.dumps({"info": {name: getattr(info, name, None) for name in COUNTERS}}).encode() + b"\n")
    hands.close()
    hands.fs = onecopy.open(job.pool)
    end.look("after everybody has closed the pool", mapped=False)
    hands.fs.rmtree(job.directory)
    end.recount()
    hands.close()


class End:
    """What is looked at when nobody stores any more. Goes on after a finding."""

    def __init__(self, hands: Hands, pipe: int) -> None:
        self._hands, self._pipe, self._found = hands, pipe, 0

    def look(self, when: str, *, mapped: bool) -> None:
        """Judge every page of every file, read by calls and, `mapped`, through mappings of both kinds."""
        hands = self._hands
        for name in range(hands.board.names):
            place = hands.lead(name)
            hands.make_whole(name, place)
            ways: list[Any] = [Called(hands.fs, hands.path(name))]
            if mapped:
                ways += [hands.map(name, mode) for mode in ("r", "r+")]
            for way in ways:
                for page in range(PAGES):
                    hands.board.add_row(hands.row, BEAT)
                    try:
                        hands.known(way, place, page, page + 1)
                    except Violation as violation:
                        violation.message = f"{when}, {violation.message}"
                        self._report(violation)
            while hands.held:
                hands.unmap()
            hands.let_go()

    def recount(self) -> None:
        """Have the pool recounted."""
        for finding in self._hands.fs.check().findings:
            self._report(Violation("S6", finding.message))

    def _report(self, violation: Violation) -> None:
        self._found += 1
        if self._found <= _MOST_FINDINGS:
            report(self._pipe, violation)


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class Finding:
    """A broken rule ("": something else went wrong), and the last operations on the pages that it is about."""

    rule: str
    message: str
    history: list[str]


@dataclass(frozen=True)
class Report:
    """What a run has done and found."""

    ok: bool
    seed: int
    pool: str
    seconds: float
    processes: int
    operations: dict[str, int]
    skipped: int
    backed_out: int
    pages_checked: int
    pages_unsure: int
    kills: int
    faults: int | None
    shootdowns: int | None
    shootdown_median_us: float | None
    shootdown_p99_us: float | None
    violations: list[Finding]

    def print_json(self) -> None:
        """Print it as one object."""
        per_second = {kind: round(count / self.seconds, 1) for kind, count in self.operations.items()}
        show.json_object(verb="stress", **asdict(self), operations_per_second=per_second)

    def print_text(self) -> None:
        """Print it for people."""
        rows = [(kind, f"{count:,}", f"{count / self.seconds:,.1f}") for kind, count in self.operations.items()]
        show.table(("operation", ">number", ">per second"), rows)
        print()
        show.facts(
            [
                ("seed", self.seed),
                ("processes", self.processes),
                ("seconds", f"{self.seconds:.1f}"),
                ("killed", self.kills),
                ("pages checked", f"{self.pages_checked:,}, {self.pages_unsure:,} of them too late to tell"),
                ("operations left", f"{self.skipped:,} to somebody else, {self.backed_out:,} for want of space"),
                ("write faults", _figure(self.faults)),
                ("shootdowns", _figure(self.shootdowns)),
                ("shootdown, median", _figure(self.shootdown_median_us, " us")),
                ("shootdown, 99 of 100", _figure(self.shootdown_p99_us, " us")),
            ]
        )
        for finding in self.violations:
            print()
            # A message may hold the stacks of processes, on lines of their own.
            lines = f"{finding.rule or 'error'}: {finding.message}".splitlines()
            print("\n".join(map(show.printable, [*lines, *(f"  {line}" for line in finding.history)])))
        print()
        print("no rule was broken" if self.ok else f"{len(self.violations)} findings; again: --seed {self.seed}")


def _figure(value: float | None, unit: str = "") -> str:
    return "not counted" if value is None else f"{value:,.4g}{unit}" if unit else f"{value:,}"


def make_report(board: Board, job: Job, seconds: float, info: dict[str, Any], found: list[dict[str, Any]]) -> Report:
    """Put together what the board counts and what was found, with the history of the pages concerned."""
    return Report(
        ok=not found,
        seed=job.seed,
        pool=job.pool,
        seconds=round(seconds, 3),
        processes=job.processes,
        operations={kind: count for index, kind in enumerate(KINDS) if (count := board.total(COUNTS + index))},
        skipped=board.total(BUSY),
        backed_out=board.total(FULL),
        pages_checked=board.total(CHECKED),
        pages_unsure=board.total(UNSURE),
        kills=board.header(KILLED),
        violations=[Finding(one["rule"], one["message"], history(board, one["pages"])) for one in found],
        **{name: info.get("info", {}).get(name) for name in COUNTERS},
    )


def history(board: Board, pages: Sequence[tuple[int, int]], most: int = 25) -> list[str]:
    """Return the last operations on some pages, (file, page) each, as lines."""
    found = {entry: row for file, page in pages for row, entry in board.entries(file, page)}
    lines = []
    for entry in sorted(found, key=lambda one: one.begun)[-most:]:
        end = f"{(entry.ended - entry.begun) / 1000:.1f} us" if entry.ended else "never ended"
        other = f", from page {entry.other_page} of file {entry.other_file}" if entry.other_file else ""
        lines.append(
            f"{(entry.begun - board.started) / 1e9:+.6f} s  writer {entry.writer} (worker {found[entry]}): {entry.kind} "
            f"of pages {entry.page}-{entry.page + entry.pages - 1} of file {entry.file}{other}, "
            f"store {entry.number} on; {end}"
        )
    return lines
