"""The policies of replacement: each against one written down naively, and what holds between them."""

from functools import cache as memoized

import numpy as np
import pytest

from onecopy.benchmarks import replacement, traces
from onecopy.benchmarks.traces import Trace

POLICIES = {
    "belady": replacement.belady,
    "lru": replacement.lru,
    "clock": replacement.clock,
    "s3fifo": replacement.s3fifo,
    "sweep": lambda trace: replacement.swept(trace)[0],
}


def requests(trace):
    return list(zip(trace.blocks.tolist(), trace.seen.tolist(), strict=True))


def tiny(seed, cache, device, length):
    """Some requests, a part of them to few blocks, so that there are hits; some hits unseen."""
    random = np.random.default_rng(seed)
    blocks = np.minimum(random.integers(device, size=length), random.integers(device, size=length))
    return Trace("tiny", blocks, random.random(length) < 0.8, cache, device)


def most_hits(trace):
    """Try all victims of all evictions."""
    blocks = trace.blocks.tolist()

    @memoized
    def rest(at, resident):
        if at == len(blocks):
            return 0
        block = blocks[at]
        if block in resident:
            return 1 + rest(at + 1, resident)
        if len(resident) < trace.cache:
            return rest(at + 1, resident | {block})
        return max(rest(at + 1, resident - {victim} | {block}) for victim in resident)

    return rest(0, frozenset())


def naive_lru(trace):
    hits, when = 0, {}
    for now, (block, seen) in enumerate(requests(trace)):
        if block in when:
            hits += 1
            when[block] = now if seen else when[block]
            continue
        if len(when) == trace.cache:
            del when[min(when, key=when.get)]
        when[block] = now
    return hits


def naive_clock(trace):
    """As a queue: a block that was used goes to its end."""
    hits, queue, used = 0, [], set()
    for block, seen in requests(trace):
        if block in queue:
            hits += 1
            used |= {block} if seen else set()
            continue
        while len(queue) == trace.cache:
            first = queue.pop(0)
            if first in used:
                used.remove(first)
                queue.append(first)
        queue.append(block)
    return hits


def naive_s3fifo(trace):
    """As in the paper, with lists of [block, freq]."""
    small_size = max(1, trace.cache // 10)
    hits, small, main, ghosts = 0, [], [], []

    def evict_main():
        while main:
            block, freq = main.pop(0)
            if freq == 0:
                return
            main.append([block, freq - 1])

    def evict_small():
        while small:
            block, freq = small.pop(0)
            if freq <= 1:
                ghosts.append(block)
                del ghosts[: -(trace.cache - small_size)]
                return
            main.append([block, 0])
            if len(main) > trace.cache - small_size:
                evict_main()

    for block, seen in requests(trace):
        entry = next((entry for entry in small + main if entry[0] == block), None)
        if entry:
            hits += 1
            entry[1] = min(3, entry[1] + seen)
            continue
        while len(small) + len(main) >= trace.cache:
            if len(small) >= small_size:
                evict_small()
            else:
                evict_main()
        if block in ghosts:
            ghosts.remove(block)
            main.append([block, 0])
        else:
            small.append([block, 0])
    return hits


def naive_sweep(trace):
    """With one number a block: resident 1, main 2, hits 4 to 12, stamp from bit 4. Looks at each word, counts them anew."""
    words, hand, hits = [0] * trace.device, 0, 0
    unit = max(1, trace.cache // 32)
    inserted = 33 * unit
    for block, seen in requests(trace):
        if words[block] & 1:
            hits += 1
            words[block] += 4 if seen and words[block] >> 2 & 3 < 3 else 0
            continue
        now, looked = inserted // unit % 65536, 0
        while sum(word & 1 for word in words) == trace.cache:
            word, looked = words[hand], looked + 1
            few = sum(word & 3 == 1 for word in words) < max(1, trace.cache // 5)
            late = looked > trace.device
            if word & 3 == 1 and ((now - (word >> 4)) % 65536 >= 2 or late):
                words[hand] = word & ~12 | 2 if word & 8 else now << 4
            elif word & 3 == 3 and (few or late):
                words[hand] = word - 4 if word & 12 else now << 4
            hand = (hand + 1) % trace.device
        ghost = (now - (words[block] >> 4)) % 65536 < 32
        words[block] = 1 | ghost << 1 | now << 4
        inserted += 1
    return hits


@pytest.mark.parametrize("cache", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_belady_is_the_most_that_can_hit(seed, cache):
    trace = tiny(seed, cache, 7, 30)
    assert replacement.belady(trace) == most_hits(trace)


@pytest.mark.parametrize("naive", [naive_lru, naive_clock, naive_s3fifo, naive_sweep])
@pytest.mark.parametrize(("cache", "device"), [(1, 4), (2, 5), (7, 20), (20, 50), (70, 150)])
@pytest.mark.parametrize("seed", range(5))
def test_each_does_as_the_naive_one(seed, cache, device, naive):
    trace = tiny(seed, cache, device, 20 * cache + 100)
    found = POLICIES[naive.__name__.removeprefix("naive_")](trace)
    assert found == naive(trace)
    assert 0 < found < len(trace.blocks)


@pytest.mark.parametrize("times", [4, 100])
def test_none_hits_more_often_than_belady(times):
    for trace in traces.make(200, times, 8_000, seed=1):
        assert trace.blocks.min() >= 0 and trace.blocks.max() < trace.device
        hits = {name: policy(trace) for name, policy in POLICIES.items()}
        assert max(hits, key=hits.get) == "belady"


def test_a_loop_over_twice_the_cache_never_hits_with_lru():
    trace = traces.make(100, 4, 2_000)[0]
    assert replacement.lru(trace) == 0
    assert replacement.belady(trace) > 800


def test_traces_come_from_their_seed():
    first, same, other = (traces.make(50, 4, 1_000, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one.blocks, two.blocks) for one, two in zip(first, same, strict=True))
    assert not all(np.array_equal(one.blocks, two.blocks) for one, two in zip(first, other, strict=True))


def test_counts_are_those_of_the_words():
    for trace in traces.make(100, 4, 4_000):
        _, cache = replacement.swept(trace)
        assert cache.residents == sum(cache.resident) <= trace.cache
        assert cache.mains == sum(main for main, there in zip(cache.main, cache.resident, strict=True) if there)
        assert max(cache.freq) <= 3
        assert cache.evictions <= cache.words


def test_what_it_reports():
    rows = replacement.measure(quick=True)
    assert all(row.met for row in rows if row.reach)
    assert all(row.ours <= row.against for row in rows if row.peer == "Belady")
