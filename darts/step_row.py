"""A step's groups as rows of `metrics.jsonl` and `groups.jsonl`, for a run and for a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from darts.events import GroupRecord, RolloutRecord

FIELDS = {kind: tuple(kind.__annotations__) for kind in (GroupRecord, RolloutRecord)}


def ledger_row(record: GroupRecord, step: int) -> dict[str, Any]:
    """A group as a row of `groups.jsonl`. It was trained in `step`, or dropped before its end."""
    row = {"step": step} | _fields(record)
    row["rollouts"] = rollouts = [_fields(rollout) for rollout in record.rollouts]
    for rollout in rollouts:
        rollout["engine"] = rollout.pop("engine_id")
        del rollout["oldest_version"]
    return row


def _fields(record: GroupRecord | RolloutRecord) -> dict[str, Any]:
    """`dataclasses.asdict` for one level, without its copies of every value."""
    names = FIELDS[type(record)]
    return dict(zip(names, attrgetter(*names)(record), strict=True))


def step_row(
    records: Sequence[GroupRecord], num_uniform: int, num_stopped: int
) -> dict[str, float]:
    """Rewards, lengths in sampled tokens, budgets and lags of the groups that a step trained.

    `num_uniform` and `num_stopped` count the groups without signal that were replaced since the
    last row, at their end or after their pilots.
    """
    rollouts = [r for record in records for r in record.rollouts]
    selected = [r for r in rollouts if r.end.startswith("selected")]
    rewards = [r.reward for r in selected if r.reward is not None]
    lags = step_lags(records)
    num_replaced = num_uniform + num_stopped
    return {
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        **_lengths("generated", [r.tokens for r in rollouts if r.tokens > 0]),
        **_lengths("selected", [r.tokens for r in selected]),
        "darts/budget_mean": float(np.mean([record.budget for record in records])),
        "darts/cancelled_frac": float(np.mean([r.end == "cancelled" for r in rollouts])),
        "darts/curtailed_frac": float(np.mean([r.curtailed for r in rollouts])),
        "darts/uniform_frac": (sum(record.uniform for record in records) + num_replaced)
        / (len(records) + num_replaced),
        "darts/replaced_groups": num_replaced,
        "darts/stopped_groups": num_stopped,
        "darts/pruned_frac": float(np.mean([record.long_end == "none" for record in records])),
        "lag/mean": float(np.mean(lags)),
        "lag/max": max(lags),
    }


def step_lags(records: Sequence[GroupRecord]) -> list[int]:
    """The lag of each selected rollout, in policy versions."""
    return [
        record.shipped_version - r.oldest_version
        for record in records
        for r in record.rollouts
        if r.end.startswith("selected")
    ]


def _lengths(name: str, tokens: list[int]) -> dict[str, float]:
    array = np.array(tokens or [0])
    of_q = zip((50, 90, 99), np.percentile(array, (50, 90, 99)), strict=True)
    quantiles = {f"length/{name}_p{q}": float(value) for q, value in of_q}
    return {
        f"length/{name}_mean": float(array.mean()),
        **quantiles,
        f"length/{name}_max": int(array.max()),
    }
