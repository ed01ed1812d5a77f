"""Damaged records: a typed error or a finding with the right code; never a crash, a hang or another kind of exception."""

import stat

import pytest

import onecopy
from onecopy.daxemu.pool import HEADER
from onecopy.fs.format import COUNT, DIRENT, EXTENT, FANOUT, INODE, NODE, SUBVOLUME, SUPERBLOCK

PAGE = onecopy.PAGE
U32, U64 = (1 << 32) - 1, (1 << 64) - 1

# Where one record of each sort is; several where it matters what the record belongs to.
_PLACES = {
    "pool header": lambda media: media.header(),
    "newer superblock": lambda media: media.superblocks()[0],
    "older superblock": lambda media: media.superblocks()[1],
    "leaf of the root tree": lambda media: media.node("root"),
    "leaf of an inode tree": lambda media: media.node("inode"),
    "leaf of a directory tree": lambda media: media.node("directory"),
    "leaf of an extent tree": lambda media: media.node("extent"),
    "leaf of the counts tree": lambda media: media.node("counts"),
    "inner node of an inode tree": lambda media: media.node("inode", leaf=False),
    "inner node of a directory tree": lambda media: media.node("directory", leaf=False),
    "inner node of an extent tree": lambda media: media.node("extent", leaf=False),
    "subvolume": lambda media: media.value("root", lambda s: s["parent"]),
    "top": lambda media: media.value("root", lambda s: not s["parent"]),
    "inode of the top directory": lambda media: media.value("inode"),
    "inode of a directory": lambda media: media.value("inode", lambda i: stat.S_ISDIR(i["mode"]) and i["parent"] != 1),
    "inode with its content": lambda media: media.value("inode", lambda i: i["flags"] == 1 and stat.S_ISREG(i["mode"])),
    "inode with its extents": lambda media: media.value("inode", lambda i: i["flags"] == 2 and i["attributes"]),
    "inode with a tree": lambda media: media.value("inode", lambda i: i["root"] and stat.S_ISREG(i["mode"])),
    "inode of a link": lambda media: media.value("inode", lambda i: stat.S_ISLNK(i["mode"])),
    "directory entry of a file": lambda media: media.value("directory", lambda e: e["kind"] == 1 and e["length"] < 9),
    "directory entry of a directory": lambda media: media.value("directory", lambda e: e["name"][:2] == b"e\0"),
    "directory entry of a subvolume": lambda media: media.value("directory", lambda e: e["kind"] == 4),
    "directory entry of a long name": lambda media: media.value("directory", lambda e: e["name"][:6] == b"a long"),
    "extent": lambda media: media.value("extent", lambda e: not e["flags"]),
    "fragment count": lambda media: media.value("counts"),
}


@pytest.fixture
def damaged(media, workout):
    """Change a field of the record at a place, put its checksum right if `mend`, and work with the pool."""

    def run(place, field, value, *, mend=True):
        where = _PLACES[place](media)
        have = media.get(where, field)
        media.put(where, field, value(have) if callable(value) else value)
        assert media.get(where, field) != have
        if mend and field != "checksum":
            media.mend(where)
        return workout(media)

    return run


def test_a_sound_pool_is_sound(media, workout):
    """What the others are compared with: an undamaged pool meets the workout's wrong uses with these errors, and no more."""
    assert workout(media) <= {"OSError", "IsADirectoryError", "NotADirectoryError", "FileNotFoundError", "OneCopyError",
                              "ReadOnly", "FileExistsError", "PermissionError"}  # fmt: skip


