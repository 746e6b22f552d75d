"""Applies the configured redundancy rule to prompts as they come: one by one, or a window at a
time.

Owns no state; `darts.core.Core` asks it. The rules themselves are pure functions in
`darts.sizing.redundancy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from configs.schema import LongEnd, largest_budget
from darts.sizing import redundancy
from darts.sizing.latency import LatencyCurve
from darts.sizing.lengths import LengthStats, length_std

# Times the pool's spread: about one prompt in twenty, as published, if spreads are lognormal.
SATURATING_SPREAD = 1.5


class Budget(NamedTuple):
    """A prompt's M', and whether it is saturated: such a prompt keeps its M shortest, and its tail
    is cut.

    Source: DARTS, variance-guided tail pruning.
    """

    rollouts: int
    saturated: bool


@dataclass(frozen=True, slots=True)
class Budgeter:
    """How many rollouts M' a prompt gets, between `group_size` and `upper` times that. Lengths are
    cut at `max_tokens`.
    """

    rule: str  # none | fixed | paper | marginal
    group_size: int
    num_long: int
    long_end: LongEnd
    upper: float
    price: float
    max_tokens: int

    @property
    def most(self) -> int:
        return largest_budget(self.group_size, self.upper)

    @property
    def by_window(self) -> bool:
        return self.rule == "paper"

    def window(
        self,
        stats: Sequence[LengthStats],
        pool: LengthStats,
        curve: LatencyCurve | None,
        num_engines: int,
    ) -> list[Budget]:
        """Budgets of a window of prompts under the published rule: a total by utility, split by
        spread in tokens.
        """
        if not stats:
            return []
        norms = redundancy.published_norm([length_std(s, self.max_tokens) for s in stats])
        total = redundancy.paper_total(
            stats, curve or LatencyCurve(), self.group_size, self.upper, self.price, num_engines
        )
        split = redundancy.paper_split(norms, total, self.group_size, self.most)
        full = (
            total == len(stats) * self.most
        )  # every prompt has the largest budget, so it distinguishes none
        return [
            Budget(m, self._has_all(m) and (not full or self._is_wide(s, pool)))
            for m, s in zip(split, stats, strict=True)
        ]

    def one(
        self, stats: LengthStats, pool: LengthStats, curve: LatencyCurve, batch: float
    ) -> Budget:
        """Budget of one prompt about to open on an engine whose batch is `batch`. A prompt of a
        window that is opened again gets `fixed`.

        Differs from the published saturation: when spare slots give every prompt the whole budget,
        only prompts far wider than the pool count as saturated. Otherwise no group would keep its
        seat for long responses.
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
