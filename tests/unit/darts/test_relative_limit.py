"""The relative length limit, as a story: a group of four, two of which set the median. Responses
have to end at twice as many tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from darts import checkpoint
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core
from darts.invariants import validate_state
from darts.sizing import lengths
from darts.sizing.lengths import LengthStats


class Story:
    """One engine and one group. Its rollouts are numbered from 0."""

    def __init__(self, purpose: ev.Purpose = "train", **changes: Any) -> None:
        settings: dict[str, Any] = {"relative_limit": 2.0, "redundancy": "none"}
        self.config = CoreConfig(groups_per_step=1, group_size=4, **(settings | changes))
        self.core = Core(self.config)
        self.decisions: list[ev.Decision] = []
        self.apply(ev.PolicyPublished(0), ev.EngineJoined("a", "cpu", 16, 0))
        if purpose == "train":
            self.apply(ev.PromptsDrawn((ev.Prompt("p"),)), ev.ShardsRequested(0))
        else:
            self.apply(ev.EvaluationRequested((ev.Prompt("p"),), 4, 0))

    def apply(self, *events: ev.Event) -> None:
        for event in events:
            self.decisions += self.core.handle(event)
            validate_state(self.core)

    def finish(
        self, rollout_id: int, num_tokens: int, truncated: bool = False, reward: float = 1.0
    ) -> None:
        self.apply(ev.RolloutFinished(rollout_id, num_tokens, truncated, reward, 0))

    def of(self, kind: type) -> list[Any]:
        return [d for d in self.decisions if isinstance(d, kind)]

    @property
    def curtailed(self) -> list[int]:
        return [d.rollout_id for d in self.of(ev.Curtail)]

    @property
    def record(self) -> ev.GroupRecord:
        (record,) = [d.record for d in self.decisions if isinstance(d, (ev.Ship, ev.Drop))]
        return record


def test_a_response_has_to_end_once_half_of_its_group_has_finished() -> None:
    story = Story()
    story.apply(ev.RolloutProgressed(3, 100))
    story.finish(0, 10)
    assert not story.curtailed
    story.finish(1, 12)
    assert story.of(ev.Curtail) == [ev.Curtail(3, "a")]
    story.apply(ev.RolloutProgressed(3, 120), ev.RolloutProgressed(2, 24))
    assert story.curtailed == [3]  # it is told once, and a response of twice the median may go on
    story.apply(ev.RolloutProgressed(2, 25))
    assert story.curtailed == [3, 2]


def test_its_reward_counts_and_it_takes_a_long_seat() -> None:
    story = Story(fill_truncated=False)  # under which a truncated response would drop the group
    for rollout_id, num_tokens in ((0, 10), (1, 12), (2, 20)):
        story.finish(rollout_id, num_tokens)
    story.apply(ev.RolloutProgressed(3, 30))
    assert not story.of(ev.Ship)  # its reward is awaited
    story.finish(3, 31, truncated=True, reward=0.0)
    (long,) = [r for r in story.record.rollouts if r.end == "selected_long"]
    assert (long.rollout_id, long.tokens, long.reward) == (3, 31, 0.0)
    assert long.curtailed and not long.truncated and not story.record.uniform
    assert sum(r.end == "selected_short" for r in story.record.rollouts) == 3


def test_with_a_surplus_the_survivor_alone_is_told_to_end() -> None:
    """Six rollouts for four seats: half are three, and four decide that the others are too long."""
    story = Story(redundancy="fixed", upper=1.5)
    for rollout_id, num_tokens in ((0, 10), (1, 11), (2, 12)):
        story.finish(rollout_id, num_tokens)
    story.apply(ev.RolloutProgressed(4, 15), ev.RolloutProgressed(5, 16))
    story.finish(3, 14)
    assert [d.rollout_id for d in story.of(ev.Cancel)] == [4]
    story.apply(ev.RolloutProgressed(5, 25))
    assert story.curtailed == [5]
    story.finish(5, 26, truncated=True, reward=0.0)
    ends = {r.rollout_id: r.end for r in story.record.rollouts}
    assert ends == {
        **dict.fromkeys((0, 1, 2), "selected_short"),
        3: "discarded",
        4: "cancelled",
        5: "selected_long",
    }


def test_a_response_that_ends_by_itself_first_is_as_any_other() -> None:
    story = Story()
    for rollout_id in (0, 1, 2):
        story.finish(rollout_id, 10)
    story.apply(ev.RolloutProgressed(3, 30))
    assert story.curtailed == [3]
    story.finish(3, 31)
    assert not any(r.curtailed for r in story.record.rollouts)


def test_statistics_take_its_length_as_a_lower_bound() -> None:
    story = Story()
    for rollout_id, num_tokens in ((0, 10), (1, 12), (2, 14)):
        story.finish(rollout_id, num_tokens)
    story.apply(ev.RolloutProgressed(3, 30))
    story.finish(3, 31, truncated=True)
    expected = lengths.update(None, [10, 12, 14], [31], lengths.POOL_PRIOR)
    learned: list[LengthStats] = [
        d.lengths for d in story.of(ev.RememberLengths) if d.prompt_id == "p"
    ]
    assert learned == [expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"relative_limit": 0.0},
        {"policy": "plain"},
        {"policy": "random"},
        {"policy": "first_finished"},
        {"audit": 1.0},
        {"purpose": "eval"},
    ],
    ids=str,
)
def test_nothing_is_cut_without_a_limit_or_in_controls_audits_and_evaluations(
    changes: dict[str, Any],
) -> None:
    story = Story(**changes)
    for rollout_id in (0, 1, 2):
        story.finish(rollout_id, 10)
    story.apply(ev.RolloutProgressed(3, 400))
    assert not story.curtailed


def test_a_pilot_does_not_set_the_median_of_its_group() -> None:
    """Its short responses end first, and the others may all be longer."""
    story = Story(pilot=3, redundancy="fixed", upper=2.0)
    story.finish(0, 10)
    story.finish(1, 12)
    story.apply(ev.RolloutProgressed(2, 100))
    assert not story.curtailed
    story.finish(2, 101, reward=0.0)
    assert len(story.of(ev.Launch)) == 8
    for rollout_id in (3, 4):
        story.finish(rollout_id, 45)
    assert not story.curtailed  # four of eight have set the median, of 45 tokens
    story.apply(ev.RolloutProgressed(5, 90))
    assert not story.curtailed
    story.apply(ev.RolloutProgressed(5, 91))
    assert story.curtailed == [5]


def test_no_rollout_is_told_to_end_that_is_cancelled_anyway() -> None:
    """The fourth response, a short one, lowers the median, and completes the group as well."""
    story = Story(cancel="eager", redundancy="fixed", upper=1.5)
    for rollout_id, num_tokens in ((0, 9), (1, 9), (2, 10)):
        story.finish(rollout_id, num_tokens)
    story.apply(ev.RolloutProgressed(4, 19), ev.RolloutProgressed(5, 19))
    story.finish(3, 8)
    assert not story.curtailed and len(story.of(ev.Cancel)) == 2


def test_a_limit_that_is_set_on_resume_applies_to_open_groups() -> None:
    story = Story(relative_limit=0.0)
    story.finish(0, 10)
    story.finish(1, 10)
    story.apply(ev.RolloutProgressed(3, 30))
    story.apply(ev.SettingsChanged(replace(story.config, relative_limit=2.0)))
    assert story.curtailed == [3]
    story.apply(ev.SettingsChanged(replace(story.config, relative_limit=0.0)))
    story.apply(ev.RolloutProgressed(2, 30))
    assert story.curtailed == [3]


def test_a_rollout_that_lost_its_tokens_in_a_power_cut_is_told_again_when_it_is_long() -> None:
    story = Story()
    story.finish(0, 10)
    story.finish(1, 10)
    story.apply(ev.RolloutProgressed(3, 30), ev.TokensLost(3, 5), ev.RolloutProgressed(3, 20))
    assert story.curtailed == [3]
    story.apply(ev.RolloutProgressed(3, 21))
    assert story.curtailed == [3, 3]


def test_another_engine_continues_a_response_and_is_told_again() -> None:
    story = Story()
    story.apply(ev.EngineJoined("b", "cpu", 16, 0))
    story.finish(0, 10)
    story.finish(1, 10)
    story.apply(ev.RolloutProgressed(3, 30), ev.EngineLost("a"))
    (again,) = [d.rollout_id for d in story.of(ev.Launch) if d.continues == 3]
    story.apply(ev.RolloutProgressed(again, 31))
    assert story.of(ev.Curtail)[-1] == ev.Curtail(again, "b")


def test_a_restored_core_decides_alike_and_tells_nobody_twice() -> None:
    story = Story()
    story.finish(0, 10)
    story.finish(1, 10)
    story.apply(ev.RolloutProgressed(3, 30))
    twin = checkpoint.restore(story.config, checkpoint.save(story.core))
    assert not twin.handle(ev.RolloutProgressed(3, 40))
    assert list(twin.handle(ev.RolloutProgressed(2, 21))) == [ev.Curtail(2, "a")]
    twin.handle(ev.RolloutFinished(2, 22, True, 0.0, 0))
    (shipped,) = [
        d for d in twin.handle(ev.RolloutFinished(3, 41, True, 0.0, 0)) if isinstance(d, ev.Ship)
    ]
    assert {r.rollout_id for r in shipped.record.rollouts if r.curtailed} == {2, 3}


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_a_limit_that_would_cut_half_of_all_responses_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match=r"darts\.relative_limit"):
        CoreConfig(groups_per_step=1, relative_limit=limit)
