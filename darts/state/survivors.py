"""Rollouts in flight that can no longer be selected, the long ones among them that survive, and
those that have to end where they are.

Pure, except for the generator that breaks ties and the group's own list of survivors. Driven by
`darts.core.Core`. Source: our online form of DARTS (arXiv 2605.30859). Let s_j be the length of the
j-th shortest finished rollout. A rollout in flight that is longer than s_j cannot take one of the j
short seats. If `long_end=survivor`, the longest such rollouts keep running and take the long seats.
"""

from __future__ import annotations

from math import inf
from random import Random

from darts import selection
from darts.config import CoreConfig
from darts.state.groups import Group, Rollout


def short_cutoff(group: Group, config: CoreConfig) -> float:
    """The length above which a rollout in flight cannot take a short seat; inf while unknown.

    It is always inf in an audited group, which cancels nothing.
    """
    if group.audit:
        return inf
    if config.by_efficiency and group.purpose == "train":
        return selection.efficiency_cutoff(group.finished, group.group_size, group.rewards())
    num_short = group.group_size
    if group.long_end != "none":
        num_short -= group.num_long
    if group.long_end == "longest" or num_short == 0 or len(group.finished) < group.group_size:
        return inf
    return group.finished[num_short - 1].tokens


def relative_cutoff(group: Group, config: CoreConfig) -> float:
    """The length above which a rollout in flight has to end; inf while unknown or unlimited."""
    if not config.relative_limit or config.policy != "darts" or group.purpose != "train":
        return inf
    if group.audit:
        return inf
    return selection.relative_cutoff(group.finished, group.budget, config.relative_limit)


def take_past_selection(group: Group, rng: Random) -> list[Rollout]:
    """Make the longest rollouts above `group.review_above` survivors; return the others."""
    past = [
        rollout
        for rollout in group.running.values()
        if rollout.tokens > group.review_above and rollout.rollout_id not in group.survivors
    ]
    seats = group.num_long - group.num_survivors_chosen if group.long_end == "survivor" else 0
    if past and seats > 0:
        rng.shuffle(past)  # breaks ties
        past.sort(key=lambda rollout: -rollout.tokens)
        group.survivors |= {rollout.rollout_id for rollout in past[:seats]}
        group.num_survivors_chosen += min(seats, len(past))
        past = past[seats:]
    return past


def lose_survivor(group: Group, rollout: Rollout, replaced: bool) -> None:
    """Strike a lost rollout off the survivors. If it is replaced, its seat is free again."""
    if rollout.rollout_id in group.survivors:
        group.survivors.discard(rollout.rollout_id)
        group.num_survivors_chosen -= int(replaced)
