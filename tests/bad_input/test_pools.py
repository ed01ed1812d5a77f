"""Files that are no pool, part of one, another version's, somebody else's; pools in use; wrong ways to open and format."""

import contextlib
import errno
import os
import shutil
import socket

import pytest

import onecopy
from onecopy.daxemu.pool import VERSION

PAGE = onecopy.PAGE
NOBODY = 65534


@pytest.fixture
def formatted(pool_path):
    """The path of an empty pool."""
    onecopy.format(pool_path, "4M")
    return pool_path


def _raises(code, work, *arguments, **options):
    with pytest.raises(OSError) as caught:
        work(*arguments, **options)
    assert caught.value.errno == code
    assert caught.value.filename or "PFN" in str(caught.value)
    return caught.value


# ------------------------------------------------------------- not a pool


@pytest.mark.parametrize(
    "content",
    [b"", b"short", bytes(PAGE), b"\x89PNG" + bytes(PAGE), b"onecopy\0", b"onecopy\0" + bytes(PAGE - 9)],
    ids=["empty", "short", "zeros", "another format", "magic only", "a byte short of a page"],
)
@pytest.mark.parametrize("use", [onecopy.open, onecopy.check, onecopy.remove])
def test_files_that_are_no_pools(tmp_path, use, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert isinstance(_raises(errno.EINVAL, use, path), onecopy.NotAPool)
    assert path.read_bytes() == content


def test_a_magic_without_a_header(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"onecopy\0" + bytes(PAGE))
    assert isinstance(_raises(errno.EPROTONOSUPPORT, onecopy.open, path), onecopy.PoolVersionError)


@pytest.mark.parametrize("use", [onecopy.open, onecopy.check, onecopy.remove])
def test_nothing_there(tmp_path, use):
    _raises(errno.ENOENT, use, tmp_path / "nothing")
    _raises(errno.ENOTDIR, use, __file__ + "/nothing")


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    for name in ("folder", "socket"):
        _raises(errno.EINVAL if name == "folder" else errno.ENXIO, onecopy.open, tmp_path / name)
    for path in ("/dev/null", "/dev/zero"):
        _raises(errno.EINVAL, onecopy.open, path)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path, in_child, mode):
    os.mkfifo(tmp_path / "pipe")
    in_child(lambda: _raises(errno.EINVAL, onecopy.open, tmp_path / "pipe", mode) and None)
    in_child(lambda: _raises(errno.EINVAL, onecopy.remove, tmp_path / "pipe") and None)


@pytest.mark.parametrize("pages", [1, 2, 3, 500, 1023])
@pytest.mark.parametrize("use", [onecopy.open, onecopy.check])
def test_truncated_pools(formatted, use, pages):
    os.truncate(formatted, pages * PAGE)
    error = _raises(errno.EINVAL, use, formatted)
    assert isinstance(error, onecopy.NotAPool) and "truncated" in str(error)


def test_a_pool_truncated_since_it_was_last_used(formatted):
    """Its run-time file is still there, and does not make up for it."""
    with onecopy.open(formatted) as fs:
        fs.write("/file", bytes(100 * PAGE))
    os.truncate(formatted, 600 * PAGE)
    _raises(errno.EINVAL, onecopy.open, formatted)


def test_a_pool_that_grew_is_the_pool_it_was(formatted):
    os.truncate(formatted, 8 << 20)
    with onecopy.open(formatted) as fs:
        assert fs.info().size == 4 << 20
        assert fs.check().findings == []


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, (1 << 32) - 1])
@pytest.mark.parametrize("use", [onecopy.open, onecopy.check])
def test_another_version(formatted, use, version):
    with open(formatted, "r+b") as file:
        file.seek(8)
        file.write(version.to_bytes(4, "little"))
    error = _raises(errno.EPROTONOSUPPORT, use, formatted)
    assert isinstance(error, onecopy.PoolVersionError) and str(version) in str(error)


def test_a_pool_replaced_by_an_older_copy(formatted, new_path):
    """Restored from a copy in place: the run-time file of what was there before is not believed."""
    copy = new_path()
    with onecopy.open(formatted) as fs:
        fs.write("/old", b"old")
    shutil.copyfile(formatted, copy)
    with onecopy.open(formatted) as fs:
        fs.write("/new", bytes(50 * PAGE))
    shutil.copyfile(copy, formatted)
    with onecopy.open(formatted) as fs:
        assert fs.listdir("/") == ["old"]
        assert fs.check().findings == []


