"""A process killed or stopped at any step of a fault or a commit: the others go on, and what was stored is there (S3, S8)."""

import os
import signal
from contextlib import suppress
from functools import partial

import pytest

import onecopy
from onecopy.daxemu import steps

from .common import PAGE, assert_all_ended, content, counter

PAGES = 1100  # three blocks
FAULT = steps.NATIVE[:7]
COMMIT = steps.NATIVE[7:11]


def some(first, second):
    """Return all pairs; most are for the slow run."""
    return [
        pytest.param(a, b, marks=() if (n + m) % 3 == 0 else pytest.mark.slow)
        for n, a in enumerate(first)
        for m, b in enumerate(second)
    ]


def mapper(path, line, name="/a", mode="r+"):
    """Map a file; then store, look, arm a signal, or do something with the pool, as told."""
    with onecopy.open(path) as fs, fs.map(name, mode) as mapping:
        line.say("mapped")
        while (request := line.hear()) is not None:
            what, *arguments = request
            if what == "store":
                offset, data = arguments
                with memoryview(mapping) as view:
                    view[offset : offset + len(data)] = data
                line.say("stored")
            elif what == "look":
                with memoryview(mapping) as view:
                    line.say([bytes(view[a:b]) for a, b in arguments[0]])
            elif what == "arm":
                steps.signal_at(*arguments)
                line.say("armed")
            elif what == "read":
                line.say(fs.read(name))
            else:
                getattr(fs, what)(*arguments)
                line.say("done")
        line.say("ends")


@pytest.fixture
def scene(pool_path, start):
    """A pool with /origin and its clone /a of three blocks, and a maker of processes that map /a."""
    onecopy.format(pool_path, "64M")
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")

    def make(name="/a", mode="r+"):
        process = start(partial(run, pool_path, name, mode))
        assert process.hear() == "mapped"
        return process

    return pool_path, make


def run(path, name, mode, line):
    return mapper(path, line, name, mode)


def end(*processes):
    for process in processes:
        assert process.ask(None) == "ends"
        process.result()


def finish(path, model, others=()):
    """Nobody is left: the pool is sound and has what was stored."""
    with onecopy.open(path) as fs:
        assert fs.check().findings == []
        found = fs.read("/a")
        assert found[: len(model)] == model, differing(found, model)
        assert fs.read("/origin") == content(PAGES)
        for name, wanted in others:
            assert fs.read(name) == wanted, name
        fs.unlink("/a")
        for name, _ in others:
            fs.unlink(name)
        assert_all_ended(fs)
        assert fs.info().used_pages < PAGES + 40


