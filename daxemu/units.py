"""Units: pages, page frame numbers and human sizes. Everything else counts in these."""

import re
from fractions import Fraction
from typing import NewType

from onecopy.daxemu.errors import invalid

PAGE = 4096  # bytes in a page, which is also the file system's block
WORDS = PAGE // 8  # 64-bit words in a page
HUGE = 512  # pages in a 2 MiB translation

Pfn = NewType("Pfn", int)  # page index in the pool; 0 is the header and never a file's page

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE)


def pages_of(size: int) -> int:
    """Return how many pages `size` bytes touch, counted from a page boundary."""
    return (size + PAGE - 1) // PAGE


def parse_size(text: str | int) -> int:
    """Return the bytes that `text` means: an integer, or a number with K, M, G or T (powers of 1,024).

    Raises OneCopyError (EINVAL) when it is not a size.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if not match:
        raise invalid(f"{text!r} is not a size: write bytes or a number with K, M, G or T, as in 8G")
    return int(Fraction(match[1]) * _SUFFIXES[match[2].upper()])


def format_size(size: float) -> str:
    """Return `size` bytes for people: '8.0 GiB'."""
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1023.95:  # what rounds to 1024.0 is 1.0 of the next unit
            return f"{size:.0f} B" if suffix == "B" else f"{size:.1f} {suffix}"
        size /= 1024
    return f"{size:.1f} TiB"
