"""The device's requests may run within a signal handler: they call system calls, and nothing that allocates or locks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "daxemu" / "_device.c"
COMPILER = os.environ.get("CC", "cc")

SYSTEM_CALLS = {
    "pread", "pwrite", "writev", "fdatasync", "fallocate", "fstat", "ioctl", "getpid", "syscall", "clock_gettime",
    "futex_wait", "futex_wake",  # of _shoot.c: one system call each
}  # fmt: skip
HARMLESS = {"__errno_location", "__udivti3", "__divti3"}  # arithmetic; code that a compiler adds


def test_a_request_makes_system_calls_only(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None or shutil.which("nm") is None:
        pytest.skip("no C compiler, or no nm")
    made = tmp_path / "device.o"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-pic", "-fno-stack-protector"]
    subprocess.run([COMPILER, *flags, "-c", SOURCE, "-o", made], check=True)
    listed = subprocess.run(["nm", "--undefined-only", made], check=True, capture_output=True, text=True).stdout
    called = {line.split()[-1].removesuffix("64") for line in listed.splitlines()}
    assert called <= SYSTEM_CALLS | HARMLESS
    assert {"pread", "pwrite", "fdatasync", "syscall"} <= called
