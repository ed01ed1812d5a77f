"""File content: read, write, truncate, and what fallocate(2) does. All offsets and lengths are bytes.

A store goes in place where the pages are private, and into fresh frames where they are shared, mapped, or missing: only
the edges that a partial page keeps are copied (after Ruan's dax copy-edges, 2019). Bytes of the last page beyond the
end of a file are zero, or become so when the file grows: a mapping may store there. An unwritten extent reads as zeros.
"""

import errno
from contextlib import nullcontext

from onecopy.blkcache.frames import SHARED
from onecopy.daxemu.errors import invalid, posix
from onecopy.daxemu.units import PAGE, pages_of
from onecopy.fs import extents
from onecopy.fs import inode as inodes
from onecopy.fs.btree import MAX_KEY
from onecopy.fs.extents import Extent
from onecopy.fs.format import INLINE, INLINE_DATA, MAX_SIZE, UNWRITTEN
from onecopy.fs.inode import Inode
from onecopy.fs.tx import Tx, View

_ZEROS = bytes(1 << 20)
_AHEAD = 64  # pages that are brought into a cache before they are copied out of it
_GRANULE = 32  # pages, aligned in the file, whose private copies are put side by side


def check_range(offset: int, length: int) -> None:
    """Raise EINVAL or EFBIG for a range that no file can have."""
    if offset < 0 or length < 0:
        raise invalid(f"offset {offset} and length {length} must not be negative")
    if offset + length > MAX_SIZE:
        raise posix(errno.EFBIG)


