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

from importlib.metadata import version as _version

from onecopy.daxemu.errors import (
    CorruptRecord,
    CrossSubvolume,
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
from onecopy.daxemu.slots import User
from onecopy.daxemu.units import PAGE, format_size, parse_size
from onecopy.fs import fork as _fork  # registers itself
from onecopy.fs.check import CheckReport, Finding
from onecopy.fs.dedupe import DedupeFile, DedupeReport
from onecopy.fs.filesystem import FileSystem, PoolInfo
from onecopy.fs.lifecycle import check, format, open, remove
from onecopy.fs.names import DirEntry, SubvolumeInfo
from onecopy.fs.usage import Extent, Usage

__version__ = _version("onecopy")

del _fork

__all__ = [
    "PAGE",
    "CheckReport",
    "CorruptRecord",
    "CrossSubvolume",
    "DedupeFile",
    "DedupeReport",
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
    "parse_size",
    "remove",
]
