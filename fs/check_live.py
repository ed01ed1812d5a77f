"""Checking a pool in use: the live trees, and against them what the run-time file says: frame table, free counter, entries."""

from typing import TYPE_CHECKING

import numpy as np

from onecopy.blkcache.frames import BACKED, FRESH, LIMBO, SHARED, USED
from onecopy.blkcache.spaces import BEYOND, LIVE, PFN_MASK, PRIVATE, STORED
from onecopy.fs import inode as inodes
from onecopy.fs.check import Checker, CheckReport
from onecopy.fs.format import FIRST_FREE
from onecopy.fs.mapped import entry_words

if TYPE_CHECKING:
    from onecopy.fs.mount import Mount


def check_mounted(mount: "Mount") -> CheckReport:
    """Check the live tree of an open pool, and the frame table against it, while nobody changes anything."""
    mount.check_open()
    with mount.lock:
        mount.settle()
        if mount.pool.writable:
            mount.maps.fold()
        losses = mount.pool.losses()
        view, array = mount.live_view(), mount.frames.array
        checker = Checker(mount.pool, (array & FRESH) != 0)
        report = checker.run(view.roots, view.counts)
        reached = checker.is_node | checker.is_data
        reached[:FIRST_FREE] = True
        waiting = (array & LIMBO) != 0
        for _, pfn, pages in mount.limbo.entries(view.limbo_tail):
            waiting[pfn : pfn + pages] = True
        used = (array & (USED | BACKED)) == USED  # without what stores have taken since
        for name, wrong in (
            ("reached by the trees, but free", reached & ~used),
            ("in limbo, but reached by the trees", waiting & reached),
            ("in use, but reached by nothing", used & ~reached & ~waiting),
            ("shared, but without the hint", (checker.references[:-1] > 1) & ((array & SHARED) == 0)),
        ):
            bad = np.flatnonzero(wrong)
            if len(bad):
                checker.found("frames", f"{len(bad)} frames, the first at {bad[0]}", int(bad[0]), "agreement", name)
        free = mount.pool.frames - int(np.count_nonzero(used))
        if free != mount.runtime.get("free"):
            checker.found("frames", "the free counter", 0, free, mount.runtime.get("free"))
        _check_entries(checker, mount)
        report.counted["waiting_pages"] = int(np.count_nonzero(waiting))
        mount.pool.raise_lost(losses)
        return report


def _check_entries(checker: Checker, mount: "Mount") -> None:
    """Compare the entries of mapped files with their extents, and private ones with the references (S1, S2)."""
    view, spaces = mount.live_view(), mount.spaces
    for index in spaces.with_entries(LIVE):
        key, pages = spaces.key(index), spaces.pages(index)
        if not inodes.exists(view, *key):
            continue
        words = spaces.entries(index, 0, pages)
        pfns = np.where(words & np.uint64(BEYOND), np.uint64(0), words & np.uint64(PFN_MASK))
        extents = entry_words(view, inodes.load(view, *key), pages) & np.uint64(PFN_MASK)
        clean = (words & np.uint64(STORED)) == 0
        private = clean & ((words & np.uint64(PRIVATE)) != 0)
        shared = private & (checker.references[np.minimum(pfns, len(checker.references) - 1).astype(np.int64)] > 1)
        for name, wrong in (
            ("another frame than the extents", clean & (pfns != extents)),
            ("private, but shared (S2)", shared),
        ):
            bad = np.flatnonzero(wrong)
            if len(bad):
                page = int(bad[0])
                checker.found(
                    "entries", f"inode {key}, {len(bad)} pages, the first {page}", int(pfns[page]), int(extents[page]), name
                )
