"""Programs that may crash, hang or spoil a process's signals: each runs in an interpreter of its own."""

import subprocess
import sys

LIMIT = 60  # seconds after which a program counts as hung

START = """
import ctypes, errno, faulthandler, os, signal, sys, threading
import onecopy
PAGE = onecopy.PAGE
path = sys.argv[1]
fs = onecopy.open(path)

def spread(mapping, n=0):
    for page in range(len(mapping) // PAGE):
        mapping[page * PAGE + 5] = (page + n) % 251

def assert_spread(mapping, n=0):
    assert all(mapping[page * PAGE + 5] == (page + n) % 251 for page in range(len(mapping) // PAGE))
    assert fs.read("/a") == mapping[:]

def crash():
    ctypes.string_at(16)
"""


def run(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program after `START`; return how it ended and what it wrote."""
    command = [sys.executable, "-c", START + text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)


def succeed(text: str, *arguments: str) -> str:
    """`run` a program that must end well; return what it printed."""
    done = run(text, *arguments)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout
