"""Calls that can't be right: closed handles, wrong modes, offsets, names and types; what a read-only handle refuses."""

import errno
import inspect
import io

import numpy as np
import pytest

import onecopy
from onecopy.daxemu.units import pages_of

PAGE = onecopy.PAGE


@pytest.fixture
def furnished(pool):
    """A pool with a file, a directory and a link."""
    pool.write("/file", b"x" * 2 * PAGE)
    pool.mkdir("/dir")
    pool.symlink("file", "/link")
    pool.create_subvolume("/sub")
    pool.setxattr("/file", "user.a", b"1")
    return pool


# Every public call, with arguments that are right for `furnished`. Those that change something come first.
_CHANGES = {
    "mkdir": ("/new",),
    "rmdir": ("/dir",),
    "unlink": ("/file",),
    "rmtree": ("/dir",),
    "rename": ("/file", "/new"),
    "link": ("/file", "/new"),
    "symlink": ("file", "/new"),
    "chmod": ("/file", 0o600),
    "chown": ("/file", 1, 1),
    "utime": ("/file",),
    "setxattr": ("/file", "user.b", b"1"),
    "removexattr": ("/file", "user.a"),
    "create": ("/new",),
    "write": ("/file", b"y"),
    "truncate": ("/file", 1),
    "allocate": ("/file", 0, PAGE),
    "punch": ("/file", 0, PAGE),
    "zero": ("/file", 0, PAGE),
    "collapse": ("/file", 0, PAGE),
    "insert": ("/file", 0, PAGE),
    "unshare": ("/file",),
    "clone": ("/file", "/new"),
    "clone_tree": ("/dir", "/new"),
    "clone_range": ("/file", 0, "/file", PAGE, PAGE),
    "dedupe_range": ("/file", 0, "/file", PAGE, PAGE),
    "create_subvolume": ("/new",),
    "snapshot": ("/sub", "/new"),
    "delete_subvolume": ("/sub",),
    "put": (__file__, "/new"),
}
_LOOKS = {
    "stat": ("/file",),
    "lstat": ("/link",),
    "exists": ("/file",),
    "scandir": ("/",),
    "listdir": ("/",),
    "walk": ("/",),
    "readlink": ("/link",),
    "getxattr": ("/file", "user.a"),
    "listxattr": ("/file",),
    "read": ("/file",),
    "readinto": ("/file", bytearray(10)),
    "seek": ("/file", 0, "data"),
    "dedupe": (),
    "extents": ("/file",),
    "shadows": (3,),
    "du": ("/",),
    "du_each": ("/",),
    "list_subvolumes": (),
    "info": (),
    "check": (),
    "map": ("/file",),
    "array": ("/file",),
    "get": ("/file", "/nowhere/to/be/written"),
    "sync": (),
}
_HANDLE = {"close", "closed", "path", "mode", "transaction"}


def _call(fs, name, arguments):
    """Call a method; a generator is run to its end."""
    result = getattr(fs, name)(*arguments)
    return list(result) if inspect.isgenerator(result) else result


def test_the_lists_name_the_whole_api():
    public = {name for name in dir(onecopy.FileSystem) if not name.startswith("_")}
    assert public - _HANDLE == (_CHANGES | _LOOKS).keys()


@pytest.mark.parametrize(("name", "arguments"), (_CHANGES | _LOOKS).items(), ids=_CHANGES | _LOOKS)
def test_a_closed_handle(furnished, name, arguments, fails):
    furnished.close()
    assert furnished.closed
    assert fails(_call, furnished, name, arguments) == errno.EBADF
    furnished.close()  # twice is nothing


@pytest.mark.parametrize(("name", "arguments"), _CHANGES.items(), ids=_CHANGES)
def test_a_read_only_handle_changes_nothing(furnished, name, arguments):
    before = furnished.info().generation
    with onecopy.open(furnished.path, "r") as reader, pytest.raises(onecopy.ReadOnly) as caught:
        _call(reader, name, arguments)
    assert caught.value.errno == errno.EROFS
    assert furnished.info().generation == before


def test_a_read_only_handle_does_not_apply_dedupe(furnished, fails):
    furnished.write("/equal", b"x" * 2 * PAGE)
    with onecopy.open(furnished.path, "r") as reader:
        assert reader.dedupe().freed_bytes == 3 * PAGE
        assert fails(reader.dedupe, apply=True) == errno.EROFS


@pytest.mark.parametrize(("name", "arguments"), _LOOKS.items(), ids=_LOOKS)
def test_a_read_only_handle_sees_everything(furnished, tmp_path, name, arguments):
    arguments = ("/file", str(tmp_path / "copy")) if name == "get" else arguments
    with onecopy.open(furnished.path, "r") as reader:
        found = _call(reader, name, arguments)
        if name not in ("map", "array", "info"):
            assert found == _call(furnished, name, arguments)


