"""Pilots, as a story: a group launches two of its four rollouts first, and the others only if their
rewards may differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts import checkpoint
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core
from darts.invariants import validate_state
from darts.sizing.rewards import RewardStats

SOLVED, FAILED = RewardStats(30.0, 0.0), RewardStats(0.0, 30.0)


class Story:
    """One engine with room for two groups of four, and a learner that waits for one group."""

    def __init__(self, history: RewardStats | None = None, **changes: Any) -> None:
        settings: dict[str, Any] = {"pilot": 2, "redundancy": "none", "max_refill": 100.0}
        settings |= changes
        self.core = Core(CoreConfig(groups_per_step=1, group_size=4, **settings))
        self.decisions: list[ev.Decision] = []
        self.apply(ev.PolicyPublished(0), ev.EngineJoined("a", "cpu", 8, 0))
        self.history = history
        self.draw("p")

    def draw(self, prompt_id: str, visit: int = 0) -> None:
        self.apply(ev.PromptsDrawn((ev.Prompt(prompt_id, visit=visit, rewards=self.history),)))

    def apply(self, *events: ev.Event) -> None:
        for event in events:
            self.decisions += self.core.handle(event)

    def of(self, kind: type) -> list[Any]:
        return [d for d in self.decisions if isinstance(d, kind)]

    @property
    def running(self) -> list[int]:
        return sorted(self.core.rollouts)

    def finish(self, *rewards: float) -> None:
        """Finish the rollouts that run, in order of launch."""
        for rollout_id, reward in zip(self.running, rewards, strict=False):
            version = self.core.rollouts[rollout_id].oldest_version
            self.apply(ev.RolloutFinished(rollout_id, 10, False, reward, version))

    @property
    def records(self) -> list[ev.GroupRecord]:
        return [d.record for d in self.decisions if isinstance(d, (ev.Ship, ev.Drop))]


def test_a_group_launches_its_pilot_alone() -> None:
    story = Story()
    assert [launch.index for launch in story.of(ev.Launch)] == [0, 1]
    assert story.of(ev.OpenGroup)[0].budget == 4


def test_different_rewards_commit_the_rest_while_the_pilot_still_runs() -> None:
    story = Story(pilot=3)
    story.finish(1.0, 0.0)
    assert [launch.index for launch in story.of(ev.Launch)] == [0, 1, 2, 3]
    story.apply(ev.ShardsRequested(0))
    story.finish(1.0, 1.0)
    assert [(r.end, r.pilot, r.mixed_prob) for r in story.records] == [("shipped", 3, 1.0)]


def test_equal_rewards_alone_do_not_stop_a_prompt_that_is_new() -> None:
    """Nothing is known about it yet, and two further responses may well differ."""
    story = Story(pilot=2)
    story.finish(1.0, 1.0)
    assert len(story.running) == 2 and not story.records


@pytest.mark.parametrize(("history", "reward"), [(SOLVED, 1.0), (FAILED, 0.0)])
def test_a_group_without_a_probable_signal_is_stopped_and_replaced(
    history: RewardStats, reward: float
) -> None:
    story = Story(history)
    story.finish(reward, reward)
    (record,) = story.records
    assert (record.end, record.pilot, record.budget) == ("no_signal", 2, 4)
    assert record.mixed_prob is not None and record.mixed_prob < 0.1
    assert [r.end for r in record.rollouts] == ["discarded", "discarded"]
    assert not story.of(ev.Drop)[0].requeued and not story.core.groups
    assert story.of(ev.RememberRewards)[-1].rewards.num_stops == 1


def test_a_surprising_pilot_is_committed_whatever_the_history() -> None:
    story = Story(SOLVED)
    story.finish(1.0, 0.0)
    assert len(story.running) == 2


def test_the_first_half_of_a_pilot_decides_nothing() -> None:
    """Short responses end first, and those still running may be of the other kind."""
    story = Story(SOLVED, pilot=3)
    story.finish(1.0, 1.0)
    assert len(story.running) == 1 and not story.records
    story.finish(0.0)
    assert len(story.running) == 1 and not story.records


def test_beyond_the_bound_groups_are_completed() -> None:
    """One replacement per step: the second group without a signal is trained."""
    story = Story(SOLVED, max_refill=1.0)
    story.apply(ev.ShardsRequested(0))
    story.finish(1.0, 1.0)
    story.draw("q")
    story.finish(1.0, 1.0)
    story.finish(1.0, 1.0)
    assert [(r.end, r.uniform) for r in story.records] == [("no_signal", False), ("shipped", True)]


def test_a_group_at_its_deadline_does_not_wait_for_its_pilot() -> None:
    story = Story(SOLVED, max_lag=0)
    story.apply(ev.ShardsRequested(0))
    assert len(story.running) == 4


def test_a_resume_without_pilots_completes_the_groups_that_had_one() -> None:
    story = Story(history=SOLVED)
    story.apply(ev.SettingsChanged(replace(story.core.config, pilot=0)))
    story.finish(1.0, 1.0)
    assert story.records == []
    assert [launch.index for launch in story.of(ev.Launch)] == [0, 1, 2, 3]


def test_small_differences_are_no_signal() -> None:
    story = Story(SOLVED, min_spread=0.2)
    story.finish(0.9, 1.0)
    assert [r.end for r in story.records] == ["no_signal"]


def test_a_lost_pilot_rollout_is_replaced_before_the_verdict() -> None:
    story = Story(SOLVED)
    story.finish(1.0)
    story.apply(ev.RolloutFailed(story.running[0]))
    assert [launch.index for launch in story.of(ev.Launch)] == [0, 1, 1]
    story.finish(1.0)
    assert [r.end for r in story.records] == ["no_signal"]


def test_a_pilot_whose_engine_is_lost_continues_on_the_next_one() -> None:
    story = Story(max_attempts=1)
    story.finish(1.0)
    story.apply(ev.EngineLost("a"))  # the second rollout has no attempt left
    assert not story.running and len(story.core.orphaned) == 1
    story.apply(ev.EngineJoined("b", "cpu", 8, 0))
    assert [launch.index for launch in story.of(ev.Launch)] == [0, 1, 2, 3]


def test_a_new_process_under_the_name_of_a_lost_engine_waits_for_its_policy() -> None:
    story = Story(SOLVED, max_lag=0)
    story.apply(ev.EngineLost("a"), ev.EngineJoined("a", "cpu", 8, -1))
    story.apply(ev.ShardsRequested(0))  # the group is due, so its pilot is over
    validate_state(story.core)
    assert not story.running
    story.apply(ev.PolicyLoaded("a", 0))
    assert len(story.running) == 4


def test_the_verdict_survives_a_restart() -> None:
    story = Story(SOLVED)
    story.finish(1.0)
    story.core = checkpoint.restore(story.core.config, checkpoint.save(story.core))
    story.finish(1.0)
    assert [r.end for r in story.records] == ["no_signal"]


def test_held_out_prompts_have_no_pilot() -> None:
    story = Story()
    story.apply(ev.EvaluationRequested((ev.Prompt("held-out"),), samples=4, min_version=0))
    assert len(story.running) == 6


def test_a_pilot_must_fit_into_a_group() -> None:
    with pytest.raises(ValueError, match="darts.pilot=5: must be <= darts.group_size=4"):
        CoreConfig(groups_per_step=1, group_size=4, pilot=5)


@settings(max_examples=60)
@given(
    max_stops=st.integers(0, 4),
    min_mixed_prob=st.floats(0.01, 0.99),
    visits=st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=25),
)
def test_no_prompt_is_given_up_forever(
    max_stops: int, min_mixed_prob: float, visits: list[float]
) -> None:
    """Whatever the rewards, each prompt gets its whole budget at least once in max_stops + 1
    visits.
    """
    story = Story(max_stops=max_stops, min_mixed_prob=min_mixed_prob, max_refill=1000.0)
    stops = version = 0
    for visit, reward in enumerate(visits, 1):
        while story.running:
            story.finish(*[reward] * 4)
        if story.core.num_ready:
            version, stops = version + 1, 0
            story.apply(ev.ShardsRequested(version))
            story.apply(ev.GroupTrained(story.of(ev.Ship)[-1].record.group_id))
            story.apply(ev.PolicyPublished(version), ev.PolicyLoaded("a", version))
        else:
            stops += 1
        assert stops <= max_stops
        story.history = story.of(ev.RememberRewards)[-1].rewards
        assert story.history.num_stops == stops
        story.draw("p", visit)
    assert len(story.records) == len(visits)
