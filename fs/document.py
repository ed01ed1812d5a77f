"""Writes FORMAT.md and CONCURRENCY.md from the tables in the code; a test fails when the files say something else.

python -m onecopy.fs.document
"""

import sys
from pathlib import Path

from onecopy.blkcache import conditions, cuts, frames
from onecopy.daxemu import locks, runtime, steps
from onecopy.fs import mapped
from onecopy.fs.btree import TREES
from onecopy.fs.check import CODES
from onecopy.fs.format import FANOUT, LIVE_ROOT, RECORDS


def format_document() -> str:
    """Return FORMAT.md."""
    lines = [
        "# The pool's format",
        "",
        "Generated from the record tables (`make docs`); the code is the source. All integers are little-endian, pages and",
        "frames have 4,096 bytes, a PFN is a page index in the pool. Unused bytes are zero. Checksums are CRC-32 with the",
        "checksum's own word taken as zero.",
        "",
        "PFN 0 holds the pool header, PFN 1 and PFN 2 the superblock slots; every other frame is free, a tree node, or data.",
        "Everything reachable from the newest valid superblock is true, and nothing else.",
        "",
        "## Trees",
        "",
        f"B+trees of one-page nodes. An inner node has up to {FANOUT} keys and as many children.",
        "",
        "| kind | tree | key | value | entries of a leaf |",
        "| --- | --- | --- | --- | --- |",
    ]
    keys = {1: "subvolume number", 2: "inode number", 3: "hash of the name", 4: "file page", 5: "first PFN"}
    lines += [f"| {kind} | {tree.name} | {keys[kind]} | {tree.value.name} | {tree.capacity} |" for kind, tree in TREES.items()]
    lines += ["", "## Records on media", ""]
    lines += [record.markdown() for record in RECORDS]
    lines += ["## The run-time file", "", "Volatile; rebuilt from the pool when it is missing.", ""]
    shared = (runtime.SPACE, runtime.MESSAGE, runtime.BELL, runtime.RUN, runtime.COUNTERS)
    lines += [record.markdown() for record in (runtime.HEADER, runtime.STATE, runtime.SLOT, LIVE_ROOT, *shared)]
    lines += ["### frame table (1 byte a frame)", "", "| bit | state | meaning |", "| --- | --- | --- |"]
    lines += [f"| {getattr(frames, name)} | {name} | {meaning} |" for name, meaning in frames.STATES.items()]
    lines += ["", "## Emulated block devices", "", "For tests and benchmarks: conditions, and a journal of requests.", ""]
    lines += [record.markdown() for record in (conditions.CONDITIONS, conditions.FAILING, cuts.JOURNAL)]
    lines += ["## Findings of the check", "", "| code | means |", "| --- | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning in CODES.items()]
    return "\n".join(lines) + "\n"


def concurrency_document() -> str:
    """Return CONCURRENCY.md."""
    lines = [
        "# Concurrency",
        "",
        "Generated (`make docs`); the lock order is the table that acquisition checks.",
        "",
        "## Locks, in the order of acquisition",
        "",
        "| rank | lock | on | protects | held |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {rank} | {' | '.join(row)} |" for rank, row in enumerate(locks.RANKS)]
    lines += ["", _section(locks.__doc__), "", "## Readers", "", "Readers take no lock. " + _section(_announce()), ""]
    lines += ["## Reuse of frames (S5)", "", _section(_limbo())]
    lines += ["", "## Stores through mappings (S1 to S4)", "", _contract(), "", "What a transaction does about them:", ""]
    lines += [_section(mapped.__doc__)]
    lines += ["", "## Steps at which a process may die", "", "Tests kill a process at each of these, at every arrival.", ""]
    lines += [f"{number}. {name}" for number, name in enumerate(steps.STEPS)]
    lines += ["", "In the native half, where a test can send a signal:", ""]
    lines += [f"{number}. {name}" for number, name in enumerate(steps.NATIVE)]
    return "\n".join(lines) + "\n"


def _contract() -> str:
    """Return the contract that daxemu/_fault.h states, without the list of its files."""
    text = (Path(locks.__file__).parent / "_fault.h").read_text(encoding="utf-8")
    comment = text[text.index("/*") + 2 : text.index("*/")]
    paragraphs = "\n".join(line.removeprefix(" *").removeprefix(" ") for line in comment.splitlines()).strip().split("\n\n")
    return "\n\n".join(paragraphs[2:])


def _announce() -> str | None:
    from onecopy.daxemu.slots import Slot

    return Slot.announce.__doc__


def _limbo() -> str | None:
    from onecopy.blkcache import limbo

    return limbo.__doc__


def _section(text: str | None) -> str:
    """Return a docstring's paragraphs behind its first one, unindented where it is indented as a whole."""
    import inspect

    return inspect.cleandoc(text or "").partition("\n\n")[2]


DOCUMENTS = {"FORMAT.md": format_document, "CONCURRENCY.md": concurrency_document}


def main() -> None:
    """Write the documents into the current folder."""
    for name, make in DOCUMENTS.items():
        Path(name).write_text(make(), encoding="utf-8")
        print(f"wrote {name}", file=sys.stderr)


if __name__ == "__main__":
    main()
