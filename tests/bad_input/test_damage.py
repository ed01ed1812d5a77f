"""Damaged records: a typed error or a finding with the right code; never a crash, a hang or another kind of exception."""

import stat

import pytest

from onecopy.daxemu.pool import HEADER
from onecopy.fs.format import COUNT, DIRENT, EXTENT, INODE, NODE, SUBVOLUME, SUPERBLOCK

TYPED = {"CorruptRecord", "NotAPool", "PoolVersionError"}


def test_a_sound_pool_is_sound(media, workout):
    """What the others are compared with: the workout of an undamaged pool raises the errors of its wrong uses only."""
    assert workout(media) <= {"OSError", "IsADirectoryError", "NotADirectoryError", "FileNotFoundError", "OneCopyError",
                              "ReadOnly", "FileExistsError", "PermissionError"}  # fmt: skip


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
    "directory entry of a directory": lambda media: media.value("directory", lambda e: e["kind"] == 2),
    "directory entry of a subvolume": lambda media: media.value("directory", lambda e: e["kind"] == 4),
    "directory entry of a long name": lambda media: media.value("directory", lambda e: e["length"] > 200),
    "extent": lambda media: media.value("extent", lambda e: not e["flags"]),
    "fragment count": lambda media: media.value("counts"),
}
_FIELDS = {
    f"{name}: {field}": (name, field)
    for records, names in (
        ([HEADER], ["pool header"]),
        ([SUPERBLOCK], ["newer superblock", "older superblock"]),
        ([NODE], [name for name in _PLACES if name.startswith(("leaf", "inner"))]),
        ([SUBVOLUME], ["subvolume", "top"]),
        ([INODE], [name for name in _PLACES if name.startswith("inode")]),
        ([DIRENT], [name for name in _PLACES if name.startswith("directory entry")]),
        ([EXTENT], ["extent"]),
        ([COUNT], ["fragment count"]),
    )
    for record in records
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
    """With the checksum put right, so that only what is checked of the field itself can notice."""
    where = _PLACES[place](media)
    have = media.get(where, field)
    for value in _nasty(where, media, field):
        media.put(where, field, value)
        if field != "checksum":
            media.mend(where)
        workout(media)
        media.put(where, field, have)
