"""The common beginning of prompts, which a learner may forward once for a group."""

from __future__ import annotations

import numpy as np
import pytest

from buffer.prompts import LEAST, common_prompt
from buffer.wire.messages import Trajectory

BEFORE = list(range(100, 100 + LEAST - 1))  # so that the tokens after them decide


def trajectory(tokens: list[int], sampled: list[int]) -> Trajectory:
    tokens, sampled = BEFORE + tokens, [0] * len(BEFORE) + sampled
    return Trajectory(
        rollout_id=0,
        group_id=0,
        tokens=np.array(tokens, "<i4").tobytes(),
        sampled=np.array(sampled, np.uint8).tobytes(),
        actor_logprobs=bytes(4 * len(tokens)),
        versions=[(0, sum(sampled))],
        reward=0.0,
        truncated=False,
        advantage=1.0,
    )


FIRST = trajectory([5, 6, 7, 8, 9], [0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], 0),
        ([FIRST], 2),
        ([trajectory([5, 6, 7, 1], [0, 0, 0, 1])] * 3, 2),
        ([trajectory([5, 6, 1, 1], [0, 0, 0, 1])], 2),
        ([trajectory([5, 1, 7, 1], [0, 0, 0, 1]), FIRST], 1),
        ([trajectory([1, 6, 7, 8], [0, 0, 0, 1])], 0),
        ([trajectory([5 + 256, 6, 7, 8], [0, 0, 0, 1])], 0),
        ([trajectory([5, 6 + 256, 7, 8], [0, 0, 0, 1])], 1),
        ([trajectory([5, 6, 7, 8, 9], [0, 1, 0, 0, 1])], 0),
        ([trajectory([5, 6, 7, 8, 9], [0, 0, 1, 0, 1])], 1),
        ([trajectory([5, 6], [0, 0])], 0),
    ],
    ids=[
        "a single one shares nothing",
        "all but the last token of the prompt",
        "the same prompt four times",
        "a token that differs after the shared ones",
        "a token that differs within them",
        "nothing in common",
        "the first token differs in its second byte alone",
        "the second token differs in its second byte alone",
        "a turn that begins at once",
        "the shortest prompt counts",
        "nothing sampled",
    ],
)
def test_the_common_prompt_ends_before_any_prediction(
    others: list[Trajectory], expected: int
) -> None:
    """`expected` tokens after `BEFORE`, or none at all, because these alone are too few."""
    expected += len(BEFORE) if expected else 0
    assert common_prompt([FIRST, *others]) == expected
    assert common_prompt([*others, FIRST]) == expected
