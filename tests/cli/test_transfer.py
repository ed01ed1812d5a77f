"""put, get, cat."""

import base64
import os

import pytest


@pytest.fixture
def tree(tmp_path):
    """A small tree of the host, with every kind of name that a pool holds."""
    root = tmp_path / "tree"
    (root / "deep" / "deeper").mkdir(parents=True)
    (root / "one").write_bytes(b"1" * 5000)
    (root / "deep" / "two").write_bytes(b"2" * 100_000)
    (root / "deep" / "link").symlink_to("../one")
    return root


def test_put_and_get_bring_a_file_back(cli, pool, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(123_456))
    assert cli("put", pool.path, source, "/file") == ""
    assert pool.read("/file") == source.read_bytes()
    assert cli("get", pool.path, "/file", copy) == ""
    assert copy.read_bytes() == source.read_bytes()


def test_put_and_get_bring_a_tree_back(cli, pool, tree, tmp_path):
    assert cli.json("put", pool.path, tree, "/tree") == {"verb": "put", "src": str(tree), "dst": "/tree"}
    copy = tmp_path / "copy"
    assert cli.json("get", pool.path, "/tree", copy) == {"verb": "get", "src": "/tree", "dst": str(copy)}
    assert (copy / "one").read_bytes() == (tree / "one").read_bytes()
    assert (copy / "deep" / "two").read_bytes() == (tree / "deep" / "two").read_bytes()
    assert os.readlink(copy / "deep" / "link") == "../one"
    assert (copy / "deep" / "deeper").is_dir()


def test_an_existing_directory_takes_the_source_in(cli, pool, tree, tmp_path):
    pool.mkdir("/d")
    assert cli.json("put", pool.path, tree / "one", "/d")["dst"] == "/d/one"
    assert cli.json("put", pool.path, tree, "/d/")["dst"] == "/d/tree"
    out = tmp_path / "out"
    out.mkdir()
    assert cli.json("get", pool.path, "/d/one", out)["dst"] == str(out / "one")
    assert (out / "one").read_bytes() == (tree / "one").read_bytes()


def test_holes_stay_holes(cli, pool, tmp_path):
    source, copy = tmp_path / "sparse", tmp_path / "copy"
    with source.open("wb") as file:
        file.truncate(16 << 20)
        file.seek(8 << 20)
        file.write(b"x" * 4096)
    cli("put", pool.path, source, "/sparse")
    assert pool.stat("/sparse").st_blocks * 512 <= 64 << 10
    cli("get", pool.path, "/sparse", copy)
    assert copy.stat().st_blocks * 512 <= 64 << 10
    assert copy.read_bytes() == source.read_bytes()


def test_cat_writes_files_one_after_the_other(cli, pool):
    big = os.urandom((2 << 20) + 7)
    pool.write("/big", big)
    pool.write("/small", b"\xff\n")
    pool.create("/empty")
    assert cli.raw("cat", pool.path, "/small", "/empty", "/big") == b"\xff\n" + big
    files = cli.json("cat", pool.path, "/small", "/empty")["files"]
    assert [(file["path"], base64.b64decode(file["base64"])) for file in files] == [
        ("/small", b"\xff\n"),
        ("/empty", b""),
    ]


def test_cat_refuses_a_directory(cli, pool):
    assert cli.fails("cat", pool.path, "/")["errno"] == "EISDIR"


def test_what_is_not_there_cannot_move(cli, pool, tmp_path):
    error = cli.fails("put", pool.path, tmp_path / "none", "/file")
    assert (error["errno"], error["paths"]) == ("ENOENT", [str(tmp_path / "none")])
    error = cli.fails("get", pool.path, "/none", tmp_path / "file")
    assert (error["errno"], error["paths"]) == ("ENOENT", ["/none"])
    assert not (tmp_path / "file").exists()


def test_put_refuses_a_special_file(cli, pool, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    error = cli.fails("put", pool.path, tmp_path / "pipe", "/pipe")
    assert error["type"] == "SpecialFile"
    assert not pool.exists("/pipe")


def test_put_into_a_full_pool_says_so(cli, pool, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(80 << 20))
    assert cli.fails("put", pool.path, large, "/large")["errno"] == "ENOSPC"
    assert pool.check().ok
