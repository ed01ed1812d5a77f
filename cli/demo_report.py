"""What the demo found, as a table, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from onecopy import format_size
from onecopy.cli import draw, show
from onecopy.cli.demo_input import Input
from onecopy.cli.demo_ways import Outcome, Physical

SOURCES = {"frames": "frames counted", "pss": "Pss, at most", "computed": "computed"}


@dataclass(frozen=True)
class _Row:
    """One line of the table and one bar of each panel; bytes and seconds."""

    label: str
    logical: int
    stored: int
    physical: Physical
    clone_seconds: float | None
    read_seconds: float | None
    ours: bool


@dataclass
class Report:
    """The outcome of every way, onecopy's last; `pool` is where it was kept, `seconds` what all took together."""

    data: Input
    ways: Sequence[Outcome]
    clones: int
    processes: int
    pool: str | None
    seconds: float
    png: str | None = None
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.skipped += [way.skipped for way in self.ways if way.skipped]

    @property
    def ok(self) -> bool:
        """Whether every comparison held, and the pool's check as well."""
        return not any(way.wrong or way.findings for way in self.ways)

    def draw_png(self, path: str) -> None:
        """Draw memory and storage of each way into a PNG file; without matplotlib note that this was skipped.

        Raises what writing the file raises.
        """
        if not draw.available():
            self.skipped.append("picture not drawn: matplotlib is missing (pip install 'onecopy[plot]')")
            return
        rows = list(self._rows())
        one = self.data.footprint
        sources = {row.physical.source for row in rows}
        panels = [
            draw.Panel(
                f"Physical memory while {self.processes} processes hold {self.clones} clones mapped",
                one,
                "one copy",
                [self._bar(row, row.physical.bytes) for row in rows],
            ),
            draw.Panel(
                "Storage: blocks of the files; for onecopy, used pages of the pool with all its trees",
                one,
                "one copy",
                [self._bar(row, row.stored) for row in rows],
            ),
        ]
        notes = []
        if "frames" in sources:
            notes.append("Memory: frames below all mappings by /proc/self/pagemap, each counted once.")
        if "pss" in sources:
            notes.append("Memory: at most this much, by Pss in /proc/self/smaps.")
        if "computed" in sources:
            notes.append("Hatched: computed, not measured.")
        draw.draw_panels(self._headline(), "  ".join(notes), panels, path)
        self.png = path

    def print_json(self) -> None:
        """Print everything as one JSON object."""
        show.json_object(
            verb="demo",
            ok=self.ok,
            input={
                "origin": self.data.origin,
                "files": len(self.data.files),
                "bytes": self.data.size,
                "footprint": self.data.footprint,
            },
            clones=self.clones,
            processes=self.processes,
            ways=[asdict(way) for way in self.ways],
            skipped=self.skipped,
            png=self.png,
            pool=self.pool,
            seconds=self.seconds,
        )

    def print_text(self) -> None:
        """Print a table of the ways, and what was verified."""
        print(f"{self._headline()}\n")
        show.table(
            ("", ">logical", ">stored", ">memory", ">copies", "how", ">Pss", ">page tables", ">clone", ">map and hash"),
            [
                (
                    row.label,
                    format_size(row.logical),
                    format_size(row.stored),
                    format_size(row.physical.bytes),
                    self._copies(row.physical.bytes),
                    SOURCES[row.physical.source],
                    _size(row.physical.pss),
                    _size(row.physical.page_tables),
                    _time(row.clone_seconds),
                    _time(row.read_seconds),
                )
                for row in self._rows()
            ],
        )
        print()
        show.facts(self._facts())

    def _headline(self) -> str:
        parts = []
        if self.data.array:
            parts.append(f"an array of {format_size(self.data.files[0].size)}")
        if self.data.tree:
            files = len(self.data.files) - len(parts)
            parts.append(f"a tree of {files:,} files")
        what = " and ".join(parts)
        one = format_size(self.data.footprint)
        return f"{self.processes} processes, {self.clones} clones of {what}; one copy is {one}"

    def _rows(self) -> Iterator[_Row]:
        for way in self.ways:
            ours = way.rewriting is not None
            read = way.read.seconds if way.read else None
            yield _Row(way.way, way.logical, way.stored, way.physical, way.clone_seconds, read, ours)
            if way.rewriting:
                stored, after = way.stored + way.rewriting.pool_growth, way.rewriting.after
                yield _Row("with 1 % rewritten", way.logical, stored, after.physical, None, after.seconds, ours)

    def _bar(self, row: _Row, count: int) -> draw.Bar:
        computed = row.physical.source == "computed"
        remark = f"{self._copies(count)} copies{', computed' if computed else ''}"
        return draw.Bar(row.label, count, remark, ours=row.ours, measured=not computed)

    def _copies(self, count: int) -> str:
        return f"{count / self.data.footprint:.2f}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        hashes = sum(way.hashes for way in self.ways)
        wrong = [path for way in self.ways for path in way.wrong]
        if wrong:
            yield "WRONG", f"{len(wrong):,} of {hashes:,} files are not what they should be; the first: {wrong[0]}"
        else:
            yield "verified", f"{hashes:,} files by their SHA-256, every one right"
        for way in self.ways:
            if way.rewriting is None:
                continue
            yield "put", f"{_time(way.put_seconds)} for the first copy in the pool"
            yield (
                "rewritten",
                f"{format_size(way.rewriting.bytes)} in {_time(way.rewriting.seconds)}; the pool grew by "
                f"{format_size(way.rewriting.pool_growth)}; {'see above' if wrong else 'nobody else saw any of it'}",
            )
            yield "host", f"{_size(way.backed)} behind the pool file, {_size(way.run_time)} behind its run-time file"
            yield "check", f"{way.findings or 'no'} findings"
        for reason in self.skipped:
            yield "skipped", reason
        if self.png:
            yield "picture", self.png
        if self.pool:
            yield "pool", f"kept: {self.pool}"
        yield "in all", _time(self.seconds)


def _size(count: int | None) -> str:
    return "-" if count is None else format_size(count)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
