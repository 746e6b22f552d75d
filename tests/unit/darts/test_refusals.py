"""The core refuses each impossible event in a line that names ids and state, and is unchanged."""

from __future__ import annotations

import pickle
from math import nan

import pytest

from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core
from darts.waiting import describe


def make_core() -> Core:
    """Version 1, group 0 on engine `a` with rollouts 0 and 1 at 5 tokens, and a requested step."""
    core = Core(CoreConfig(groups_per_step=1, group_size=2, redundancy="none", max_tokens=50))
    for event in (
        ev.PolicyPublished(0),
        ev.PolicyPublished(1),
        ev.EngineJoined("a", "cpu", 2, 1),
        ev.PromptsDrawn((ev.Prompt("p"),)),
        ev.RolloutProgressed(0, 5),
        ev.RolloutProgressed(1, 5),
        ev.ShardsRequested(0),
    ):
        core.handle(event)
    return core


REFUSED: list[tuple[ev.Event, list[str]]] = [
    (ev.EngineJoined("a", "cpu", 2, 1), ["engine a", "already"]),
    (ev.EngineJoined("b", "cpu", 0, 1), ["engine b", "0 slots"]),
    (ev.EngineJoined("b", "cpu", 2, 2), ["engine b", "version 2", "above 1"]),
    (ev.EngineLost("b"), ["engine b", "a"]),
    (ev.PolicyLoaded("a", 0), ["engine a", "version 0", "had 1"]),
    (ev.PolicyLoaded("a", 2), ["engine a", "version 2", "newest is 1"]),
    (ev.LatencyReported("b", 1.0, 1.0), ["engine b"]),
    (ev.RolloutProgressed(2, 1), ["rollout 2", "never launched"]),
    (ev.RolloutProgressed(0, 4), ["rollout 0", "4 tokens", "had 5"]),
    (ev.RolloutProgressed(0, 51), ["rollout 0", "51 tokens", "limit is 50"]),
    (ev.RolloutFinished(0, 4, False, 1.0, 1), ["rollout 0", "4 tokens"]),
    (ev.RolloutFinished(0, 9, False, nan, 1), ["rollout 0", "reward nan"]),
    (ev.RolloutFinished(0, 9, False, 1.0, 0), ["rollout 0", "version 0"]),
    (ev.RolloutFinished(0, 9, False, 1.0, 2), ["rollout 0", "version 2"]),
    (ev.RolloutFailed(-1), ["rollout -1"]),
    (ev.RolloutStopped(0, 5), ["rollout 0", "running"]),
    (ev.PolicyPublished(1), ["version 1"]),
    (ev.ShardsRequested(1), ["step 1", "0"]),
    (ev.GroupTrained(0), ["group 0"]),
    (ev.GroupTrained(7), ["group 7"]),
    (ev.EvaluationRequested((ev.Prompt("q"),), 0, 0), ["0 samples"]),
]


@pytest.mark.parametrize(("event", "named"), REFUSED, ids=lambda value: str(value)[:60])
def test_an_impossible_event_is_refused_and_changes_nothing(
    event: ev.Event, named: list[str]
) -> None:
    core = make_core()
    before = pickle.dumps(vars(core))
    with pytest.raises(ev.ProtocolError) as refusal:
        core.handle(event)
    message = str(refusal.value)
    assert "\n" not in message and all(part in message for part in named), message
    assert pickle.dumps(vars(core)) == before


def test_a_second_batch_of_one_version_is_refused() -> None:
    core = make_core()
    for rollout_id in (0, 1):
        core.handle(ev.RolloutFinished(rollout_id, 9, False, 1.0, 1))
    with pytest.raises(ev.ProtocolError, match=r"step 1 .*version 1"):
        core.handle(ev.ShardsRequested(1))


def test_the_core_says_which_side_waits() -> None:
    core = Core(CoreConfig(groups_per_step=2, group_size=2, redundancy="none", max_lag=0))
    core.handle(ev.PolicyPublished(0))
    core.handle(ev.ShardsRequested(0))
    assert describe(core) == "learner waits for actors: no engine has joined"
    core.handle(ev.EngineJoined("a", "cpu", 4, 0))
    core.handle(ev.PromptsDrawn(tuple(ev.Prompt(str(n)) for n in range(4))))
    assert describe(core) == "learner waits for group 0 (lag bound), 2 due in total"
    for rollout_id in range(4):
        core.handle(ev.RolloutFinished(rollout_id, 9, False, 1.0, 0))
    assert describe(core) == "actors wait for the learner: 0 groups outstanding at version 0"
    core.handle(ev.AdmissionPaused(True))
    assert describe(core) == "actors wait for the learner: the trajectory store is full"
