"""Fixtures of the tests of stores through mappings."""

from ..multiproc.processes import start

__all__ = ["start"]