def differing(found, model):
    pages = [n for n in range(len(model) // PAGE) if found[n * PAGE : (n + 1) * PAGE] != model[n * PAGE : (n + 1) * PAGE]]
    return f"{len(found)} bytes, {len(model)} wanted; pages {pages[:20]} differ"


LOOK = [(0, 40 * PAGE), (500 * PAGE, 530 * PAGE), (1090 * PAGE, 1100 * PAGE)]


def agree(model, *processes):
    """All show the model, or, where `model` is a list of two, one of them, all the same."""
    models = model if isinstance(model, list) else [model]
    found = processes[0].ask(("look", LOOK))
    assert found in [[bytes(one[a:b]) for a, b in LOOK] for one in models]
    for process in processes[1:]:
        assert process.ask(("look", LOOK)) == found
    return models[[[bytes(one[a:b]) for a, b in LOOK] for one in models].index(found)]


# --------------------------------------------------------------- faults


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("step", FAULT)
def test_killed_in_a_store(scene, step, nth):
    path, make = scene
    victim, writer, reader = make(), make(), make(mode="r")
    model = bytearray(content(PAGES))
    for n, process in enumerate((victim, writer)):  # what they completed must stay
        assert process.ask(("store", (510 + n) * PAGE, b"complete %d" % n)) == "stored"
        model[(510 + n) * PAGE : (510 + n) * PAGE + 10] = b"complete %d" % n
    victim.ask(("arm", step, nth, signal.SIGKILL))
    spots = [2 * PAGE, 30 * PAGE, 1095 * PAGE]
    for n, spot in enumerate(spots):
        victim.say(("store", spot, b"the victim's"))
        if n == nth - 1:
            break
        assert victim.hear() == "stored"
        model[spot : spot + 12] = b"the victim's"
    assert victim.wait() == -signal.SIGKILL
    agree(model, writer, reader)
    for spot in spots:  # into the very block and granule that the dead one had locked
        assert writer.ask(("store", spot + 20, b"a survivor's")) == "stored"
        model[spot + 20 : spot + 32] = b"a survivor's"
        agree(model, writer, reader)
    late = make()
    agree(model, late, writer, reader)
    assert late.ask(("store", 3 * PAGE, b"late")) == "stored"
    model[3 * PAGE : 3 * PAGE + 4] = b"late"
    agree(model, late, writer, reader)
    assert late.ask(("clone", "/a", "/clone")) == "done"
    late.ask(("sync",))
    assert reader.ask(("read",)) == model
    end(late, writer, reader)
    finish(path, model, [("/clone", model)])


@pytest.mark.parametrize("step", FAULT)
def test_all_mappers_killed_then_reopened(scene, step):
    path, make = scene
    one, other = make(), make()
    model = bytearray(content(PAGES))
    one.ask(("store", 600 * PAGE, b"complete"))
    model[600 * PAGE : 600 * PAGE + 8] = b"complete"
    other.kill()
    one.ask(("arm", step, 1, signal.SIGKILL))
    one.say(("store", 5 * PAGE, b"half done"))
    assert one.wait() == -signal.SIGKILL
    finish(path, model)


@pytest.mark.parametrize(("first", "second"), some(FAULT, FAULT))
def test_two_deaths_in_a_row(scene, first, second):
    """The second one dies while it clears up after the first, or in its own store; a third one goes on."""
    path, make = scene
    a, b, c = make(), make(), make()
    model = bytearray(content(PAGES))
    a.ask(("arm", first, 1, signal.SIGKILL))
    b.ask(("arm", second, 1, signal.SIGKILL))
    a.say(("store", 5 * PAGE, b"a"))
    assert a.wait() == -signal.SIGKILL
    for page in (6, 40):  # the first one may have been entered by the one who died
        b.say(("store", page * PAGE, b"b"))
        try:
            assert b.hear() == "stored"
        except AssertionError:
            break
        model[page * PAGE] = ord("b")
    assert b.wait() == -signal.SIGKILL
    agree(model, c)
    assert c.ask(("store", 5 * PAGE + 9, b"c")) == "stored"
    model[5 * PAGE + 9] = ord("c")
    agree(model, c)
    end(c)
    finish(path, model)


@pytest.mark.parametrize("step", FAULT)
def test_counters_after_a_death(scene, step):
    path, make = scene
    victim, other = make(), make()
    victim.ask(("arm", step, 1, signal.SIGKILL))
    victim.say(("store", 5 * PAGE, b"x"))
    assert victim.wait() == -signal.SIGKILL
    end(other)
    with onecopy.open(path) as fs:
        fs.sync()
        assert (counter(fs, "dirty"), counter(fs, "held")) == (0, 0)


# -------------------------------------------------------------- commits

CHANGES = {
    "sync": (("sync",), None),
    "write": (("write", "/a", b"w" * 5 * PAGE, 3 * PAGE), (3 * PAGE, b"w" * 5 * PAGE)),
    "write over blocks": (("write", "/a", b"w" * 20 * PAGE, 505 * PAGE), (505 * PAGE, b"w" * 20 * PAGE)),
    "punch": (("punch", "/a", 2 * PAGE, 515 * PAGE), (2 * PAGE, bytes(515 * PAGE))),
    "zero of parts of pages": (("zero", "/a", 2 * PAGE + 5, 3 * PAGE), (2 * PAGE + 5, bytes(3 * PAGE))),
    "truncate": (("truncate", "/a", 515 * PAGE + 77), "cut"),
    "clone": (("clone", "/a", "/clone"), None),
    "clone_range": (
        ("clone_range", "/origin", 20 * PAGE, "/a", 2 * PAGE, 9 * PAGE),
        (2 * PAGE, content(PAGES)[20 * PAGE : 29 * PAGE]),
    ),
    "collapse": (("collapse", "/a", 4 * PAGE, 3 * PAGE), "collapse"),
}


def changed(model, change):
    after = bytearray(model)
    if change == "cut":
        after[515 * PAGE + 77 :] = b""
    elif change == "collapse":
        del after[4 * PAGE : 7 * PAGE]
    elif change:
        after[change[0] : change[0] + len(change[1])] = change[1]
    return after


@pytest.mark.parametrize("nth", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "step"), some(list(CHANGES), COMMIT))
def test_killed_in_a_commit(scene, name, step, nth):
    """The change has happened or it hasn't, once somebody took over; nobody waits, no store of others is lost."""
    path, make = scene
    victim, writer, reader = make(), make(), make(mode="r")
    request, change = CHANGES[name]
    model = bytearray(content(PAGES))
    for process, spot in ((victim, 8 * PAGE), (writer, 600 * PAGE), (writer, 4 * PAGE), (victim, 511 * PAGE)):
        process.ask(("store", spot, b"dirty"))
        model[spot : spot + 5] = b"dirty"
    if nth == 2:  # the entries are clean, then
        assert victim.ask(("punch", "/a", 9 * PAGE, PAGE)) == "done"
        model[9 * PAGE : 10 * PAGE] = bytes(PAGE)
    victim.ask(("arm", step, 1, signal.SIGKILL))
    victim.say(request)
    with suppress(AssertionError):  # unless no entry is to change: then it is done, and did not come to the step
        assert nth == 2 and victim.hear() == "done"
        victim.kill()
    assert victim.wait() == -signal.SIGKILL
    after = changed(model, change)
    look = [(a, min(b, len(after))) for a, b in LOOK if a < len(after)]
    assert writer.ask(("look", look)) == reader.ask(("look", look))
    assert writer.ask(("store", PAGE + 10, b"survivor")) == "stored"
    assert writer.ask(("look", look)) == reader.ask(("look", look))
    for one in (model, after):
        one[PAGE + 10 : PAGE + 18] = b"survivor"
    assert writer.ask(("sync",)) == "done"
    found = reader.ask(("read",))
    assert found in (model, after), "neither before nor after"
    if step != COMMIT[0] and nth == 1:
        assert found == after, "it had been published"
    for process in (writer, reader):
        assert process.ask(("look", look)) == [found[a:b] for a, b in look]
    assert writer.ask(("store", PAGE + 20, b"again")) == "stored"
    found = found[: PAGE + 20] + b"again" + found[PAGE + 25 :]
    assert reader.ask(("look", look)) == [found[a:b] for a, b in look]
    end(writer, reader)
    finish_with_clone(path, found)


@pytest.mark.parametrize("step", COMMIT)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("name", ["truncate", "collapse", "write over blocks", "punch"])
def test_a_reader_never_sees_half_of_a_commit(scene, name, number, step):
    """Without the lock, while the one who commits is anywhere in it, dead or stopped; for a stopped one it may wait."""
    _, make = scene
    victim, reader = make(), make(mode="r")
    request, change = CHANGES[name]
    model = bytearray(content(PAGES))
    victim.ask(("store", 8 * PAGE, b"dirty"))
    model[8 * PAGE : 8 * PAGE + 5] = b"dirty"
    victim.ask(("arm", step, 1, number))
    victim.say(request)
    wait_for(victim, number)
    try:
        reader.say(("read",))
        reader._pipe.poll(60 if number == signal.SIGKILL else 0.2)
    finally:
        if number == signal.SIGSTOP:
            victim.resume()
    found = reader.hear()
    after = changed(model, change)
    assert found in (model, after), differing(found, model) + "; " + differing(found, after)
    if number == signal.SIGSTOP:
        assert victim.hear() == "done"
        end(victim)
        assert reader.ask(("read",)) == after
    end(reader)


def wait_for(process, number):
    """Return when the process has been stopped or killed."""
    if number == signal.SIGSTOP:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    else:
        assert process.wait() == -number


def finish_with_clone(path, model):
    with onecopy.open(path) as fs:
        if fs.exists("/clone"):
            assert fs.check().findings == []
            fs.unlink("/clone")
    finish(path, model)


@pytest.mark.parametrize(("fault", "commit"), some(FAULT, COMMIT))
def test_a_store_dies_after_a_commit_died(scene, commit, fault):
    path, make = scene
    a, b, c = make(), make(), make()
    model = bytearray(content(PAGES))
    for process, spot in ((a, 8 * PAGE), (b, 9 * PAGE), (c, 600 * PAGE)):
        process.ask(("store", spot, b"dirty"))
        model[spot : spot + 5] = b"dirty"
    a.ask(("arm", commit, 1, signal.SIGKILL))
    b.ask(("arm", fault, 1, signal.SIGKILL))
    a.say(("punch", "/a", 16 * PAGE, 16 * PAGE))
    assert a.wait() == -signal.SIGKILL
    b.say(("store", 20 * PAGE, b"b"))
    assert b.wait() == -signal.SIGKILL
    cut = changed(model, (16 * PAGE, bytes(16 * PAGE)))
    found = c.ask(("look", [(16 * PAGE, 32 * PAGE)]))[0]
    assert found in (model[16 * PAGE : 32 * PAGE], bytes(16 * PAGE))
    now = c.ask(("read",))
    assert now in (model, cut)
    assert c.ask(("store", 20 * PAGE + 1, b"c")) == "stored"
    now = bytearray(now)
    now[20 * PAGE + 1] = ord("c")
    agree(now, c)
    end(c)
    finish(path, now)