# ------------------------------------------------------------------- content


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("read", ("/file", -1), errno.EINVAL),
        ("read", ("/file", 0, -1), errno.EINVAL),
        ("read", ("/file", 1 << 63, 1), errno.EFBIG),
        ("read", ("/dir",), errno.EISDIR),
        ("read", ("/none",), errno.ENOENT),
        ("readinto", ("/file", bytearray(5), -1), errno.EINVAL),
        ("write", ("/file", b"x", -1), errno.EINVAL),
        ("write", ("/file", b"x", 1 << 62), errno.EFBIG),
        ("write", ("/file", b"x", 1 << 70), errno.EFBIG),
        ("write", ("/dir", b"x"), errno.EISDIR),
        ("write", ("/dir/", b"x"), errno.EISDIR),
        ("write", ("/new/", b"x"), errno.EISDIR),
        ("write", ("/none/new", b"x"), errno.ENOENT),
        ("write", ("/file/new", b"x"), errno.ENOTDIR),
        ("create", ("/dir",), errno.EISDIR),
        ("truncate", ("/dir", 0), errno.EISDIR),
        ("seek", ("/file", 0, "end"), errno.EINVAL),
        ("seek", ("/file", 0, 3), errno.EINVAL),
        ("extents", ("/dir",), errno.EISDIR),
        ("setxattr", ("/file", "", b"x"), errno.EINVAL),
        ("setxattr", ("/file", "a\0b", b"x"), errno.EINVAL),
        ("setxattr", ("/file", "n" * 256, b"x"), errno.EINVAL),
        ("setxattr", ("/file", "user.big", bytes((1 << 16) + 1)), errno.E2BIG),
        ("getxattr", ("/file", "user.none"), errno.ENODATA),
        ("removexattr", ("/file", "user.none"), errno.ENODATA),
        ("chown", ("/file", 1 << 32, 0), errno.EINVAL),
        ("chown", ("/file", 0, -2), errno.EINVAL),
        ("utime", ("/file", (-1, 0)), errno.EINVAL),
        ("utime", ("/file", (0, 1 << 64)), errno.EINVAL),
        ("readlink", ("/file",), errno.EINVAL),
        ("snapshot", ("/dir", "/new"), errno.EINVAL),
        ("snapshot", ("/file", "/new"), errno.EINVAL),
        ("delete_subvolume", ("/dir",), errno.EINVAL),
        ("delete_subvolume", ("/",), errno.EINVAL),
        ("create_subvolume", ("/dir",), errno.EEXIST),
        ("rmtree", ("/file",), errno.ENOTDIR),
        ("rmdir", ("/",), errno.EBUSY),
        ("clone_tree", ("/file", "/new"), errno.ENOTDIR),
        ("clone_tree", ("/dir", "/file"), errno.EEXIST),
        ("rename", ("/", "/new"), errno.EBUSY),
        ("link", ("/dir", "/new"), errno.EPERM),
        ("link", ("/file", "/sub/new"), errno.EXDEV),
        ("rename", ("/file", "/sub/new"), errno.EXDEV),
    ],
)
def test_impossible_arguments(furnished, name, arguments, code, fails):
    before = furnished.info().generation
    assert fails(_call, furnished, name, arguments) == code
    assert furnished.info().generation == before


def test_reading_more_than_memory_holds(pool, fails):
    """A sparse file may be larger than memory: that is an OSError, too, and parts of it can be read."""
    pool.create("/sparse")
    pool.truncate("/sparse", 1 << 60)
    assert fails(pool.read, "/sparse") == errno.ENOMEM
    assert pool.read("/sparse", (1 << 60) - 10) == bytes(10)
    assert fails(pool.map, "/sparse") == errno.ENOMEM
    assert fails(pool.array, "/sparse") == errno.ENOMEM


@pytest.mark.parametrize("value", ["text", 5, None, [1, 2]])
def test_content_that_is_no_bytes(pool, value):
    with pytest.raises(TypeError):
        pool.write("/file", value)
    assert not pool.exists("/file")


def test_any_buffer_is_content(pool):
    numbers = np.arange(1000, dtype="<u4").reshape(10, 100)
    for name, data in (("bytes", bytes(numbers)), ("array", numbers), ("view", memoryview(numbers)), ("empty", b"")):
        assert pool.write(f"/{name}", data) == (4000 if name != "empty" else 0)
    assert pool.read("/array") == pool.read("/view") == pool.read("/bytes") == bytes(numbers)
    buffer = np.zeros(500, "<u4")
    assert pool.readinto("/array", buffer, 2000) == 2000
    assert buffer[0] == 500 and buffer[-1] == 999


