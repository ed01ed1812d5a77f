"""What the demo clones."""

import errno
import hashlib
import os

import numpy as np
import pytest

from onecopy.cli import demo_input
from onecopy.cli.measure import PAGE


def test_the_default_is_the_library_and_an_array_of_real_bytes(tmp_path):
    data = demo_input.default_input(tmp_path, 4 << 20)
    names = {file.name for file in data.files}
    assert {"array", "tree/os.py", "tree/json/__init__.py"} <= names
    assert not any(name.endswith(".pyc") or "site-packages" in name for name in names)
    array = np.load(data.array)
    assert array.nbytes == 4 << 20
    pages = array.view(np.uint8).reshape(-1, PAGE)
    assert len(np.unique(pages, axis=0)) == len(pages)


def test_the_array_is_the_same_every_time(tmp_path):
    digests = set()
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "some.py").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "library" / "empty.py").touch()
    for name in "ab":
        demo_input._derive_array(tmp_path / name, 40_000, str(tmp_path / "library"))
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).digest())
    assert len(digests) == 1
    assert np.load(tmp_path / "a")[:4].tolist() == [0, 1, 3, 6]


def test_a_named_file_is_the_array(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * (PAGE + 1))
    data = demo_input.named_input(str(tmp_path / "f"))
    assert (data.array, data.tree, data.size, data.footprint) == (str(tmp_path / "f"), None, PAGE + 1, 2 * PAGE)
    assert [file.digest for file in data.files] == [hashlib.sha256(b"x" * (PAGE + 1)).digest()]


def test_a_named_tree_is_its_regular_files(tree):
    data = demo_input.named_input(str(tree))
    names = {os.path.relpath(file.name, "tree") for file in data.files}
    assert {"empty", "tiny", "sub/page", os.fsdecode(b"sub/deep/not utf-8 \xff")} <= names
    assert "sub/link" not in names
    assert data.array is None


def test_nothing_to_clone_is_an_error(tmp_path):
    (tmp_path / "empty").touch()
    for path in (tmp_path, tmp_path / "empty"):
        with pytest.raises(OSError, match="no byte") as error:
            demo_input.named_input(str(path))
        assert error.value.errno == errno.ENODATA
