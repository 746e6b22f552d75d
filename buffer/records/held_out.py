"""From the scored responses to held-out prompts to the results of an evaluation. Pure.

Used by evaluations during a run (`buffer.evaluation`) and after it (`tools.evaluate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Answer(NamedTuple):
    """A held-out response that was scored."""

    kind: str  # of its prompt
    reward: float
    tokens: int


def judged(answers: Sequence[Answer]) -> dict[str, float]:
    """Rewards and lengths of held-out responses, of all together and of each kind of prompt."""
    if not answers:
        return {}
    lengths = [answer.tokens for answer in answers]
    row = _means("eval", answers)
    row |= {f"eval/length_p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)}
    for kind in sorted({answer.kind for answer in answers} - {""}):
        row |= _means(f"eval/{kind}", [answer for answer in answers if answer.kind == kind])
    return row


def evaluation_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation in a row of metrics, which only the row of the step that it ended in has."""
    return {name: value for name, value in row.items() if name.startswith("eval/")}


def _means(name: str, answers: Sequence[Answer]) -> dict[str, float]:
    """The mean reward, which is also an accuracy if each reward is 0 or 1, and the mean length."""
    rewards = [answer.reward for answer in answers]
    mean = float(np.mean(rewards))
    accuracy = {f"{name}/accuracy": mean} if {0.0, 1.0}.issuperset(rewards) else {}
    length = float(np.mean([answer.tokens for answer in answers]))
    return {f"{name}/reward_mean": mean, **accuracy, f"{name}/length_mean": length}
