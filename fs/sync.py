"""Moving the durable root up to the live one: what `sync` does, and who comes after a death in it finishes."""

from typing import TYPE_CHECKING

import numpy as np

from onecopy.blkcache.frames import DIRTY, FRESH, NODE, USED
from onecopy.daxemu.persist import Volatile
from onecopy.daxemu.runtime import W
from onecopy.daxemu.steps import reach
from onecopy.fs import counts, rebuild, superblock
from onecopy.fs.format import SUPERBLOCK_PFNS
from onecopy.fs.tx import View

if TYPE_CHECKING:
    from onecopy.fs.mount import Mount

INTENT_SYNC = 2


def write_out(mount: "Mount") -> None:
    """Make the live generation durable; what is interrupted is begun anew. The caller holds the transaction lock.

    OSError (EIO) when the device fails, NoSpace when its host has no room: the durable root stays the one it was.
    """
    runtime, pool, array = mount.runtime, mount.pool, mount.frames.array
    generation = runtime.atomic.load(W["live_generation"])
    view = View(runtime, pool, generation)
    # Stores go to private pages and leave no mark; where flushing does something, all of these are flushed. A cache knows.
    marks = not mount.spaces.any_entries or isinstance(pool.persistence, Volatile)
    stored = [(0, pool.frames)] if pool.cached else [] if marks else mount.spaces.private_runs()
    if generation == runtime.get("durable_generation") and runtime.get("intent") != INTENT_SYNC:
        for first, pages in stored:
            pool.persistence.flush(first, pages)
        if stored:
            pool.persistence.fence()
        return
    runtime.set("intent", INTENT_SYNC)
    reach("sync intended")
    for pfn in np.flatnonzero((array & (USED | NODE | FRESH)) == USED | NODE | FRESH).tolist():
        losses, found = pool.losses(), rebuild.node_checksum(pool, pfn)
        if pool.words[pfn * 512 + 3] != found:  # else it went to the media with a sync that failed
            pool.raise_lost(losses)
            pool.words[pfn * 512 + 3] = found
    reach("checksums set")
    for first, pages in stored:
        pool.persistence.flush(first, pages)
    dirty = (array & (USED | DIRTY)) == USED | DIRTY
    edges = np.flatnonzero(np.diff(dirty, prepend=False, append=False)).tolist()
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        pool.persistence.flush(first, end - first)
    pool.persistence.fence()  # S7: before the superblock names it
    reach("pages flushed")
    current = superblock.newest(pool)
    if current.generation != generation:
        slot = next(pfn for pfn in SUPERBLOCK_PFNS if pfn != current.pfn)
        superblock.write(pool, slot, generation, view.roots, view.counts, view.next_subvolume)
    runtime.set("durable_generation", generation)
    reach("durable noted")
    mount.limbo.committed(view.limbo_tail)
    if runtime.get("stale_hints"):
        counts.refresh_hints(view)
        runtime.set("stale_hints", 0)
    reach("flags cleaned")
    runtime.set("intent", 0)
    mount.limbo.reclaim(view.limbo_tail)
    mount.frames.give_back(faults=bool(mount.spaces.with_entries()))
