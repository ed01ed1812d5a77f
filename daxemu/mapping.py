"""Mappings: a contiguous range of addresses over scattered frames of the pool.

The hardware translates: each run of consecutive PFNs is one MAP_FIXED mapping (a VMA) of the pool file, so the result is
a plain array at memory speed. Holes read as zeros and cost nothing. A mapping shows the file as it was when it
was made: its frames are pinned (S5), and nobody stores into a pinned frame.
"""

import errno
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from onecopy.daxemu._fault import Region
from onecopy.daxemu.errors import OneCopyError
from onecopy.daxemu.pool import Pool
from onecopy.daxemu.units import HUGE, PAGE, pages_of

Run = tuple[int, int, int]  # (page of the mapping, PFN, pages)


def merge_runs(runs: Sequence[Run]) -> list[Run]:
    """Return `runs`, ascending by page, with neighbours that continue each other in both respects made one (one VMA)."""
    merged: list[Run] = []
    for page, pfn, pages in runs:
        if merged:
            last_page, last_pfn, last_pages = merged[-1]
            if last_page + last_pages == page and last_pfn + last_pages == pfn:
                merged[-1] = (last_page, last_pfn, last_pages + pages)
                continue
        merged.append((page, pfn, pages))
    return merged


class Mapping(Region):
    """A read-only picture of a file in memory: buffer protocol, `len`, slices, `pfns`.

    Stays valid after the pool's handle is closed. `close` raises BufferError while arrays or views look into it.
    """

    path: str
    runs: list[Run]
    _on_close: Callable[["Mapping"], None] | None = None

    def __new__(cls, length: int, runs: Sequence[Run], path: str) -> "Mapping":
        """Reserve addresses for `length` bytes; `attach` maps the runs."""
        # Congruent addresses and PFNs let the kernel use 2 MiB translations where the pool has huge pages.
        self = super().__new__(cls, length, PAGE * HUGE if length >= PAGE * HUGE else PAGE)
        self.path, self.runs = path, merge_runs(runs)
        return self

    def __init__(self, *_: object) -> None:
        pass

    def attach(self, pool: Pool, on_close: Callable[["Mapping"], None]) -> None:
        """Map the runs; `on_close` is called once, when the mapping ends. OneCopyError (ENOMEM) past the VMA limit."""
        try:
            self.map(pool.fd, np.array(self.runs, np.uint64).tobytes())
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise OneCopyError(
                    f"the file lies in {len(self.runs)} runs, each a mapping of its own, and the kernel allows this process "
                    "no more (vm.max_map_count): copy the file within the pool to make it contiguous",
                    path=self.path,
                    code=errno.ENOMEM,
                ) from error
            raise
        self._on_close = on_close

    @property
    def pfns(self) -> npt.NDArray[np.uint64]:
        """The PFN of each page; 0 = hole."""
        table = np.zeros(pages_of(len(self)), np.uint64)
        for page, pfn, pages in self.runs:
            table[page : page + pages] = np.arange(pfn, pfn + pages, dtype=np.uint64)
        return table

    def __getitem__(self, key: int | slice) -> int | bytes:
        view = memoryview(self)
        return bytes(view[key]) if isinstance(key, slice) else view[key]

    def close(self) -> None:
        """Unmap and unpin. BufferError while arrays or views look into the mapping; closing twice is nothing."""
        self.unmap()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(self)

    def __enter__(self) -> "Mapping":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._on_close is not None and not sys.is_finalizing():
            self.close()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a mapping belongs to its process; map the file again in the other one")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} bytes in {len(self.runs)} runs"
        return f"<onecopy.Mapping of {self.path!r}: {state}>"
