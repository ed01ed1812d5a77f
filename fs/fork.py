"""fork as a normal event: a child is a full user of every pool its parent has open, from the first instruction; and the end.

Before the fork the parent takes the transaction locks (so no transaction is cut in half) and makes, for every handle, the
child's slot. The fork itself lets the parent's faults end, and makes the slots mappers of the same files (before_fork in
_guard.c). The slot's lock lives on a descriptor that the child inherits; when the parent closes its copy, the child alone
keeps it. In the child every lock gets a descriptor of its own.
"""

import atexit
import os

from onecopy.daxemu.locks import RankedLock, forget_held
from onecopy.fs.mount import MOUNTS, Mount

_prepared: list[tuple[RankedLock, list[Mount]]] = []


def _before() -> None:
    by_pool: dict[str, list[Mount]] = {}
    for mount in list(MOUNTS):
        if mount.slot.fd >= 0 and mount.pid == os.getpid():
            by_pool.setdefault(mount.runtime.path, []).append(mount)
    for _, mounts in sorted(by_pool.items()):  # one order everywhere: two forking processes can't wait in a circle
        # Handles of one pool exclude each other through the file: one lock serves for all of them, preferably one that
        # this thread holds already (a callback within a transaction that forks).
        locks = sorted((mount.lock for mount in mounts), key=lambda lock: not lock.held_here)
        lock = next((lock for lock in locks if _acquired(lock)), None)
        if lock is None:
            continue  # all were being closed
        mounts = [mount for mount in mounts if mount.slot.fd >= 0]
        _prepared.append((lock, mounts))
        for mount in mounts:
            try:
                mount.prepare_child()
            except OSError:
                pass  # no slot is left: the child's handle is closed


def _acquired(lock: RankedLock) -> bool:
    try:
        lock.acquire(ranked=False)
    except OSError:
        return False  # closed while we waited for it
    return True


def _after_in_parent() -> None:
    for lock, mounts in _prepared:
        for mount in mounts:
            mount.forget_child()
        lock.release()
    _prepared.clear()


def _after_in_child() -> None:
    forget_held()
    for _, mounts in _prepared:
        for mount in mounts:
            mount.become_child()
    _prepared.clear()
    for mount in list(MOUNTS):
        if mount.pid != os.getpid() and not mount.lost:
            mount.lose()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def _at_exit() -> None:
    """Fold what was stored through handles that nobody closed: a process that ends in order leaves nothing to others."""
    for mount in list(MOUNTS):
        if mount.pid == os.getpid() and mount.slot.fd >= 0 and mount.pool.writable and mount.lock.try_idle():
            try:
                mount.recover()
                mount.maps.fold()
            except OSError:
                pass
            finally:
                mount.lock.release()


atexit.register(_at_exit)