# ------------------------------------------------------------- permission


@pytest.fixture
def as_nobody(in_child):
    """Run work in a child without privileges; return its result."""
    if os.geteuid():
        pytest.skip("takes the right to become somebody else")

    def run(work):
        def unprivileged():
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            return work()

        return in_child(unprivileged)

    return run


def _outcome(work, *arguments):
    try:
        work(*arguments)
    except OSError as error:
        return type(error).__name__
    return "done"


@pytest.mark.parametrize(
    ("mode", "outcome"), [(0o600, "PermissionError"), (0o640, "PermissionError"), (0o644, "PermissionError"), (0o666, "done")]
)
@pytest.mark.parametrize("running", [True, False])
def test_another_users_pool(pool_path, as_nobody, mode, outcome, running):
    """A reader, too, registers in the run-time file, which has the pool's owner and mode."""
    onecopy.format(pool_path, "4M", mode=mode)

    def work():
        return [_outcome(lambda mode=mode: onecopy.open(pool_path, mode).close()) for mode in ("r", "r+")]

    with onecopy.open(pool_path) if running else contextlib.nullcontext():
        assert as_nobody(work) == [outcome] * 2
    with onecopy.open(pool_path) as fs:
        assert fs.check().findings == []


def test_what_a_stranger_may_not_do_to_a_pool(formatted, as_nobody):
    def work():
        return [
            _outcome(onecopy.remove, formatted),
            _outcome(lambda: onecopy.format(formatted, "4M", force=True)),
            _outcome(onecopy.check, formatted),
            _outcome(onecopy.format, f"/{NOBODY}.pool", "4M"),
        ]

    assert as_nobody(work) == ["PermissionError"] * 4
    with onecopy.open(formatted) as fs:
        assert fs.check().findings == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_ones_own_pool_without_permission(formatted):
    os.chmod(formatted, 0)
    _raises(errno.EACCES, onecopy.open, formatted)
    os.chmod(formatted, 0o400)
    _raises(errno.EACCES, onecopy.open, formatted)
    os.chmod(formatted, 0o600)


# ----------------------------------------------------- in use, wrong arguments


def test_a_pool_in_use_is_neither_replaced_nor_removed(formatted):
    with onecopy.open(formatted) as fs:
        fs.write("/file", b"kept")
        for mode in ("r", "r+"):
            with onecopy.open(formatted, mode):
                assert isinstance(_raises(errno.EBUSY, onecopy.format, formatted, "4M", force=True), onecopy.PoolBusy)
                assert isinstance(_raises(errno.EBUSY, onecopy.remove, formatted), onecopy.PoolBusy)
        assert fs.read("/file") == b"kept"


def test_format_does_not_replace_unasked(formatted, tmp_path):
    _raises(errno.EEXIST, onecopy.format, formatted, "4M")
    (tmp_path / "mine").write_bytes(b"mine")
    _raises(errno.EEXIST, onecopy.format, tmp_path / "mine", "4M")
    _raises(errno.EISDIR, onecopy.format, tmp_path, "4M", force=True)
    _raises(errno.ENOENT, onecopy.format, tmp_path / "no" / "folder", "4M")
    assert os.listdir(tmp_path) == ["mine"]
    assert (tmp_path / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize("size", [0, -1, 1, PAGE, 255 * PAGE, 1 << 53, "", "x", "8 X", "-8G", "1.2.3G", "G", "8GG", "1e9"])
def test_impossible_sizes(pool_path, size):
    with pytest.raises(OSError) as caught:
        onecopy.format(pool_path, size)
    assert caught.value.errno == errno.EINVAL
    assert not os.path.exists(pool_path)


@pytest.mark.parametrize("mode", ["w", "", "rb", "r+b", "R", "a", None])
def test_wrong_modes(formatted, mode):
    _raises(errno.EINVAL, onecopy.open, formatted, mode)


def test_a_pool_on_a_full_host_file_system(tmp_path):
    """A size beyond what the host's file system can address leaves nothing behind."""
    with pytest.raises(OSError) as caught:
        onecopy.format(tmp_path / "pool", 1 << 52)
    assert caught.value.errno in (errno.ENOSPC, errno.EINVAL)
    assert os.listdir(tmp_path) == []
