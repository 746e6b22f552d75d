"""Pilots: a group launches a few rollouts first, and the others only if its rewards may differ.

Pure. Driven by `darts.core.Core`. A pilot is judged once all of its rollouts have ended, because
the short ones end first and say little about the long ones. It is over at once if its rewards
differ already, or if the group's deadline leaves no time. Source: Pilot-Commit (arXiv 2605.26606).
Differs: the decision uses the prompt's history, and a prompt is never given up for good.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from darts.config import CoreConfig
from darts.sizing import rewards
from darts.sizing.rewards import RewardPool, RewardStats
from darts.state.groups import Group


class Verdict(Enum):
    WAIT = "wait"  # the pilot is not over
    COMMIT = "commit"  # launch the rest of the budget
    STOP = "stop"  # the group would probably carry no signal


class Judgement(NamedTuple):
    """The verdict, and the probability on which it rests that the group's rewards will differ."""

    verdict: Verdict
    mixed_prob: float | None = None


def judge(group: Group, config: CoreConfig, pool: RewardPool) -> Judgement:
    """Judge a group that holds rollouts back. `pool` is the prior of prompts without history."""
    seen = [r for r in group.responses() if r.reward is not None]
    if rewards.has_signal([r.reward for r in seen if r.reward is not None], config.min_spread):
        return Judgement(Verdict.COMMIT, 1.0)
    if group.at_deadline or not config.pilot:  # which a resume may have turned off
        return Judgement(Verdict.COMMIT)
    if group.running or group.planned:
        return Judgement(Verdict.WAIT)
    history = group.prompt.rewards or RewardStats()
    num_right = sum(r.is_right for r in seen)
    mixed_prob = rewards.mixed_probability(
        rewards.prior(history, pool),
        num_right,
        len(seen) - num_right,
        group.group_size - len(seen),
    )
    overdue = history.num_stops >= config.max_stops
    if not seen or overdue or mixed_prob >= config.min_mixed_prob:
        return Judgement(Verdict.COMMIT, mixed_prob)
    return Judgement(Verdict.STOP, mixed_prob)
