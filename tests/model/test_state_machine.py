"""The whole API against a model: two handles here, one in another process that may die, and whatever hypothesis thinks of.

Asserted after every step: results and errno; every file's bytes (S4); what is mapped stays as it was, read-only (S1, S5);
who shares what (S2). At the end, and whenever everybody leaves: names, links, attributes, counts (S6), before and after a
reboot, which only what was synced survives.
"""

import copy
import itertools
import os
import random
import secrets
from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import onecopy
from onecopy.daxemu.steps import STEPS
from onecopy.fs import mount

from ..conftest import forget
from ..multiproc.trials import differences, reboot
from .hands import Distant, Hands
from .reference import Directory, File, Link, Model, Outcome, Phantom

PAGE = onecopy.PAGE

names = st.sampled_from(["a", "b", "c", "d", "longer than one record can hold"])
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
near_pages = st.integers(0, 8).map(lambda pages: pages * PAGE)
offsets = near_pages | st.integers(0, 9 * PAGE) | st.integers(0, 200)
sizes = near_pages | st.integers(1, 9 * PAGE) | st.integers(0, 200)
hands = st.sampled_from([0, 1, 2])


class Choice(NamedTuple):
    """A path to be chosen among those that there are: mostly one of the right kind, sometimes any at all."""

    kind: str
    number: int
    path: str


def a(kind: str) -> st.SearchStrategy[Choice]:
    return st.builds(Choice, st.just(kind), st.integers(0, 999), paths)


