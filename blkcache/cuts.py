"""Power cuts: from the journal of a `Conditioned` device, what its media may hold when the power goes.

A write, or discard, may have come to media from its beginning on, block by block in any order; it has for certain when a flush
that began after it was done is done itself. A block that was written several times since may hold any of the versions, the one
before them included. A later version that a flush has made certain puts an end to the earlier ones. What an unsound flush
(`lose_flushes`) promised is not in the journal. Requests that touch one block at the same time count in the order they began.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from onecopy.daxemu.errors import OneCopyError
from onecopy.daxemu.record import Record
from onecopy.daxemu.units import PAGE

_MAGIC = b"copyjrnl"
WRITE, DISCARD, FLUSH, DONE = 1, 2, 3, 4

JOURNAL = Record(
    "journal record",
    48,
    "Of a device's requests, appended by one system call each; a write's data follow.",
    [
        ("magic", "u64", "", "the bytes 'copyjrnl'"),
        ("kind", "u64", "", f"{WRITE} write begins, {DISCARD} discard begins, {FLUSH} flush begins, {DONE} request is done"),
        ("block", "u64", "blocks", "the first one"),
        ("blocks", "u64", "blocks", "how many"),
        ("sequence", "u64", "", "of the request"),
        ("check", "u64", "", "exclusive or of the words before"),
    ],
)


@dataclass(frozen=True)
class Entry:
    """One record of a journal: `kind`, the blocks and the request's number; a write's data."""

    kind: int
    block: int
    blocks: int
    sequence: int
    data: memoryview


def read_journal(path: str | os.PathLike[str]) -> list[Entry]:
    """Return the records. What a process that was killed left of one is passed over: its request was not begun.

    OneCopyError (EIO) when the file is no journal.
    """
    with open(path, "rb") as file:
        data = file.read()
    if data and data[:8] != _MAGIC:
        raise OneCopyError(f"not a journal: expected the bytes 'copyjrnl' first, found {data[:8]!r}", path=os.fspath(path))
    entries: list[Entry] = []
    view, at = memoryview(data), _header(data, 0, len(data))
    while at < len(data):
        _, kind, block, blocks, sequence, _ = JOURNAL.unpack_from(data, at)
        end = at + JOURNAL.size + (blocks * PAGE if kind == WRITE else 0)
        if end <= len(data) and _header(data, at + 1, end) == end:
            entries.append(Entry(kind, block, blocks, sequence, view[at + JOURNAL.size : end]))
            at = _header(data, end, len(data))
        else:  # part of a record: the next one begins before this one's data could end
            at = _header(data, at + 1, len(data))
    return entries


def _header(data: bytes, low: int, high: int) -> int:
    """Return where the first whole header in [low, high) begins, or `high`."""
    at = data.find(_MAGIC, low)
    while 0 <= at < high:
        if len(data) - at >= JOURNAL.size:
            magic, kind, block, blocks, sequence, check = JOURNAL.unpack_from(data, at)
            if check == magic ^ kind ^ block ^ blocks ^ sequence:
                return at
        at = data.find(_MAGIC, at + 1)
    return high


_ZEROS = memoryview(bytes(PAGE))


@dataclass
class Media:
    """What is certain, `image`, and what else each block may hold, oldest first: (request, content)."""

    image: bytearray
    maybe: dict[int, list[tuple[int, memoryview]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begun: dict[int, Entry] = {}  # writes and discards that may have come to media
        self._done: dict[int, Entry] = {}  # of these, the ones that are done
        self._flushes: dict[int, list[int]] = {}  # flushes under way, and what they make certain

    def take(self, entry: Entry) -> None:
        """Let the next record happen."""
        if entry.kind in (WRITE, DISCARD):
            self._begun[entry.sequence] = entry
            for number in range(entry.blocks):
                content = entry.data[number * PAGE : (number + 1) * PAGE] if entry.kind == WRITE else _ZEROS
                self.maybe.setdefault(entry.block + number, []).append((entry.sequence, content))
        elif entry.kind == FLUSH:
            self._flushes[entry.sequence] = [number for number in self._begun if number in self._done]
        elif entry.sequence in self._flushes:
            for number in self._flushes.pop(entry.sequence):
                if number in self._done:  # else another flush was faster
                    self._settle(self._done.pop(number))
        elif entry.sequence in self._begun:
            self._done[entry.sequence] = self._begun[entry.sequence]

    def _settle(self, entry: Entry) -> None:
        del self._begun[entry.sequence]
        for block in range(entry.block, entry.block + entry.blocks):
            versions = self.maybe.get(block, [])
            for index, (number, content) in enumerate(versions):
                if number == entry.sequence:
                    self.image[block * PAGE : (block + 1) * PAGE] = content
                    del versions[: index + 1]
                    break
            if not versions:
                self.maybe.pop(block, None)


@dataclass(frozen=True)
class Cut:
    """The media after a cut behind `records` of the journal.

    `chosen`: for each uncertain block its version: 0 the certain one, 1 the oldest of the others.
    """

    records: int
    chosen: dict[int, int]
    image: bytearray


def legal_cuts(
    journal: str | os.PathLike[str], base_image: bytes | bytearray | memoryview, *, most: int = 16, seed: int = 0
) -> Iterator[Cut]:
    """Yield images that a power cut may leave, at every point of the journal; `base_image`: the media when it was begun.

    At each point: all combinations when there are no more than `most`; else nothing uncertain, all of it at its newest, and
    `most` - 2 others, of which some lack or have one block only; the same ones for the same `seed`.
    """
    media, chance = Media(bytearray(base_image)), random.Random(seed)
    yield Cut(0, {}, bytearray(media.image))
    for records, entry in enumerate(read_journal(journal), 1):
        media.take(entry)
        if entry.kind == FLUSH or (entry.kind == DONE and entry.blocks):
            continue  # changes nothing that a cut could leave
        for chosen in _choices({block: len(versions) for block, versions in media.maybe.items()}, most, chance):
            image = bytearray(media.image)
            for block, version in chosen.items():
                if version:
                    image[block * PAGE : (block + 1) * PAGE] = media.maybe[block][version - 1][1]
            yield Cut(records, chosen, image)


def _choices(versions: dict[int, int], most: int, chance: random.Random) -> Iterator[dict[int, int]]:
    """Yield choices of a version, 0 to versions[block], for every block; all different if they are all."""
    combinations = 1
    for count in versions.values():
        combinations = min(combinations * (count + 1), most + 1)
    if combinations <= most:
        for number in range(combinations):
            chosen = {}
            for block, count in versions.items():
                number, chosen[block] = divmod(number, count + 1)
            yield chosen
        return
    none = dict.fromkeys(versions, 0)
    yield none
    yield dict(versions)
    blocks = list(versions)
    for number in range(most - 2):
        one = chance.choice(blocks)
        if number % 4 == 0:
            yield versions | {one: versions[one] - 1}
        elif number % 4 == 1:
            yield none | {one: chance.randint(1, versions[one])}
        else:
            yield {block: chance.randint(0, count) for block, count in versions.items()}
