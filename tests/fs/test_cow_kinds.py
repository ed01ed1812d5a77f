"""Copy on write over every kind of extent, and over every mixture: writing the clone, writing its source, parts of pages.

Kinds: `hole`; `unwritten` (allocated, never stored to); `regular` (stored and synced); `fresh` (stored since the last sync,
what delayed allocation is elsewhere); `shared` with /origin; `other`, shared with another file.
"""

import itertools

import pytest

import onecopy

PAGE = onecopy.PAGE
KINDS = ["hole", "unwritten", "regular", "fresh", "shared"]


def _lay(twin, files, unit=1):
    """Make each of `files`, path -> kinds, of one run of `unit` pages for each kind."""
    for origin in ("/origin", "/other"):
        twin.fill(origin, 0, max(len(kinds) for kinds in files.values()) * unit * PAGE)
    for path, kinds in files.items():
        twin.create(path)
        twin.truncate(path, len(kinds) * unit * PAGE)
        _store(twin, path, kinds, unit, {"unwritten", "regular", "shared", "other"})
    twin.fs.sync()
    for path, kinds in files.items():
        _store(twin, path, kinds, unit, {"fresh"})
        states = [kind if kind in ("hole", "unwritten") else "data" for kind in kinds]
        assert twin.states(path) == [state for state in states for _ in range(unit)]


def _store(twin, path, kinds, unit, wanted):
    for n, kind in enumerate(kinds):
        at, size = n * unit * PAGE, unit * PAGE
        if kind not in wanted:
            continue
        if kind == "unwritten":
            twin.allocate(path, at, size)
        elif kind in ("regular", "fresh"):
            twin.fill(path, at, size)
        else:
            twin.clone_range("/origin" if kind == "shared" else "/other", at, path, at, size)


def _share_with(twin, path, kinds, unit, clone):
    """Share the runs of `path` that are to be shared as the *source* of `clone`."""
    twin.create(clone)
    twin.truncate(clone, len(kinds) * unit * PAGE)
    for n, kind in enumerate(kinds):
        if kind == "shared":
            twin.clone_range(path, n * unit * PAGE, clone, n * unit * PAGE, unit * PAGE)


# What lies beside the shared runs, and the scenarios that ask for it: written through the clone; through the source.
_BESIDE = {
    "183-185-shared": ["shared", "other"],
    "188-189-unwritten": ["shared", "unwritten"],
    "190-191-hole": ["shared", "hole"],
    "194-195-fresh": ["shared", "fresh"],
    "196-197-regular": ["shared", "regular"],
    "199-200-mixture": ["shared", "unwritten", "hole", "regular", "fresh"],
}
_BESIDE_SOURCE = {
    "284-287-regular": ["shared", "regular"],
    "289-290-unwritten": ["shared", "unwritten"],
    "291-292-hole": ["shared", "hole"],
    "293-295-mixture": ["shared", "unwritten", "hole", "regular", "fresh"],
}


def _woven(kinds):
    return list(itertools.islice(itertools.cycle(kinds), 20))


@pytest.mark.parametrize("step", ["one write", "page by page"])
@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("kinds", _BESIDE.values(), ids=_BESIDE)
def test_generic_cow_of_the_clone_beside(twin, kinds, unit, step):
    _lay(twin, {"/file3": _woven(kinds)}, unit)
    first, length = 5 * unit * PAGE, 10 * unit * PAGE
    size = length if step == "one write" else PAGE
    for offset in range(first, first + length, size):
        twin.fill("/file3", offset, size)
    assert twin.sharers("/file3")[5 * unit : 15 * unit] == [1] * 10 * unit
    assert set(twin.sharers("/origin")[5 * unit : 15 * unit]) == {1}


@pytest.mark.parametrize("step", ["one write", "page by page"])
@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("kinds", _BESIDE_SOURCE.values(), ids=_BESIDE_SOURCE)
def test_generic_cow_of_the_source_beside(twin, kinds, unit, step):
    woven = _woven(kinds)
    _lay(twin, {"/file1": ["regular" if kind == "shared" else kind for kind in woven]}, unit)
    _share_with(twin, "/file1", woven, unit, "/file3")
    first, length = 5 * unit * PAGE, 10 * unit * PAGE
    size = length if step == "one write" else PAGE
    for offset in range(first, first + length, size):
        twin.fill("/file1", offset, size)
    assert twin.sharers("/file1")[5 * unit : 15 * unit] == [1] * 10 * unit


