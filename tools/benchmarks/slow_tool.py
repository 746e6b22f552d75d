"""An environment of three turns whose steps can straggle, for `python -m tools.bench turns`.

A step takes `QUICK_S`. The share `slow_frac` of the steps, a column of the rows, takes `SLOW_S` or
longer, with a long tail. A response decides how long its own step takes.
"""

from __future__ import annotations

import time
from random import Random
from typing import Any

MOST_TURNS = 3
QUICK_S, SLOW_S, LONGEST_S = 0.05, 2.0, 10.0
TAIL = 1.5  # of a Pareto distribution


def delay_s(response: str, slow_frac: float) -> float:
    random = Random(response)
    if random.random() >= slow_frac:
        return QUICK_S
    return min(LONGEST_S, SLOW_S * random.paretovariate(TAIL))


class SlowTool:
    def reset(self, row: dict[str, Any]) -> None:
        self.slow_frac, self.num_responses = float(row["metadata"]["slow_frac"]), 0

    def step(self, response: str) -> str | float:
        time.sleep(delay_s(response, self.slow_frac))
        self.num_responses += 1
        return "go on" if self.num_responses < MOST_TURNS else float(len(response) % 2)
