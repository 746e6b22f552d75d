"""Selection of a group's training trajectories among its finished rollouts.

Pure functions of lengths, truncation flags, M and L. Source: DARTS (arXiv 2605.30859),
distribution-aware trajectory sampling: the K = M - L shortest plus the L longest, without responses
that hit the length limit. Differs: ties go to the earlier rollout id, and a group with too few
valid responses may be filled with truncated ones, so that no hard prompt starves.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Bounds are a little too large rather than too small, so that rounding never cancels a tie.
ROUNDING = 1.0 + 1e-12


class Candidate(NamedTuple):
    """A rollout that ended by itself. Candidates sort by length, then by id."""

    tokens: int
    rollout_id: int


class Selection(NamedTuple):
    """Rollout ids by seat. `filled` are truncated rollouts that make up for missing valid ones."""

    short: tuple[int, ...]
    long: tuple[int, ...]
    filled: tuple[int, ...] = ()


def select_dual_end(
    finished: Sequence[Candidate],
    truncated: Sequence[Candidate],
    group_size: int,
    num_long: int,
    fill_truncated: bool,
) -> Selection | None:
    """The K shortest and the L longest of `finished`.

    None if there are too few and `truncated` cannot fill the group, or may not.
    """
    valid = sorted(finished)
    missing = group_size - len(valid)
    if missing > 0:
        return _fill(valid, truncated, missing) if fill_truncated else None
    num_short = group_size - num_long
    short = tuple(c.rollout_id for c in valid[:num_short])
    long = tuple(c.rollout_id for c in valid[len(valid) - num_long :])
    return Selection(short, long)


def select_efficient(
    finished: Sequence[Candidate],
    truncated: Sequence[Candidate],
    group_size: int,
    fill_truncated: bool,
    rewards: Mapping[int, float],
) -> Selection | None:
    """The M of `finished` with the highest reward per token.

    Source: GFPO (arXiv 2508.09726), token efficiency. Differs: rewards are limited to 0..1, which
    makes `efficiency_cutoff` a proof. Ties go to the earlier rollout, not to the shorter one: all
    wrong responses score 0, and if the short ones among them were preferred, most long responses
    that are trained on would be right.
    """
    best = _by_efficiency(finished, rewards)[:group_size]
    return select_dual_end(best, truncated, group_size, 0, fill_truncated)


def efficiency_cutoff(
    finished: Sequence[Candidate], group_size: int, rewards: Mapping[int, float]
) -> float:
    """The length above which a rollout in flight cannot be selected by `select_efficient`.

    A response of c tokens scores at most 1/c. No bound follows if fewer than M have a reward.
    """
    if len(finished) < group_size:
        return math.inf
    last = _by_efficiency(finished, rewards)[group_size - 1]
    reward = _limited(rewards[last.rollout_id])
    return last.tokens / reward * ROUNDING if reward > 0 else math.inf


def relative_cutoff(finished: Sequence[Candidate], budget: int, limit: float) -> float:
    """`limit` times the median length of `budget` rollouts; inf until half of them have finished.

    finished: sorted. It only falls as more finish, so no rollout is told to end too early.
    """
    half = math.ceil(budget / 2)
    return limit * finished[half - 1].tokens if len(finished) >= half else math.inf


def _by_efficiency(finished: Sequence[Candidate], rewards: Mapping[int, float]) -> list[Candidate]:
    def rank(candidate: Candidate) -> tuple[float, int]:
        reward = _limited(rewards[candidate.rollout_id])
        return -reward / max(1, candidate.tokens), candidate.rollout_id

    return sorted(finished, key=rank)


def _limited(reward: float) -> float:
    return min(max(reward, 0.0), 1.0)


def select_random(
    finished: Sequence[Candidate],
    truncated: Sequence[Candidate],
    group_size: int,
    num_long: int,
    fill_truncated: bool,
    rng: random.Random,
) -> Selection | None:
    """A control: any M of `finished`, regardless of length.

    It separates the effect of selection by length from that of sampling more responses.
    """
    valid = sorted(finished, key=lambda c: c.rollout_id)
    if len(valid) > group_size:
        valid = rng.sample(valid, group_size)
    return select_dual_end(valid, truncated, group_size, num_long, fill_truncated)


def _fill(valid: list[Candidate], truncated: Sequence[Candidate], missing: int) -> Selection | None:
    filled = sorted(truncated, key=lambda c: c.rollout_id)[:missing]
    if len(filled) < missing:
        return None
    return Selection(tuple(c.rollout_id for c in valid), (), tuple(c.rollout_id for c in filled))
