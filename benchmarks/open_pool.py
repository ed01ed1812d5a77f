"""How long does opening a pool take?

Pools with a million extents and with none, of one size: opened while the run-time file of the last use is there, and
opened when it is gone, as after a reboot, so that it is rebuilt from the trees.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter_ns

import onecopy
from onecopy import PAGE
from onecopy.benchmarks import harness
from onecopy.benchmarks.harness import GiB, MiB, Row

EXTENTS = 1_000_000
BASE = 10_000  # extents of a file that the others are made from


def measure(quick: bool) -> list[Row]:
    extents = EXTENTS // 100 if quick else EXTENTS
    base = min(BASE, extents)
    ...
