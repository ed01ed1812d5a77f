"""An exception out of nowhere, Ctrl-C above all, at any step and call: the call did all or nothing, the handle goes on (S8)."""

import pytest

import onecopy

from .processes import Calls, Process, at_step
from .scenarios import SCENARIOS
from .trials import LEAVING, assert_survived, assert_unlocked, early, late, spread


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(path: str, name: str, arm) -> None:
    """Do a scenario that `arm` interrupts; hold what follows against the states that it may leave."""
    fs, scenario = onecopy.open(path), SCENARIOS[name]
    early(scenario, fs)
    watch = arm()
    try:
        late(scenario, fs)
    except KeyboardInterrupt:
        pass
    finally:
        watch.__exit__(None, None, None)
    assert_unlocked(fs)
    assert fs.check().findings == []
    vars(fs).pop("kept", None)
    fs.close()


def try_all(trial, name, ways, allowed) -> None:
    for where, arm in ways.items():
        path = trial()
        try:
            Process(lambda _, path=path, arm=arm: interrupted(path, name, arm)).result()
            assert_survived(onecopy.open(path), allowed)
        except BaseException as error:
            error.add_note(f"after an interrupt while doing '{name}' at {where}")
            raise


class AtStep:
    """Interrupts this process at its first arrival at a step."""

    def __init__(self, step: str) -> None:
        at_step(step, 1, interrupt)

    def __exit__(self, *_: object) -> None:
        at_step("lock taken", 0, interrupt)


def steps_of(reached, most):
    steps = list(reached)
    return {f"'{steps[n - 1]}'": lambda n=n: AtStep(steps[n - 1]) for n in spread(len(steps), most)}


def calls_of(count, most):
    return {f"call event {n}": lambda n=n: Calls(n, interrupt, LEAVING).__enter__() for n in spread(count, most)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_interrupted_at_some_steps_and_calls(trial, counted, name):
    allowed, reached, _, calls = counted(name)
    try_all(trial, name, steps_of(reached, 4) | calls_of(calls, 2), allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_interrupted_at_any_step_and_call(trial, counted, name):
    allowed, reached, _, calls = counted(name)
    try_all(trial, name, steps_of(reached, 99) | calls_of(calls, 400), allowed)
