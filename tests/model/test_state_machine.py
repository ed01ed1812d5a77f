"""The whole API against a model: two handles here, one in another process that may die, and whatever hypothesis thinks of.

Asserted after every step: results and errno; every file's bytes (S4); that what is mapped shows its file as it is, a deleted
one, too, whoever wrote it or stored into it (S1, S3, S5); who shares what (S2). At the end, and whenever everybody leaves:
names, links, attributes, counts (S6), before and after a reboot, which only what was synced survives.
"""

import copy
import itertools
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import onecopy
from onecopy.daxemu.steps import NATIVE, STEPS
from onecopy.daxemu.units import pages_of
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
FAULT, COMMIT = NATIVE[:7], NATIVE[7:]  # the steps of a store, and of a transaction


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


class Mapped(NamedTuple):
    """A mapping: whose it is, of which file (perhaps a deleted one), how long, and whether for storing."""

    hand: int
    file: File
    length: int
    writable: bool

    @property
    def size(self) -> int:
        """How many bytes of it there are: what lies in pages behind the end of the file does not exist."""
        return min(self.length, pages_of(len(self.file.data)) * PAGE)


def is_between(found, before, after):
    """Return whether `found` is `before`, but for bytes of files that `after` has in their place."""
    different = [path for path in before if found.get(path) != before[path]]
    return found.keys() == before.keys() and all(
        found[path][:-1] == before[path][:-1]
        and len(found[path][-1]) == len(before[path][-1])
        and all(byte in pair for byte, *pair in zip(found[path][-1], before[path][-1], after[path][-1], strict=False))
        for path in different
    )


