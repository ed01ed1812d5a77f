"""The journal and the images that a power cut may leave, against a device that is asked in known order."""

import os
import random
import signal

import pytest

import onecopy
from onecopy.blkcache.cuts import DISCARD, DONE, FLUSH, JOURNAL, WRITE, Media, legal_cuts, read_journal
from onecopy.blkcache.device import Conditioned, RamDevice
from onecopy.daxemu.units import PAGE

BLOCKS = 8
BASE = b"".join(bytes([48 + number]) * PAGE for number in range(BLOCKS))  # "0" to "7"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


@pytest.fixture
def device(path):
    with Conditioned(RamDevice(BLOCKS * PAGE)) as device:
        device.write(0, BASE)
        device.journal(path)
        yield device


def letters(image):
    """One character a block; whole blocks only."""
    blocks = [bytes(image[at : at + PAGE]) for at in range(0, len(image), PAGE)]
    assert all(block == block[:1] * PAGE for block in blocks)
    return "".join(chr(block[0]) if block[0] else "." for block in blocks)


def cuts(path, **options):
    """The different images, by number of records."""
    found = {}
    for cut in legal_cuts(path, BASE, **options):
        found.setdefault(cut.records, set()).add(letters(cut.image))
    return found


def content(device):
    data = bytearray(BLOCKS * PAGE)
    device.native.read(0, data)
    return letters(data)


def test_the_journal_says_what_was_asked(device, path):
    device.write(1, b"a" * PAGE + b"b" * PAGE)
    device.discard(5, 2)
    device.flush()
    device.read(0, bytearray(PAGE))
    entries = read_journal(path)
    assert [(entry.kind, entry.block, entry.blocks, entry.sequence) for entry in entries] == [
        (WRITE, 1, 2, 1), (DONE, 1, 2, 1), (DISCARD, 5, 2, 2), (DONE, 5, 2, 2), (FLUSH, 0, 0, 3), (DONE, 0, 0, 3),
    ]  # fmt: skip
    assert letters(entries[0].data) == "ab"
    device.journal(None)
    device.write(0, b"z" * PAGE)
    assert len(read_journal(path)) == 6


def test_any_subset_until_a_flush(device, path):
    device.write(1, b"ab".replace(b"a", b"a" * PAGE).replace(b"b", b"b" * PAGE))
    device.flush()
    device.write(2, b"c" * PAGE)
    assert cuts(path) == {
        0: {"01234567"},
        1: {"01234567", "0a234567", "01b34567", "0ab34567"},
        4: {"0ab34567"},
        5: {"0ab34567", "0ac34567"},
    }


def test_any_version_of_a_block(device, path):
    for letter in (b"a", b"b", b"c"):
        device.write(0, letter * PAGE)
    assert cuts(path)[5] == {f"{first}1234567" for first in "0abc"}
    device.flush()
    assert cuts(path)[8] == {"c1234567"}


def test_a_discard_is_a_write_of_zeros(device, path):
    device.discard(6, 2)
    assert cuts(path)[1] == {"01234567", "012345.7", "0123456.", "012345.."}
    device.flush()
    assert cuts(path)[4] == {"012345.."}


def test_a_lost_flush_makes_nothing_certain(device, path):
    device.lose_flushes = True
    device.write(0, b"a" * PAGE)
    device.flush()
    device.lose_flushes = False
    device.write(1, b"b" * PAGE)
    assert "01234567" in cuts(path)[3]
    device.flush()
    assert cuts(path)[6] == {"ab234567"}


def test_a_failed_write_may_have_happened_unless_refused(device, path):
    device.fail(0, 1, write=True)
    with pytest.raises(onecopy.DeviceError):
        device.write(0, b"a" * PAGE)
    assert read_journal(path) == []


def record(kind, sequence, block=0, blocks=0, data=b""):
    words = int.from_bytes(b"copyjrnl", "little"), kind, block, blocks, sequence
    return JOURNAL.pack(*words, words[0] ^ kind ^ block ^ blocks ^ sequence) + data


def test_a_flush_is_for_what_was_done_before_it_began(path):
    """Records of requests that overlap, as processes side by side leave them."""
    with open(path, "wb") as file:
        file.write(record(WRITE, 1, 0, 1, b"a" * PAGE))
        file.write(record(FLUSH, 2))
        file.write(record(DONE, 1, 0, 1))
        file.write(record(DONE, 2))
        file.flush()
        assert cuts(path)[4] == {"01234567", "a1234567"}
        file.write(record(FLUSH, 3) + record(WRITE, 4, 0, 1, b"b" * PAGE) + record(FLUSH, 5) + record(DONE, 4, 0, 1))
        file.write(record(DONE, 5) + record(DONE, 3))
    found = cuts(path)
    assert found[9] == found[10] == {"a1234567", "b1234567"}


