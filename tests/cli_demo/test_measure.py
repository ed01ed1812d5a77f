"""Physical memory of address ranges, against areas whose memory is known."""

import json
import mmap
import shutil
import subprocess
import sys

import numpy as np
import pytest

from onecopy.cli import measure
from onecopy.cli.measure import PAGE, Memory, distinct_bytes

PAGES = 1024


def range_of(area):
    return (np.frombuffer(area, np.uint8).ctypes.data, len(area))


def private_area():
    """Map private memory that has an area of its own, in ordinary pages: the advice keeps neighbours from merging."""
    area = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_DONTDUMP)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    return area


def touch(area, pages):
    for page in pages:
        area[page * PAGE] = 1


def test_private_memory_counts_once_it_is_touched():
    area = private_area()
    assert measure.measure([range_of(area)]).pss == 0
    touch(area, range(0, PAGES, 2))
    memory = measure.measure([range_of(area)])
    assert memory.pss == PAGES // 2 * PAGE
    assert memory.pss_rounding == 1024
    assert memory.page_tables > 0
    if memory.frames is not None:
        assert memory.frames.size == PAGES // 2


def test_only_the_ranges_count():
    area, other = private_area(), private_area()
    other.madvise(mmap.MADV_DONTFORK)  # or the two might lie side by side and be one area
    touch(area, range(PAGES))
    touch(other, range(PAGES))
    one, both = measure.measure([range_of(area)]), measure.measure([range_of(other), range_of(area)])
    assert (one.pss, both.pss) == (PAGES * PAGE, 2 * PAGES * PAGE)
    assert measure.measure([]).pss == 0
    if one.frames is not None and both.frames is not None:
        assert set(one.frames) < set(both.frames)


def test_part_of_a_page_takes_the_whole_page():
    area = private_area()
    touch(area, range(PAGES))
    start, _ = range_of(area)
    frames = measure.frame_numbers([(start + PAGE - 1, 2)])
    if frames is None:
        pytest.skip("frame numbers are hidden from this user")
    assert frames.size == 2


READER = """
import json, mmap, sys
import numpy as np
from onecopy.cli.measure import measure
with open(sys.argv[1], "rb") as file:
    area = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
view = np.frombuffer(area, np.uint8)
view.sum()
print("mapped", flush=True)
input()
memory = measure([(view.ctypes.data, view.nbytes)])
print(json.dumps([memory.pss, None if memory.frames is None else memory.frames.tolist()]), flush=True)
sys.stdin.read()  # stay mapped until the other has measured, too
"""


def test_shared_memory_is_divided_by_pss_and_counted_once_by_frames(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (PAGES * PAGE // 256))
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    memories = []
    for reader in readers:
        assert reader.stdout.readline() == "mapped\n"
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
        pss, frames = json.loads(reader.stdout.readline())
        memories.append(Memory(pss, 0, None if frames is None else np.array(frames, np.uint64), 0))
    for reader in readers:
        reader.communicate()
    assert [memory.pss for memory in memories] == [PAGES * PAGE // 2] * 2
    if memories[0].frames is not None:
        assert distinct_bytes(memories) == PAGES * PAGE


def test_hidden_frame_numbers_are_no_figure():
    setpriv = shutil.which("setpriv")
    if setpriv is None or measure.frame_numbers([range_of(bytearray(PAGE))]) is None:
        pytest.skip("needs setpriv, and frame numbers that can be hidden")
    code = (
        "import numpy as np; from onecopy.cli.measure import frame_numbers;"
        "view = np.ones(100_000, np.uint8); print(frame_numbers([(view.ctypes.data, view.nbytes)]))"
    )
    hidden = subprocess.run(
        [setpriv, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert hidden.stdout == "None\n"


def test_one_process_without_frame_numbers_hides_the_sum():
    seen, hidden = Memory(0, 0, np.array([7, 8], np.uint64), 0), Memory(0, 0, None, 0)
    assert distinct_bytes([seen, seen]) == 2 * PAGE
    assert distinct_bytes([seen, hidden]) is None
