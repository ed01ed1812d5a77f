"""What the tests of address spaces share: how records and frames look, and what a mapping of a gone file must show."""

import numpy as np

from onecopy.blkcache import spaces as module
from onecopy.blkcache.frames import PINNED
from onecopy.daxemu.units import PAGE
from onecopy.fs import namei


def pinned(fs) -> set[int]:
    """Return the frames with a PINNED bit."""
    return set(np.flatnonzero(fs._mount.frames.array & PINNED).tolist())


def frames(fs, path: str) -> list[int]:
    return [extent.pfn + n for extent in fs.extents(path) for n in range(extent.pages) if extent.pfn]


def key(fs, path: str) -> tuple[int, int]:
    with fs._mount.reading() as view:
        inode = namei.file_at(view, path)
        return inode.subvolume, inode.number


def known(spaces) -> dict[tuple[int, int], int]:
    """Return the states of all spaces there are, by key."""
    used = range(spaces.runtime.get("spaces_used"))
    return {spaces.key(index): spaces.state(index) for index in used if spaces.state(index)}


def free_list(spaces) -> list[int]:
    """Return the records that are free to be used again."""
    found, index = [], spaces.runtime.get("spaces_free") - 1
    while index >= 0:
        assert index not in found
        found.append(index)
        index = spaces.runtime.words[spaces._at(index) + module._NEXT] - 1
    return found


def assert_whole(spaces) -> None:
    """Each space is found by its key and no free record is; a record is free or one inode's, and no chain goes round."""
    free = free_list(spaces)
    for index in range(spaces.runtime.get("spaces_used")):
        found = spaces.find(*spaces.key(index))
        assert (found == index) == bool(spaces.state(index)) != (index in free)


def assert_kept(fs, mapping, letter: bytes) -> None:
    """The mapping of a file that is gone shows what it showed, whatever is written to files."""
    for n in range(6):
        for name in "xy":
            fs.write(f"/{name}", bytes([n]) * 7 * PAGE)
        fs.sync()
    assert mapping[:] == letter * 5 * PAGE


def colliding(spaces, count: int) -> list[int]:
    """Return inode numbers of subvolume 1 that hash to one bucket."""
    wanted, found, number = spaces._bucket(1, 1), [], 0
    while len(found) < count:
        number += 1
        if spaces._bucket(1, number) == wanted:
            found.append(number)
    return found


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)
