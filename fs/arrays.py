"""numpy arrays over mappings: .npy files as their header says, raw files by dtype, shape and offset."""

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from onecopy.daxemu.errors import invalid

if TYPE_CHECKING:
    from onecopy.fs.filesystem import FileSystem

_HEADER_MAX = 1 << 20


def array(
    fs: "FileSystem", path: str, mode: str, *, dtype: Any, shape: int | tuple[int, ...] | None, offset: int, order: str
) -> "np.ndarray[Any, Any]":
    """Return an array over a mapping of `path`, which lives as long as the array does. See FileSystem.array."""
    if order not in ("C", "F"):
        raise invalid(f"order {order!r}: say 'C' or 'F'", path)
    mapping = fs.map(path, mode)
    magic = mapping[: len(npy.MAGIC_PREFIX)]
    if magic == npy.MAGIC_PREFIX and dtype is None and shape is None and not offset:
        shape, fortran, kind, offset = _header(mapping[:_HEADER_MAX], path)  # type: ignore[arg-type]
        order = "F" if fortran else "C"
    else:
        kind = np.dtype(np.uint8 if dtype is None else dtype)
    if kind.hasobject:
        raise invalid(f"an array of {kind} holds Python objects, which can't be mapped", path)
    room = len(mapping) - offset
    if shape is None:
        if offset < 0 or room < 0 or room % kind.itemsize:
            raise invalid(f"{len(mapping)} bytes less offset {offset} are no whole number of {kind} items", path)
        shape = (room // kind.itemsize,)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    if offset < 0 or min(shape, default=0) < 0 or count * kind.itemsize > room:
        raise invalid(f"shape {shape} of {kind} from offset {offset} does not fit into {len(mapping)} bytes", path)
    if count == 0 or kind.itemsize == 0:
        return np.empty(shape, kind)
    flat = np.frombuffer(memoryview(mapping), kind, count, offset)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _header(start: bytes, path: str) -> tuple[tuple[int, ...], bool, "np.dtype[Any]", int]:
    """Return (shape, Fortran order, dtype, length) of a .npy header."""
    file = io.BytesIO(start)
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, kind = read(file, max_header_size=_HEADER_MAX)
    except ValueError as error:
        raise invalid(f"a damaged .npy header: {error}", path) from error
    return shape, fortran, kind, file.tell()