def test_a_buffer_that_can_not_be_filled(pool):
    pool.write("/file", b"x" * PAGE)
    with pytest.raises(TypeError):
        pool.readinto("/file", bytes(10))


# ---------------------------------------------------------- mapping, arrays


def _saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("path", ["/dir", "/none", "/sub"])
def test_what_can_not_be_mapped(furnished, path, fails):
    code = errno.ENOENT if path == "/none" else errno.EISDIR
    assert fails(furnished.map, path) == code
    assert fails(furnished.array, path) == code


@pytest.mark.parametrize("mode", ["w", "", "x", "rw", None])
def test_wrong_modes_of_mappings(furnished, mode, fails):
    assert fails(furnished.map, "/file", mode) == errno.EINVAL
    assert fails(furnished.array, "/file", mode) == errno.EINVAL


def test_an_empty_file_maps_to_nothing(pool):
    pool.create("/empty")
    with pool.map("/empty") as mapping:
        assert (len(mapping), mapping[:], len(mapping.pfns)) == (0, b"", 0)
    assert pool.array("/empty").shape == (0,)
    assert pool.array("/empty", dtype="f8", shape=(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "f8", "shape": 1025},
        {"dtype": "f8", "shape": (3, 1000)},
        {"dtype": "f8", "shape": (-1,)},
        {"dtype": "f8", "shape": (-1, -1024)},
        {"dtype": "f8", "shape": (1 << 62, 1 << 62)},
        {"dtype": "f8", "offset": 4},
        {"dtype": "f8", "offset": -8},
        {"dtype": "f8", "offset": 3 * PAGE},
        {"dtype": "V3"},
        {"dtype": "O"},
        {"dtype": [("a", "i4"), ("b", "O")]},
        {"dtype": "f8", "order": "K"},
        {"offset": 1 << 70},
    ],
)
def test_arrays_that_do_not_fit_the_file(furnished, options, fails):
    assert fails(furnished.array, "/file", **options) == errno.EINVAL


@pytest.mark.parametrize("dtype", ["no such type", object()])
def test_a_dtype_that_is_none(furnished, dtype):
    with pytest.raises(TypeError):
        furnished.array("/file", dtype=dtype)


def test_an_npy_file_of_objects(pool, fails):
    pool.write("/objects.npy", _saved(np.array([{}, 1, "x"], object), allow_pickle=True))
    assert fails(pool.array, "/objects.npy") == errno.EINVAL


_WHOLE = _saved(np.arange(100.0))


@pytest.mark.parametrize(
    "content",
    [
        _WHOLE[:8],
        _WHOLE[:40],
        _WHOLE[:-1],
        _WHOLE[:6] + b"\x09\x00" + _WHOLE[8:],
        _WHOLE.replace(b"(100,)", b"(101,)"),
        _WHOLE.replace(b"(100,)", b"(-10,)"),
        _WHOLE.replace(b"(100,)", b"('a',)"),
        _WHOLE.replace(b"'<f8'", b"'<q9'"),
        _WHOLE.replace(b"'descr'", b"'color'"),
        _WHOLE.replace(b"{", b"("),
        _WHOLE.replace(b"{'descr'", b"{'\xff\xfe\0cr'"),
        _WHOLE[:8] + b"\xff\xff" + _WHOLE[10:],
    ],
    ids=["magic", "half a header", "a byte short", "version", "too long", "negative", "shape", "dtype", "key", "syntax",
         "bytes", "header size"],
)  # fmt: skip
def test_damaged_npy_headers(pool, content, fails):
    pool.write("/damaged.npy", content)
    assert fails(pool.array, "/damaged.npy") == errno.EINVAL
    assert pool.array("/damaged.npy", dtype=np.uint8).tobytes() == content


def test_what_is_mapped_for_reading_can_not_be_written(furnished):
    with furnished.map("/file") as mapping:
        with pytest.raises(TypeError):
            memoryview(mapping)[0] = 1
        with pytest.raises(onecopy.ReadOnly):
            mapping[0] = 1
        array = np.frombuffer(mapping, np.uint8)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(BufferError):
            mapping.close()
        del array


