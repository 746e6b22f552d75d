"""Groups at their deadline, as a story: two groups of two from three rollouts each, which the
learner needs for its next batch.
"""

from __future__ import annotations

from typing import Any

import pytest

from configs import cli
from darts import events as ev
from darts.config import CoreConfig, core_config
from darts.core import Core
from darts.simulate.schema import SimulateConfig
from darts.simulate.world import simulate


class Story:
    """Rollouts 0 to 2 belong to one group and 3 to 5 to the other. The rule waits for all."""

    def __init__(self, **changes: Any) -> None:
        settings: dict[str, Any] = {"max_lag": 0, "groups_per_step": 2, "long_end": "longest"}
        self.core = Core(
            CoreConfig(group_size=2, redundancy="fixed", upper=1.5, **(settings | changes))
        )
        prompts = tuple(ev.Prompt(name) for name in "pqrs"[: self.core.config.groups_per_step])
        self.apply(ev.PolicyPublished(0), ev.EngineJoined("a", "cpu", 12, 0))
        self.apply(ev.PromptsDrawn(prompts))

    def apply(self, *events: ev.Event) -> list[ev.Decision]:
        return [decision for event in events for decision in self.core.handle(event)]

    def finish(self, rollout_id: int, num_tokens: int = 10, version: int = 0) -> list[ev.Decision]:
        return self.apply(ev.RolloutFinished(rollout_id, num_tokens, False, 1.0, version))


def cancelled(decisions: list[ev.Decision]) -> list[int]:
    return [d.rollout_id for d in decisions if isinstance(d, ev.Cancel)]


def shipped(decisions: list[ev.Decision]) -> list[ev.GroupRecord]:
    return [d.record for d in decisions if isinstance(d, ev.Ship)]


def test_due_groups_are_released_together() -> None:
    """Releasing one while the learner waits for the other would save no time."""
    story = Story()
    story.finish(0)
    story.finish(1)
    assert story.apply(ev.ShardsRequested(0)) == []
    assert story.finish(3) == []
    decisions = story.finish(4)
    assert sorted(cancelled(decisions)) == [2, 5]
    assert len(shipped(decisions)) == 2


def test_a_long_response_that_ends_in_the_meantime_takes_its_seat() -> None:
    story = Story()
    story.apply(ev.ShardsRequested(0))
    for rollout_id, num_tokens in ((0, 10), (1, 11), (3, 10), (2, 25)):
        assert shipped(story.finish(rollout_id, num_tokens)) == []
    decisions = story.finish(4)
    assert cancelled(decisions) == [5]
    record = next(r for r in shipped(decisions) if r.prompt_id == "p")
    long = [r.tokens for r in record.rollouts if r.end == "selected_long"]
    assert long == [25]


def test_the_learner_does_not_release_a_batch_that_others_still_hold_up() -> None:
    """With a bound of 1 the second pair of groups, of the newer version, is not due."""
    story = Story(max_lag=1, groups_per_step=1)
    story.apply(ev.PromptsDrawn((ev.Prompt("q"),)))
    for rollout_id in (0, 1, 3, 4):
        story.finish(rollout_id)
    assert story.apply(ev.ShardsRequested(0)) == []  # none is due, and none is ready
    assert len(shipped(story.finish(5))) == 1
    story.apply(ev.GroupTrained(1), ev.PolicyPublished(1))
    decisions = story.apply(ev.ShardsRequested(1))
    assert (cancelled(decisions), len(shipped(decisions))) == ([2], 1)


def test_a_newer_group_leaves_a_seat_to_older_ones_that_would_find_none() -> None:
    """One seat per batch, and a bound of 2. Groups p, q and r fill three batches. If s, of
    the newer version, took the second one, q or r would be too old after the third.
    """
    story = Story(max_lag=2, groups_per_step=1)
    story.apply(ev.PromptsDrawn((ev.Prompt("q"), ev.Prompt("r"), ev.Prompt("s"))))
    for rollout_id in (0, 1, 2):
        story.finish(rollout_id)
    assert len(shipped(story.apply(ev.ShardsRequested(0)))) == 1
    story.apply(ev.GroupTrained(0), ev.PolicyPublished(1), ev.PolicyLoaded("a", 1))
    for rollout_id in (9, 10, 11):  # those of s, which opened only now
        story.finish(rollout_id, version=1)
    assert story.apply(ev.ShardsRequested(1)) == []
    for rollout_id in (6, 7):
        assert story.finish(rollout_id) == []
    [record] = shipped(story.finish(8))
    assert record.prompt_id == "r"  # whichever of q and r ends first
    story.apply(ev.GroupTrained(2), ev.PolicyPublished(2))
    for rollout_id in (3, 4, 5):
        story.finish(rollout_id)
    [record] = shipped(story.apply(ev.ShardsRequested(2)))
    assert record.prompt_id == "q"


def test_complete_waits_for_the_rule() -> None:
    config = cli.load(["staleness.on_deadline=complete", "pipeline.mode=async"])
    assert not core_config(config).release_at_deadline
    story = Story(release_at_deadline=False)
    story.apply(ev.ShardsRequested(0))
    for rollout_id in (0, 1, 2, 3, 4):
        assert cancelled(story.finish(rollout_id)) == []
    assert len(shipped(story.finish(5, 99))) == 2


@pytest.mark.parametrize("max_lag", [1, 2])
def test_a_tight_bound_costs_long_seats_or_time(max_lag: int) -> None:
    """`complete` keeps the long seats and takes longer, in a simulation of the demo."""
    wait, complete = (
        simulate(
            cli.load(
                [
                    "--config",
                    "configs/simulate/cpu.yaml",
                    "run.steps=10",
                    f"staleness.max_lag={max_lag}",
                    f"staleness.on_deadline={on_deadline}",
                ],
                SimulateConfig,
            )
        )
        for on_deadline in ("wait", "complete")
    )
    assert complete["long_wrong_frac"] < wait["long_wrong_frac"]
    assert complete["step_s"] > wait["step_s"]
