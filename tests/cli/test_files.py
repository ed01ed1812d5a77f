"""ls, stat, mkdir, mv, rm, ln."""

import os

import pytest


def test_ls_lists_names_in_order(cli, pool):
    pool.write("/b", b"")
    pool.mkdir("/a")
    pool.symlink("b", "/c")
    assert cli("ls", pool.path).splitlines() == ["a", "b", "c"]
    kinds = {entry["name"]: entry["kind"] for entry in cli.json("ls", pool.path, "/")["entries"]}
    assert kinds == {"a": "dir", "b": "file", "c": "symlink"}


def test_ls_long_shows_what_ls_shows(cli, pool):
    pool.write("/file", b"x" * 12_345)
    pool.chmod("/file", 0o640)
    pool.link("/file", "/other")
    pool.symlink("file", "/soft")
    lines = cli("ls", "-l", pool.path).splitlines()
    assert lines[0].split() == ["mode", "links", "uid", "gid", "size", "modified", "name"]
    mode, links, _, _, size, _, _, name = lines[1].split()
    assert (mode, links, size, name) == ("-rw-r-----", "2", "12345", "file")
    assert lines[3].endswith("soft -> file")
    first, _, soft = cli.json("ls", "-l", pool.path)["entries"]
    assert (first["size"], first["nlink"], first["uid"]) == (12_345, 2, os.getuid())
    assert soft["target"] == "file"


def test_ls_of_a_file_lists_the_file(cli, pool):
    pool.write("/file", b"x")
    assert cli("ls", pool.path, "/file") == "/file\n"
    assert cli.json("ls", pool.path, "/file")["entries"][0]["kind"] == "file"


def test_ls_follows_a_link_to_a_directory_and_shows_a_dangling_one(cli, pool):
    pool.mkdir("/d")
    pool.write("/d/inside", b"")
    pool.symlink("/d", "/to-d")
    pool.symlink("/none", "/dangling")
    assert cli("ls", pool.path, "/to-d") == "inside\n"
    assert cli("ls", pool.path, "/dangling") == "/dangling\n"


def test_stat_shows_the_inode(cli, pool):
    pool.write("/file", b"x" * 5000)
    pool.chmod("/file", 0o600)
    pool.symlink("file", "/soft")
    found = cli.json("stat", pool.path, "/file")
    inode = pool.stat("/file")
    assert (found["kind"], found["size"], found["ino"]) == ("file", 5000, inode.st_ino)
    assert found["mtime_ns"] == inode.st_mtime_ns
    lines = dict(line.split(maxsplit=1) for line in cli("stat", pool.path, "/file").splitlines())
    assert (lines["path"], lines["size"], lines["mode"]) == ("/file", "5000", "0600 -rw-------")
    assert cli.json("stat", pool.path, "/soft")["target"] == "file"


def test_mkdir_makes_parents_only_when_asked(cli, pool):
    assert cli.fails("mkdir", pool.path, "/a/b")["errno"] == "ENOENT"
    assert cli("mkdir", "-p", pool.path, "/a/b", "/c") == ""
    assert pool.listdir("/") == ["a", "c"]
    assert pool.listdir("/a") == ["b"]
    assert cli.fails("mkdir", pool.path, "/c")["errno"] == "EEXIST"
    assert cli.json("mkdir", "-p", pool.path, "/c") == {"verb": "mkdir", "paths": ["/c"]}


def test_mv_renames_replaces_and_moves_into_directories(cli, pool):
    pool.write("/a", b"a")
    pool.write("/b", b"b")
    pool.mkdir("/d")
    assert cli("mv", pool.path, "/a", "/b") == ""
    assert pool.read("/b") == b"a"
    assert cli.json("mv", pool.path, "/b", "/d") == {"verb": "mv", "src": "/b", "dst": "/d/b"}
    assert pool.listdir("/") == ["d"]


def test_rm_takes_directories_only_with_r(cli, pool):
    pool.mkdir("/d")
    pool.write("/d/file", b"x")
    pool.write("/file", b"x")
    assert cli.fails("rm", pool.path, "/d")["errno"] == "EISDIR"
    assert "-r" in cli.err
    assert cli("rm", pool.path, "/file") == ""
    assert cli.json("rm", "-r", pool.path, "/d") == {"verb": "rm", "paths": ["/d"]}
    assert pool.listdir("/") == []
    assert cli.fails("rm", pool.path, "/file")["errno"] == "ENOENT"


def test_ln_makes_both_kinds_of_link(cli, pool):
    pool.write("/file", b"x")
    assert cli("ln", pool.path, "/file", "/hard") == ""
    assert pool.stat("/hard").st_ino == pool.stat("/file").st_ino
    made = cli.json("ln", "-s", pool.path, "../file", "/soft")
    assert made == {"verb": "ln", "target": "../file", "link": "/soft", "symbolic": True}
    assert pool.readlink("/soft") == "../file"
    assert cli.fails("ln", pool.path, "/file", "/hard")["errno"] == "EEXIST"


def test_ln_does_not_cross_subvolumes(cli, pool):
    pool.create_subvolume("/sub")
    pool.write("/file", b"x")
    assert cli.fails("ln", pool.path, "/file", "/sub/hard")["errno"] == "EXDEV"


@pytest.mark.parametrize("verb", [["ls"], ["stat"], ["cat"], ["rm"], ["du"], ["extents"]])
def test_every_reader_says_what_is_missing(cli, pool, verb):
    error = cli.fails(*verb, pool.path, "/no/such")
    assert (error["type"], error["errno"], error["paths"]) == ("FileNotFoundError", "ENOENT", ["/no/such"])
    assert "/no/such" in cli.err
