"""A process that is stopped, not dead: who needs its answer waits, goes on when it is continued, and can say who it is."""

import os
import signal

import pytest

import onecopy
from onecopy.daxemu import steps
from onecopy.fs import mapped as fs_mapped

from .common import PAGE, content
from .test_deaths import PAGES, agree, end, finish, mapper


@pytest.fixture
def scene(pool_path, start):
    """A pool with /origin and its clone /a, and a maker of processes that map /a."""
    onecopy.format(pool_path, "64M")
    with onecopy.open(pool_path) as fs:
        fs.write("/origin", content(PAGES))
        fs.clone("/origin", "/a")

    def make(name="/a", mode="r+", patience=None):
        def work(line):
            if patience is not None:
                fs_mapped._PATIENCE = patience
            return mapper(pool_path, line, name, mode)

        process = start(work)
        assert process.hear() == "mapped"
        return process

    return pool_path, make


def silent(process):
    """Return whether the process has nothing to say (a pipe, looked at for a moment: only a wrong engine can fail)."""
    return not process._pipe.poll(0.3)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_store_waits_for_a_stopped_mapper_and_goes_on(scene, mode):
    path, make = scene
    peer, writer = make(mode=mode), make()
    model = bytearray(content(PAGES))
    peer.stop()
    try:
        writer.say(("store", 5 * PAGE, b"waits"))
        assert silent(writer)
    finally:
        peer.resume()
    assert writer.hear() == "stored"
    model[5 * PAGE : 5 * PAGE + 5] = b"waits"
    agree(model, writer, peer)
    end(peer, writer)
    finish(path, model)


def test_a_store_waits_for_a_stopped_mapper_that_is_killed_then(scene):
    path, make = scene
    peer, writer = make(), make()
    model = bytearray(content(PAGES))
    peer.stop()
    writer.say(("store", 5 * PAGE, b"waits"))
    assert silent(writer)
    peer.kill()
    assert writer.hear() == "stored"
    model[5 * PAGE : 5 * PAGE + 5] = b"waits"
    agree(model, writer)
    end(writer)
    finish(path, model)


def test_nobody_waits_for_a_stopped_process_that_maps_something_else(scene):
    _, make = scene
    peer, writer = make("/origin"), make()
    peer.stop()
    try:
        assert writer.ask(("store", 5 * PAGE, b"at once")) == "stored"
        assert writer.ask(("clone", "/a", "/clone")) == "done"
    finally:
        peer.resume()
    end(peer, writer)


@pytest.mark.parametrize(
    "what", [("clone", "/a", "/clone"), ("punch", "/a", 0, 9 * PAGE), ("truncate", "/a", 600 * PAGE), ("sync",)]
)
def test_a_change_waits_for_a_stopped_process_with_writable_pages(scene, what):
    path, make = scene
    peer, other = make(), make()
    model = bytearray(content(PAGES))
    peer.ask(("store", 700 * PAGE, b"dirty"))
    model[700 * PAGE : 700 * PAGE + 5] = b"dirty"
    peer.stop()
    try:
        other.say(what)
        if what[0] == "sync":  # what is stored stays private: nobody has to be told
            assert other.hear() == "done"
        else:
            assert silent(other)
    finally:
        peer.resume()
    if what[0] != "sync":
        assert other.hear() == "done"
    before = bytes(model)
    if what[0] == "punch":
        model[: 9 * PAGE] = bytes(9 * PAGE)
    elif what[0] == "truncate":
        del model[600 * PAGE :]
    assert peer.ask(("store", 590 * PAGE, b"after")) == "stored"
    model[590 * PAGE : 590 * PAGE + 5] = b"after"
    assert other.ask(("read",)) == model
    end(peer, other)
    finish(path, model, [("/clone", before)] if what[0] == "clone" else [])


