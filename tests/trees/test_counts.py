"""Fragment counts against one counter a frame: split, merged, dropped to nothing, hinted at."""

import random
from itertools import pairwise

import numpy as np
import pytest

from onecopy.blkcache.frames import SHARED
from onecopy.fs import counts
from onecopy.fs.btree import COUNTS
from onecopy.fs.format import COUNT

FRAMES = 120


class Counted:
    """A run of frames with a counter for each; all start with one reference."""

    def __init__(self, mount, together: bool) -> None:
        self.mount, self.together = mount, together
        ((self.first, _),) = mount.run(lambda tx: tx.frames.take_data(FRAMES))
        self.model = dict.fromkeys(range(self.first, self.first + FRAMES), 1)

    def alive(self, pfn: int, pages: int) -> bool:
        return all(self.model.get(pfn + n) for n in range(pages))

    def add(self, runs, delta: int) -> None:
        """Change the references of runs in one transaction; hold what is freed against the model."""
        if self.together:
            freed = self.mount.run(lambda tx: counts.change_many(tx, np.array(runs, np.int64).reshape(-1, 2), delta))
        else:
            freed = self.mount.run(lambda tx: counts.add_runs(tx, runs, delta))
        gone = []
        for pfn, pages in runs:
            for one in range(pfn, pfn + pages):
                self.model[one] += delta
                gone += [one] * (self.model[one] == 0)
        assert sorted(pfn + n for pfn, pages in freed for n in range(pages)) == sorted(gone)

    def verify(self) -> None:
        """Compare everything that can be asked with the model."""
        view = self.mount.live_view()
        for pfn, count in self.model.items():
            if count:
                assert counts.references(view, pfn) == count
                assert count == 1 or view.table[pfn] & SHARED, "a clear hint means: surely not shared"
        self._verify_records(view)

    def _verify_records(self, view) -> None:
        """There is a record for exactly the maximal runs of two references or more."""
        records = [(key, *COUNT.unpack_from(view.bytes, offset)) for key, offset in COUNTS.items(view.words, view.counts)]
        wanted: list[tuple[int, int, int]] = []
        for pfn, count in self.model.items():
            if count < 2:
                continue
            last = wanted[-1] if wanted else (0, 0, 0)
            if last[0] + last[1] == pfn and last[2] == count:
                wanted[-1] = (last[0], last[1] + 1, count)
            else:
                wanted.append((pfn, 1, count))
        assert records == wanted

    def split(self, pfn: int, pages: int) -> list[tuple[int, int, int]]:
        return counts.split_by_references(self.mount.live_view(), pfn, pages)


@pytest.fixture(params=[False, True], ids=["one by one", "together"])
def counted(mount, request):
    return Counted(mount, request.param)


@pytest.mark.parametrize("seed", range(6))
def test_random_references(counted, seed):
    rng = random.Random(seed)

    def some_run() -> tuple[int, int]:
        pages = rng.choice([1, 1, 2, 5, 30])
        return counted.first + rng.randrange(FRAMES - pages + 1), pages

    for _ in range(250):
        runs = [run for run in (some_run() for _ in range(rng.choice([1, 1, 3, 6]))) if counted.alive(*run)]
        if rng.random() < 0.6:
            counted.add(runs, rng.choice([1, 1, 1, 3]))
        else:
            lowest = dict(counted.model)
            taken = []
            for pfn, pages in runs:
                if all(lowest[one] > (1 if rng.random() < 0.9 else 0) for one in range(pfn, pfn + pages)):
                    taken.append((pfn, pages))
                    for one in range(pfn, pfn + pages):
                        lowest[one] -= 1
            counted.add(taken, -1)
        if rng.random() < 0.1:
            counted.mount.sync()
        counted.verify()
        pfn, pages = some_run()
        if counted.alive(pfn, pages):
            found = counted.split(pfn, pages)
            assert [one for first, end, count in found for one in [count] * (end - first)] == [
                counted.model[pfn + n] for n in range(pages)
            ]
            assert found[0][0] == pfn and found[-1][1] == pfn + pages
            assert all(a[1] == b[0] for a, b in pairwise(found))