_PARTS = {
    "205-206-regular": "regular",
    "216-217-unwritten": "unwritten",
    "218-220-hole": "hole",
    "222-227-fresh": "fresh",
}


@pytest.mark.parametrize("kind", _PARTS.values(), ids=_PARTS)
def test_generic_sub_page_cow_beside(twin, kind):
    """A write begins 17 bytes into the first page and ends 17 bytes before the end of the last."""
    orders = [kind, "shared", kind], ["shared", kind, "shared"], [kind, kind, "shared"]
    _lay(twin, {f"/file{n}": kinds for n, kinds in enumerate(orders)})
    for n in range(len(orders)):
        path = f"/file{n}"
        twin.fill(path, 17, 3 * PAGE - 34)
        assert twin.sharers(path) == [1, 1, 1]


@pytest.mark.parametrize("kinds", list(itertools.permutations(KINDS, 2)), ids="-".join)
def test_generic_229_238_sub_page_cow_over_mixtures(twin, kinds):
    """Small writes within a page, and across the border of two."""
    ranges = (1, 1), (PAGE - 1, 1), (PAGE - 1, 2), (PAGE - 100, 300), (PAGE, 17), (17, PAGE), (2 * PAGE - 1, 1)
    _lay(twin, {f"/file{n}": kinds for n in range(len(ranges))})
    for n, (offset, length) in enumerate(ranges):
        twin.fill(f"/file{n}", offset, length)


_MIXTURES = list(itertools.product(KINDS, repeat=3))  # each kind between each two
_APART = 8  # pages from one mixture to the next in one file


def _at(name, first, length):
    """Return the operation `name` on a range given relative to where a mixture begins."""
    return lambda twin, path, base: getattr(twin, name)(path, base + first, length)


def _cut_and_grown(twin, path, base):
    twin.truncate(path, base + PAGE + 17)
    twin.truncate(path, base + 5 * PAGE)


_OPERATIONS = {
    "write": _at("fill", PAGE, PAGE),
    "write ragged": _at("fill", PAGE - 100, PAGE + 300),
    "write all": _at("fill", 0, 3 * PAGE),
    "punch": _at("punch", PAGE, PAGE),
    "punch ragged": _at("punch", PAGE - 100, PAGE + 300),
    "zero": _at("zero", PAGE, PAGE),
    "zero ragged": _at("zero", PAGE - 100, PAGE + 300),
    "allocate": _at("allocate", 17, 4 * PAGE),
    "truncate": lambda twin, path, base: twin.truncate(path, base + PAGE + 17),
    "truncate and grow": _cut_and_grown,
    "collapse": _at("collapse", PAGE, PAGE),
    "insert": _at("insert", PAGE, PAGE),
    "unshare": _at("unshare", PAGE, PAGE),
    "unshare all": lambda twin, path, _: twin.unshare(path),
    "clone over": lambda twin, path, base: twin.clone_range("/donor", 0, path, base + PAGE, PAGE),
    "clone further": lambda twin, path, base: twin.clone_range(path, base, path, base + 4 * PAGE, 3 * PAGE),
    "clone back": lambda twin, path, base: twin.clone_range(path, base + PAGE, path, base, PAGE),
}


@pytest.mark.parametrize("operation", _OPERATIONS.values(), ids=_OPERATIONS)
def test_every_mixture_under_every_operation(twin, operation):
    """Each mixture in a file of its own: alone, cloned before, or the clone of another."""
    twin.fill("/donor", 0, 4 * PAGE)
    files = {f"/{number}": kinds for number, kinds in enumerate(_MIXTURES)}
    _lay(twin, files)
    for number, path in enumerate(files):
        if number % 3:
            twin.clone(path, path + "c")
        operation(twin, path + "c" if number % 3 == 2 else path, 0)


@pytest.mark.parametrize("operation", _OPERATIONS.values(), ids=_OPERATIONS)
def test_every_mixture_within_one_large_clone(twin, operation):
    """All mixtures in one file, whose extents take a tree, from the last to the first."""
    twin.fill("/donor", 0, 4 * PAGE)
    kinds = [kind for mixture in _MIXTURES for kind in (*mixture, *["hole"] * (_APART - 3))]
    _lay(twin, {"/file": kinds})
    twin.clone("/file", "/clone")
    for number in reversed(range(len(_MIXTURES))):
        operation(twin, "/clone", number * _APART * PAGE)