def test_a_clone_that_gives_up_names_the_process_and_breaks_nothing(scene):
    """The stopped process stores on when it is continued: not into what somebody shares then."""
    path, make = scene
    peer, other = make(), make(patience=100)
    model = bytearray(content(PAGES))
    peer.ask(("store", 7 * PAGE, b"dirty"))
    model[7 * PAGE : 7 * PAGE + 5] = b"dirty"
    peer.stop()
    try:
        other.say(("clone", "/a", "/clone"))
        with pytest.raises(AssertionError, match=rf"process {peer.pid} .*does not answer"):
            other.hear()
    finally:
        peer.resume()
    assert peer.ask(("store", 7 * PAGE + 8, b"continued")) == "stored"
    model[7 * PAGE + 8 : 7 * PAGE + 17] = b"continued"
    third = make()
    agree(model, peer, third)
    assert third.ask(("clone", "/a", "/clone")) == "done"
    assert peer.ask(("store", 7 * PAGE + 8, b"not there")) == "stored"
    before = bytes(model)
    model[7 * PAGE + 8 : 7 * PAGE + 17] = b"not there"
    agree(model, peer, third)
    end(peer, third)
    finish(path, model, [("/clone", before)])


@pytest.mark.parametrize("step", steps.NATIVE[:7])
def test_stopped_in_a_store(scene, step):
    """It holds a block: who needs it waits, others don't; when continued all goes on."""
    path, make = scene
    victim, writer, reader = make(), make(), make(mode="r")
    model = bytearray(content(PAGES))
    victim.ask(("arm", step, 1, signal.SIGSTOP))
    victim.say(("store", 5 * PAGE, b"victim"))
    assert os.WIFSTOPPED(os.waitpid(victim.pid, os.WUNTRACED)[1])
    try:
        writer.say(("store", 6 * PAGE, b"writer"))
        assert silent(writer)
    finally:
        victim.resume()
    assert (victim.hear(), writer.hear()) == ("stored", "stored")
    model[5 * PAGE : 5 * PAGE + 6], model[6 * PAGE : 6 * PAGE + 6] = b"victim", b"writer"
    agree(model, victim, writer, reader)
    end(victim, writer, reader)
    finish(path, model)


@pytest.mark.parametrize("step", steps.NATIVE[7:11])
def test_stopped_in_a_commit(scene, step):
    path, make = scene
    victim, writer, reader = make(), make(), make(mode="r")
    model = bytearray(content(PAGES))
    victim.ask(("store", 8 * PAGE, b"dirty"))
    model[8 * PAGE : 8 * PAGE + 5] = b"dirty"
    victim.ask(("arm", step, 1, signal.SIGSTOP))
    victim.say(("punch", "/a", 20 * PAGE, PAGE))
    assert os.WIFSTOPPED(os.waitpid(victim.pid, os.WUNTRACED)[1])
    try:
        writer.say(("store", 6 * PAGE, b"writer"))  # waits, or doesn't, by the step
        reader.say(("look", [(0, PAGE)]))
        assert reader.hear() == [bytes(model[:PAGE])], "who only reads never waits"
    finally:
        victim.resume()
    assert (victim.hear(), writer.hear()) == ("done", "stored")
    model[6 * PAGE : 6 * PAGE + 6], model[20 * PAGE : 21 * PAGE] = b"writer", bytes(PAGE)
    agree(model, victim, writer, reader)
    end(victim, writer, reader)
    finish(path, model)


def test_two_that_wait_for_each_other(scene):
    """Many stores of two processes into the same blocks at once: no circle."""
    path, make = scene
    one, other = make(), make()
    for n in range(60):
        one.say(("store", n * 18 * PAGE, b"one"))
        other.say(("store", (n * 18 + 1) * PAGE, b"other"))
        assert (one.hear(), other.hear()) == ("stored", "stored")
    model = bytearray(content(PAGES))
    for n in range(60):
        model[n * 18 * PAGE : n * 18 * PAGE + 3] = b"one"
        model[(n * 18 + 1) * PAGE : (n * 18 + 1) * PAGE + 5] = b"other"
    agree(model, one, other)
    end(one, other)
    finish(path, model)