@pytest.mark.parametrize("place", [place for place in _PLACES if place not in ("pool header", "older superblock")])
def test_one_flipped_bit_in_each_record(media, workout, place):
    """Any bit: the checksum over the record says so. The newer superblock damaged, the older one serves."""
    where = _PLACES[place](media)
    media.data[where.at + where.record.size // 2] ^= 4
    found = workout(media)
    assert ("superblock" if place == "newer superblock" else "checksum") in found
    assert ("CorruptRecord" in found) == (place != "newer superblock")


_FLIPPED = {
    "magic": ("magic", "NotAPool"),
    "version": ("version", "PoolVersionError"),
    "page size": ("page_size", "CorruptRecord"),
    "size": ("frames", "CorruptRecord"),
    "identity": ("uuid", "CorruptRecord"),
    "checksum": ("checksum", "CorruptRecord"),
}


@pytest.mark.parametrize(("field", "error"), _FLIPPED.values(), ids=_FLIPPED)
def test_one_flipped_bit_in_the_pool_header(media, workout, field, error):
    media.data[HEADER.offset[field] + 1] ^= 4
    assert workout(media) == {error}


# What is damaged beneath a checksum that is right, and the finding or error that it must lead to.
_MENDED = [
    ("pool header", "version", lambda version: version + 1, "PoolVersionError"),
    ("pool header", "page_size", 8192, "CorruptRecord"),
    ("pool header", "frames", 0, "CorruptRecord"),
    ("pool header", "frames", lambda frames: frames + 1, "NotAPool"),
    ("pool header", "frames", U64, "CorruptRecord"),
    ("pool header", "uuid", bytes(16), "no-superblock"),
    ("newer superblock", "magic", 0, "superblock"),
    ("newer superblock", "pfn", 0, "superblock"),
    ("newer superblock", "uuid", bytes(16), "superblock"),
    ("newer superblock", "roots", 0, "superblock"),
    ("newer superblock", "roots", U64, "superblock"),
    ("newer superblock", "roots", 4, "node"),
    ("newer superblock", "counts", U64, "superblock"),
    ("newer superblock", "counts", 0, "references"),
    ("newer superblock", "generation", U64, "superblock"),
    ("newer superblock", "next_subvolume", 2, "CorruptRecord"),
    *((f"{node}", field, value, "node")
      for node in ("leaf of an inode tree", "leaf of a directory tree", "leaf of an extent tree",
                   "leaf of the counts tree", "inner node of an inode tree", "inner node of an extent tree")
      for field, value in (("magic", 0), ("kind", 77), ("level", 5), ("pfn", 3), ("count", 0), ("count", 0xFFFF))),
    ("leaf of the root tree", "magic", 0, "node"),
    ("leaf of the root tree", "level", 5, "CorruptRecord"),
    ("leaf of the root tree", "count", 0xFFFF, "node"),
    ("leaf of the root tree", "count", lambda count: count - 1, "references"),
    ("leaf of an inode tree", "count", lambda count: count - 1, "subvolume"),
    ("leaf of an inode tree", "count", lambda count: count - 1, "name"),
    ("leaf of a directory tree", "count", lambda count: count - 1, "inode"),
    ("leaf of an extent tree", "count", lambda count: count - 1, "pages"),
    ("leaf of the counts tree", "count", lambda count: count - 1, "references"),
    ("inner node of an extent tree", "count", lambda count: count - 1, "pages"),
    ("subvolume", "root", 0, "pointer"),
    ("subvolume", "root", U64, "pointer"),
    ("subvolume", "root", 4, "node"),
    ("subvolume", "next_inode", 1, "CorruptRecord"),
    ("subvolume", "next_inode", U64, "CorruptRecord"),
    ("subvolume", "parent", 77, "subvolume"),
    ("subvolume", "directory", 77, "subvolume"),
    ("subvolume", "inodes", 0, "subvolume"),
    ("top", "inodes", U64, "subvolume"),
    ("inode of the top directory", "mode", 0, "orphan"),
    ("inode of a directory", "mode", stat.S_IFREG, "name"),
    ("inode of a directory", "links", 9, "links"),
    ("inode of a directory", "size", 0, "inode"),
    ("inode of a directory", "root", U64, "pointer"),
    ("inode of a directory", "root", 4, "node"),
    ("inode of a directory", "parent", 77, "inode"),
    ("inode of a directory", "attributes", 77, "inode"),
    ("inode with its content", "links", 0, "links"),
    ("inode with its content", "size", U64, "inode"),
    ("inode with its content", "flags", 3, "inode"),
    ("inode with its content", "flags", 0, "inode"),
    ("inode with its content", "inline_used", U32, "inode"),
    ("inode with its content", "root", 4, "inode"),
    ("inode with its extents", "size", 0, "inode"),
    ("inode with its extents", "size", U64, "CorruptRecord"),
    ("inode with its extents", "pages", U64, "pages"),
    ("inode with its extents", "inline_used", U32, "inode"),
    ("inode with its extents", "inline", b"\xff" * 168, "pointer"),
    ("inode with its extents", "attributes", 2, "orphan"),
    ("inode with a tree", "root", U64, "pointer"),
    ("inode with a tree", "root", 0, "pages"),
    ("inode with a tree", "flags", 4, "inode"),
    ("inode of a link", "mode", stat.S_IFREG, "name"),
    ("inode of a link", "size", 1 << 40, "inode"),
    ("directory entry of a file", "target", 0, "name"),
    ("directory entry of a file", "target", U64, "name"),
    ("directory entry of a file", "target", 1, "name"),
    ("directory entry of a file", "kind", 0, "name"),
    ("directory entry of a file", "kind", 2, "name"),
    ("directory entry of a file", "kind", 3, "name"),
    ("directory entry of a file", "kind", 255, "name"),
    ("directory entry of a file", "length", 0, "name"),
    ("directory entry of a file", "length", 255, "name"),
    ("directory entry of a file", "name", b"../../a\0".ljust(22, b"\0"), "name"),
    ("directory entry of a directory", "target", 1, "inode"),
    ("directory entry of a directory", "target", 77, "name"),
    ("directory entry of a subvolume", "target", 77, "subvolume"),
    ("directory entry of a subvolume", "kind", 2, "subvolume"),
    ("directory entry of a long name", "length", 22, "name"),
    ("directory entry of a long name", "length", 255, "name"),
    ("extent", "pfn", 0, "pointer"),
    ("extent", "pfn", U64, "pointer"),
    ("extent", "pfn", 2, "pointer"),
    ("extent", "pfn", lambda pfn: pfn + 1, "references"),
    ("extent", "pages", 0, "pointer"),
    ("extent", "pages", U32, "pointer"),
    ("extent", "pages", 2, "pages"),
    ("extent", "flags", U32, "inode"),
    ("fragment count", "pages", 0, "pointer"),
    ("fragment count", "pages", U64, "pointer"),
    ("fragment count", "pages", lambda pages: pages + 1, "references"),
    ("fragment count", "references", 0, "fragments"),
    ("fragment count", "references", 1, "fragments"),
    ("fragment count", "references", 77, "references"),
    ("fragment count", "references", U64, "references"),
]  # fmt: skip


def _label(value):
    return "changed" if callable(value) else repr(value)[:20]


@pytest.mark.parametrize(
    ("place", "field", "value", "code"), _MENDED, ids=[f"{p}: {f} {_label(v)}: {c}" for p, f, v, c in _MENDED]
)
def test_damage_beneath_a_right_checksum(damaged, place, field, value, code):
    assert code in damaged(place, field, value)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("kind", ["inode", "directory", "extent"])
@pytest.mark.parametrize("what", ["disorder", "repetition"])
def test_keys_out_of_order(media, workout, kind, leaf, what):
    head = media.node(kind, leaf=leaf)
    first = head.at + NODE.size
    keys = memoryview(media.data)[first : first + 8 * media.get(head, "count")].cast("Q")
    keys[1] = keys[0] if what == "repetition" else U64
    media.mend(head)
    assert "order" in workout(media)


@pytest.mark.parametrize("target", ["itself", "the root", "a sibling", "nowhere", "data", "the header"])
@pytest.mark.parametrize("kind", ["inode", "directory", "extent"])
def test_child_pointers_astray(media, workout, kind, target):
    """A circle, two ways to one node, a frame of something else, a frame beyond the end."""
    head = media.node(kind, leaf=False)
    at = media.child(head, 0)
    data = media.get(media.value("extent"), "pfn")
    goal = {"itself": head.pfn, "the root": media.get(media.superblocks()[0], "roots"), "nowhere": 1 << 40, "data": data,
            "a sibling": media.children(head.pfn)[1], "the header": 0}[target]  # fmt: skip
    media.data[at : at + 8] = goal.to_bytes(8, "little")
    media.mend(head)
    found = workout(media)
    assert {"node", "pointer", "order"} & found


@pytest.mark.parametrize("over", ["root", "inode", "directory", "extent", "counts"])
def test_extents_over_tree_nodes(media, workout, over):
    """A file whose content is the pool's own trees."""
    where = media.value("extent")
    media.put(where, "pfn", media.node(over).pfn)
    media.mend(where)
    assert "overlap" in workout(media)


def test_extents_over_each_other(media, workout):
    where = media.value("extent", lambda extent: not extent["flags"])
    media.put(where, "pages", 40)
    media.mend(where)
    assert {"overlap", "references"} <= workout(media)


def test_a_directory_within_itself(media, workout):
    """The entry 'e' in /d leads to /d: walks and copies end, the directory that was there is an orphan."""
    entry = media.value("directory", lambda e: e["name"][:2] == b"e\0")
    parent = media.value("directory", lambda e: e["name"][:2] == b"d\0")
    media.put(entry, "target", media.get(parent, "target"))
    media.mend(entry)
    found = workout(media)
    assert {"CorruptRecord", "orphan", "inode"} <= found


def test_directories_that_are_each_others_parent(media, workout):
    inner, outer = (media.value("inode", wanted) for wanted in (
        lambda i: stat.S_ISDIR(i["mode"]) and i["parent"] != 1,
        lambda i: stat.S_ISDIR(i["mode"]) and i["parent"] == 1 and i["links"] == 3 and i["size"] == 2,
    ))  # fmt: skip
    entry = media.value("directory", lambda e: e["name"][:2] == b"e\0")
    media.put(outer, "parent", media.get(entry, "target"))
    media.mend(outer)
    assert media.get(inner, "parent")
    assert {"CorruptRecord", "inode"} <= workout(media)


def test_both_superblocks_damaged(media, workout):
    for where in media.superblocks():
        media.put(where, "checksum", 0)
    assert workout(media) == {"no-superblock", "superblock", "CorruptRecord"}


def test_both_superblocks_blank(media, workout):
    for where in media.superblocks():
        media.data[where.at : where.at + PAGE] = bytes(PAGE)
    assert workout(media) == {"no-superblock", "CorruptRecord"}


def test_the_older_superblock_serves(media, in_child, new_path):
    """With the newer one gone, the pool is what it was one sync before, and the next sync makes two good ones."""
    newer = media.superblocks()[0]
    media.data[newer.at : newer.at + PAGE] = bytes(PAGE)
    path = new_path()
    media.write(path)

    def use():
        with onecopy.open(path) as fs:
            assert fs.read("/inline") == b"within the inode"
            fs.write("/new", b"after")
        with onecopy.open(path) as fs:
            assert fs.read("/new") == b"after"
        return [finding.code for finding in onecopy.check(path).findings]

    assert in_child(use) == []


def test_a_misplaced_node_is_noticed(media, workout):
    """A whole, sound node of the right kind in the place of another one: its own PFN tells."""
    first, second = media.children(media.node("extent", leaf=False).pfn)[:2]
    media.page(second)[:] = media.page(first)
    found = workout(media)
    assert {"node", "CorruptRecord"} <= found


# -------------------------------------------------------------------- all of it

_FIELDS = {
    f"{name}: {field}": (name, field)
    for record, names in (
        (HEADER, ["pool header"]),
        (SUPERBLOCK, ["newer superblock", "older superblock"]),
        (NODE, [name for name in _PLACES if name.startswith(("leaf", "inner"))]),
        (SUBVOLUME, ["subvolume", "top"]),
        (INODE, [name for name in _PLACES if name.startswith("inode")]),
        (DIRENT, [name for name in _PLACES if name.startswith("directory entry")]),
        (EXTENT, ["extent"]),
        (COUNT, ["fragment count"]),
    )
    for name in names
    for field in record.offset
}


def _nasty(where, media, field):
    """Values that the field should not have: extremes, near misses, frames that are something else."""
    have = media.get(where, field)
    if isinstance(have, bytes):
        return [bytes(len(have)), b"\xff" * len(have), bytes([have[0] ^ 1]) + have[1:]]
    size = next(one.size for one in where.record.fields if one.name == field)
    values = {0, 1, 2, 3, have ^ 1, have + 1, 1 << 31, 1 << 40, where.pfn, (1 << 8 * size) - 1, 1 << 8 * size - 1}
    return sorted(value for value in values if value < 1 << 8 * size and value != have)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "field"), _FIELDS.values(), ids=_FIELDS)
def test_every_field_with_values_it_should_not_have(media, workout, place, field):
    """With the checksum put right. Not all of them can be noticed; whatever happens is an OSError."""
    where = _PLACES[place](media)
    have = media.get(where, field)
    for value in _nasty(where, media, field):
        media.put(where, field, value)
        if field != "checksum":
            media.mend(where)
        workout(media)
        media.put(where, field, have)


def test_the_places_are_what_they_are_called(media):
    """The trees are as high as the tests above assume."""
    assert FANOUT > 2
    for name, place in _PLACES.items():
        where = place(media)
        if where.record is NODE:
            assert media.get(where, "count") > 1, name
            assert (media.get(where, "level") > 0) == name.startswith("inner"), name