class Machine(RuleBasedStateMachine):
    """A pool and its model."""

    size = "16M"
    kind: ClassVar[dict[str, str]] = {}
    may_fill_up = False
    reclaim_at = mount._RECLAIM_AT

    def __init__(self) -> None:
        super().__init__()
        self.path = f"/dev/shm/test-{os.getpid()}-{secrets.token_hex(4)}.pool"
        self.hands: list[Any] = []
        self.model = Model()
        self.mapped: dict[int, Mapped] = {}
        self.numbers = itertools.count()

    @initialize()
    def begin(self) -> None:
        mount._RECLAIM_AT = self.reclaim_at
        onecopy.format(self.path, self.size, **self.kind)
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

    @rule(hand=hands, choice=a("file"), mode=st.sampled_from(["r", "r+", "r+"]))
    def map(self, hand, choice, mode):
        number, path = next(self.numbers), self.path_of(choice)
        outcome, found = self.hands[hand].map(number, path, mode)
        note(f"{hand}: map {number}, {path!r}, {mode!r}: {outcome}")
        if outcome == "full" and self.may_fill_up:
            return
        expected = self.model.attempt("file", path)
        assert outcome == expected[0]
        if outcome == "error":
            assert found == expected[1]
        else:
            assert found == len(expected[1].data)
            self.mapped[number] = Mapped(hand, expected[1], found, mode == "r+")

    def a_place(self, data, size: int, wanted: Callable[[Mapped], bool]) -> tuple[int, Mapped, int, int] | None:
        """Return a mapping for storing, with where in it and how much; None when there is none that is wanted."""
        found = [n for n, one in self.mapped.items() if one.writable and min(one.length, len(one.file.data)) and wanted(one)]
        if not found:
            return None
        number = data.draw(st.sampled_from(sorted(found)))
        one = self.mapped[number]
        end = min(one.length, len(one.file.data))
        offset = data.draw(offsets) % end
        return number, one, offset, min(size, end - offset)

    @precondition(lambda self: self.mapped)
    @rule(data=st.data(), size=sizes, value=st.integers(1, 255))
    def store(self, data, size, value):
        place = self.a_place(data, max(1, size), lambda one: True)
        if place is None:
            return
        number, one, offset, size = place
        note(f"{one.hand}: store {size} of {value} at {offset} of {number}")
        outcome = self.hands[one.hand].store(number, offset, bytes([value]) * size)
        if outcome == ("full", None) and self.may_fill_up:
            return
        assert outcome == ("ok", None)
        one.file.data[offset : offset + size] = bytes([value]) * size

    @precondition(lambda self: any(one.hand == 2 for one in self.mapped.values()) and not self.may_fill_up)
    @rule(data=st.data(), value=st.integers(1, 255), step=st.sampled_from(FAULT))
    def die_while_storing(self, data, value, step):
        """The other process dies in the middle of a store, or it need not fault for that: then it has stored."""
        place = self.a_place(data, 1, lambda one: one.hand == 2)
        if place is None:
            return
        number, one, offset, _ = place
        note(f"2, dying at {step!r}: store {value} at {offset} of {number}")
        if self.hands[2].do_and_die("store_and_die", number, offset, value, step):
            one.file.data[offset] = value
        self.hands[2].end()
        self.another_process()

    def another_process(self) -> None:
        """The other one has died."""
        self.mapped = {number: one for number, one in self.mapped.items() if one.hand != 2}
        self.hands[2] = Distant(self.path, self.hands[:2])

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def unmap(self, data):
        number = data.draw(st.sampled_from(sorted(self.mapped)))
        note(f"unmap {number}")
        self.hands[self.mapped.pop(number).hand].unmap(number)

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

    @rule(
        change=writing | sharing | growing | naming | removing, step=st.sampled_from(STEPS + COMMIT), arrival=st.integers(1, 3)
    )
    def die_while(self, change, step, arrival):
        """The other process dies in the middle of something: it has happened, or it has not."""
        change = self.resolved(change)
        note(f"2, dying at {step!r}, arrival {arrival}: {change!r:.300}")
        self.hands[2].die_at(step, arrival)
        before = picture(self.model)
        outcome = self.hands[2].attempt_and_die(*change)
        self.hands[2].end()
        if outcome is not None:
            self.hold(outcome, change)
        else:
            after, mapped = copy.deepcopy((self.model, self.mapped))
            after.attempt(*change)
            found = seen(self.hands[0].fs)
            if change[0] == "write" and found not in (before, picture(after)):
                # Stores over a file's own pages come before the publishing: a death between leaves them, as in any file system.
                assert is_between(found, before, picture(after))
                outcome = self.hands[0].attempt(*change)
                assume(outcome != ("full", None))  # then nobody can say what the file holds
                self.hold(outcome, change)
            else:
                assert found in (before, picture(after))
                if found != before:
                    self.model, self.mapped = after, mapped
        self.another_process()

    # ------------------------------------------------------------- comparing

    @invariant()
    def bytes_are_what_they_should_be(self):
        if self.hands:
            fs = self.hands[0].fs
            for path, node in self.model.walk():
                if isinstance(node, File):
                    assert fs.read(path) == node.data, f"S4: {path}"

    @invariant()
    def mappings_show_their_files(self):
        for number, one in self.mapped.items():
            shown = self.hands[one.hand].look(number, one.size)
            assert shown == bytes(one.file.data[: one.size]).ljust(one.size, b"\0"), "S3, S5"

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


class SharedMachine(Machine):
    """The same through a cache that is smaller than the pool."""

    kind: ClassVar[dict[str, str]] = {"device": "cached", "cache_size": "1M", "policy": "shared"}


class PerInodeMachine(Machine):
    """The same through one that keeps each file's pages for itself."""

    kind: ClassVar[dict[str, str]] = {"device": "cached", "cache_size": "1M", "policy": "per-inode"}


def run_of(machine: type[Machine], examples: int, steps: int, *, random: bool = False) -> type:
    """Return the test case of a machine, so many examples of so many steps; the same ones each time, or random."""
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        derandomize=not random,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    return case


TestPool = run_of(Machine, 40, 40)
TestFullPool = run_of(FullMachine, 20, 40)
TestSharedPool = run_of(SharedMachine, 15, 40)
TestPerInodePool = run_of(PerInodeMachine, 15, 40)
TestPoolLong = pytest.mark.slow(run_of(type("LongMachine", (Machine,), {}), 3000, 80, random=True))
TestFullPoolLong = pytest.mark.slow(run_of(type("LongFullMachine", (FullMachine,), {}), 1500, 80, random=True))
TestSharedPoolLong = pytest.mark.slow(run_of(type("LongSharedMachine", (SharedMachine,), {}), 1500, 80, random=True))
TestPerInodePoolLong = pytest.mark.slow(run_of(type("LongPerInodeMachine", (PerInodeMachine,), {}), 1500, 80, random=True))
