"""Fixtures of the tests with several processes."""

from .processes import start
from .trials import counted, image, trial

__all__ = ["counted", "image", "start", "trial"]
