"""Extents of files with thousands of runs, shared by clones: every page shows what was last written to it, in every file."""

import random

import numpy as np
import pytest

import onecopy
from onecopy.fs import namei
from onecopy.fs.btree import EXTENTS

PAGE = onecopy.PAGE


def stamps(*numbers: int) -> bytes:
    """Return pages that show these numbers; 0 is a page of zeros."""
    return np.repeat(np.array(numbers, np.uint64), PAGE // 8).tobytes()


class Files:
    """Files of whole pages and, for each page, the number that is stamped all over it."""

    def __init__(self, fs: onecopy.FileSystem) -> None:
        self.fs, self.last = fs, 0
        self.pages: dict[str, list[int]] = {}

    def write(self, path: str, page: int, count: int = 1) -> None:
        numbers = list(range(self.last + 1, self.last + 1 + count))
        self.last += count
        self.fs.write(path, stamps(*numbers), page * PAGE)
        table = self.pages.setdefault(path, [])
        table.extend([0] * (page + count - len(table)))
        table[page : page + count] = numbers

    def punch(self, path: str, page: int, count: int) -> None:
        self.fs.punch(path, page * PAGE, count * PAGE)
        table = self.pages[path]
        count = min(count, len(table) - page)
        table[page : page + count] = [0] * count

    def collapse(self, path: str, page: int, count: int) -> None:
        self.fs.collapse(path, page * PAGE, count * PAGE)
        del self.pages[path][page : page + count]

    def insert(self, path: str, page: int, count: int) -> None:
        self.fs.insert(path, page * PAGE, count * PAGE)
        self.pages[path][page:page] = [0] * count

    def clone(self, src: str, dst: str) -> None:
        if dst in self.pages:
            self.unlink(dst)
        self.fs.clone(src, dst)
        self.pages[dst] = list(self.pages[src])

    def clone_range(self, src: str, page: int, dst: str, to: int, count: int) -> None:
        self.fs.clone_range(src, page * PAGE, dst, to * PAGE, count * PAGE)
        table = self.pages[dst]
        table.extend([0] * (to + count - len(table)))
        table[to : to + count] = self.pages[src][page : page + count]

    def unlink(self, path: str) -> None:
        self.fs.unlink(path)
        del self.pages[path]

    def verify(self) -> None:
        for path, table in self.pages.items():
            words = np.frombuffer(self.fs.read(path), np.uint64).reshape(-1, PAGE // 8)
            assert words[:, 0].tolist() == table
            assert (words == words[:, :1]).all()

    def separators(self, path: str) -> list[int]:
        """Return the first pages of the leaves of the file's extent tree, the first left out."""
        with self.fs._mount.reading() as view:
            root = namei.file_at(view, path).root
            count = view.words[root * 512] & 0xFFFF
            assert EXTENTS.children(view.words, root * 512)
            return view.words[root * 512 + 5 : root * 512 + 4 + count].tolist()


@pytest.fixture
def files(pool):
    """Nothing yet; verified at the end."""
    files = Files(pool)
    yield files
    files.verify()
    assert pool.check().findings == []


@pytest.fixture
def reaching(files):
    """/a, whose extents lie in two leaves, one of which reaches over the border: from page `first` on, 60 pages. /b, its clone.

    The border is the key that separates the leaves: look-ups from there on start in the right leaf, where nothing is found.
    """
    for page in range(0, 500, 2):
        files.write("/a", page)
    files.write("/new", 0, 60)
    first = files.separators("/a")[0] - 2
    files.clone_range("/new", 0, "/a", first, 60)
    files.unlink("/new")
    files.fs.sync()
    assert [extent.file_page for extent in files.fs.extents("/a") if extent.pages == 60] == [first]
    assert first < files.separators("/a")[0] < first + 60
    files.clone("/a", "/b")
    return files, first


CHANGES = {
    "write": lambda files, page: files.write("/a", page),
    "write over its end": lambda files, page: files.write("/a", page, 50),
    "punch": lambda files, page: files.punch("/a", page, 3),
    "collapse": lambda files, page: files.collapse("/a", page, 2),
    "insert": lambda files, page: files.insert("/a", page, 2),
    "clone_range from it": lambda files, page: (files.write("/c", 0), files.clone_range("/a", page, "/c", 5, 3)),
    "clone_range into it": lambda files, page: (files.write("/c", 0, 3), files.clone_range("/c", 0, "/a", page, 3)),
    "truncate": lambda files, page: (files.fs.truncate("/a", page * PAGE), files.pages["/a"].__delitem__(slice(page, None))),
    "zero": lambda files, page: (files.fs.zero("/a", page * PAGE, PAGE), files.pages["/a"].__setitem__(page, 0)),
    "unshare": lambda files, page: files.fs.unshare("/a", page * PAGE, PAGE),
    "dedupe": lambda files, page: files.fs.dedupe_range("/a", page * PAGE, "/b", page * PAGE, PAGE),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("by", [3, 30])
def test_an_extent_that_reaches_beyond_its_leaf_is_shared_like_any_other(reaching, change, by):
    files, first = reaching
    CHANGES[change](files, first + by)
    files.verify()
    assert files.fs.check().findings == []
    files.write("/b", first + by + 1, 4)
    files.write("/a", first + by - 1)


@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_runs_shared_and_changed_apart(files, seed):
    rng = random.Random(seed)
    names = ["/a", "/b", "/c"]
    for page in rng.sample(range(900), 700):
        files.write("/a", page, rng.choice([1, 1, 1, 4]))
    files.clone("/a", "/b")
    files.clone("/b", "/c")

    def page(path: str) -> int:
        return rng.randrange(max(1, len(files.pages[path]) - 30))

    for turn in range(300):
        one, two = rng.sample(names, 2)
        count = rng.choice([1, 1, 2, 17])
        action = rng.choice(["write"] * 8 + ["punch"] * 2 + ["clone_range"] * 4 + ["clone", "insert", "collapse", "sync"])
        if action == "clone":
            files.clone(one, two)
        elif action == "clone_range":
            files.clone_range(one, page(one), two, page(two), min(count * 8, 25))
        elif action == "sync":
            files.fs.sync()
        elif action != "collapse" or len(files.pages[one]) > 600:
            getattr(files, action)(one, page(one), count)
        if turn % 20 == 0:
            files.verify()
    assert len(files.separators("/a")) >= 1
