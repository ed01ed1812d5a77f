"""System calls on pages of a mapping that are not in memory: EFAULT, and what to do about it."""

import errno
import os
from collections.abc import Callable

import pytest

import onecopy

PAGE = 4096


@pytest.mark.parametrize("policy", ["shared", "per-inode"])
def test_what_the_kernel_cannot_fetch_is_fetched_before(new_path: Callable[[], str], policy: str) -> None:
    path, content = new_path(), os.urandom(64 * PAGE)
    onecopy.format(path, "32M", policy=policy, cache_size="2M")
    with onecopy.open(path) as fs:
        fs.write("/a", content)
    with onecopy.open(path) as fs, fs.map("/a") as mapping:  # the last one to close it has emptied the cache
        fd = os.memfd_create("copy")
        try:
            with pytest.raises(OSError) as caught:
                os.pwrite(fd, mapping, 0)
            assert caught.value.errno == errno.EFAULT
            mapping.fetch()
            assert os.pwrite(fd, mapping, 0) == len(content)
            assert os.pread(fd, len(content), 0) == content
        finally:
            os.close(fd)
        mapping.fetch(5, 5)
        with pytest.raises(onecopy.OneCopyError, match="bytes 0 to"):
            mapping.fetch(0, len(content) + 1)
        fs.truncate("/a", PAGE)
        with pytest.raises(OSError) as caught:
            mapping.fetch()
        assert caught.value.errno == errno.ENXIO
