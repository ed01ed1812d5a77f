"""A pool works the same wherever it lies: tmpfs, a huge-page tmpfs, ext4 or whatever holds the temporary folder, XFS."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import onecopy
from onecopy.daxemu.runtime import runtime_paths

MiB = 1 << 20


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(params=["tmpfs", "huge-page tmpfs", "disk", "xfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on each kind of file system; mounting needs root."""
    kind = request.param
    if kind == "disk":
        yield tmp_path
        return
    if os.geteuid() != 0:
        pytest.skip(f"mounting a {kind} needs root")
    if kind == "xfs" and not shutil.which("mkfs.xfs"):
        pytest.skip("mkfs.xfs is not installed")
    folder = tmp_path / "mount"
    folder.mkdir()
    if kind == "xfs":
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(512 * MiB)
        run("mkfs.xfs", "-q", str(image))
        command = ["mount", "-o", "loop", str(image), str(folder)]
    else:
        options = "size=512m,huge=always" if kind.startswith("huge") else "size=512m"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount a {kind} here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        run("umount", str(folder))


@pytest.fixture
def path(place: Path) -> Iterator[str]:
    made = str(place / "a.pool")
    onecopy.format(made, "128M")
    yield made
    onecopy.remove(made)


def test_content_clones_and_mappings(path: str, tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(4 * MiB + 123)
    source = tmp_path / "source"
    source.write_bytes(data)
    with onecopy.open(path) as fs:
        fs.put(source, "/a")
        fs.clone("/a", "/b")
        with fs.map("/a") as a, fs.map("/b") as b:
            assert (a.pfns == b.pfns).all()
            assert bytes(memoryview(b)) == data
        fs.write("/b", b"new", MiB)
        assert fs.read("/a") == data
        assert fs.read("/b") == data[:MiB] + b"new" + data[MiB + 3 :]
        fs.get("/b", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == fs.read("/b")
        assert fs.check().ok


def test_what_was_synced_survives_the_loss_of_the_run_time_file(path: str) -> None:
    with onecopy.open(path) as fs:
        fs.write("/a", b"x" * 10_000)
        fs.clone("/a", "/b")
        files = runtime_paths(fs._mount.pool)
    for file in files:
        os.unlink(file)
    with onecopy.open(path) as fs:
        assert fs.read("/b") == b"x" * 10_000
        assert fs.check().ok
    assert onecopy.check(path).ok


def test_storage_is_given_back(path: str) -> None:
    with onecopy.open(path) as fs:
        before = fs.info().backed_bytes
        fs.write("/a", os.urandom(32 * MiB))
        fs.sync()
        assert fs.info().backed_bytes >= before + 32 * MiB
        fs.unlink("/a")
        fs.sync()
        assert fs.info().backed_bytes <= before + 4 * MiB  # room for nodes stays; a huge page goes as a whole


def test_large_files_start_where_2_mib_translations_can(path: str) -> None:
    with onecopy.open(path) as fs:
        fs.write("/small", b"x" * 5000)
        fs.write("/large", bytes(range(256)) * (4 * MiB // 256))
        assert fs.extents("/large")[0].pfn % 512 == 0
        with fs.map("/large") as mapping:
            assert mapping.address % (2 * MiB) == 0


def test_a_full_host_is_an_error_and_nothing_else(place: Path) -> None:
    """The pool promises more than its file system has: the write fails, the process lives, the pool is as it was."""
    if os.statvfs(place).f_bavail * os.statvfs(place).f_bsize > 600 * MiB:
        pytest.skip("the temporary folder's file system is too large to fill")
    path = str(place / "big.pool")
    onecopy.format(path, "2G")
    try:
        with onecopy.open(path) as fs:
            fs.write("/kept", b"k" * MiB)
            with pytest.raises(onecopy.NoSpace):
                for n in range(40):
                    fs.write(f"/f{n}", os.urandom(32 * MiB))
            assert fs.read("/kept") == b"k" * MiB
            for name in fs.listdir("/"):
                fs.unlink(f"/{name}")
            fs.sync()
            assert fs.check().ok
            fs.write("/again", b"a" * MiB)
    finally:
        onecopy.remove(path)
