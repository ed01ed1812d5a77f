"""Units, records and errors: the vocabulary of every layer."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import onecopy
from onecopy.daxemu import errors
from onecopy.daxemu.record import Record, checksum
from onecopy.daxemu.units import PAGE, format_size, pages_of, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [(17, 17), ("17", 17), ("8G", 8 << 30), ("1.5k", 1536), (" 2 MiB ", 2 << 20), ("3tb", 3 << 40), ("0", 0)],
)
def test_sizes_that_people_write(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "8X", "1e3", "8G8", "0x10", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(onecopy.OneCopyError) as caught:
        parse_size(text)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (8 << 30, "8.0 GiB"), (-2048, "-2.0 KiB"), (1 << 50, "1024.0 TiB")],
)
def test_sizes_for_people(size, text):
    assert format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_pages_hold_their_bytes(size):
    pages = pages_of(size)
    assert (pages - 1) * PAGE < size <= pages * PAGE


POINT = Record(
    "point",
    24,
    "A test's.",
    [("x", "u16", "m", "across"), ("y", "u8", "", ""), ("z", "u8", "", ""), ("w", "u32", "", ""), ("far", "u64", "", ""),
     ("name", "bytes[8]", "", "its name")],
)  # fmt: skip


def test_a_record_reads_what_it_writes():
    packed = POINT.pack(1, 2, 3, 4, 5, b"p")
    assert POINT.unpack(b"..." + packed, 3) == {"x": 1, "y": 2, "z": 3, "w": 4, "far": 5, "name": b"p".ljust(8, b"\0")}
    assert POINT.offset == {"x": 0, "y": 2, "z": 3, "w": 4, "far": 8, "name": 16}
    assert POINT.dtype.itemsize == POINT.size
    assert (POINT.word("x"), POINT.word("far")) == (0, 1)
    assert "| 8 | far | u64 |  |  |" in POINT.markdown()


def test_a_record_is_as_large_as_declared():
    with pytest.raises(TypeError, match="16 bytes but its fields take 8"):
        Record("wrong", 16, "", [("x", "u64", "", "")])


def test_a_word_starts_on_a_word():
    with pytest.raises(TypeError, match="field w"):
        POINT.word("w")


@given(st.binary(min_size=16, max_size=200), st.data())
def test_a_checksum_covers_every_byte_but_its_own(page, data):
    skip = data.draw(st.integers(0, len(page) - 8))
    at = data.draw(st.integers(0, len(page) - 1))
    changed = bytearray(page)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    same = skip <= at < skip + 8
    assert (checksum(page, skip) == checksum(changed, skip)) is same


@pytest.mark.parametrize(
    ("kind", "code"),
    [("NotAPool", errno.EINVAL), ("PoolVersionError", errno.EPROTONOSUPPORT), ("PoolBusy", errno.EBUSY),
     ("RuntimeLost", errno.ESTALE), ("ReadOnly", errno.EROFS), ("NoSpace", errno.ENOSPC), ("CrossSubvolume", errno.EXDEV),
     ("SpecialFile", errno.EINVAL), ("OneCopyError", errno.EIO)],
)  # fmt: skip
def test_every_error_is_an_oserror_with_its_errno(kind, code):
    error = getattr(onecopy, kind)("what happened", path="/where")
    assert isinstance(error, OSError) and isinstance(error, onecopy.OneCopyError)
    assert (error.errno, error.strerror, error.filename) == (code, "what happened", "/where")


def test_damage_says_where_and_what():
    error = onecopy.CorruptRecord("inode", 91, "mode", expected=1, actual=2)
    assert (error.errno, error.pfn, error.record, error.expected, error.actual) == (errno.EUCLEAN, 91, "inode", 1, 2)
    assert "S10: damaged inode at PFN 91: mode: expected 1, found 2" in str(error)


def test_a_broken_rule_is_named():
    error = onecopy.InvariantError("S5", "a frame was reused")
    assert (error.errno, error.rule) == (errno.EIO, "S5")
    assert "S5: a frame was reused" in str(error)


def test_posix_errors_are_the_builtin_ones():
    error = errors.posix(errno.ENOENT, "/x", "no such thing")
    assert type(error) is FileNotFoundError
    assert (error.filename, error.strerror) == ("/x", f"{os.strerror(errno.ENOENT)}: no such thing")
