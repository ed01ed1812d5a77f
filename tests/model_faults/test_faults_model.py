"""The model of entries, shootdowns and deaths (faults.pml), checked exhaustively by spin; and mutants, which it must catch."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "faults.pml"

# Slots 0 and 1 store, 2 clones or moves a page and buries the dead, 3 is the one that may die at any step.
WRITER = {"PRESENT": 13, "WRITERS": 9, "CLONERS": 4, "LATE": 0}  # two writers, of which one dies, and a cloner
LATE = WRITER | {"LATE": 8}  # the one that dies maps the file meanwhile
CLONER = {"PRESENT": 13, "WRITERS": 1, "CLONERS": 12, "LATE": 0}  # one writer, two cloners, of which one dies
TWICE = {"PRESENT": 14, "WRITERS": 2, "CLONERS": 8, "LATE": 0, "DIE": 10, "KILLS": 2}  # a cloner dies, and a writer
AGAIN = {"PRESENT": 13, "WRITERS": 9, "CLONERS": 0, "LATE": 8, "REUSE": 8}  # the dead's slot is claimed anew
PATIENCE = {"PRESENT": 5, "WRITERS": 1, "CLONERS": 4, "LATE": 0, "KILLS": 0, "PATIENCE": 1}  # a freeze gives up
SWEEP = WRITER | {"CLONERS": 0, "SWEEPERS": 4}  # a transaction fails when it has frozen, and frees what has lost its name since
CONFIGURATIONS = {
    "a writer dies": WRITER,
    "a mapper dies": LATE,
    "a cloner dies": CLONER,
    "two die": TWICE,
    "a slot is used again": AGAIN,
    "a freeze times out": PATIENCE,
    "frames without a name are freed": SWEEP,
}
FULL = {
    "two writers, a cloner dies, a fourth cleans up": {"WRITERS": 3, "CLONERS": 8, "LATE": 0},
    "two writers, a cloner, a fourth stores and dies": {"WRITERS": 11, "CLONERS": 4, "LATE": 0},
    "two blocks, a writer dies": WRITER | {"PAGES": 2},
    "two blocks, a cloner dies": CLONER | {"PAGES": 2},
    "a freeze times out, two writers": PATIENCE | {"PRESENT": 13, "WRITERS": 9},
    "a block of two pages, a writer dies": WRITER | {"PAGES": 2, "PPB": 2},
}
MUTANTS = {
    "MAPPERS_FIRST": LATE,  # break_sharing reads the mappers before it publishes the entries
    "MAPPER_LATE": LATE,  # Maps.map reads the entries before it is a mapper
    "ACK_FIRST": WRITER,  # answer acknowledges before it remaps
    "NO_GUARD": LATE,  # refresh doesn't take the guard
    "PEERS_WRITABLE": WRITER,  # a service thread maps a private page writable while others have not been told
    "NO_NUMBER": PATIENCE,  # a late answer counts for the record's next message
    "RING_ONCE": AGAIN,  # a bell that was cleared with its dead owner isn't rung again for the slot's next one
    "WAIT_FOR_STRUCK": AGAIN,  # who doesn't map the file any more is waited for
    "TAKE_OVER_SILENTLY": WRITER,  # repair tells nobody
    "NO_INCARNATION": AGAIN,  # a lock word names a slot alone: who saw the dead there takes the block off the slot's next one
    "OWED_FORGOTTEN": TWICE,  # who takes a block over takes over nothing that the dead had taken over
    "NO_REDO": CLONER,  # the next transaction doesn't look for a published log
    "REDO_SKIPS": CLONER,  # redo doesn't wait for who has taken a block over and not repaired it yet
    "LOG_LEFT": {"PRESENT": 13, "WRITERS": 1, "CLONERS": 8, "LATE": 0, "AFTER": 8},  # commit doesn't declare the log done
    "UNLOCK_BEFORE_TELLING": CLONER,  # commit unlocks the blocks, then tells the mappers
    "LOCK_AFTER_LIVE": CLONER,  # commit publishes, then locks the blocks
    "NO_CONFLICT": WRITER,  # commit moves pages that have been stored to
    "FREEZE_KEEPS_PRIVATE": WRITER,  # freeze write-protects, and leaves PRIVATE
    "FREEZE_SILENTLY": WRITER,  # freeze shoots nobody
    "FOLD_LATER": WRITER,  # Changes.freeze reads the entries anew after the blocks are unlocked
    "SWEEP_AT_ONCE": SWEEP,  # what no entry names is freed while a fault has told nobody yet
    "TIMEOUT_STAYS_FROZEN": PATIENCE,  # a freeze that gave up leaves PRIVATE cleared
}

# The default run's: soon found, and each of another kind. The others are slow for their number.
TELLING = [
    "ACK_FIRST", "PEERS_WRITABLE", "TAKE_OVER_SILENTLY", "OWED_FORGOTTEN",
    "NO_REDO", "LOG_LEFT", "NO_CONFLICT", "FREEZE_SILENTLY", "SWEEP_AT_ONCE",
]  # fmt: skip

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="needs spin and gcc (Debian: apt-get install spin)"
)


def check(folder: Path, configuration: dict[str, int], *defines: str, optimised: bool = False) -> str:
    """Let spin look at every state; return what it says."""
    values = [f"-D{name}={value}" for name, value in configuration.items()]
    subprocess.run(["spin", "-a", *values, *defines, MODEL], cwd=folder, check=True, capture_output=True, timeout=60)
    optimise = "-O2" if optimised else "-O0"  # which takes longer than most searches
    compiler = ["gcc", optimise, "-w", "-DSAFETY", "-o", "pan", "pan.c"]
    subprocess.run(compiler, cwd=folder, check=True, capture_output=True, timeout=120)
    search = ["./pan", "-E", "-m100000", "-w22"]
    return subprocess.run(search, cwd=folder, check=False, capture_output=True, text=True, timeout=900).stdout


def complete(said: str) -> bool:
    return "Search not completed" not in said and "max search depth too small" not in said and "out of memory" not in said


@needs_spin
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_protocol(name: str, tmp_path: Path) -> None:
    """No order of steps, and no death at any of them, breaks a rule."""
    said = check(tmp_path, CONFIGURATIONS[name])
    assert "errors: 0" in said, said
    assert complete(said), said


@pytest.mark.slow
@needs_spin
@pytest.mark.parametrize("name", FULL)
def test_protocol_in_full(name: str, tmp_path: Path) -> None:
    """The same with four processes, or two pages."""
    said = check(tmp_path, FULL[name], optimised=True)
    assert "errors: 0" in said, said
    assert complete(said), said


@needs_spin
@pytest.mark.parametrize(
    "mutant", [name if name in TELLING else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS]
)
def test_mutants(mutant: str, tmp_path: Path) -> None:
    """A protocol with this change is found out."""
    said = check(tmp_path, MUTANTS[mutant], f"-DM_{mutant}")
    assert "errors: 1" in said, f"{mutant} passes: {said}"


def test_each_mutant_is_in_the_model() -> None:
    assert set(re.findall(r"M_(\w+)", MODEL.read_text())) == set(MUTANTS)
