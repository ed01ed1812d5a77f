"""Reflinked files that share memory as well as storage.

A pool file emulates an NVDIMM; a copy-on-write file system on it holds reflinked extents; any number of processes map the
same frames, so a shared page is in memory once.

    >>> import onecopy
    >>> onecopy.format("/dev/shm/p.pool", size="8G")
    >>> with onecopy.open("/dev/shm/p.pool") as fs:
    ...     fs.put("weights.npy", "/base.npy")
    ...     fs.clone("/base.npy", "/run1.npy")
    ...     a = fs.array("/run1.npy")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onecopy.daxemu.errors import (
        CorruptRecord,
        CrossSubvolume,
        DeviceError,
        InvariantError,
        NoSpace,
        NotAPool,
        OneCopyError,
        PoolBusy,
        PoolVersionError,
        ReadOnly,
        RuntimeLost,
        SpecialFile,
    )
    from onecopy.daxemu.mapping import Mapping
    from onecopy.daxemu.raw import RawDevice
    from onecopy.daxemu.slots import User
    from onecopy.daxemu.units import PAGE, format_size, parse_size
    from onecopy.fs.check import CheckReport, Finding
    from onecopy.fs.dedupe import DedupeFile, DedupeReport
    from onecopy.fs.filesystem import FileSystem, PoolInfo
    from onecopy.fs.lifecycle import check, format, open, open_device, remove
    from onecopy.fs.names import DirEntry, SubvolumeInfo
    from onecopy.fs.usage import Extent, Usage

    __version__: str

_HOMES = {
    "daxemu.errors": "CorruptRecord CrossSubvolume DeviceError InvariantError NoSpace NotAPool OneCopyError PoolBusy "
    "PoolVersionError ReadOnly RuntimeLost SpecialFile",
    "daxemu.mapping": "Mapping",
    "daxemu.raw": "RawDevice",
    "daxemu.slots": "User",
    "daxemu.units": "PAGE format_size parse_size",
    "fs.check": "CheckReport Finding",
    "fs.dedupe": "DedupeFile DedupeReport",
    "fs.filesystem": "FileSystem PoolInfo",
    "fs.lifecycle": "check format open open_device remove",
    "fs.names": "DirEntry SubvolumeInfo",
    "fs.usage": "Extent Usage",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    # Names load at first use: `onecopy --help` and shell completion need neither numpy nor the trees.
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("onecopy")
    elif name in _HOME:
        value = getattr(import_module(f"onecopy.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'onecopy' has no attribute {name!r}")
    globals()[name] = value
    return value


__all__ = [
    "PAGE",
    "CheckReport",
    "CorruptRecord",
    "CrossSubvolume",
    "DedupeFile",
    "DedupeReport",
    "DeviceError",
    "DirEntry",
    "Extent",
    "FileSystem",
    "Finding",
    "InvariantError",
    "Mapping",
    "NoSpace",
    "NotAPool",
    "OneCopyError",
    "PoolBusy",
    "PoolInfo",
    "PoolVersionError",
    "RawDevice",
    "ReadOnly",
    "RuntimeLost",
    "SpecialFile",
    "SubvolumeInfo",
    "Usage",
    "User",
    "__version__",
    "check",
    "format",
    "format_size",
    "open",
    "open_device",
    "parse_size",
    "remove",
]
