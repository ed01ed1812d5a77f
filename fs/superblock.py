"""The superblock: two slots, written in turn. Storing one is the commit point of `sync`; the newest valid one is the truth."""

import time
from typing import NamedTuple

from onecopy.daxemu.errors import CorruptRecord
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.record import checksum
from onecopy.daxemu.steps import reach
from onecopy.daxemu.units import PAGE
from onecopy.fs.format import FIRST_FREE, SUPERBLOCK, SUPERBLOCK_MAGIC, SUPERBLOCK_PFNS


class Superblock(NamedTuple):
    """A superblock: where it was found, its generation, and the roots that it names (PFNs; 0 = empty)."""

    pfn: int
    generation: int
    roots: int
    counts: int
    next_subvolume: int


def read_slot(pool: Pool, pfn: int) -> Superblock:
    """Return the superblock at `pfn`; CorruptRecord when it is none."""
    data = pool.read_media(pfn)[: SUPERBLOCK.size]
    fields = SUPERBLOCK.unpack(data)
    for name, expected in (("magic", SUPERBLOCK_MAGIC), ("pfn", pfn), ("uuid", pool.uuid.bytes)):
        if fields[name] != expected:
            raise CorruptRecord("superblock", pfn, name, expected=expected, actual=fields[name])
    found = checksum(data, SUPERBLOCK.offset["checksum"])
    if fields["checksum"] != found:
        raise CorruptRecord("superblock", pfn, "checksum", expected=fields["checksum"], actual=found)
    block = Superblock(pfn, *(int(fields[name]) for name in Superblock._fields[1:]))
    if not FIRST_FREE <= block.roots < pool.frames or block.counts >= pool.frames:
        raise CorruptRecord("superblock", pfn, "roots", expected="PFNs within the pool", actual=(block.roots, block.counts))
    if max(block.generation, block.next_subvolume) >= 1 << 63:
        raise CorruptRecord(
            "superblock", pfn, "counters", expected="below 2^63", actual=(block.generation, block.next_subvolume)
        )
    return block


def newest(pool: Pool) -> Superblock:
    """Return the newest valid superblock; the first slot's CorruptRecord when neither is."""
    found: list[Superblock] = []
    errors: list[CorruptRecord] = []
    for pfn in SUPERBLOCK_PFNS:
        try:
            found.append(read_slot(pool, pfn))
        except CorruptRecord as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return max(found, key=lambda block: block.generation)


def write(pool: Pool, pfn: int, generation: int, roots: int, counts: int, next_subvolume: int) -> None:
    """Store a superblock at `pfn`, the slot that is *not* the newest; all it names has been flushed and fenced (S7)."""
    fields = [
        SUPERBLOCK_MAGIC, pfn, generation, roots, counts, next_subvolume, time.time_ns(), pool.uuid.bytes, b"", 0,
    ]  # fmt: skip
    fields[-1] = checksum(SUPERBLOCK.pack(*fields), SUPERBLOCK.offset["checksum"])
    pool.store(pfn * PAGE, SUPERBLOCK.pack(*fields))
    pool.persistence.flush(pfn, 1)
    pool.persistence.fence()  # COMMIT: a power cut before this leaves the older superblock's tree, after it this one
    reach("superblock stored")
