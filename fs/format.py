"""What is on media: the records of the file system and its trees' nodes. FORMAT.md is generated from these tables."""

from onecopy.daxemu.pool import HEADER as POOL_HEADER
from onecopy.daxemu.record import Record
from onecopy.daxemu.units import WORDS

SUPERBLOCK = Record(
    "superblock",
    96,
    "At the start of PFN 1 and of PFN 2, written in turn; the newest valid one wins. The rest of the page is zero.",
    [
        ("magic", "u64", "", "the bytes 'onecopyS'"),
        ("pfn", "u64", "PFN", "where this slot is: 1 or 2"),
        ("generation", "u64", "", "of the last transaction that it contains"),
        ("roots", "u64", "PFN", "root of the root tree"),
        ("counts", "u64", "PFN", "root of the fragment counts; 0: nothing is shared"),
        ("next_subvolume", "u64", "", "number of the next subvolume"),
        ("committed", "u64", "ns since 1970", "when it was written"),
        ("uuid", "bytes[16]", "", "of the pool"),
        ("unused", "bytes[16]", "", ""),
        ("checksum", "u64", "", "CRC-32 of this record with this word zero"),
    ],
)
SUPERBLOCK_MAGIC = int.from_bytes(b"onecopyS", "little")
SUPERBLOCK_PFNS = (1, 2)
FIRST_FREE = 3  # the first frame that trees and files may use

LIVE_ROOT = Record(
    "live root",
    128,
    "In the run-time file, two slots written in turn: what the next superblock will hold, and the tail of the limbo ring.",
    [
        ("roots", "u64", "PFN", "root of the root tree"),
        ("counts", "u64", "PFN", "root of the fragment counts"),
        ("next_subvolume", "u64", "", "number of the next subvolume"),
        ("limbo_tail", "u64", "", "end of the limbo ring"),
        ("unused", "bytes[96]", "", ""),
    ],
)

NODE = Record(
    "node header",
    32,
    "At the start of every tree node. Keys follow, ascending, as 64-bit words: room for all of them, then the children's "
    "PFNs (inner nodes) or the values (leaves), in the same order. The first key of an inner node is a lower bound only.",
    [
        ("count", "u16", "", "keys in use"),
        ("level", "u8", "", "0: leaf"),
        ("kind", "u8", "", "of the tree, see below"),
        ("magic", "u32", "", "the bytes 'ocTN'"),
        ("pfn", "u64", "PFN", "where this node is"),
        ("generation", "u64", "", "of the transaction that made this copy"),
        ("checksum", "u64", "", "CRC-32 of the page with this word zero; set at sync"),
    ],
)
NODE_MAGIC = int.from_bytes(b"ocTN", "little")
NODE_WORDS = NODE.size // 8
FANOUT = (WORDS - NODE_WORDS) // 2  # keys of an inner node

EXTENT = Record(
    "extent",
    16,
    "Value in an extent tree; its key is the file page. A page that no extent covers is a hole.",
    [
        ("pfn", "u64", "PFN", "first frame"),
        ("pages", "u32", "pages", "at least 1"),
        ("flags", "u32", "", "bit 0: unwritten, reads as zeros"),
    ],
)
UNWRITTEN = 1

COUNT = Record(
    "fragment count",
    16,
    "Value in the counts tree; its key is the fragment's first PFN. Frames without one have at most one reference. A "
    "fragment is maximal: its neighbours have other counts.",
    [
        ("pages", "u64", "pages", "at least 1"),
        ("references", "u64", "", "at least 2"),
    ],
)

DIRENT = Record(
    "directory entry",
    32,
    "Value in a directory tree. Key: 56 bits of the BLAKE2b hash of the name, 4 bits to tell names of equal hash apart, 4 "
    "bits that number the records of one name. This is record 0; records 1 to 8 hold 32 more bytes of the name each.",
    [
        ("target", "u64", "", "inode number; of a subvolume: its number"),
        ("kind", "u8", "", "1 file, 2 directory, 3 symbolic link, 4 subvolume"),
        ("length", "u8", "bytes", "of the name"),
        ("name", "bytes[22]", "", "the name's first bytes"),
    ],
)

INLINE = 168
INODE = Record(
    "inode",
    256,
    "Value in an inode tree; its key is the inode number.",
    [
        ("mode", "u32", "", "type and permissions, as st_mode"),
        ("links", "u32", "", "names; of a directory: 2 and one for each subdirectory"),
        ("uid", "u32", "", "owner"),
        ("gid", "u32", "", "group"),
        ("size", "u64", "bytes", "length; of a directory: number of names"),
        ("accessed", "u64", "ns since 1970", "st_atime"),
        ("modified", "u64", "ns since 1970", "st_mtime"),
        ("changed", "u64", "ns since 1970", "st_ctime"),
        ("root", "u64", "PFN", "root of the extent or directory tree; 0: none"),
        ("pages", "u64", "pages", "covered by extents"),
        ("parent", "u64", "", "of a directory: inode number of the one it is in"),
        ("attributes", "u64", "", "inode number that holds the extended attributes; 0: none"),
        ("flags", "u32", "", "bit 0: the inline area holds the content; bit 1: it holds the extents"),
        ("inline_used", "u32", "bytes, extents", "how much the inline area holds"),
        ("inline", f"bytes[{INLINE}]", "", "content or symbolic link of up to 168 bytes, or up to 7 extents (key, then value)"),
    ],
)  # fmt: skip
INLINE_DATA, INLINE_EXTENTS = 1, 2
MAX_SIZE = 1 << 62  # bytes of a file
MAX_INLINE_EXTENTS = INLINE // (8 + EXTENT.size)

SUBVOLUME = Record(
    "subvolume",
    64,
    "Value in the root tree; its key is the subvolume's number. Number 1 is the pool's top.",
    [
        ("root", "u64", "PFN", "root of the inode tree"),
        ("next_inode", "u64", "", "number of the next inode; 1 is the root directory"),
        ("parent", "u64", "", "number of the subvolume that it is in; 0 for the top"),
        ("directory", "u64", "", "inode number, in the parent, of the directory that names it"),
        ("created", "u64", "ns since 1970", "when it was made"),
        ("origin", "u64", "", "number of the subvolume that it was snapshotted from; 0: none"),
        ("inodes", "u64", "", "inodes in it"),
        ("flags", "u64", "", "none yet"),
    ],
)
TOP, ROOT_INODE = 1, 1

KINDS = {1: "root tree", 2: "inode tree", 3: "directory tree", 4: "extent tree", 5: "counts tree"}
RECORDS = (POOL_HEADER, SUPERBLOCK, NODE, SUBVOLUME, INODE, DIRENT, EXTENT, COUNT)
