"""Random bytes in a pool's metadata: nothing but OSErrors comes out, whether the pool is opened after the damage or before."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onecopy

PAGE = onecopy.PAGE

_FLIPS = st.lists(
    st.tuples(
        st.integers(0, 1 << 20),  # which node or superblock
        st.one_of(st.integers(0, 1000), st.integers(0, PAGE - 1)),  # which byte of it; headers and keys lie in front
        st.one_of(st.sampled_from([0, 1, 0x7F, 0xFF]), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=8,
)


def _try(count, run):
    """Run the property `run` with `count` examples, the same ones every time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    given(_FLIPS)(
        settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)(run)
    )()


_counts = pytest.mark.parametrize("count", [20, pytest.param(600, marks=pytest.mark.slow)])


def _damage(media, flips, mend):
    """Change bytes of records; return the frames changed."""
    places = [*media.superblocks(), *(media.head(pfn) for pfn in sorted(media.nodes()))]
    hit = []
    for number, offset, value in flips:
        where = places[number % len(places)]
        media.data[where.at + offset % (PAGE if where.pfn > 2 else where.record.size)] = value
        hit.append(where)
    if mend:
        for where in hit:
            media.mend(where)
    return {where.pfn for where in hit}


@_counts
@pytest.mark.parametrize("mend", [True, False], ids=["checksums right", "checksums wrong"])
def test_random_damage_before_the_pool_is_opened(sound, workout, mend, count):
    def run(flips):
        media = sound()
        _damage(media, flips, mend)
        workout(media)

    _try(count, run)


@_counts
def test_random_damage_while_the_pool_is_open(sound, workout, count):
    """The checksums have been looked at by then. What can't be noticed reads as something else, but as nothing worse."""

    def run(flips):
        damaged = sound()
        pfns = _damage(damaged, flips, mend=True)
        workout(sound(), meanwhile={pfn: bytes(damaged.page(pfn)) for pfn in pfns})

    _try(count, run)
