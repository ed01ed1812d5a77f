"""What processes are doing when they die: operations, and the states of the pool between them.

A scenario starts from the pool of `BEFORE`, does `early` undisturbed, and then `operations`, of which any may be cut short.
Whoever looks afterwards must see the state after some prefix of them: nothing else, and nothing in between (S8).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onecopy

from .processes import fork

PAGE = onecopy.PAGE
SIZE = "4M"

Operation = Callable[[onecopy.FileSystem], object]


def pages(text: str) -> bytes:
    """Return a page full of each letter."""
    return b"".join(letter.encode() * PAGE for letter in text)


def before(fs: onecopy.FileSystem) -> None:
    """Make the pool that every scenario starts from."""
    fs.write("/private", pages("abcdefgh"))
    fs.write("/master", pages("ABCDEFGH"))
    fs.clone("/master", "/clone")
    fs.write("/twin", pages("ABxDEFGH"))
    fs.write("/tiny", b"tiny")
    fs.setxattr("/tiny", "user.name", b"value" * 50)
    for page in range(0, 400, 2):
        fs.write("/runs", bytes([page // 2]) * PAGE, page * PAGE)  # more extents than one leaf holds, no two alike
    fs.clone("/runs", "/runs of the clone")
    fs.mkdir("/dir")
    fs.write("/dir/file", pages("f"))
    fs.create_subvolume("/sub")
    fs.mkdir("/sub/inner")
    fs.write("/sub/inner/file", pages("stu"))
    fs.clone("/sub/inner/file", "/sub/again")


@dataclass(frozen=True)
class Scenario:
    """Operations that a process may die in."""

    operations: list[Operation]
    early: list[Operation] = field(default_factory=list)


def one(operation: Operation, *early: Operation) -> Scenario:
    return Scenario([operation], list(early))


def churn(fs: onecopy.FileSystem) -> None:
    """Fill the limbo, so that the next transaction reclaims."""
    for n in range(150):
        fs.write("/private", pages("z"), n % 8 * PAGE)
        fs.utime("/tiny", (n, n))
    fs.write("/private", pages("abcdefgh"))


def fill(fs: onecopy.FileSystem) -> None:
    """Leave room only in what waits for a sync: what comes next must sync to go on."""
    fs.sync()
    fs.create("/full")
    with contextlib.suppress(onecopy.NoSpace):
        for page in range(0, 2048, 8):
            fs.write("/full", pages("fullfull"), page * PAGE)
    fs.sync()
    fs.unlink("/runs")
    fs.unlink("/runs of the clone")


def map_and_close(fs: onecopy.FileSystem) -> None:
    with fs.map("/private"), fs.map("/runs"):
        pass


def leave_a_dead_user(fs: onecopy.FileSystem) -> None:
    """Leave the slot of a process that died with a mapping of what is gone now."""
    mapping = fs.map("/private")
    pid = fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    mapping.close()
    fs.unlink("/private")


def put(fs: onecopy.FileSystem) -> None:
    fs.put(os.path.abspath(__file__), "/put")


def replace_by_put(fs: onecopy.FileSystem) -> None:
    fs.put(os.path.abspath(__file__), "/private")


SCENARIOS = {
    "write a new file": one(lambda fs: fs.write("/new", pages("nnn"))),
    "write to a shared file": one(lambda fs: fs.write("/clone", pages("xy")[:-100], 2 * PAGE + 50)),
    "write to a shared tree": one(lambda fs: fs.write("/runs", pages("xyz"), 100 * PAGE)),
    "write in place": one(lambda fs: fs.write("/private", pages("q"), 3 * PAGE)),
    "write to what is mapped": one(
        lambda fs: fs.write("/private", pages("q"), 3 * PAGE), lambda fs: setattr(fs, "kept", fs.map("/private"))
    ),
    "write into an inode": one(lambda fs: fs.write("/tiny", b"y", 3)),
    "write when the pool is full": one(lambda fs: fs.write("/new", pages("n" * 60)), fill),
    "reclaim": one(lambda fs: [fs.utime("/tiny", (n, n)) for n in range(200)], churn),
    "clone": one(lambda fs: fs.clone("/private", "/copy")),
    "clone a tree of extents": one(lambda fs: fs.clone("/runs", "/copy")),
    "clone a range": one(lambda fs: fs.clone_range("/private", 0, "/clone", 2 * PAGE, 3 * PAGE)),
    "clone a directory": one(lambda fs: fs.clone_tree("/dir", "/dir2")),
    "snapshot, then write": Scenario(
        [lambda fs: fs.snapshot("/sub", "/shot"), lambda fs: fs.write("/sub/inner/file", pages("w"), PAGE)]
    ),
    "delete a subvolume": one(lambda fs: fs.delete_subvolume("/sub"), lambda fs: fs.snapshot("/sub", "/shot")),
    "unlink": one(lambda fs: fs.unlink("/private")),
    "unlink a shared tree": one(lambda fs: fs.unlink("/runs")),
    "rename over another file": one(lambda fs: fs.rename("/private", "/twin")),
    "rename a directory": one(lambda fs: fs.rename("/sub/inner", "/sub/outer")),
    "truncate": one(lambda fs: fs.truncate("/clone", 2 * PAGE + 7)),
    "truncate of pages of its own": one(lambda fs: fs.truncate("/private", 2 * PAGE + 7)),
    "punch of parts of pages of its own": one(lambda fs: fs.punch("/private", 2 * PAGE + 7, PAGE)),
    "punch": one(lambda fs: fs.punch("/runs", 50 * PAGE, 99 * PAGE)),
    "zero": one(lambda fs: fs.zero("/private", PAGE, 20 * PAGE)),
    "collapse": one(lambda fs: fs.collapse("/runs", 20 * PAGE, 10 * PAGE)),
    "insert": one(lambda fs: fs.insert("/clone", 2 * PAGE, 4 * PAGE)),
    "unshare": one(lambda fs: fs.unshare("/clone")),
    "dedupe": one(lambda fs: fs.dedupe(apply=True)),
    "attributes": one(lambda fs: fs.setxattr("/tiny", "user.other", b"w" * 5000)),
    "directories": Scenario([lambda fs: fs.mkdir("/new"), lambda fs: fs.rmdir("/new")]),
    "put": one(put),
    "put over another file": one(replace_by_put),
    "map and close": one(map_and_close),
    "reap": one(lambda fs: fs.info(), leave_a_dead_user),
    "sync": one(lambda fs: fs.sync(), churn, lambda fs: fs.unlink("/runs"), lambda fs: fs.write("/new", pages("nn"))),
    "sync twice": Scenario([lambda fs: fs.sync(), lambda fs: fs.write("/new", pages("n")), lambda fs: fs.sync()], [churn]),
    "sync after the end of sharing": one(lambda fs: fs.sync(), lambda fs: fs.unlink("/clone")),
}


def picture(fs: onecopy.FileSystem) -> dict[str, Any]:
    """Return everything that names lead to: kinds, sizes, links, contents, attributes."""
    found: dict[str, Any] = {}
    for folder, folders, files in fs.walk("/"):
        found[folder] = sorted(folders + files)
        for name in files:
            path = f"{folder.rstrip('/')}/{name}"
            if name.endswith(".put"):
                found[folder].remove(name)  # what `put` builds until it is complete; a killed one leaves it
                continue
            status = fs.lstat(path)
            attributes = {key: fs.getxattr(path, key) for key in fs.listxattr(path)}
            found[path] = (status.st_mode, status.st_size, status.st_nlink, fs.read(path), attributes)
    found["subvolumes"] = [one.path for one in fs.list_subvolumes()]
    return found


def states(scenario: Scenario, fs: onecopy.FileSystem) -> Iterator[dict[str, Any]]:
    """Do a scenario; yield the picture before, between and after its operations."""
    for operation in scenario.early:
        operation(fs)
    yield picture(fs)
    for operation in scenario.operations:
        operation(fs)
        yield picture(fs)
