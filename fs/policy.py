"""Opening a pool under another policy than the one it was last used under: what that left behind is made durable first."""

import os
from contextlib import suppress

from onecopy.blkcache.cache import cache_paths
from onecopy.blkcache.options import CacheOptions, policy_in_use
from onecopy.daxemu.errors import PoolBusy
from onecopy.daxemu.locks import try_mount
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.runtime import runtime_paths
from onecopy.fs.mount import Mount


def settle_policy(path: str, options: CacheOptions) -> None:
    """Let a pool that was last used under another policy, and that nobody has open, be opened under the one that is asked for.

    What processes that died have left in its run-time file, or in its cache, is made durable first. PoolBusy.
    """
    if options.policy is None:
        return
    pool = Pool(path, writable=False)
    try:
        in_use = policy_in_use(pool)
    finally:
        pool.close()
    if in_use in (None, options.policy):
        return
    old = Mount(path, writable=True, cache=CacheOptions(policy=in_use, name=options.name, device=options.device))
    try:
        old.sync()
        with old.lock:
            if not try_mount(old.pool.fd, exclusive=True):
                raise PoolBusy(f"processes have the pool open with policy {in_use!r}; 'onecopy info' lists them", path=path)
            for name in (*runtime_paths(old.pool), *cache_paths(old.pool)):
                with suppress(FileNotFoundError):
                    os.unlink(name)
    finally:
        old.close()
