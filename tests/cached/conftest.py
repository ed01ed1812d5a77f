"""Fixtures of the tests of pools in a buffer cache."""

from ..multiproc.processes import start

__all__ = ["start"]