def test_a_certain_version_ends_the_earlier_ones(path):
    with open(path, "wb") as file:
        file.write(record(WRITE, 1, 0, 2, b"a" * 2 * PAGE))  # its process dies
        file.write(record(WRITE, 2, 0, 1, b"b" * PAGE) + record(DONE, 2, 0, 1) + record(FLUSH, 3) + record(DONE, 3))
    assert cuts(path)[5] == {"b1234567", "ba234567"}


@pytest.mark.parametrize("part", [1, 20, 48, 100, 48 + PAGE, 47 + 2 * PAGE])
def test_what_a_killed_process_left_of_a_record_is_passed_over(path, part):
    torn = record(WRITE, 9, 4, 2, b"t" * 2 * PAGE)[:part]
    whole = record(WRITE, 1, 0, 1, b"a" * PAGE), record(DONE, 1, 0, 1), record(FLUSH, 2), record(DONE, 2)
    for place in range(1, 5):
        path.write_bytes(b"".join(whole[:place]) + torn + b"".join(whole[place:]))
        assert [entry.kind for entry in read_journal(path)] == [WRITE, DONE, FLUSH, DONE]
        assert cuts(path)[4] == {"a1234567"}


def test_another_file_is_no_journal(path):
    path.write_bytes(b"something else")
    with pytest.raises(onecopy.OneCopyError, match="not a journal"):
        read_journal(path)
    path.write_bytes(b"")
    assert read_journal(path) == []


def test_of_many_the_same_some(device, path):
    for block in range(BLOCKS):
        device.write(block, b"a" * PAGE)
        device.write(block, b"b" * PAGE)
    last = [letters(cut.image) for cut in legal_cuts(path, BASE, most=20) if cut.records == 31]
    assert last[:2] == ["01234567", "bbbbbbbb"]
    assert len(last) == 20
    assert any(image.count("b") == BLOCKS - 1 and "a" in image for image in last)
    assert last == [letters(cut.image) for cut in legal_cuts(path, BASE, most=20) if cut.records == 31]
    other = [letters(cut.image) for cut in legal_cuts(path, BASE, most=20, seed=1) if cut.records == 31]
    assert last[:2] == other[:2]
    assert last != other


def test_what_is_flushed_is_in_every_cut_and_nothing_else_is_there(device, path):
    """Random requests: each cut's blocks hold what was certain there, or something written to them since."""
    chance = random.Random(20)
    certain, since, history = list(letters(BASE)), [set() for _ in range(BLOCKS)], []
    for turn in range(60):
        if chance.random() < 0.2:
            device.flush()
            certain, since = list(content(device)), [set() for _ in range(BLOCKS)]
        else:
            block = chance.randrange(BLOCKS)
            letter = chr(97 + turn % 26)
            device.write(block, letter.encode() * PAGE)
            since[block].add(letter)
        history.append((len(read_journal(path)), list(certain), [set(letters) for letters in since]))
    allowed = {records: (was, may) for records, was, may in history}
    seen = 0
    for cut in legal_cuts(path, BASE):
        if cut.records + 1 in allowed and cut.records not in allowed:
            was, may = allowed[cut.records + 1]  # the cut came before its last record, which says that the request is done
            for block, letter in enumerate(letters(cut.image)):
                assert letter in may[block] | {was[block]}
                seen += 1
    assert seen > 1000


def test_processes_write_one_journal(device, path):
    pids = []
    for number in range(4):
        pid = os.fork()
        if not pid:
            for _ in range(25):
                device.write(number * 2, bytes([97 + number]) * (2 * PAGE))
                device.flush()
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    entries = read_journal(path)
    assert len(entries) == 4 * 25 * 4
    assert len({entry.sequence for entry in entries}) == 4 * 25 * 2
    media = Media(bytearray(BASE))
    for entry in entries:
        media.take(entry)
    assert letters(media.image) == "aabbccdd"
    assert not media.maybe


def test_a_journal_goes_on_after_a_process_was_killed(device, path):
    for _ in range(20):
        pid = os.fork()
        if not pid:
            while True:
                device.write(0, b"k" * (BLOCKS * PAGE))
        before = device.counters.writes
        while device.counters.writes < before + 3:
            os.sched_yield()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        device.write(1, b"p" * PAGE)
        device.flush()
    media = Media(bytearray(BASE))
    for entry in read_journal(path):
        media.take(entry)
    assert letters(media.image)[1] == "p"
    assert 1 not in media.maybe