def test_a_handle_for_reading_maps_for_reading(furnished):
    with onecopy.open(furnished.path, "r") as reading:
        for call in (reading.map, reading.array):
            with pytest.raises(onecopy.ReadOnly):
                call("/file", mode="r+")
        with reading.map("/file") as mapping:
            furnished.write("/file", b"live")
            assert mapping[:4] == b"live"


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_mapping_that_is_sent_elsewhere_is_mapped_there(furnished, mode):
    """By inode: the file may have another name by then; or none, and that is said."""
    import pickle

    furnished.write("/sent", b"s" * 2 * PAGE)
    with furnished.map("/sent", mode) as mapping:
        sent = pickle.dumps(mapping)
        furnished.rename("/sent", "/renamed")
        with pickle.loads(sent) as other:
            assert other[:] == b"s" * 2 * PAGE and other.writable == (mode == "r+")
            furnished.write("/renamed", b"live")
            assert other[:5] == mapping[:5] == b"lives"
            if mode == "r+":
                other[0] = ord("L")
                assert mapping[:5] == furnished.read("/renamed", 0, 5) == b"Lives"
        furnished.unlink("/renamed")
        with pytest.raises(OSError, match="deleted before its mapping was unpickled") as caught:
            pickle.loads(sent)
        assert caught.value.errno == errno.ESTALE
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(mapping)


# ------------------------------------------- what is mapped outlives its file (S5)


GONE = {
    "unlink": (),
    "truncate": (0,),
    "punch": (0, 200 * PAGE),
    "rewrite": (bytes(200 * PAGE),),
    "collapse": (0, 199 * PAGE),
    "rename over": (),
    "rmtree": (),
}


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("gone", GONE)
def test_a_mapping_shows_its_file_while_the_space_would_be_used_again(pool, gone, mode):
    """Of a deleted file what it was; of others what they are: never what is written where its pages were."""
    pages = 200
    data = np.random.default_rng(5).bytes(pages * PAGE)
    pool.mkdir("/dir")
    pool.write("/dir/file", data)
    free = _free(pool)
    mapping = pool.map("/dir/file", mode)
    if gone == "rmtree":
        pool.rmtree("/dir")
        pool.mkdir("/dir")
    elif gone == "rename over":
        pool.write("/dir/other", b"short")
        pool.rename("/dir/other", "/dir/file")
    else:
        getattr(pool, "write" if gone == "rewrite" else gone)("/dir/file", *GONE[gone])
    pool.sync()
    for number in range(40):  # far more than there is: everything that is free is used again
        try:
            pool.write("/filler", bytes([number + 1]) * (512 * PAGE), number * 512 * PAGE)
        except onecopy.NoSpace:
            break
    else:
        pytest.fail("the pool did not run full")
    if gone in ("truncate", "collapse"):
        kept = pages_of(pool.stat("/dir/file").st_size)
        assert mapping[: kept * PAGE] == data[(pages - kept) * PAGE :]
        for place in (kept * PAGE, -1):
            with pytest.raises(OSError, match="cut off") as caught:
                mapping[place]
            assert caught.value.errno == errno.ENXIO
    else:
        assert mapping[:] == (bytes(pages * PAGE) if gone in ("punch", "rewrite") else data)
    pfns = set(mapping.pfns.tolist()) - {0}
    assert len(pfns) == {"truncate": 0, "punch": 0, "collapse": 1}.get(gone, pages)
    assert not pfns & {e.pfn + n for e in pool.extents("/filler") for n in range(e.pages)}
    pool.unlink("/filler")
    mapping.close()
    if gone != "rewrite":
        assert _free(pool) >= free + pages - 1


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_mapping_goes_on_when_its_handle_is_closed(furnished, mode):
    """It is as live as before, it can still be stored to, and it knows its pages."""
    other = onecopy.open(furnished.path)
    with other.map("/file", mode) as mapping:
        other.close()
        furnished.write("/file", b"live")
        assert mapping[:5] == b"livex" and mapping[0] == ord("l")
        assert mapping.pfns.tolist() == [e.pfn + n for e in furnished.extents("/file") for n in range(e.pages)]
        if mode == "r+":
            mapping[PAGE] = 7
            mapping.sync()
            assert furnished.read("/file", PAGE, 2) == b"\7x"
        furnished.truncate("/file", PAGE)
        with pytest.raises(OSError, match="cut off") as caught:
            mapping[PAGE]
        assert caught.value.errno == errno.ENXIO and mapping[:4] == b"live"
    assert len(furnished.info().users) == 1


def test_a_mapping_outlives_its_handle(furnished):
    data = furnished.read("/file")
    other = onecopy.open(furnished.path)
    mapping, array = other.map("/file"), other.array("/file")
    other.close()
    furnished.unlink("/file")
    furnished.sync()
    furnished.write("/filler", bytes(100 * PAGE))
    assert mapping[:] == array.tobytes() == data
    used = furnished.info().pinned_pages
    assert used == 2
    mapping.close()
    del array
    assert furnished.info().pinned_pages == 0


def _free(fs):
    fs.sync()
    return fs.info().free_pages
