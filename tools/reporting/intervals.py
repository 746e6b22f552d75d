"""Intervals of means, for tables of several seeds or of many groups. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import stdev

# Student's quantiles for 1 to 9 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Z_95, EXCESS = 1.96, 2.7  # for more, Z_95 + EXCESS / freedom is at most 0.01 too large


def half_width(values: Sequence[float]) -> float:
    """Half of the width of the 95 % interval of a mean, by Student's t. 0 for a single value."""
    freedom = len(values) - 1
    if freedom < 1:
        return 0.0
    quantile = T_95[freedom - 1] if freedom <= len(T_95) else Z_95 + EXCESS / freedom
    return quantile * stdev(values) / sqrt(len(values))
