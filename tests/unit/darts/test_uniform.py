"""Groups without signal, as a story: a group whose selected rewards are all equal is replaced, a
bounded number of times per step.
"""

from __future__ import annotations

from typing import Any

from darts import checkpoint
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core


class Story:
    """One engine with room for two groups of two, and a learner that waits for two groups."""

    def __init__(self, **changes: Any) -> None:
        settings: dict[str, Any] = {"uniform": "drop", "max_refill": 1.0, "redundancy": "none"}
        settings |= changes
        self.core = Core(CoreConfig(groups_per_step=2, group_size=2, **settings))
        self.decisions: list[ev.Decision] = []
        self.apply(ev.PolicyPublished(0), ev.EngineJoined("a", "cpu", 4, 0))
        self.apply(ev.PromptsDrawn(tuple(ev.Prompt(f"p{i}") for i in range(10))))
        self.apply(ev.ShardsRequested(0))

    def apply(self, *events: ev.Event) -> None:
        for event in events:
            self.decisions += self.core.handle(event)

    def finish(self, group_id: int, *rewards: float) -> None:
        launched = [
            d for d in self.decisions if isinstance(d, ev.Launch) and d.group_id == group_id
        ]
        for launch, reward in zip(launched, rewards, strict=True):
            self.apply(ev.RolloutFinished(launch.rollout_id, 10, False, reward, 0))

    @property
    def shipped(self) -> list[int]:
        return [d.record.group_id for d in self.decisions if isinstance(d, ev.Ship)]

    @property
    def dropped(self) -> list[tuple[int, str, bool]]:
        drops = [d for d in self.decisions if isinstance(d, ev.Drop)]
        return [(d.record.group_id, d.record.end, d.requeued) for d in drops]


def test_a_uniform_group_is_dropped_for_good_and_another_prompt_takes_its_place() -> None:
    story = Story()
    story.finish(0, 1.0, 1.0)
    assert story.dropped == [(0, "uniform", False)]
    assert 2 in story.core.groups  # the next prompt's group has opened
    story.finish(1, 0.0, 1.0)
    story.finish(2, 1.0, 0.0)
    assert story.shipped == [1, 2]


def test_beyond_the_bound_uniform_groups_are_trained() -> None:
    """With two replacements per step of two groups, the batch fills without any signal."""
    story = Story()
    for group_id in range(4):
        story.finish(group_id, 0.0, 0.0)
    assert [group_id for group_id, _, _ in story.dropped] == [0, 1]
    assert story.shipped == [2, 3]


def test_the_bound_starts_again_with_each_batch() -> None:
    story = Story()
    for group_id in range(4):
        story.finish(group_id, 0.0, 0.0)
    story.apply(*(ev.GroupTrained(i) for i in story.shipped), ev.PolicyPublished(1))
    story.apply(ev.ShardsRequested(1))
    story.finish(4, 0.0, 0.0)
    assert story.dropped[-1] == (4, "uniform", False)


def test_the_count_survives_a_restart() -> None:
    story = Story()
    story.finish(0, 1.0, 1.0)
    story.finish(1, 1.0, 1.0)
    story.core = checkpoint.restore(story.core.config, checkpoint.save(story.core))
    story.finish(2, 1.0, 1.0)
    story.finish(3, 1.0, 1.0)
    assert story.shipped == [2, 3]


def test_by_default_uniform_groups_are_trained() -> None:
    story = Story(uniform="train")
    story.finish(0, 1.0, 1.0)
    story.finish(1, 1.0, 1.0)
    assert story.dropped == [] and story.shipped == [0, 1]


def test_only_selected_rewards_count() -> None:
    """A wrong response that is too long to be selected gives no gradient."""
    story = Story(num_long=0, redundancy="fixed", upper=2.0, long_end="none")
    launched = [d.rollout_id for d in story.decisions if isinstance(d, ev.Launch)]
    assert len(launched) == 4  # all rollouts of group 0
    story.apply(
        ev.RolloutFinished(launched[0], 12, False, 0.0, 0),
        ev.RolloutFinished(launched[1], 5, False, 1.0, 0),
        ev.RolloutFinished(launched[2], 6, False, 1.0, 0),
        ev.RolloutProgressed(launched[3], 7),
    )
    assert story.dropped == [(0, "uniform", False)]
