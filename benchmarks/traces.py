"""Requests to a block cache: seeded traces on which policies of replacement are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int64]
Seen = NDArray[np.bool_]
Hits = Callable[[Blocks, int], Seen]
Generate = Callable[[np.random.Generator, int, int, int], Blocks]  # from cache, device, number of requests


@dataclass(frozen=True)
class Trace:
    """Requests, in order, to a device of `device` blocks behind a cache of `cache` blocks.

    `seen` says of each whether the cache learns of it when it hits: a read does, a load from a mapping does not.
    """

    name: str
    blocks: Blocks
    seen: Seen
    cache: int
    device: int


def zipf(random: np.random.Generator, items: int, length: int, alpha: float = 1.0) -> Blocks:
    """Return requests to items 0, 1, 2 and so on, each asked for in proportion to 1 / (its number + 1) ** alpha."""
    weights = np.cumsum(np.arange(1, items + 1, dtype=float) ** -alpha)
    return np.asarray(np.searchsorted(weights, random.random(length) * weights[-1], side="right"), dtype=np.int64)


def loop(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """A file of twice the cache is read from start to end, over and over."""
    return np.arange(length, dtype=np.int64) % (2 * cache)


def once(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """The device is read from start to end in pieces of a quarter of a block."""
    return np.arange(min(length, 4 * device), dtype=np.int64) // 4


def scattered(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """Zipf over twice the cache, blocks anywhere."""
    return random.permutation(device)[: 2 * cache][zipf(random, 2 * cache, length)]


def clustered(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """Zipf over twice the cache, the more popular the nearer to the device's start."""
    return zipf(random, 2 * cache, length)


def mixed(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """Zipf over twice the cache; after each ten caches' worth of requests, a file as large as the cache is read."""
    found = scattered(random, cache, device, length)
    for number, at in enumerate(range(10 * cache, length - cache, 11 * cache)):
        found[at : at + cache] = (np.arange(cache) + number * cache) % device
    return found


def beside(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """Every other request is Zipf over the cache's size, the others read files of twice the cache in turn, over and over."""
    found = scattered(random, cache, device, length)
    found[::2] = np.arange(len(found[::2])) % (2 * cache)
    return found


def shifting(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """Nine of ten requests go to a hot half cache, another one after each ten caches' worth; the rest to twice the cache."""
    places = random.permutation(device)[: 2 * cache]
    period = np.arange(length) // (10 * cache)
    hot = (random.integers(cache // 2, size=length) + period * (cache // 2)) % (2 * cache)
    cold = random.integers(2 * cache, size=length)
    return places[np.where(random.random(length) < 0.9, hot, cold)]


def filled_ahead(cache: int) -> int:
    """Return how many blocks are filled ahead of a reader: a 32nd of the cache."""
    return max(1, cache // 32)


def ahead(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """Zipf over the cache's size, and in turn with it files are read, of which a window is filled ahead each time."""
    window = filled_ahead(cache)
    rounds = length // (3 * window) + 1
    starts = np.repeat(random.integers(device, size=rounds // 100 + 1), 100)[:rounds]  # another file after 100 windows
    filled = (starts + np.arange(rounds) % 100 * window)[:, None] + np.arange(window)
    popular = random.permutation(device)[:cache][zipf(random, cache, filled.size)].reshape(filled.shape)
    read = np.stack((filled, popular), axis=2).reshape(rounds, -1)
    return np.concatenate((filled, read), axis=1).ravel()[:length] % device


def wide(random: np.random.Generator, cache: int, device: int, length: int) -> Blocks:
    """Zipf over half of the device, most of which is asked for once or twice."""
    return random.permutation(device)[: device // 2][zipf(random, device // 2, length)]


def even(blocks: Blocks, cache: int) -> Seen:
    """Of every other block hits are loads from a mapping."""
    return np.equal(blocks % 2, 0)


def reads(blocks: Blocks, cache: int) -> Seen:
    """Every request is a read."""
    return np.ones(len(blocks), dtype=np.bool_)


def not_ahead(blocks: Blocks, cache: int) -> Seen:
    """Of the requests of `ahead`, those that come from the cache itself are not seen."""
    return np.greater(np.arange(len(blocks)) // filled_ahead(cache) % 3, 0)


TRACES: dict[str, tuple[Generate, Hits]] = {
    "a loop over twice the cache": (loop, reads),
    "one pass over the device": (once, reads),
    "Zipf, blocks anywhere": (scattered, reads),
    "Zipf, blocks in order": (clustered, reads),
    "Zipf, half of it mapped": (scattered, even),
    "Zipf with scans in between": (mixed, reads),
    "Zipf beside a loop": (beside, reads),
    "a hot set that shifts": (shifting, reads),
    "Zipf beside readahead": (ahead, not_ahead),
}
LARGE_TRACES: dict[str, tuple[Generate, Hits]] = {
    "Zipf over half the device": (wide, reads),
    "Zipf, blocks anywhere": (scattered, reads),
    "Zipf with scans in between": (mixed, reads),
    "a hot set that shifts": (shifting, reads),
}


def make(cache: int, times: int, length: int, seed: int = 0) -> list[Trace]:
    """Return the traces for a device of so many times the cache; from 100 times on, those for large ones."""
    found = []
    for name, (generate, seen) in (LARGE_TRACES if times >= 100 else TRACES).items():
        blocks = generate(np.random.default_rng(seed), cache, times * cache, length)
        found.append(Trace(name, blocks, seen(blocks, cache), cache, times * cache))
    return found
