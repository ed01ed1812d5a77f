"""Extended attributes: the content of a hidden inode that the file's inode names, so clones and snapshots share them, too.

The content is, for each attribute, the lengths of name and value (u16, u32), the name, the value.
"""

import errno
import struct

from onecopy.daxemu.errors import CorruptRecord, invalid, posix
from onecopy.fs import content
from onecopy.fs import inode as inodes
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx, View

VALUE_MAX = 1 << 16
_HEAD = struct.Struct("<HI")
_HIDDEN = 0o100000


def load(view: View, inode: Inode) -> dict[str, bytes]:
    """Return the inode's attributes."""
    if not inode.attributes:
        return {}
    holder = inodes.load(view, inode.subvolume, inode.attributes)
    data, at, found = content.read(view, holder, 0, None), 0, {}
    while at < len(data):
        name_size, size = _HEAD.unpack_from(data, at) if at + _HEAD.size <= len(data) else (0, 0)
        name = data[at + _HEAD.size : at + _HEAD.size + name_size]
        at += _HEAD.size + name_size + size
        if not name or at > len(data):
            raise CorruptRecord(
                "attributes", holder.root, f"inode {holder.number}", expected="whole entries", actual=f"byte {at}"
            )
        found[name.decode("utf-8", "surrogateescape")] = data[at - size : at]
    return found


def change(tx: Tx, inode: Inode, name: str, value: bytes | None) -> None:
    """Set attribute `name`, or remove it (None): ENODATA when there is none. Saves the inode."""
    raw = name.encode("utf-8", "surrogateescape")
    if not 0 < len(raw) <= 255 or b"\0" in raw:
        raise invalid("an attribute's name has 1 to 255 bytes, none of them zero")
    if value is not None and len(value) > VALUE_MAX:
        raise posix(errno.E2BIG, detail=f"an attribute has at most {VALUE_MAX} bytes")
    have = load(tx, inode)
    if value is None:
        if name not in have:
            raise posix(errno.ENODATA)
        del have[name]
    else:
        have[name] = bytes(value)
    if inode.attributes:
        inodes.remove(tx, inodes.change(tx, inode.subvolume, inode.attributes))
        inode.attributes = 0
    if have:
        holder = inodes.make(tx, inode.subvolume, _HIDDEN)
        inode.attributes = holder.number
        data = b"".join(
            _HEAD.pack(len(key), len(one)) + key + one
            for key, one in ((text.encode("utf-8", "surrogateescape"), one) for text, one in have.items())
        )
        content.write(tx, holder, 0, memoryview(data))
    inode.touch()
    inodes.save(tx, inode)