@st.composite
def contents(draw) -> bytes:
    """Bytes that are like no others, or that several files have in common."""
    size, seed = draw(sizes), draw(st.integers(0, 3))
    if draw(st.booleans()):
        return random.Random(seed).randbytes(PAGE) * (size // PAGE)
    return random.Random(seed ^ size).randbytes(size)


writing = st.one_of(
    st.tuples(st.just("write"), a("file") | a("new"), contents(), offsets),
    st.tuples(st.just("truncate"), a("file"), sizes),
)
changing = st.one_of(
    st.tuples(st.sampled_from(["punch", "zero", "allocate", "unshare"]), a("file"), offsets, sizes),
    st.tuples(st.sampled_from(["collapse", "insert"]), a("file"), near_pages, near_pages),
)
sharing = st.one_of(
    st.tuples(st.just("clone"), a("file"), a("new")),
    st.tuples(st.just("clone_range"), a("file"), near_pages, a("file"), near_pages, near_pages | sizes),
)
deduping = st.one_of(
    st.tuples(st.just("dedupe_range"), a("file"), near_pages, a("file"), near_pages, near_pages | sizes),
    st.tuples(st.just("dedupe"), st.tuples(a("any")) | st.just(("/",))),
)
growing = st.one_of(
    st.tuples(st.just("create_subvolume"), a("new")),
    st.tuples(st.just("snapshot"), a("subvolume"), a("new")),
    st.tuples(st.just("clone_tree"), a("directory"), a("new")),
    st.tuples(st.just("mkdir"), a("new")),
)
naming = st.one_of(
    st.tuples(st.just("rename"), a("any"), a("new") | a("any")),
    st.tuples(st.just("link"), a("file"), a("new")),
    st.tuples(st.just("symlink"), a("any") | a("new"), a("new")),
    st.tuples(st.just("create"), a("new")),
)
removing = st.one_of(
    st.tuples(st.just("unlink"), a("file") | a("link")),
    st.tuples(st.just("rmdir"), a("directory")),
    st.tuples(st.just("delete_subvolume"), a("subvolume")),
)
describing = st.one_of(
    st.tuples(st.just("chmod"), a("any"), st.integers(0, 0o7777)),
    st.tuples(st.just("setxattr"), a("any"), st.sampled_from(["user.a", "user.b"]), st.binary(max_size=9000)),
    st.tuples(st.just("removexattr"), a("any"), st.sampled_from(["user.a", "user.b"])),
)
KINDS = {
    "any": lambda node: True,
    "file": lambda node: isinstance(node, File),
    "link": lambda node: isinstance(node, Link),
    "directory": lambda node: isinstance(node, Directory | Phantom),
    "subvolume": lambda node: isinstance(node, Directory) and node.is_volume,
}


START = [
    ("write", "/a", random.Random(0).randbytes(PAGE) * 5, 0),
    ("write", "/b", random.Random(1).randbytes(6 * PAGE + 100), 0),
    ("write", "/c", b"tiny", 0),
    ("mkdir", "/d"),
    ("clone", "/b", "/d/a"),
    ("create_subvolume", "/d/b"),
    ("write", "/d/b/a", random.Random(2).randbytes(3 * PAGE), 0),
    ("symlink", "../b", "/d/c"),
]


class Machine(RuleBasedStateMachine):
    """A pool and its model."""

    size = "16M"
    may_fill_up = False
    reclaim_at = mount._RECLAIM_AT

    def __init__(self) -> None:
        super().__init__()
        self.path = f"/dev/shm/test-{os.getpid()}-{secrets.token_hex(4)}.pool"
        self.hands: list[Any] = []
        self.model = Model()
        self.mapped: dict[int, tuple[int, bytes]] = {}  # number of a mapping -> whose, and what it must show
        self.numbers = itertools.count()

    @initialize()
    def begin(self) -> None:
        mount._RECLAIM_AT = self.reclaim_at
        onecopy.format(self.path, self.size)
        self.hands = [Distant(self.path, [])]
        self.hands = [Hands(self.path), Hands(self.path), *self.hands]
        for call in START:
            self.do(0, call)

    # ---------------------------------------------------------------- doing

    def path_of(self, choice: Choice) -> str:
        """Return a path of the kind wanted; one time in eight, and when there is none, any path."""
        number, odd = divmod(choice.number, 8)
        wanted = KINDS["directory" if choice.kind == "new" else choice.kind]
        found = sorted(path for path, node in self.model.walk() if wanted(node))
        if odd == 7 or not found:
            return choice.path
        path = found[number % len(found)]
        return path if choice.kind != "new" else f"{path.rstrip('/')}/{choice.path.rpartition('/')[2]}"

    def resolved(self, call: Any) -> Any:
        """Return a call with its choices made."""
        if isinstance(call, Choice):
            return self.path_of(call)
        return tuple(map(self.resolved, call)) if isinstance(call, tuple) else call

    def do(self, hand: int, call: tuple[Any, ...]) -> None:
        """Do the same to the pool and to the model."""
        call = self.resolved(call)
        note(f"{hand}: {call!r:.300}")
        self.hold(self.hands[hand].attempt(*call), call)

    def hold(self, found: Outcome, call: tuple[Any, ...]) -> None:
        """Compare an outcome with the model's."""
        if found == ("full", None) and self.may_fill_up:
            return
        expected = self.model.attempt(*call)
        assert found == expected, f"{call[0]} gave {found}, the model {expected}"

    @rule(hand=hands, call=writing)
    def write(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=writing)
    def write_more(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=changing)
    def change(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=sharing)
    def share(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=deduping)
    def dedupe(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=growing)
    def grow(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=naming)
    def name(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=removing)
    def remove(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands, call=describing)
    def describe(self, hand, call):
        self.do(hand, call)

    @rule(hand=hands)
    def sync(self, hand):
        self.do(hand, ("sync",))

    # -------------------------------------------------------------- mapping

    @rule(hand=hands, choice=a("file"))
    def map(self, hand, choice):
        number, path = next(self.numbers), self.path_of(choice)
        outcome, shown = self.hands[hand].map(number, path)
        if outcome == "full" and self.may_fill_up:
            return
        expected = self.model.attempt("file", path)
        assert outcome == expected[0]
        if outcome == "error":
            assert shown == expected[1]
        else:
            assert shown == expected[1].data
            self.mapped[number] = hand, shown

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def unmap(self, data):
        number = data.draw(st.sampled_from(sorted(self.mapped)))
        self.hands[self.mapped.pop(number)[0]].unmap(number)

    # ------------------------------------------------- coming, going, dying

    @rule(hand=hands)
    def reopen(self, hand):
        self.hands[hand].reopen()

    @rule()
    def leave_and_reboot(self):
        """Everybody leaves, which syncs; the run-time file is lost; all come back."""
        for hand in self.hands:
            hand.close()
        self.mapped.clear()
        reboot(self.path)
        for hand in self.hands:
            hand.open()
        self.compare(self.hands[0].fs)

    @rule(change=writing | sharing | growing | naming | removing, step=st.sampled_from(STEPS), arrival=st.integers(1, 3))
    def die_while(self, change, step, arrival):
        """The other process dies in the middle of something: it has happened, or it has not."""
        change = self.resolved(change)
        note(f"2, dying at {step!r}, arrival {arrival}: {change!r:.300}")
        self.hands[2].die_at(step, arrival)
        before = picture(self.model)
        outcome = self.hands[2].attempt_and_die(*change)
        self.hands[2].end()
        self.mapped = {number: held for number, held in self.mapped.items() if held[0] != 2}
        if outcome is not None:
            self.hold(outcome, change)
        else:
            after = copy.deepcopy(self.model)
            after.attempt(*change)
            found = seen(self.hands[0].fs)
            assert found in (before, picture(after))
            if found != before:
                self.model = after
        self.hands[2] = Distant(self.path, self.hands[:2])

    # ------------------------------------------------------------- comparing

    @invariant()
    def bytes_are_what_they_should_be(self):
        if self.hands:
            fs = self.hands[0].fs
            for path, node in self.model.walk():
                if isinstance(node, File):
                    assert fs.read(path) == node.data, f"S4: {path}"

    @invariant()
    def mappings_show_what_they_showed(self):
        for number, (hand, shown) in self.mapped.items():
            assert self.hands[hand].look(number) == shown, "S5"

    @invariant()
    def sharers_are_known(self):
        if self.hands:
            assert_sharers(self.hands[0].fs, self.model)

    def compare(self, fs: onecopy.FileSystem) -> None:
        found, expected = seen(fs), picture(self.model)
        assert found == expected, differences(found, [expected])
        assert fs.check().findings == [], "S6"

    def teardown(self) -> None:
        try:
            if self.hands:
                self.compare(self.hands[1].fs)
                for hand in self.hands:
                    hand.close()
                assert onecopy.check(self.path).findings == []
                with onecopy.open(self.path) as fs:
                    self.compare(fs)
                    info = fs.info()
                    assert (info.waiting_pages, info.pinned_pages, len(info.users)) == (0, 0, 1)
        finally:
            for hand in self.hands[2:]:
                hand.end()
            for hand in self.hands[:2]:
                hand.close()
            forget(self.path)
            mount._RECLAIM_AT = Machine.reclaim_at


def picture(model: Model) -> dict[str, Any]:
    """Return what there is to see of a model."""
    found: dict[str, Any] = {"subvolumes": model.volumes()}
    for path, node in model.walk():
        content: Any = []
        if isinstance(node, File):
            content = bytes(node.data)
        elif isinstance(node, Link):
            content = node.target
        elif isinstance(node, Directory):
            content = sorted(node.entries)
        found[path] = (node.mode, model.names(node), node.attributes, content)
    return found


def seen(fs: onecopy.FileSystem) -> dict[str, Any]:
    """Return what there is to see of a pool, in the same words."""
    found: dict[str, Any] = {"subvolumes": [one.path for one in fs.list_subvolumes()]}
    stack = [("/", "dir")]
    while stack:
        path, kind = stack.pop()
        status = fs.lstat(path)
        content: Any
        if kind == "file":
            content = fs.read(path)
        elif kind == "symlink":
            content = fs.readlink(path)
        else:
            content = fs.listdir(path)
            stack += [(f"{path.rstrip('/')}/{one.name}", one.kind) for one in fs.scandir(path)]
        attributes = {} if kind == "symlink" else {name: fs.getxattr(path, name) for name in fs.listxattr(path)}
        assert status.st_size == len(content)
        found[path] = (status.st_mode & 0o7777, status.st_nlink, attributes, content)
    return found


def assert_sharers(fs: onecopy.FileSystem, model: Model) -> None:
    """Hold the sharers of every run against who reaches its frames, file by file (S2)."""
    reached: Counter[int] = Counter()
    claimed: dict[int, int] = {}
    for path in {id(node): path for path, node in model.walk() if isinstance(node, File)}.values():
        for extent in fs.extents(path):
            for pfn in range(extent.pfn, extent.pfn + extent.pages) if extent.pfn else ():
                reached[pfn] += 1
                claimed[pfn] = extent.sharers
    assert claimed == reached


class FullMachine(Machine):
    """The same in a pool that is soon full: whatever finds no room has changed nothing."""

    size = "1M"
    may_fill_up = True
    reclaim_at = 1  # frames are used again as soon as they may be


def run_of(machine: type[Machine], examples: int, steps: int) -> type:
    """Return the test case of a machine, so many examples of so many steps."""
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    return case


TestPool = run_of(Machine, 40, 40)
TestFullPool = run_of(FullMachine, 20, 40)
TestPoolLong = pytest.mark.slow(run_of(type("LongMachine", (Machine,), {}), 3000, 80))
TestFullPoolLong = pytest.mark.slow(run_of(type("LongFullMachine", (FullMachine,), {}), 1500, 80))