def read_into(view: View, inode: Inode, offset: int, buffer: memoryview) -> int:
    """Copy the content from `offset` on into `buffer`; return how many bytes there were."""
    check_range(offset, len(buffer))
    end = min(inode.size, offset + len(buffer))
    if end <= offset:
        return 0
    content = inode.content
    if content is not None:
        buffer[: end - offset] = content[offset:end]
        return end - offset
    at = offset
    for page, pfn, pages, flags in extents.load(view, inode, offset // PAGE, pages_of(end)):
        if flags & UNWRITTEN:
            continue
        first, last = max(page * PAGE, offset), min((page + pages) * PAGE, end)
        if at < first:
            _clear(buffer[at - offset : first - offset])
        source = pfn * PAGE + first - page * PAGE
        step = _AHEAD * PAGE if view.cached else last - first
        for start in range(0, last - first, step or 1):
            size = min(step, last - first - start)
            if view.cached:
                view.fetch((source + start) // PAGE, pages_of(source + start + size) - (source + start) // PAGE)
            buffer[first - offset + start : first - offset + start + size] = view.bytes[source + start : source + start + size]
        at = last
    if at < end:
        _clear(buffer[at - offset : end - offset])
    return end - offset


def _clear(buffer: memoryview) -> None:
    for at in range(0, len(buffer), len(_ZEROS)):
        piece = buffer[at : at + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


def read(view: View, inode: Inode, offset: int, size: int | None) -> bytes:
    """Return up to `size` bytes (all: None) from `offset` on."""
    check_range(offset, size or 0)
    left = max(0, inode.size - offset)
    wanted = left if size is None else min(size, left)
    try:
        buffer = bytearray(wanted)
    except MemoryError as error:
        raise posix(errno.ENOMEM, detail=f"{wanted} bytes at once; read parts, or map the file") from error
    read_into(view, inode, offset, memoryview(buffer))
    return bytes(buffer)


def write(tx: Tx, inode: Inode, offset: int, data: memoryview) -> None:
    """Store `data` at `offset`, growing the file where needed; saves the inode. NoSpace."""
    check_range(offset, len(data))
    end = offset + len(data)
    if data and not _write_inline(tx, inode, offset, data):
        to_pages(tx, inode)
        clear_tail(tx, inode, offset)
        _store(tx, inode, offset, data)
        inode.size = max(inode.size, end)
    inode.touch()
    inodes.save(tx, inode)


def clear_tail(tx: Tx, inode: Inode, end: int) -> None:
    """Before the file grows: zero the last page's bytes up to `end`, which a mapping may have stored to behind the end."""
    if inode.size % PAGE and end > inode.size and inode.content is None:
        last = inode.size // PAGE
        for _, pfn, _, flags in extents.clip(extents.load(tx, inode, last, last + 1), last, last + 1):
            tail = tx.bytes[pfn * PAGE + inode.size % PAGE : (pfn + 1) * PAGE]
            if not flags & UNWRITTEN and (tail != _ZEROS[: len(tail)] or (tx.changes is not None and tx.changes.pages(inode))):
                _zero_part(tx, inode, inode.size, min(end, (last + 1) * PAGE))


def _write_inline(tx: Tx, inode: Inode, offset: int, data: memoryview) -> bool:
    """Store into the inode's record if all of the content fits there."""
    end = offset + len(data)
    content = inode.content if inode.size else b""
    if (
        content is None
        or max(end, inode.size) > INLINE
        or inode.pages
        or (tx.changes is not None and tx.changes.of(inode) >= 0)
    ):
        return False
    whole = bytearray(content.ljust(max(end, inode.size), b"\0"))
    whole[offset:end] = data
    inode.set_content(bytes(whole))
    return True


def to_pages(tx: Tx, inode: Inode) -> None:
    """Move content that lies in the record to a page of its own."""
    content = inode.content
    if content is None:
        return
    inode.flags &= ~INLINE_DATA
    inode.inline, inode.inline_used = b"", 0
    if content:
        _store(tx, inode, 0, memoryview(content))


def give_pages(tx: Tx, inode: Inode) -> None:
    """`to_pages`, and save the inode."""
    to_pages(tx, inode)
    inodes.save(tx, inode)


def _store(tx: Tx, inode: Inode, offset: int, data: memoryview, *, in_place: bool = True) -> None:
    """Store into pages: in place where they are private, unless told otherwise, else into fresh frames. The size stays."""
    end = offset + len(data)
    low, high = offset // PAGE, pages_of(end)
    if tx.changes is not None:
        tx.changes.own(tx, inode, low, high)
    missing = [low]  # edges of the ranges that need fresh frames
    for page, pfn, pages, flags, private in extents.pieces(tx, inode, low, high):
        if not private or not (in_place or flags & UNWRITTEN):
            continue
        first, last = page * PAGE, (page + pages) * PAGE
        if flags & UNWRITTEN:
            _fill(tx, (page, pfn, pages, 0), (b"", b""), offset, data)
            extents.replace(tx, inode, page, page + pages, [(page, pfn, pages, 0)], keep=True)
        else:
            start, stop = max(first, offset), min(last, end)
            tx.store_in_place(pfn, data[start - offset : stop - offset], start - first)
        missing += [page, page + pages]
    missing.append(high)
    for first, last in zip(missing[::2], missing[1::2], strict=True):
        if first < last:
            edges = _edges(tx, inode, first, last, offset, end)
            fresh: list[Extent] = []
            at = first
            for pfn, pages in tx.frames.take_data(last - first, _goal(tx, inode, first, last)):
                fresh.append((at, pfn, pages, 0))
                at += pages
            for extent in fresh:
                _fill(tx, extent, edges, offset, data)
            extents.replace(tx, inode, first, last, fresh)


def _goal(tx: Tx, inode: Inode, first: int, last: int) -> int:
    """Return where the frames of pages [first, last) would continue what the file has for itself around them; 0: nowhere.

    Pages that are rewritten one by one, in any order, come to lie beside each other by granules: the first one of a
    granule opens a window of free frames, the others find their places in it (as XFS's extent size hint for
    copy-on-write, 32 blocks).
    """
    low = first - first % _GRANULE
    if inode.pages < _GRANULE or last > low + _GRANULE:
        return 0
    own = 0
    for page, pfn, pages, _ in extents.clip(extents.load(tx, inode, low, low + _GRANULE), low, low + _GRANULE):
        if not (tx.array[pfn : pfn + pages] & SHARED).any():
            own = pfn + first - page
            if tx.frames.are_free(own, last - first):
                return own
    if own:
        return 0
    window = tx.frames.open_window(_GRANULE)
    return window and window + first - low


def _edges(tx: Tx, inode: Inode, first: int, last: int, offset: int, end: int) -> tuple[bytes, bytes]:
    """Return what pages [first, last) keep of their old content before `offset` and behind `end`."""
    head = bytearray(max(0, offset - first * PAGE))
    tail = bytearray(max(0, last * PAGE - end))
    read_into(tx, inode, first * PAGE, memoryview(head))
    if tail:
        read_into(tx, inode, end, memoryview(tail))
    return bytes(head), bytes(tail)


def _fill(tx: Tx, extent: Extent, edges: tuple[bytes, bytes], offset: int, data: memoryview) -> None:
    """Store all bytes of fresh (or never written) frames: `data` where it reaches, edges or zeros elsewhere."""
    page, pfn, pages, _ = extent
    first, last, end = page * PAGE, (page + pages) * PAGE, offset + len(data)
    if offset > first:
        tx.store(pfn, edges[0].rjust(offset - first, b"\0"))
    if end < last:
        tx.store(pfn, edges[1].ljust(last - end, b"\0"), end - first)
    start, stop = max(first, offset), min(last, end)
    tx.store(pfn, data[start - offset : stop - offset], start - first)


def append_from(tx: Tx, inode: Inode, first: int, last: int, fd: int) -> int:
    """Store bytes [first, last) of the host file `fd` where `inode` has nothing; whole pages, but at the host file's end.

    Returns the end of what was stored, a page boundary or the new size. The caller saves the inode. NoSpace.
    """
    low, high = first // PAGE, pages_of(last)
    at = low
    for pfn, pages in tx.frames.take_data(high - low):
        size = min((at + pages) * PAGE, last) - at * PAGE
        done = tx.pool.store_from(pfn * PAGE, fd, at * PAGE, size)
        for rest in range(done, pages * PAGE, len(_ZEROS)):  # behind the end, also of a file that shrank meanwhile
            tx.store(pfn, memoryview(_ZEROS)[: pages * PAGE - rest], rest)
        extents.replace(tx, inode, at, at + pages, [(at, pfn, pages, 0)])
        at += pages
    inode.size = max(inode.size, last)
    return high * PAGE


def _zero_part(tx: Tx, inode: Inode, offset: int, end: int) -> None:
    """Zero bytes [offset, end) of one page, if there is anything in it.

    Never in place: what dies before it is published must not have cut anything off (S8), and unlike a write's, these bytes were
    stored by somebody else, and completely.
    """
    page = offset // PAGE
    if tx.changes is not None and offset < end and tx.changes.zero(tx, inode, offset, end):
        return
    if offset < end and extents.written(extents.load(tx, inode, page, page + 1)):
        _store(tx, inode, offset, memoryview(_ZEROS)[: end - offset], in_place=False)


def truncate(tx: Tx, inode: Inode, size: int) -> None:
    """Make the file `size` bytes long; saves the inode."""
    check_range(size, 0)
    content = inode.content
    if content is not None and size <= INLINE:
        inode.set_content(content[:size].ljust(size, b"\0"))
    else:
        to_pages(tx, inode)
        clear_tail(tx, inode, size)
        if size < inode.size:
            _zero_part(tx, inode, size, min(pages_of(size) * PAGE, inode.size))
        extents.replace(tx, inode, pages_of(size), MAX_KEY - 1, [])
        inode.size = size
    inode.touch()
    inodes.save(tx, inode)


def allocate(tx: Tx, inode: Inode, offset: int, length: int) -> None:
    """Give holes in the range unwritten frames, with storage of the host: writing there can't fail for want of space.

    Grows the file to offset + length, as posix_fallocate does. Saves the inode.
    """
    _check_some(offset, length)
    to_pages(tx, inode)
    clear_tail(tx, inode, offset + length)
    low, high = offset // PAGE, pages_of(offset + length)
    _fill_holes(tx, inode, low, high)
    inode.size = max(inode.size, offset + length)
    inode.touch()
    inodes.save(tx, inode)


def _fill_holes(tx: Tx, inode: Inode, low: int, high: int) -> None:
    with tx.changes.quiet() if tx.changes is not None else nullcontext():  # a mapping shows zeros before and after
        for first, last in extents.holes(extents.load(tx, inode, low, high), low, high):
            at = first
            for pfn, pages in tx.frames.take_data(last - first):
                tx.pool.back(pfn, pages)
                extents.replace(tx, inode, at, at + pages, [(at, pfn, pages, UNWRITTEN)])
                at += pages


def punch(tx: Tx, inode: Inode, offset: int, length: int) -> None:
    """Make the range a hole: whole pages go, parts of pages become zeros. The size stays. Saves the inode."""
    _check_some(offset, length)
    end = offset + length
    if inode.content is not None:
        _zero_inline(inode, offset, end)
    else:
        low, high = pages_of(offset), end // PAGE
        _zero_ends(tx, inode, offset, end)
        extents.replace(tx, inode, low, high, [])
    inode.touch()
    inodes.save(tx, inode)


def _zero_inline(inode: Inode, offset: int, end: int) -> None:
    whole = bytearray(inode.content or b"")
    stop = min(end, len(whole))
    if offset < stop:
        whole[offset:stop] = bytes(stop - offset)
        inode.set_content(bytes(whole))


def _zero_ends(tx: Tx, inode: Inode, offset: int, end: int) -> None:
    """Zero the parts of pages at the ends of [offset, end)."""
    if offset // PAGE == end // PAGE:
        _zero_part(tx, inode, offset, end)
        return
    if offset % PAGE:
        _zero_part(tx, inode, offset, pages_of(offset) * PAGE)
    if end % PAGE:
        _zero_part(tx, inode, end // PAGE * PAGE, end)


def zero(tx: Tx, inode: Inode, offset: int, length: int) -> None:
    """Make the range read as zeros and keep it allocated (unwritten); grows the file as `allocate` does. Saves it."""
    _check_some(offset, length)
    to_pages(tx, inode)
    clear_tail(tx, inode, offset + length)
    end = offset + length
    low, high = pages_of(offset), end // PAGE
    _zero_ends(tx, inode, offset, end)
    if low < high:
        for page, pfn, pages, flags, private in extents.pieces(tx, inode, low, high):
            if private and not flags & UNWRITTEN:
                extents.replace(tx, inode, page, page + pages, [(page, pfn, pages, UNWRITTEN)], keep=True)
            elif not private:
                extents.replace(tx, inode, page, page + pages, [])
    _fill_holes(tx, inode, offset // PAGE, pages_of(end))
    inode.size = max(inode.size, end)
    inode.touch()
    inodes.save(tx, inode)


def collapse(tx: Tx, inode: Inode, offset: int, length: int) -> None:
    """Cut whole pages out of the file; what follows moves up. EINVAL unless page-aligned and short of the end."""
    _check_some(offset, length)
    if offset % PAGE or length % PAGE:
        raise invalid(f"collapse takes whole pages of {PAGE} bytes")
    if offset + length >= inode.size:
        raise invalid("collapse must end before the end of the file; truncate cuts the end off")
    to_pages(tx, inode)
    low, high = offset // PAGE, (offset + length) // PAGE
    if tx.changes is not None:
        tx.changes.keep(tx, inode, low, MAX_KEY)
    extents.replace(tx, inode, low, high, [])
    extents.shift(tx, inode, high, low - high)
    inode.size -= length
    inode.touch()
    inodes.save(tx, inode)


def insert(tx: Tx, inode: Inode, offset: int, length: int) -> None:
    """Make room: a hole of whole pages at `offset`; what was there moves down. EINVAL unless aligned and within."""
    _check_some(offset, length)
    if offset % PAGE or length % PAGE:
        raise invalid(f"insert takes whole pages of {PAGE} bytes")
    if offset >= inode.size:
        raise invalid("insert must start before the end of the file; truncate makes it longer")
    check_range(0, inode.size + length)
    to_pages(tx, inode)
    if tx.changes is not None:
        tx.changes.keep(tx, inode, offset // PAGE, MAX_KEY)
    extents.shift(tx, inode, offset // PAGE, length // PAGE)
    inode.size += length
    inode.touch()
    inodes.save(tx, inode)


def unshare(tx: Tx, inode: Inode, offset: int, length: int) -> None:
    """Give the file frames of its own wherever the range is shared. Saves the inode."""
    check_range(offset, length)
    end = min(offset + length, inode.size)
    low, high = offset // PAGE, pages_of(end)
    if tx.changes is not None and low < high:
        tx.changes.own(tx, inode, low, high)
    if low < high and inode.content is None:
        for page, pfn, pages, flags, private in extents.pieces(tx, inode, low, high):
            if not private and not flags & UNWRITTEN:
                _copy(tx, inode, page, pfn, pages)
    inodes.save(tx, inode)


def _copy(tx: Tx, inode: Inode, page: int, pfn: int, pages: int) -> None:
    fresh: list[Extent] = []
    at = page
    for mine, count in tx.frames.take_data(pages):
        source = (pfn + at - page) * PAGE
        tx.store(mine, tx.bytes[source : source + count * PAGE])
        fresh.append((at, mine, count, 0))
        at += count
    extents.replace(tx, inode, page, page + pages, fresh)


def _check_some(offset: int, length: int) -> None:
    check_range(offset, length)
    if length == 0:
        raise invalid("the length must be more than 0")


def seek(view: View, inode: Inode, offset: int, whence: str) -> int:
    """Return the first offset >= `offset` that is in data ('data') or in a hole ('hole'; the end is one). ENXIO past it."""
    if whence not in ("data", "hole"):
        raise invalid(f"seek to {whence!r}: say 'data' or 'hole'")
    if not 0 <= offset < inode.size:
        raise posix(errno.ENXIO)
    if inode.content is not None:
        return offset if whence == "data" else inode.size
    at = offset
    for page, _, pages, _ in extents.written(extents.load(view, inode, offset // PAGE)):
        if page * PAGE > at:
            if whence == "hole":
                return at
            return page * PAGE
        if whence == "data":
            return at
        at = (page + pages) * PAGE
    if whence == "hole":
        return min(at, inode.size)
    raise posix(errno.ENXIO)
