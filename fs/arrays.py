"""numpy arrays over mappings: .npy files as their header says, raw files by dtype, shape and offset."""

import errno
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from onecopy.daxemu.errors import invalid, posix
from onecopy.daxemu.mapping import Mapping

if TYPE_CHECKING:
    from onecopy.fs.filesystem import FileSystem

_HEADER_MAX = 1 << 20


class MappedArray(np.ndarray[Any, Any]):
    """An array over a mapping. Pickled, it is mapped anew, by inode, where it is unpickled; so are its slices and other views.

    What is computed from it is a plain array. Copies may be of this type, too, and are pickled by value, as plain arrays.
    """

    __array_priority__ = -100.0  # as np.memmap has it: other kinds of arrays say what comes of an operation with them

    def __array_wrap__(self, array: "np.ndarray[Any, Any]", context: Any = None, return_scalar: bool = False) -> Any:
        """Return what a ufunc has made as a plain array; `self`, where it was the output."""
        if array is self:
            return array
        return np.asarray(array) if array.ndim else array[()]

    def __reduce_ex__(self, protocol: Any) -> Any:
        mapping = self._mapping()
        if mapping is None or not self.size:
            return np.asarray(self).__reduce_ex__(protocol)
        offset = self.__array_interface__["data"][0] - mapping.address
        return _again, (mapping, self.dtype, self.shape, self.strides, offset, self.flags.writeable)

    def _mapping(self) -> Mapping | None:
        """Return the mapping that this array looks into; None where it is a copy, or what is mapped has no pages of a file."""
        base: Any = self.base
        while isinstance(base, np.ndarray):
            base = base.base
        mapping = base.obj if isinstance(base, memoryview) else None
        return mapping if isinstance(mapping, Mapping) and mapping.space >= 0 else None


def _again(
    mapping: Mapping, kind: "np.dtype[Any]", shape: tuple[int, ...], strides: tuple[int, ...], offset: int, writable: bool
) -> MappedArray:
    """Return the array that was pickled, over its mapping made anew."""
    try:
        array = MappedArray(shape, kind, np.frombuffer(memoryview(mapping), np.uint8), offset, strides)
    except (TypeError, ValueError) as error:
        why = f"the file was cut off at {len(mapping)} bytes, before the end of an array in it was unpickled"
        raise posix(errno.ENXIO, mapping.path, why) from error
    if not writable:
        array.flags.writeable = False
    return array


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
    return flat.reshape(shape, order="F" if order == "F" else "C").view(MappedArray)


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
