"""Every error of the project's own. All are OSErrors with the errno that the same trouble has in a kernel file system.

A message says what, where, what was expected and found, and what to do next.
"""

import errno
import os


class OneCopyError(OSError):
    """Base of the project's errors; `errno` is set, `filename` where a path is meant."""

    code = errno.EIO

    def __init__(self, message: str, *, path: str | None = None, code: int | None = None) -> None:
        super().__init__(self.code if code is None else code, message, path)


class NotAPool(OneCopyError):
    """The file is not a pool, or only part of one."""

    code = errno.EINVAL


class PoolVersionError(OneCopyError):
    """The pool was made by a version with another format."""

    code = errno.EPROTONOSUPPORT


class CorruptRecord(OneCopyError):
    """S10: bytes of the pool are not what they claim to be."""

    code = errno.EUCLEAN

    def __init__(self, record: str, pfn: int, what: str, *, expected: object, actual: object) -> None:
        self.record, self.pfn, self.expected, self.actual = record, pfn, expected, actual
        super().__init__(
            f"S10: damaged {record} at PFN {pfn}: {what}: expected {expected}, found {actual}; run 'onecopy check' on the pool"
        )


class PoolBusy(OneCopyError):
    """Somebody else holds the pool in a way that excludes this."""

    code = errno.EBUSY


class RuntimeLost(OneCopyError):
    """The run-time file vanished under live processes."""

    code = errno.ESTALE


class ReadOnly(OneCopyError):
    """The pool was opened for reading."""

    code = errno.EROFS


class NoSpace(OneCopyError):
    """No frame is left."""

    code = errno.ENOSPC


class DeviceError(OneCopyError):
    """A block device did not do what it was asked to."""

    code = errno.EIO


class CrossSubvolume(OneCopyError):
    """Links and renames stay within one subvolume."""

    code = errno.EXDEV


class SpecialFile(OneCopyError):
    """A device, socket or pipe, which a pool cannot hold."""

    code = errno.EINVAL


class InvariantError(OneCopyError):
    """A rule of the design (S1-S10) does not hold; the operation stopped before it published anything."""

    code = errno.EIO

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(f"{rule}: {message}; please report this")


def posix(code: int, path: str | None = None, detail: str = "") -> OSError:
    """Return the builtin OSError for `code` (FileNotFoundError for ENOENT ...), its message extended by `detail`."""
    message = os.strerror(code) + (f": {detail}" if detail else "")
    return OSError(code, message, path)


def invalid(message: str, path: str | None = None) -> OneCopyError:
    """Return the error for an argument that can never be right (EINVAL)."""
    return OneCopyError(message, path=path, code=errno.EINVAL)
