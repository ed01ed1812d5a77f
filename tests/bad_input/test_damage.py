"""Damaged records: a typed error or a finding with the right code; never a crash, a hang or another kind of exception."""

import pytest

TYPED = {"CorruptRecord", "NotAPool", "PoolVersionError"}


def test_a_sound_pool_is_sound(media, workout):
    """What the others are compared with: the workout of an undamaged pool raises the errors of its wrong uses only."""
    assert workout(media) <= {"OSError", "IsADirectoryError", "NotADirectoryError", "FileNotFoundError", "OneCopyError",
                              "ReadOnly", "FileExistsError", "PermissionError"}  # fmt: skip
