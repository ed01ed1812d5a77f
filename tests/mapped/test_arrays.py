"""Pickled arrays: what looks into a mapping is mapped anew elsewhere, what was computed from it is a value."""

import errno
import gc
import multiprocessing
import operator
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

import onecopy

from .common import PAGE, assert_all_ended

ROWS, COLUMNS = 100, 200
NUMBERS = np.arange(ROWS * COLUMNS, dtype=np.float64).reshape(ROWS, COLUMNS)
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture
def fs(pool, tmp_path):
    """A pool with the array /origin.npy and its clone /a.npy."""
    np.save(tmp_path / "a.npy", NUMBERS)
    pool.put(tmp_path / "a.npy", "/origin.npy")
    pool.clone("/origin.npy", "/a.npy")
    yield pool
    gc.collect()  # attachments are in cycles
    assert (pool.array("/origin.npy") == NUMBERS).all()
    assert_all_ended(pool)


def again(array, protocol=pickle.HIGHEST_PROTOCOL):
    """Return the array pickled and unpickled, which took no copy of its bytes."""
    text = pickle.dumps(array, protocol)
    assert len(text) < 1000
    return pickle.loads(text)


VIEWS = {
    "all": lambda a: a,
    "rows": lambda a: a[3:70],
    "backwards": lambda a: a[::-2, 7:1:-3],
    "turned": lambda a: a.T,
    "one number": lambda a: a[5, ..., 6],
    "flat": lambda a: a.ravel(),
    "bytes": lambda a: a[2:].view(np.uint8),
    "fields": lambda a: a.view([("x", "f8"), ("y", "f8")])["y"],
    "a longer axis": lambda a: a[:, None, :, None],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_view_is_mapped_anew(fs, protocol, view):
    array = view(fs.array("/a.npy", "r+"))
    other = again(array, protocol)
    assert (other.dtype, other.shape, other.strides) == (array.dtype, array.shape, array.strides)
    assert other.flags.writeable and not np.may_share_memory(other, array)
    np.testing.assert_array_equal(other, array)
    other[...] = 7
    assert (array == 7).all()
    array[...] = 9
    assert (other == 9).all()
    assert (again(other, protocol) == 9).all()


COPIES = {
    "copy": lambda a: a.copy(),
    "of another type": lambda a: a.astype(np.int32),
    "some rows": lambda a: a[[1, 5]],
    "a mask": lambda a: a[a > 7],
    "sum": lambda a: a + 1,
    "sum the other way": lambda a: 1 + a,
    "of two": lambda a: a + a,
    "negative": lambda a: -a,
    "of rows": lambda a: a.sum(axis=0),
    "product": lambda a: a.T @ a,
    "sorted": np.sort,
    "joined": lambda a: np.concatenate([a, a]),
    "a view of a copy": lambda a: a.copy()[1:].T,
    "plain": np.asarray,
    "nothing": lambda a: a[5:5],
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_copy_is_pickled_by_value(fs, protocol, make):
    copy = make(fs.array("/a.npy", "r+"))
    text = pickle.dumps(copy, protocol)
    np.testing.assert_array_equal(copy, make(NUMBERS))
    with onecopy.open(fs.path) as other:
        other.array("/a.npy", "r+")[:] = 0
        other.unlink("/a.npy")
    found = pickle.loads(text)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, make(NUMBERS))


@pytest.mark.parametrize("make", [lambda a: a + 1, lambda a: 2 * a, lambda a: a == a, np.sqrt, lambda a: a.sum(axis=1)])
def test_what_is_computed_is_a_plain_array(fs, make):
    assert type(make(fs.array("/a.npy"))) is np.ndarray


def test_what_is_computed_from_all_is_a_number(fs):
    array = fs.array("/a.npy")
    assert [type(x) for x in (array.sum(), array.max(), array[3, 4], array[3, ..., 4] + 1, np.mean(array))] == [np.float64] * 5


def test_an_operation_in_place_is_a_store(fs):
    array = fs.array("/a.npy", "r+")
    before = array
    array += 1
    assert np.multiply(array, 2, out=array) is array is before
    np.testing.assert_array_equal(fs.array("/a.npy"), (NUMBERS + 1) * 2)
    assert len(pickle.dumps(array)) < 1000


def test_a_large_copy_goes_out_of_band(fs):
    buffers = []
    copy = fs.array("/a.npy") + 1
    text = pickle.dumps(copy, 5, buffer_callback=buffers.append)
    assert len(text) < 1000 and len(buffers) == 1
    np.testing.assert_array_equal(pickle.loads(text, buffers=buffers), NUMBERS + 1)


def test_views_that_are_pickled_together_look_into_one_mapping(fs):
    array = fs.array("/a.npy", "r+")
    whole, part = again((array, array[4:6]))
    assert np.shares_memory(whole, part) and not np.may_share_memory(whole, array)


def test_raw_files_and_both_orders(fs):
    fs.write("/raw", bytes(100) + NUMBERS.tobytes() + bytes(3))
    array = fs.array("/raw", "r+", dtype=np.float64, shape=(COLUMNS, ROWS), offset=100, order="F")
    other = again(array)
    assert other.flags.f_contiguous and not other.flags.aligned
    np.testing.assert_array_equal(other, NUMBERS.T)


def test_for_reading_it_is_for_reading_there(fs):
    assert not again(fs.array("/a.npy")).flags.writeable
    array = fs.array("/a.npy", "r+")
    array.flags.writeable = False
    assert not again(array).flags.writeable
    with onecopy.open(fs.path, "r") as reading:
        array = reading.array("/a.npy")
        other = again(array)
        assert not other.flags.writeable
        fs.array("/a.npy", "r+")[3] = -1
        assert (other[3] == -1).all()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_of_a_pool_store_through_it(fs, method):
    """No path, no handle: the arrays are the arguments and the result. The clone's origin keeps what it had."""
    fs.clone("/a.npy", "/b.npy")
    a, b = fs.array("/a.npy", "r+"), fs.array("/b.npy")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        rows = [pool.submit(operator.setitem, a[row], slice(None), -row) for row in range(ROWS)]
        for row in rows:
            row.result(60)
        np.testing.assert_array_equal(a, np.repeat(-np.arange(ROWS, dtype=float), COLUMNS).reshape(ROWS, COLUMNS))
        np.testing.assert_array_equal(b, NUMBERS)
        a[7] = 5
        assert pool.submit(np.sum, a[7:9]).result(60) == COLUMNS * (5 - 8)
        part = pool.submit(operator.getitem, a, slice(2, 4)).result(60)
        part[0] = 8
        assert (a[2] == 8).all() and (b[2] == NUMBERS[2]).all()
        value = pool.submit(operator.add, a, 1).result(60)
        value[:] = 0
        assert (a[2] == 8).all()


def test_a_deleted_file_is_said_to_be(fs):
    array = fs.array("/a.npy", "r+")
    text = pickle.dumps(array)
    fs.rename("/a.npy", "/renamed.npy")
    fs.write("/a.npy", b"another file")
    np.testing.assert_array_equal(pickle.loads(text), NUMBERS)
    fs.unlink("/renamed.npy")
    for _ in range(2):
        with pytest.raises(OSError, match="deleted before its mapping was unpickled") as caught:
            pickle.loads(text)
        assert caught.value.errno == errno.ESTALE
    array[0] = 1  # here it goes on


@pytest.mark.parametrize("size", [0, 1, 2 * PAGE, 128 + NUMBERS.nbytes - 1])
def test_a_file_that_was_cut_off_is_said_to_be(fs, size):
    text = pickle.dumps(fs.array("/a.npy", "r+"))
    fs.truncate("/a.npy", size)
    with pytest.raises(OSError, match=f"cut off at {size} bytes") as caught:
        pickle.loads(text)
    assert caught.value.errno == errno.ENXIO
    fs.truncate("/a.npy", 128 + NUMBERS.nbytes)
    rest = NUMBERS.tobytes()[: max(0, size - 128)]
    assert pickle.loads(text).tobytes() == rest + bytes(NUMBERS.nbytes - len(rest))


def test_a_small_file(fs):
    """It lies in its inode until it is mapped through a handle that may give it a page."""
    fs.write("/small", bytes(range(100)))
    with onecopy.open(fs.path, "r") as reading:
        text = pickle.dumps(reading.array("/small"))
    array = fs.array("/small", "r+")
    again(array)[3] = 77
    assert array[3] == 77
    handle = pickle.dumps(array)
    del array
    fs.truncate("/small", 0)
    fs.sync()
    fs.write("/small", bytes(reversed(range(100))))  # in the inode again
    other = pickle.loads(handle)
    other[1] = 55
    assert fs.read("/small", 0, 3) == bytes([99, 55, 97])
    assert pickle.loads(text).tobytes() == bytes(range(100))


def test_attachments_end_with_their_mappings(fs):
    """More than there are slots, one after another and many at a time; and where the unpickling fails."""
    text = pickle.dumps(fs.array("/a.npy", "r+"))
    for n in range(600):
        pickle.loads(text)[0, 0] = n
    assert len(fs.info().users) == 1
    with ThreadPoolExecutor(4) as threads:  # one ends the attachment that the next one is about to take
        for total in threads.map(lambda _: pickle.loads(text)[1:].sum(), range(400)):
            assert total == NUMBERS[1:].sum()
    assert len(fs.info().users) == 1
    many = [pickle.loads(text) for _ in range(100)]
    assert len(fs.info().users) == 2
    many[50][0, 0] = 1
    assert many[99][0, 0] == fs.array("/a.npy")[0, 0] == 1
    many.clear()
    assert len(fs.info().users) == 1
    fs.unlink("/a.npy")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError, match="deleted"):
            pickle.loads(text)
    gc.collect()
    assert len(fs.info().users) == 1
    assert len(os.listdir("/proc/self/fd")) <= before
