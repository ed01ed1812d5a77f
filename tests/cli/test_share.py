"""clone, snapshot, subvolume, dedupe, du, extents: what is shared, and what it costs."""

import os

import pytest

PAGE = 4096


@pytest.fixture
def base(pool):
    """A file of 64 different pages."""
    data = os.urandom(64 * PAGE)
    pool.write("/base", data)
    return data


def test_clone_shares_every_page(cli, pool, base):
    assert cli("clone", pool.path, "/base", "/copy") == ""
    assert pool.read("/copy") == base
    assert [extent.pfn for extent in pool.extents("/copy")] == [extent.pfn for extent in pool.extents("/base")]
    assert cli.json("clone", pool.path, "/base", "/again") == {
        "verb": "clone",
        "src": "/base",
        "dst": "/again",
        "range": None,
    }


def test_clone_never_replaces(cli, pool, base):
    pool.write("/there", b"x")
    assert cli.fails("clone", pool.path, "/base", "/there")["errno"] == "EEXIST"
    assert pool.read("/there") == b"x"


def test_clone_of_a_directory_needs_r(cli, pool, base):
    pool.mkdir("/d/e", parents=True)
    pool.clone("/base", "/d/e/file")
    assert cli.fails("clone", pool.path, "/d", "/copy")["errno"] == "EISDIR"
    assert "-r" in cli.err
    cli("clone", "-r", pool.path, "/d", "/copy")
    assert pool.read("/copy/e/file") == base
    cli("clone", "-r", pool.path, "/base", "/file")
    assert pool.read("/file") == base


def test_clone_range_shares_a_part(cli, pool, base):
    pool.write("/part", b"z" * (8 * PAGE))
    done = cli.json("clone", pool.path, "/base", "/part", "--range", "16K:8K@4K")
    assert done["range"] == {"src_offset": 4 * PAGE, "length": 2 * PAGE, "dst_offset": PAGE}
    assert pool.read("/part") == b"z" * PAGE + base[4 * PAGE : 6 * PAGE] + b"z" * (5 * PAGE)
    cli("clone", pool.path, "/base", "/new", "--range", "0:4096")
    assert pool.read("/new") == base[:PAGE]


def test_clone_range_that_fails_leaves_no_file_behind(cli, pool, base):
    assert cli.fails("clone", pool.path, "/base", "/new", "--range", "1:4096")["errno"] == "EINVAL"
    assert cli.fails("clone", pool.path, "/none", "/new", "--range", "0:4096")["errno"] == "ENOENT"
    assert pool.listdir("/") == ["base"]


@pytest.mark.parametrize("text", ["4K", "4K:", ":4K", "a:b", "0:4K@", "-4K:4K"])
def test_clone_refuses_what_is_no_range(cli, pool, base, text):
    cli.fails("clone", pool.path, "/base", "/part", f"--range={text}")
    assert not pool.exists("/part")


def test_clone_range_takes_no_directories(cli, pool):
    assert cli.fails("clone", "-r", pool.path, "/", "/d", "--range", "0:4K")["type"] == "UsageError"


def test_subvolumes_are_made_listed_cloned_and_deleted(cli, pool, base):
    assert cli("subvolume", "create", pool.path, "/sub") == ""
    pool.clone("/base", "/sub/file")
    assert cli.json("snapshot", pool.path, "/sub", "/snap") == {"verb": "snapshot", "src": "/sub", "dst": "/snap"}
    assert pool.read("/snap/file") == base
    listed = cli.json("subvolume", "list", pool.path)["subvolumes"]
    assert {"/sub", "/snap"} <= {one["path"] for one in listed}
    assert "/snap" in cli("subvolume", "list", pool.path)
    assert cli.json("subvolume", "delete", pool.path, "/sub") == {"verb": "subvolume delete", "path": "/sub"}
    assert pool.listdir("/") == ["base", "snap"]
    assert pool.read("/snap/file") == base


