"""Applies the configured redundancy rule to prompts as they come: one by one, or a window at a time.

Owns no state; `darts.core.Core` asks it. The rules themselves are pure functions in `darts.redundancy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from darts import redundancy
from darts.events import LongEnd
from darts.latency import LatencyCurve
from darts.lengths import LengthStats, spread

SATURATING_SPREAD = 1.5  # times the pool's: about one prompt in twenty, as published, where spreads are themselves lognormal


@dataclass(frozen=True, slots=True)
class Budgeter:
    """How many rollouts M' a prompt gets, between `group_size` and `upper` times that."""

    rule: str  # none | fixed | paper | marginal
    group_size: int
    num_long: int
    long_end: LongEnd
    upper: float
    price: float

    @property
    def most(self) -> int:
        return redundancy.fixed_budget(self.group_size, self.upper)

    @property
    def by_window(self) -> bool:
        return self.rule == "paper"

    def window(self, stats: Sequence[LengthStats], curve: LatencyCurve | None, num_engines: int) -> list[int]:
        """Budgets of a window of prompts under the published rule: a total by utility, split by spread."""
        if not stats:
            return []
        norms = redundancy.published_norm([spread(s) for s in stats])
        total = redundancy.paper_total(stats, curve or LatencyCurve(), self.group_size, self.upper, self.price, num_engines)
        return redundancy.paper_split(norms, total, self.group_size, self.most)

    def one(self, stats: LengthStats, pool: LengthStats, curve: LatencyCurve, batch: float) -> int:
        """Budget of one prompt about to open on an engine whose batch is `batch`. A window's prompt that returns gets `fixed`."""
        match self.rule:
            case "none":
                return self.group_size
            case "marginal":
                return self._marginal(stats, pool, curve.elasticity(max(batch, 1.0)))
            case _:
                return self.most

    def saturates(self, stats: LengthStats, pool: LengthStats, budget: int) -> bool:
        """Whether the prompt's spread alone earns it the whole budget; such prompts keep the M shortest.

        Source: DARTS, variance-guided tail pruning. Differs: where spare slots give everybody the whole budget, only
        prompts far wider than the pool count, or necessary depth would lose its seat everywhere.
        """
        wide = redundancy.normalised_spread(stats, pool) >= SATURATING_SPREAD
        return self.rule in ("paper", "marginal") and wide and budget == self.most > self.group_size

    def _marginal(self, stats: LengthStats, pool: LengthStats, elasticity: float) -> int:
        v = redundancy.normalised_spread(stats, pool)
        return redundancy.marginal_budget(stats, v, elasticity, self.price, self.group_size, self.num_long, self.long_end, self.most)
