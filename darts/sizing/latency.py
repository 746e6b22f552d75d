"""PTL(b): milliseconds per decoded token of one request while b requests decode together.

Owns one curve per engine type, which is fitted to the engines' reports and never falls.
`darts.core` feeds it, and `darts.sizing.redundancy` prices extra rollouts by its slope. Never
judges an engine, and keeps only a few numbers per bin of batch size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable

DEFAULT_MS, DEFAULT_KNEE = 10.0, 64.0
BINS_PER_OCTAVE = 4
SAMPLES_PER_BIN = 15  # the newest ones; their median withstands seven outliers
MIN_SAMPLES = 3  # a bin with fewer is ignored once another bin has this many
MIN_BATCH, MAX_BATCH, MAX_MS = 0.5, 1e6, 60_000.0

SavedCurve = dict[int, list[tuple[float, float]]]


class LatencyCurve:
    """Medians per quarter octave of batch size, joined by power laws.

    Isotonic regression makes the medians monotone. Before any report, the curve is
    `DEFAULT_MS * (1 + b / DEFAULT_KNEE)`: flat while decoding is bound by memory, then linear.
    Outside the measured range, that shape continues from the outermost knot. Above it, the last
    measured slope is used if it is steeper.
    """

    def __init__(self) -> None:
        # bin -> (log batch, log ms), at most 85 bins
        self._bins: dict[int, deque[tuple[float, float]]] = {}
        self._log_batch: list[float] = []
        self._log_ms: list[float] = []
        self._last_slope = 0.0
        self._stale = False

    @classmethod
    def from_points(cls, points: Iterable[tuple[float, float]]) -> LatencyCurve:
        """A measured curve of (batch, ms per token), which later reports refine.

        Points within a quarter octave merge. Raises `ValueError` for an impossible point.
        """
        curve = cls()
        for batch, ms in points:
            for _ in range(MIN_SAMPLES):
                if not curve.observe(batch, ms):
                    raise ValueError(
                        f"latency point ({batch}, {ms}): the batch must lie in "
                        f"{MIN_BATCH}..{MAX_BATCH:g} and the ms per token "
                        f"in 0..{MAX_MS:g}; no engine can be modelled from it"
                    )
        return curve

    def save(self) -> SavedCurve:
        """Everything that the curve knows, as plain data."""
        return {index: list(samples) for index, samples in self._bins.items()}

    @classmethod
    def restore(cls, saved: SavedCurve) -> LatencyCurve:
        curve = cls()
        for index, samples in saved.items():
            curve._bins[index] = deque(samples, maxlen=SAMPLES_PER_BIN)
        curve._stale = bool(saved)
        return curve

    def observe(self, batch: float, ms_per_token: float) -> bool:
        """Add one report. Returns False, with nothing changed, if the value is impossible.

        An impossible value is not finite, not positive, or beyond any engine.
        """
        # NaN fails every comparison.
        if not (MIN_BATCH <= batch <= MAX_BATCH and 0.0 < ms_per_token <= MAX_MS):
            return False
        index = round(BINS_PER_OCTAVE * math.log2(batch))
        samples = self._bins.setdefault(index, deque(maxlen=SAMPLES_PER_BIN))
        samples.append((math.log(batch), math.log(ms_per_token)))
        self._stale = True
        return True

    def ptl(self, batch: float) -> float:
        """Milliseconds per decoded token of one request. It never falls as the batch grows.

        Batches below one count as one.
        """
        return math.exp(self._log_ptl(math.log(max(1.0, batch))))

    def elasticity(self, batch: float) -> float:
        """d ln PTL / d ln batch >= 0, over the octave around `batch`.

        It is 0 if slots are free, and 1 if requests only share the engine's time.
        """
        middle, half = math.log(max(1.0, batch)), 0.5 * math.log(2.0)
        low, high = max(0.0, middle - half), middle + half
        return max(0.0, (self._log_ptl(high) - self._log_ptl(low)) / (high - low))

    def points(self) -> list[tuple[float, float]]:
        """The fitted knots (batch, ms per token), for monitors. Empty before any report."""
        self._refit()
        return [
            (math.exp(x), math.exp(y)) for x, y in zip(self._log_batch, self._log_ms, strict=True)
        ]

    def _log_ptl(self, x: float) -> float:
        self._refit()
        knots = self._log_batch
        if not knots:
            return _log_default(x)
        after = bisect_right(knots, x)
        if after == 0:
            return self._log_ms[0] + _log_default(x) - _log_default(knots[0])
        left, base = knots[after - 1], self._log_ms[after - 1]
        if after == len(knots):
            return base + max(_log_default(x) - _log_default(left), self._last_slope * (x - left))
        return base + (self._log_ms[after] - base) * (x - left) / (knots[after] - left)

    def _refit(self) -> None:
        if not self._stale:
            return
        self._stale = False
        enough = min(MIN_SAMPLES, max(len(samples) for samples in self._bins.values()))
        kept = [samples for _, samples in sorted(self._bins.items()) if len(samples) >= enough]
        self._log_batch = [math.fsum(x for x, _ in samples) / len(samples) for samples in kept]
        medians = [_weighted_median([(y, 1.0) for _, y in samples]) for samples in kept]
        self._log_ms = _isotonic(medians, [float(len(samples)) for samples in kept])
        self._last_slope = self._slope_of_last_octave()

    def _slope_of_last_octave(self) -> float:
        """At most 1, because further requests of a saturated engine only share its time."""
        x = self._log_batch
        first = next(i for i, value in enumerate(x) if value >= x[-1] - math.log(2.0) - 1e-9)
        if first == len(x) - 1 and first > 0:
            first -= 1
        return (
            0.0
            if first == len(x) - 1
            else min(1.0, (self._log_ms[-1] - self._log_ms[first]) / (x[-1] - x[first]))
        )


def _log_default(x: float) -> float:
    return math.log(DEFAULT_MS) + math.log1p(math.exp(x) / DEFAULT_KNEE)


def _isotonic(values: list[float], weights: list[float]) -> list[float]:
    """The nearest non-decreasing sequence in weighted absolute error.

    Adjacent violators are pooled. A single outlier moves nothing.
    """
    blocks: list[tuple[float, list[tuple[float, float]]]] = []
    for value, weight in zip(values, weights, strict=True):
        level, members = value, [(value, weight)]
        while blocks and blocks[-1][0] > level:
            members = blocks.pop()[1] + members
            level = _weighted_median(members)
        blocks.append((level, members))
    return [level for level, members in blocks for _ in members]


def _weighted_median(members: list[tuple[float, float]]) -> float:
    """The lower median if the weight splits evenly."""
    ordered = sorted(members)
    half, seen = 0.5 * math.fsum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        seen += weight
        if seen >= half - 1e-12:
            return value
    raise AssertionError("the median of no values")