def test_a_clone_of_a_clone_stays_one_record(counted):
    whole = [(counted.first, FRAMES)]
    for _ in range(50):
        counted.add(whole, 1)
        assert counted.split(*whole[0]) == [(counted.first, counted.first + FRAMES, counted.model[counted.first])]
    counted.verify()
    for _ in range(50):
        counted.add(whole, -1)
    assert counted.mount.live_view().counts == 0
    counted.verify()


def test_a_hole_in_the_middle_heals(counted):
    counted.add([(counted.first, FRAMES)], 1)
    counted.add([(counted.first + 50, 1)], 1)
    assert len(counted.split(counted.first, FRAMES)) == 3
    counted.add([(counted.first + 50, 1)], -1)
    assert len(counted.split(counted.first, FRAMES)) == 1
    counted.verify()


def test_many_fragments(counted):
    """More records than a leaf holds, in an order that splits and joins leaves."""
    mount = counted.mount
    ((first, pages),) = mount.run(lambda tx: tx.frames.take_data(3000))
    singles = [(pfn, 1) for pfn in range(first, first + pages, 2)]
    random.Random(3).shuffle(singles)
    for at in range(0, len(singles), 100):
        mount.run(lambda tx, at=at: counts.add_runs(tx, singles[at : at + 100], 1))
    assert counts.split_by_references(mount.live_view(), first, pages)[::2] == [(pfn, pfn + 1, 2) for pfn, _ in sorted(singles)]
    mount.run(lambda tx: counts.add_runs(tx, [(pfn + 1, 1) for pfn, _ in singles], 1))
    assert counts.split_by_references(mount.live_view(), first, pages) == [(first, first + pages, 2)]
    mount.run(lambda tx: counts.add(tx, first, pages, -1))
    assert mount.live_view().counts == 0


def test_repeats_are_counted_one_by_one(counted):
    run = (counted.first + 3, 4)
    counted.add([run] * 5, 1)
    assert counted.split(*run) == [(run[0], run[0] + 4, 6)]
    counted.add([run] * 6, -1)
    assert counted.model[run[0]] == 0
    counted.verify()


def test_fragments_meet_across_leaves(counted):
    """A change at the border of a leaf finds the neighbour that touches in the next leaf, or in the one before."""
    mount = counted.mount
    ((first, pages),) = mount.run(lambda tx: tx.frames.take_data(1200))

    def add(pfn, delta) -> list[tuple[int, int, int]]:
        mount.run(lambda tx: counts.change_many(tx, np.array([(pfn, 1)]), delta))
        return counts.fragments(mount.live_view(), pfn - 1, pfn + 2)

    for pfn in range(first, first + pages, 2):
        add(pfn, 1)
    view = mount.live_view()
    borders = view.words[view.counts * 512 + 5 : view.counts * 512 + 4 + (view.words[view.counts * 512] & 0xFFFF)].tolist()
    assert len(borders) > 2
    for border in borders:
        assert add(border - 1, 2) == [(border - 2, border - 1, 2), (border - 1, border, 3), (border, border + 1, 2)]
        assert add(border, 1) == [(border - 1, border + 1, 3)]
        add(border, -1)
        assert add(border - 1, -1) == [(border - 2, border + 1, 2)]


def test_hints_go_with_the_next_sync(counted):
    """Not before: the durable root may still name the frames twice, and nobody may store into them in place (S9)."""
    mount, run = counted.mount, (counted.first, 8)
    counted.add([run], 1)
    mount.sync()
    counted.add([run], -1)
    assert all(mount.frames.array[run[0] + n] & SHARED for n in range(8))
    mount.sync()
    assert not any(mount.frames.array[run[0] + n] & SHARED for n in range(8))
    counted.verify()


def test_hints_of_what_is_still_shared_stay(counted):
    mount = counted.mount
    counted.add([(counted.first, 20)], 1)
    counted.add([(counted.first + 5, 5)], -1)
    mount.sync()
    mount.sync()
    hinted = [bool(mount.frames.array[counted.first + n] & SHARED) for n in range(25)]
    assert hinted == [True] * 5 + [False] * 5 + [True] * 10 + [False] * 5
    counted.verify()
