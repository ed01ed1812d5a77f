"""How fast is the first read through a mapping of a fresh clone?

A clone is made, mapped and read once; so is a plain shared mapping of a file of the same size on tmpfs, which is the
limit. Both lie in memory: what is measured is page faults, of one word in each page, and of every byte.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Buffer
from pathlib import Path

import numpy as np
