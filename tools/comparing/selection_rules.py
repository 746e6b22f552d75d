"""The selection rules as functions of the finished responses of a group.

Pure. Owns no statistics: `tools.comparing.selection_bias` compares the gradients of the selections.
A rule returns the positions of its responses in the group, and none where a run would give the
group up.

Shapes: D entries of a sketch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from configs.schema import Config
from darts.selection import Candidate, Selection, select_dual_end, select_efficient, select_random

SLOW_ENGINE = 0.5  # the speed of every second response's engine


@dataclass(frozen=True, slots=True)
class Response:
    """A finished response, and the sketch [D] of the gradient of its log-probability."""

    tokens: int
    truncated: bool
    reward: float
    sketch_D: np.ndarray


Group = Sequence[Response]
Rule = Callable[[Group, Config, random.Random], list[int]]


def _parts(group: Group) -> tuple[list[Candidate], list[Candidate]]:
    valid = [Candidate(r.tokens, i) for i, r in enumerate(group) if not r.truncated]
    return valid, [Candidate(r.tokens, i) for i, r in enumerate(group) if r.truncated]


def _seats(config: Config) -> tuple[int, int, bool]:
    """M, no long seats, and whether truncated responses fill the group."""
    return config.darts.group_size, 0, config.darts.fill_truncated


def _chosen(selection: Selection | None) -> list[int]:
    if selection is None:  # too few responses within the limit, and `darts.fill_truncated` is off
        return []
    return [*selection.short, *selection.long, *selection.filled]


def _full(group: Group, config: Config, rng: random.Random) -> list[int]:
    return list(range(len(group)))


def _plain(group: Group, config: Config, rng: random.Random) -> list[int]:
    """The group of a run without selection: M responses, and no surplus."""
    return list(range(config.darts.group_size))


def _dual_end(group: Group, config: Config, rng: random.Random) -> list[int]:
    darts = config.darts
    seats = darts.group_size, darts.num_long, darts.fill_truncated
    return _chosen(select_dual_end(*_parts(group), *seats))


def _survivor(group: Group, config: Config, rng: random.Random) -> list[int]:
    """L survivors drawn among the rollouts that still run when the M-th has finished.

    All have decoded equally many tokens then. A survivor that is truncated gives its seat back.
    """
    valid, truncated = _parts(group)
    darts = config.darts
    size, num_long = darts.group_size, darts.num_long
    running = sorted(valid)[size:] + truncated
    kept = rng.sample(running, min(num_long, len(running)))
    finished = sorted(valid)[:size] + [c for c in kept if c not in truncated]
    return _chosen(select_dual_end(finished, truncated, size, num_long, darts.fill_truncated))


def _shortest(group: Group, config: Config, rng: random.Random) -> list[int]:
    return _chosen(select_dual_end(*_parts(group), *_seats(config)))


def _first_finished(group: Group, config: Config, rng: random.Random) -> list[int]:
    """Every second response comes from an engine of half the speed. At one speed, the first to
    finish would be the shortest.
    """
    valid, truncated = _parts(group)
    valid.sort(key=lambda c: c.tokens / (SLOW_ENGINE if c.rollout_id % 2 else 1.0))
    seats = _seats(config)
    return _chosen(select_dual_end(valid[: seats[0]], truncated, *seats))


def _random(group: Group, config: Config, rng: random.Random) -> list[int]:
    return _chosen(select_random(*_parts(group), *_seats(config), rng))


def _reward_per_token(group: Group, config: Config, rng: random.Random) -> list[int]:
    rewards = {i: r.reward for i, r in enumerate(group)}
    size, _, fill = _seats(config)
    return _chosen(select_efficient(*_parts(group), size, fill, rewards))


RULES: dict[str, Rule] = {
    "full": _full,
    "plain": _plain,
    "dual-end": _dual_end,
    "survivor": _survivor,
    "shortest": _shortest,
    "first finished": _first_finished,
    "random": _random,
    "reward/token": _reward_per_token,
}
