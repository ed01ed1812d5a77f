"""What must be owned before it is let go: an extent that reaches beyond its own leaf's range of keys."""

import onecopy
from onecopy.fs import extents, inode, namei
from onecopy.fs.tx import Tx


def spread(tx: Tx) -> None:
    """Give /a 200 extents in two leaves, then let the left leaf's last one reach over the keys of the right leaf."""
    file = namei.change_file(tx, "/a")
    ((base, _),) = tx.frames.take_data(4000)
    extents.replace(tx, file, 0, 400, [(2 * i, base + 20 * i, 1, 0) for i in range(200)])
    root = file.root
    (first, _, _), (right, _, _) = extents.EXTENTS.slices(tx.words, root)
    last = tx.words[first + 4 + (tx.words[first] & 0xFFFF) - 1]
    start = last // 2 * 20 + base
    extents.replace(tx, file, last, last + 20, [(last, start, 20, 0)], keep=True)
    used = {pfn + n for _, pfn, pages, _ in extents.load(tx, file) for n in range(pages)}
    tx.freed += [(pfn, 1) for pfn in range(base, base + 4000) if pfn not in used]
    assert tx.words[(file.root << 9) + 5] < last + 20, "the right leaf's range must begin within the long extent"
    del right
    file.size = 400 * 4096
    inode.save(tx, file)


def test_a_write_into_the_far_end_of_a_shared_extent_leaves_the_clone_alone(pool: onecopy.FileSystem) -> None:
    pool.create("/a")
    pool._mount.run(spread)
    long = max(pool.extents("/a"), key=lambda e: e.pages)
    assert long.pages == 20
    pool.clone("/a", "/b")
    before = pool.read("/a")
    pool.write("/b", b"x" * 4096, (long.file_page + 15) * 4096)
    assert pool.check().findings == []
    pool.write("/c", b"y" * 40_960)
    pool.sync()
    pool.write("/d", b"z" * 40_960)
    assert pool.read("/a") == before
