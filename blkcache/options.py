"""Which policy a pool is opened under: what it was formatted for, what it is in use as, what is asked for."""

from dataclasses import dataclass

from onecopy.blkcache.cache import DEFAULT_CACHE, MIN_FRAMES, CachedPool
from onecopy.blkcache.device import BlockDevice
from onecopy.daxemu import runtime
from onecopy.daxemu.errors import PoolBusy, invalid
from onecopy.daxemu.pool import POLICIES, Pool
from onecopy.daxemu.runtime import runtime_paths


def policy_in_use(pool: Pool) -> str | None:
    """Return the policy that the pool's run-time file was made for; None when there is none."""
    try:
        with open(runtime_paths(pool)[0], "rb") as file:
            header = runtime.HEADER.unpack(file.read(runtime.HEADER.size).ljust(runtime.HEADER.size, b"\0"))
    except (FileNotFoundError, PermissionError):
        return None
    return POLICIES[header["policy"]] if header["magic"] == runtime.MAGIC and header["layout"] == runtime.LAYOUT else None


@dataclass(frozen=True)
class CacheOptions:
    """How a pool is to be opened: None is as it is in use already, or else as its header says. `limit`: pages."""

    policy: str | None = None
    limit: int | None = None
    name: str | None = None
    device: BlockDevice | None = None


NO_OPTIONS = CacheOptions()


def open_pool(path: str, *, writable: bool, options: CacheOptions) -> Pool:
    """Open the pool at `path` as `options` say. PoolBusy when it is in use otherwise; what Pool raises."""
    pool = Pool(path, writable=writable)
    try:
        policy, pages = pool.wanted
        in_use = policy_in_use(pool)
        policy = options.policy or ("shared" if options.device is not None and policy == "dax" else in_use or policy)
        if policy not in POLICIES:
            raise invalid(f"policy {policy!r}: say {', '.join(POLICIES)}", path)
        if in_use not in (None, policy):
            raise PoolBusy(f"processes have the pool open with policy {in_use!r}; 'onecopy info' lists them", path=path)
    except BaseException:
        pool.close()
        raise
    if policy == "dax":
        return pool
    pool.close()
    limit = options.limit
    if limit is not None and limit < MIN_FRAMES:
        raise invalid(f"a cache of {limit} pages: it must have at least {MIN_FRAMES}", path)
    return CachedPool(
        pool.path, writable=writable, policy=policy, limit=limit, name=options.name, device=options.device,
        default=max(pages, MIN_FRAMES) if pages else DEFAULT_CACHE,
    )  # fmt: skip
