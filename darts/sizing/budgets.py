"""Applies the configured redundancy rule to prompts, one at a time or a window at a time.

Owns no state. Driven by `darts.core.Core`. The rules themselves are pure functions in
`darts.sizing.redundancy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from configs.schema import LongEnd, largest_budget
from darts.sizing import lengths, moving_average, redundancy
from darts.sizing.latency import LatencyCurve
from darts.sizing.lengths import LengthStats

# As a multiple of the pool's spread. If spreads are lognormal, about one prompt in twenty exceeds
# it, as published.
SATURATING_SPREAD = 1.5


class Budget(NamedTuple):
    """A prompt's M', and whether the prompt is saturated.

    A saturated prompt keeps its M shortest responses, and its tail is cut. Source: DARTS,
    variance-guided tail pruning.
    """

    rollouts: int
    saturated: bool


@dataclass(frozen=True, slots=True)
class Budgeter:
    """The number of rollouts M' of a prompt, between `group_size` and `upper` times that.

    Lengths, in tokens, are cut at `max_tokens`.
    """

    rule: str  # none | fixed | paper | marginal
    group_size: int
    num_long: int
    long_end: LongEnd
    upper: float
    price: float
    max_tokens: int
    variance: str  # censored | ema

    @property
    def most(self) -> int:
        return largest_budget(self.group_size, self.upper)

    @property
    def by_window(self) -> bool:
        return self.rule == "paper"

    def estimate(self, stats: LengthStats | None, pool: LengthStats) -> LengthStats:
        """A prompt's statistics for its budget, given its own history, if any, and the pool."""
        if self.variance == "ema":
            return moving_average.estimate(stats, pool)
        return lengths.estimate(stats, pool)

    def sigma(self, stats: LengthStats) -> float:
        """The standard deviation of a prompt's lengths, in tokens."""
        if self.variance == "ema":
            return moving_average.std(stats)
        return lengths.length_std(stats, self.max_tokens)

    def window(
        self,
        stats: Sequence[LengthStats],
        pool: LengthStats,
        curve: LatencyCurve | None,
        num_engines: int,
    ) -> list[Budget]:
        """Budgets of a window of prompts under the published rule.

        A total is chosen by utility, and split among the prompts by their spread in tokens.
        """
        if not stats:
            return []
        norms = redundancy.published_norm([self.sigma(s) for s in stats])
        total = redundancy.paper_total(
            stats, curve or LatencyCurve(), self.group_size, self.upper, self.price, num_engines
        )
        split = redundancy.paper_split(norms, total, self.group_size, self.most)
        # If every prompt has the largest budget, the budget distinguishes none of them.
        full = total == len(stats) * self.most
        return [
            Budget(m, self._has_all(m) and (not full or self._is_wide(s, pool)))
            for m, s in zip(split, stats, strict=True)
        ]

    def one(
        self, stats: LengthStats, pool: LengthStats, curve: LatencyCurve, batch: float
    ) -> Budget:
        """Budget of one prompt that is about to open on an engine whose batch will be `batch`.

        Under the published rule, a prompt that is opened again gets the largest budget. Differs
        from the published saturation: when spare slots give every prompt the largest budget, only
        prompts far wider than the pool are saturated. Otherwise no group would keep its seat for
        long responses.
        """
        match self.rule:
            case "none":
                return Budget(self.group_size, False)
            case "marginal":
                m = self._marginal(stats, pool, curve.elasticity(max(batch, 1.0)))
                return Budget(m, self._has_all(m) and self._is_wide(stats, pool))
            case "paper":
                return Budget(self.most, self._has_all(self.most) and self._is_wide(stats, pool))
            case _:
                return Budget(self.most, False)

    def _has_all(self, budget: int) -> bool:
        return budget == self.most > self.group_size

    def _is_wide(self, stats: LengthStats, pool: LengthStats) -> bool:
        return redundancy.normalised_spread(stats, pool) >= SATURATING_SPREAD

    def _marginal(self, stats: LengthStats, pool: LengthStats, elasticity: float) -> int:
        v = redundancy.normalised_spread(stats, pool)
        return redundancy.marginal_budget(
            stats,
            v,
            elasticity,
            self.price,
            self.group_size,
            self.num_long,
            self.long_end,
            self.most,
        )
