"""Records: every structure on media or in the run-time file is declared once, as a table.

From the table come the struct that reads and writes it, the numpy dtype, the size check, and its part of FORMAT.md.
All integers are little-endian; unused bytes are zero.
"""

import struct
import sys
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Buffer

if sys.byteorder != "little":
    raise ImportError("onecopy maps little-endian records directly and needs a little-endian machine")

_CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


@dataclass(frozen=True)
class Field:
    """One field: its name, type (u8 ... u64, or bytes[N]), unit, and what it means."""

    name: str
    type: str
    unit: str
    meaning: str

    @property
    def code(self) -> str:
        """The field's struct format."""
        if self.type.startswith("bytes["):
            return f"{self.type[6:-1]}s"
        return _CODES[self.type]

    @property
    def size(self) -> int:
        """Bytes."""
        return struct.calcsize("<" + self.code)


class Record:
    """A record of `size` bytes. Offsets are in bytes from its start."""

    def __init__(self, name: str, size: int, meaning: str, fields: list[tuple[str, str, str, str]]) -> None:
        self.name, self.size, self.meaning = name, size, meaning
        self.fields = [Field(*field) for field in fields]
        self.struct = struct.Struct("<" + "".join(field.code for field in self.fields))
        if self.struct.size != size:
            raise TypeError(f"record {name} is declared with {size} bytes but its fields take {self.struct.size}")
        self.offset: dict[str, int] = {}
        at = 0
        for field in self.fields:
            self.offset[field.name] = at
            at += field.size
        self.unpack_from = self.struct.unpack_from
        self.pack_into = self.struct.pack_into
        self.pack = self.struct.pack

    def word(self, name: str) -> int:
        """Return the index of the 64-bit word that field `name` starts at; it must start on one."""
        index, rest = divmod(self.offset[name], 8)
        if rest:
            raise TypeError(f"field {name} of record {self.name} does not start on a word")
        return index

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The numpy type of one record."""
        types = {"u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8"}
        return np.dtype([(f.name, types.get(f.type, f"V{f.size}")) for f in self.fields])

    def unpack(self, source: "Buffer", offset: int = 0) -> dict[str, Any]:
        """Return the record at `offset` as a dictionary (integers, bytes), for checks and reports."""
        return dict(zip(self.offset, self.unpack_from(source, offset), strict=True))

    def markdown(self) -> str:
        """Return the record's table for FORMAT.md."""
        lines = [f"### {self.name} ({self.size} bytes)", "", self.meaning, ""]
        lines += ["| offset | field | type | unit | meaning |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {self.offset[f.name]} | {f.name} | {f.type} | {f.unit} | {f.meaning} |" for f in self.fields]
        return "\n".join(lines) + "\n"


def checksum(page: "Buffer", skip: int) -> int:
    """Return the CRC-32 of a record or node whose own checksum word, 8 bytes at `skip`, counts as zero."""
    view = memoryview(page).cast("B")
    return zlib.crc32(view[skip + 8 :], zlib.crc32(bytes(8), zlib.crc32(view[:skip])))
