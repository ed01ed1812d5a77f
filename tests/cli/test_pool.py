"""format, info, check."""

import os
from pathlib import Path

import pytest

import onecopy


def test_format_makes_a_pool_of_the_size_asked_for(cli, pool_path):
    assert "64.0 MiB" in cli("format", pool_path, "--size", "64M")
    with onecopy.open(pool_path) as fs:
        assert fs.info().size == 64 << 20


def test_format_reports_the_pool_as_json(cli, pool_path):
    made = cli.json("format", pool_path, "--size", "64M")
    assert made["verb"] == "format"
    assert made["pool"]["size"] == 64 << 20 == made["pool"]["pages"] * made["pool"]["page_size"]
    assert Path(made["pool"]["path"]).samefile(pool_path)


def test_format_replaces_a_pool_only_when_forced(cli, pool_path):
    cli("format", pool_path, "--size", "64M")
    with onecopy.open(pool_path) as fs:
        fs.write("/kept", b"x")
    assert cli.fails("format", pool_path, "--size", "64M")["errno"] == "EEXIST"
    assert "force" in cli.err
    with onecopy.open(pool_path) as fs:
        assert fs.exists("/kept")
    cli("format", pool_path, "--size", "64M", "--force")
    with onecopy.open(pool_path) as fs:
        assert not fs.exists("/kept")


@pytest.mark.parametrize("size", ["8X", "", "-1G", "many"])
def test_format_refuses_what_is_no_size(cli, pool_path, size):
    assert cli.fails("format", pool_path, "--size", size)["errno"] == "EINVAL"
    assert not os.path.exists(pool_path)


def test_format_refuses_a_pool_in_use(cli, pool):
    assert cli.fails("format", pool.path, "--size", "64M", "--force")["type"] == "PoolBusy"


def test_info_counts_pages_and_names_users(cli, pool):
    pool.write("/file", b"x" * (1 << 20))
    pool.sync()
    found = cli.json("info", pool.path)["pool"]
    assert found["used_pages"] + found["free_pages"] + found["waiting_pages"] <= found["pages"]
    assert found["used_pages"] > 256
    assert os.getpid() in [user["pid"] for user in found["users"]]
    text = cli("info", pool.path)
    assert found["uuid"] in text
    assert str(os.getpid()) in text


def test_check_finds_nothing_in_a_sound_pool(cli, pool):
    pool.write("/file", b"x" * 10_000)
    pool.clone("/file", "/clone")
    pool.sync()
    assert "no findings" in cli("check", pool.path)
    found = cli.json("check", pool.path)
    assert found["ok"] and found["findings"] == [] and found["counted"]


@pytest.fixture
def damage(pool_path):
    """Format a pool, and give a function that overwrites one of its pages."""
    onecopy.format(pool_path, "64M")

    def overwrite(pfn):
        with open(pool_path, "r+b") as file:
            file.seek(pfn * 4096)
            file.write(b"\xa5" * 4096)

    return overwrite


def test_check_ends_with_1_when_it_finds_damage(cli, pool_path, damage):
    damage(2)
    assert cli("ls", pool_path) == ""
    found = cli.json("check", pool_path, status=1)
    assert not found["ok"]
    assert {finding["code"] for finding in found["findings"]} == {"superblock"}
    assert set(found["findings"][0]) == {"code", "where", "pfn", "expected", "actual", "message"}
    lines = cli("check", pool_path, status=1).splitlines()
    assert lines[0].split() == ["code", "pfn", "message"]
    assert lines[1].startswith("superblock")
    assert cli.err == ""


def test_check_reads_a_pool_that_is_too_damaged_to_open(cli, pool_path, damage):
    damage(1)
    damage(2)
    assert cli.fails("ls", pool_path)["type"] == "CorruptRecord"
    assert "no-superblock" in [found["code"] for found in cli.json("check", pool_path, status=1)["findings"]]


def test_check_of_what_is_no_pool_is_an_error(cli, tmp_path):
    assert cli.fails("check", tmp_path / "none")["errno"] == "ENOENT"
    (tmp_path / "text").write_text("something else\n" * 1000)
    assert cli.fails("check", tmp_path / "text")["type"] == "NotAPool"
