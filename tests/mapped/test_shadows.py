"""The reverse map: which pages of mapped files show a frame."""

PAGE = 4096


def test_shadows_are_all_entries_of_a_frame(pool):
    pool.write("/a", bytes(range(256)) * 16 * 4)
    pool.clone("/a", "/b")
    pool.clone_range("/a", PAGE, "/b", 3 * PAGE, PAGE)  # the same frame at another page of the clone
    with pool.map("/a", "r+") as a, pool.map("/b", "r+", granule=1) as b:
        numbers = {path: (pool.stat(path).st_dev & 0xFFFFF, pool.stat(path).st_ino) for path in ("/a", "/b")}
        frame = int(a.pfns[1])
        assert frame == int(b.pfns[1]) == int(b.pfns[3])
        assert sorted(pool.shadows(frame)) == sorted([(*numbers["/a"], 1), (*numbers["/b"], 1), (*numbers["/b"], 3)])
        b[PAGE] = 1  # one page gets a frame of its own, with one entry (S2)
        assert sorted(pool.shadows(frame)) == sorted([(*numbers["/a"], 1), (*numbers["/b"], 3)])
        assert pool.shadows(int(b.pfns[1])) == [(*numbers["/b"], 1)]
        pool.truncate("/a", PAGE)
        assert pool.shadows(frame) == [(*numbers["/b"], 3)]
