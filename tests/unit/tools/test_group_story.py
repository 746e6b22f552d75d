"""The story of one group, printed from a log that holds two."""

from __future__ import annotations

from buffer.records.event_log import LoggedEvent
from darts import events as ev
from tools.reporting.group_story import Story


def opened(group_id: int, rollout_id: int) -> list[ev.Decision]:
    prompt_id = f"prompt {group_id}"
    return [
        ev.OpenGroup(group_id, prompt_id, "train", "pool/0", 2, "survivor"),
        ev.Launch(rollout_id, group_id, prompt_id, 0, 0, 1, "train", "pool/0", None),
    ]


LOG = [
    LoggedEvent(1.0, ev.PromptsDrawn(()), opened(4, 10) + opened(5, 11), True),
    LoggedEvent(2.0, ev.RolloutProgressed(10, 8), [], True),
    LoggedEvent(
        2.5, ev.RolloutProgressed(11, 16), [ev.Cancel(10, "pool/0", "past_selection")], True
    ),
    LoggedEvent(3.0, ev.RolloutStopped(10, 11), [], True),
]


def told(group_id: int | None, prompt_id: str | None) -> list[str]:
    story = Story(group_id, prompt_id)
    return [" ".join(line.split()) for entry in LOG for line in story.lines(entry)]


def test_a_story_runs_from_the_opening_of_its_group_to_its_stop() -> None:
    assert told(4, None) == [
        "1.000 s -> open group 4 of prompt prompt 4 for train on engine pool/0: budget 2, "
        "long seat by survivor",
        "1.000 s -> launch rollout 10 on pool/0",
        "2.000 s rollout 10 has 8 tokens",
        "2.500 s -> cancel rollout 10 at 8 tokens (past selection)",
        "3.000 s rollout 10 stopped; 3 tokens were sampled after the cancel",
    ]


def test_a_prompt_gives_the_stories_of_only_its_own_groups() -> None:
    assert told(None, "prompt 4") == told(4, None)
    assert told(6, None) == []