def test_snapshot_wants_a_subvolume(cli, pool):
    pool.mkdir("/d")
    assert cli.fails("snapshot", pool.path, "/d", "/snap")["errno"] == "EINVAL"


@pytest.fixture
def twins(pool, base):
    """Beside /base: /twin, all of its pages once more, and /half, half of them."""
    pool.write("/twin", base)
    pool.write("/half", base[: 32 * PAGE])
    return 96 * PAGE


def test_dedupe_says_what_it_would_free_and_changes_nothing(cli, pool, twins):
    used = pool.info().used_pages
    found = cli.json("dedupe", pool.path)
    assert (found["freed_bytes"], found["applied"]) == (twins, False)
    sizes = [file["duplicate_bytes"] for file in found["files"]]
    assert sizes == sorted(sizes, reverse=True)
    text = cli("dedupe", pool.path)
    assert f"would free {twins // 1024}.0 KiB ({twins:,} bytes)" in text
    assert "--apply" in text
    assert pool.info().used_pages == used


def test_dedupe_apply_frees_exactly_that(cli, pool, twins, base):
    pool.sync()
    before = cli.json("du", pool.path)["total"]
    assert f"freed {twins // 1024}.0 KiB" in cli("dedupe", pool.path, "--apply")
    assert before - cli.json("du", pool.path)["total"] == twins
    assert pool.read("/twin") == base
    assert cli.json("dedupe", pool.path, "--apply")["freed_bytes"] == 0


def test_dedupe_searches_only_the_paths_given(cli, pool, twins):
    assert cli.json("dedupe", pool.path, "/base", "/half")["freed_bytes"] == 32 * PAGE


def test_du_tells_unique_from_shared(cli, pool, base):
    pool.mkdir("/d")
    pool.clone("/base", "/d/clone")
    pool.write("/d/own", os.urandom(8 * PAGE))
    found = cli.json("du", pool.path)
    children = {child["path"]: child for child in found["children"]}
    assert (found["logical"], found["total"]) == (136 * PAGE, 72 * PAGE)
    assert (children["/d"]["unique"], children["/d"]["shared"]) == (8 * PAGE, 64 * PAGE)
    assert (children["/base"]["unique"], children["/base"]["shared"]) == (0, 64 * PAGE)
    lines = [line.split() for line in cli("du", pool.path, "--bytes").splitlines()]
    assert lines[0] == ["logical", "unique", "shared", "total", "path"]
    assert lines[1] == [str(72 * PAGE), str(8 * PAGE), str(64 * PAGE), str(72 * PAGE), "/d"]
    assert lines[-1][-1] == "/"
    assert "288.0 KiB" in cli("du", pool.path)


def test_du_of_a_file_has_no_children(cli, pool, base):
    assert cli.json("du", pool.path, "/base")["children"] == []
    assert len(cli("du", pool.path, "/base").splitlines()) == 2


def test_extents_show_each_run(cli, pool, base):
    pool.truncate("/base", 100 * PAGE)
    pool.allocate("/base", 80 * PAGE, 4 * PAGE)
    pool.create("/clone")
    pool.clone_range("/base", 0, "/clone", 0, 16 * PAGE)
    found = cli.json("extents", pool.path, "/base")["extents"]
    assert [run["file_page"] for run in found] == [sum(run["pages"] for run in found[:index]) for index in range(len(found))]
    assert {run["state"] for run in found} == {"data", "hole", "unwritten"}
    assert found[0]["sharers"] == 2
    lines = cli("extents", pool.path, "/base").splitlines()
    assert lines[0].split("  ") == ["file page", *lines[0].split("  ")[1:]]
    assert lines[1].split() == ["0", str(found[0]["pfn"]), "16", "2", "data"]


def test_extents_are_drawn(cli, pool, base, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "base.png"
    assert cli.json("extents", pool.path, "/base", "--png", picture)["png"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
