"""A restarted buffer: ids are never used twice, and groups that lost tokens are drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core


def make_core(num_prompts: int = 1, groups_per_step: int = 1) -> tuple[Core, list[ev.Decision]]:
    """A core with groups of two on an engine with two slots, and its decisions."""
    core = Core(CoreConfig(groups_per_step=groups_per_step, group_size=2, redundancy="none"))
    decisions: list[ev.Decision] = []
    for event in (
        ev.PolicyPublished(0),
        ev.EngineJoined("a", "cpu", 2, 0),
        ev.PromptsDrawn(tuple(ev.Prompt(f"p{n}") for n in range(num_prompts))),
    ):
        decisions += core.handle(event)
    return core, decisions


def finish(core: Core, *rollout_ids: int) -> None:
    for rollout_id in rollout_ids:
        core.handle(ev.RolloutFinished(rollout_id, 9, False, 1.0, 0))


def drops(decisions: Sequence[ev.Decision]) -> list[tuple[int, str, bool]]:
    return [
        (one.record.group_id, one.record.end, one.requeued)
        for one in decisions
        if isinstance(one, ev.Drop)
    ]


def shipped(decisions: Sequence[ev.Decision]) -> list[int]:
    return [one.record.group_id for one in decisions if isinstance(one, ev.Ship)]


def test_a_restarted_buffer_skips_ids_that_may_have_been_sent() -> None:
    core, first = make_core(num_prompts=1)
    core.handle(ev.BufferRestarted())
    finish(core, 0, 1)
    opened = core.handle(ev.PromptsDrawn((ev.Prompt("next"),)))
    launched = {one.rollout_id for one in [*first, *opened] if isinstance(one, ev.Launch)}
    groups = {one.group_id for one in [*first, *opened] if isinstance(one, ev.OpenGroup)}
    assert len(launched) == 4 and len(groups) == 2
    assert min(launched - {0, 1}) > 100_000 and max(groups) > 100_000


def test_a_rollout_in_flight_continues_from_its_remaining_tokens() -> None:
    core, _ = make_core()
    core.handle(ev.RolloutProgressed(0, 20))
    assert not core.handle(ev.TokensLost(0, 12))
    core.handle(ev.RolloutProgressed(0, 13))
    assert core.rollouts[0].tokens == 13


def test_a_ready_group_that_lost_tokens_is_dropped_and_its_prompt_returns() -> None:
    core, _ = make_core()
    finish(core, 0, 1)
    decisions = core.handle(ev.TokensLost(1, 3))
    assert drops(decisions) == [(0, "tokens_lost", True)]
    reopened = [one for one in decisions if isinstance(one, ev.OpenGroup)]
    assert [one.prompt_id for one in reopened] == ["p0"]


def test_a_step_that_lost_tokens_was_never_sent_and_is_made_again() -> None:
    """The groups that have all their tokens are offered again; the other one is drawn again."""
    core, _ = make_core(num_prompts=2, groups_per_step=2)
    finish(core, 0, 1)
    finish(core, 2, 3)
    assert shipped(core.handle(ev.ShardsRequested(0))) == [0, 1]
    decisions = core.handle(ev.TokensLost(1, 3))
    assert drops(decisions) == [(0, "tokens_lost", True)]
    again = [one.rollout_id for one in decisions if isinstance(one, ev.Launch)]
    assert core.num_ready == 1 and len(again) == 2
    assert not shipped(core.handle(ev.ShardsRequested(0)))
    decisions = [
        decision
        for rollout_id in again
        for decision in core.handle(ev.RolloutFinished(rollout_id, 9, False, 1.0, 0))
    ]
    assert shipped(decisions) == [1, 2]


def test_a_portion_that_lost_tokens_is_made_again_and_the_earlier_ones_stay() -> None:
    core, _ = make_core(num_prompts=4, groups_per_step=3)
    core.handle(ev.SettingsChanged(replace(core.config, stream="group")))
    assert not core.handle(ev.ShardsRequested(0))
    finish(core, 0)
    decisions = core.handle(ev.RolloutFinished(1, 9, False, 1.0, 0))
    assert [(d.record.group_id, d.portion) for d in decisions if isinstance(d, ev.Ship)] == [(0, 0)]
    finish(core, 2, 3)
    finish(core, 4, 5)
    decisions = core.handle(ev.ShardsRequested(0, 1))  # the step is complete with it
    assert shipped(decisions) == [1, 2] and core.outstanding.steps_left == 0
    assert drops(core.handle(ev.TokensLost(4, 3))) == [(2, "tokens_lost", True)]
    assert core.outstanding.steps_left == 1
    decisions = core.handle(ev.ShardsRequested(0, 1))
    assert [(d.record.group_id, d.portion) for d in decisions if isinstance(d, ev.Ship)] == [(1, 1)]
    with pytest.raises(ev.ProtocolError, match="portion 0 of step 0"):
        core.handle(ev.ShardsRequested(0))


def test_losing_no_tokens_or_those_of_an_unknown_rollout_changes_nothing() -> None:
    core, _ = make_core()
    core.handle(ev.RolloutProgressed(0, 20))
    assert not core.handle(ev.TokensLost(0, 20)) and core.rollouts[0].tokens == 20
    assert not core.handle(ev.TokensLost(99, 0))
