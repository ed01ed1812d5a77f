"""Fixtures of the tests with several processes."""

from .processes import start

__all__ = ["start"]
