"""Estimates: the length of cancelled responses in full, and the cost of a run without redundancy.

Fits a lognormal to the lengths of each prompt, group by group in the order of the ledger, as the
core does during a run (`darts.sizing.lengths`), for the rest of responses that were cancelled; the
length of all others is known. Pure: from rows of `groups.jsonl` to numbers. Driven by
`tools.reporting.advice`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from darts.sizing.lengths import (
    POOL_PRIOR,
    LengthStats,
    estimate,
    expected_length,
    spread,
    update,
    update_pool,
)
from tools.reporting.run_directory import Row, is_number

NEWEST_GROUPS = 5000  # a fit takes up to a millisecond per group


@dataclass(frozen=True)
class Counterfactual:
    """Sums over the trained groups, in sampled tokens. A length is cut at the response limit."""

    num_groups: int
    tokens: int  # of all rollouts of these groups
    num_cut: int  # cancelled, or at the relative limit
    cut_tokens: int
    rest_tokens: float  # further tokens of those responses, had they gone on
    longest: float  # mean over groups of the longest response that was trained on
    plain_tokens: float  # of `group_size` responses per group, all of them in full
    plain_longest: float  # mean over groups of the longest of these


def counterfactual(
    groups: Sequence[Row], group_size: int, max_tokens: int
) -> Counterfactual | None:
    """Estimate from the newest trained groups of a ledger; None if it has none."""
    fitted = [
        (rollouts, stats)
        for rollouts, stats in fit_lengths(groups[-NEWEST_GROUPS:])
        if any(rollout["end"].startswith("selected") for rollout in rollouts)
    ]
    if not fitted:
        return None
    full = [_full_lengths(rollouts, stats, max_tokens) for rollouts, stats in fitted]
    tokens = sum(rollout["tokens"] for rollouts, _ in fitted for rollout in rollouts)
    cut = [r["tokens"] for rollouts, _ in fitted for r in rollouts if _cut(r)]
    return Counterfactual(
        num_groups=len(fitted),
        tokens=tokens,
        num_cut=len(cut),
        cut_tokens=sum(cut),
        rest_tokens=sum(map(sum, full)) - tokens,
        longest=fmean(
            max(r["tokens"] for r in rollouts if r["end"].startswith("selected"))
            for rollouts, _ in fitted
        ),
        plain_tokens=group_size * sum(map(fmean, full)),
        plain_longest=fmean(expected_longest(lengths, group_size) for lengths in full),
    )


def _full_lengths(rollouts: list[Row], stats: LengthStats, max_tokens: int) -> list[float]:
    """The lengths of a group's responses, of which those of cut ones are estimates."""
    return [
        r["tokens"] + (expected_rest(stats, r["tokens"], max_tokens) if _cut(r) else 0.0)
        for r in rollouts
    ]


def fit_lengths(groups: Iterable[Row]) -> Iterable[tuple[list[Row], LengthStats]]:
    """The launched rollouts of each shipped group, and the statistics of its prompt after it."""
    pool, prompts = POOL_PRIOR, dict[str, LengthStats]()
    for group in groups:
        rollouts = [
            r
            for r in group["rollouts"]
            if is_number(r.get("tokens")) and r.get("end") not in (None, "lost")
        ]
        if group["end"] != "shipped" or not rollouts:
            continue
        finished = [r["tokens"] for r in rollouts if _finished(r)]
        bounds = [r["tokens"] for r in rollouts if not _finished(r) and r["tokens"]]
        stats = update(prompts.get(group["prompt_id"]), finished, bounds, pool)
        pool = update_pool(pool, stats)
        prompts[group["prompt_id"]] = stats
        yield rollouts, estimate(stats, pool)


def expected_rest(stats: LengthStats, tokens: int, limit: int) -> float:
    """Mean number of further tokens of a response that has `tokens` and is cut at `limit`."""
    if tokens >= limit:
        return 0.0
    z = (math.log(max(1, tokens)) - stats.mean_log) / spread(stats)
    longer = 0.5 * math.erfc(z / math.sqrt(2.0))
    rest = expected_length(stats, limit) - expected_length(stats, tokens)
    # So far out in the tail, the fit knows nothing about the rest.
    return min(rest / longer, limit - tokens) if longer > 1e-6 else 0.0


def expected_longest(lengths: Sequence[float], num: int) -> float:
    """Mean of the longest of `num` responses drawn from these, without putting any back."""
    num = min(num, len(lengths))
    ways = math.comb(len(lengths), num)
    return sum(
        length * math.comb(rank, num - 1) / ways for rank, length in enumerate(sorted(lengths))
    )


def _finished(rollout: Row) -> bool:
    ended = rollout["end"] in ("selected_short", "selected_long", "discarded")
    return ended and not rollout.get("truncated") and not rollout.get("curtailed")


def _cut(rollout: Row) -> bool:
    return rollout["end"] == "cancelled" or rollout.get("curtailed", False)
