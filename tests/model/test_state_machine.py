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
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import onecopy
from onecopy.daxemu.steps import STEPS

from ..conftest import forget
from ..multiproc.trials import reboot
from .hands import Distant, Hands
from .reference import Directory, File, Link, Model, Outcome

PAGE = onecopy.PAGE

names = st.sampled_from(["a", "b", "c", "long name " * 20])
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
targets = paths | paths.map(lambda path: path[1:]) | paths.map(lambda path: ".." + path) | st.just("/" + "a/" * 90 + "b")
near_pages = st.integers(0, 8).map(lambda pages: pages * PAGE)
offsets = near_pages | st.integers(0, 9 * PAGE) | st.integers(0, 200)
sizes = near_pages | st.integers(0, 9 * PAGE) | st.integers(0, 200)
hands = st.sampled_from([0, 1, 2])


@st.composite
def contents(draw) -> bytes:
    """Bytes that are like no others, or that several files have in common."""
    size, seed = draw(sizes), draw(st.integers(0, 3))
    if draw(st.booleans()):
        return random.Random(seed).randbytes(PAGE) * (size // PAGE)
    return random.Random(seed ^ size).randbytes(size)


changes = st.one_of(
    st.tuples(st.just("write"), paths, contents(), offsets),
    st.tuples(st.just("truncate"), paths, sizes),
    st.tuples(st.just("unlink"), paths),
    st.tuples(st.just("rename"), paths, paths),
    st.tuples(st.just("clone"), paths, paths),
    st.tuples(st.just("snapshot"), paths, paths),
    st.tuples(st.just("punch"), paths, offsets, sizes),
    st.tuples(st.just("sync")),
)


class Machine(RuleBasedStateMachine):
    """A pool and its model."""

    size = "16M"
    may_fill_up = False

    def __init__(self) -> None:
        super().__init__()
        self.path = f"/dev/shm/test-{os.getpid()}-{secrets.token_hex(4)}.pool"
        self.hands: list[Any] = []
        self.model = Model()
        self.mapped: dict[int, tuple[int, bytes]] = {}  # number of a mapping -> whose, and what it must show
        self.numbers = itertools.count()

    @initialize()
    def begin(self) -> None:
        onecopy.format(self.path, self.size)
        self.hands = [Distant(self.path, [])]
        self.hands = [Hands(self.path), Hands(self.path), *self.hands]

    # ---------------------------------------------------------------- doing

    def do(self, hand: int, *call: Any) -> None:
        """Do the same to the pool and to the model."""
        self.hold(self.hands[hand].attempt(*call), call)

    def hold(self, found: Outcome, call: tuple[Any, ...]) -> None:
        """Compare an outcome with the model's."""
        if found == ("full", None) and self.may_fill_up:
            return
        expected = self.model.attempt(*call)
        assert found == expected, f"{call[0]} gave {found}, the model {expected}"

    @rule(hand=hands, path=paths, data=contents(), offset=offsets)
    def write(self, hand, path, data, offset):
        self.do(hand, "write", path, data, offset)

    @rule(hand=hands, path=paths, size=sizes)
    def truncate(self, hand, path, size):
        self.do(hand, "truncate", path, size)

    @rule(hand=hands, how=st.sampled_from(["punch", "zero", "allocate", "unshare"]), path=paths, offset=offsets, length=sizes)
    def change_range(self, hand, how, path, offset, length):
        self.do(hand, how, path, offset, length)

    @rule(hand=hands, how=st.sampled_from(["collapse", "insert"]), path=paths, offset=near_pages, length=near_pages)
    def shift(self, hand, how, path, offset, length):
        self.do(hand, how, path, offset, length)

    @rule(hand=hands, how=st.sampled_from(["clone", "clone_tree", "snapshot", "rename", "link"]), src=paths, dst=paths)
    def from_to(self, hand, how, src, dst):
        self.do(hand, how, src, dst)

    @rule(hand=hands, how=st.sampled_from(["clone_range", "dedupe_range"]), a=paths, b=paths, of_a=near_pages, of_b=near_pages,
          length=near_pages | sizes)  # fmt: skip
    def share_range(self, hand, how, a, b, of_a, of_b, length):
        self.do(hand, how, a, of_a, b, of_b, length)

    @rule(hand=hands, paths=st.lists(paths, max_size=2).map(lambda some: tuple(some) or ("/",)))
    def dedupe(self, hand, paths):
        self.do(hand, "dedupe", paths)

    @rule(hand=hands, how=st.sampled_from(["mkdir", "create_subvolume", "create"]), path=paths)
    def make(self, hand, how, path):
        self.do(hand, how, path)

    @rule(hand=hands, how=st.sampled_from(["unlink", "rmdir", "delete_subvolume"]), path=paths | st.just("/"))
    def remove(self, hand, how, path):
        self.do(hand, how, path)

    @rule(hand=hands, leads_to=targets, path=paths)
    def symlink(self, hand, leads_to, path):
        self.do(hand, "symlink", leads_to, path)

    @rule(hand=hands, path=paths, name=st.sampled_from(["user.a", "user.b"]), value=st.none() | st.binary(max_size=9000))
    def attribute(self, hand, path, name, value):
        if value is None:
            self.do(hand, "removexattr", path, name)
        else:
            self.do(hand, "setxattr", path, name, value)

    @rule(hand=hands, path=paths, mode=st.integers(0, 0o7777))
    def chmod(self, hand, path, mode):
        self.do(hand, "chmod", path, mode)

    @rule(hand=hands)
    def sync(self, hand):
        self.do(hand, "sync")

    # -------------------------------------------------------------- mapping

    @rule(hand=hands, path=paths)
    def map(self, hand, path):
        number = next(self.numbers)
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

    @rule(change=changes, step=st.sampled_from(STEPS), arrival=st.integers(1, 3))
    def die_while(self, change, step, arrival):
        """The other process dies in the middle of something: it has happened, or it has not."""
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
        assert seen(fs) == picture(self.model)
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
