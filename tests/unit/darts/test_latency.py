"""The latency curve: monotone, robust, and sensible at batch sizes without measurements."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts.sizing.latency import LatencyCurve

CPU_POINTS = [(1, 5.9), (4, 6.3), (8, 5.9), (16, 7.0), (32, 8.6), (64, 13.7), (128, 22.8)]


def true_ms(batch: float) -> float:
    return 6.0 + 0.15 * batch


def noisy_curve(seed: int, outliers: float = 0.0, samples: int = 2000) -> LatencyCurve:
    rng, curve = random.Random(seed), LatencyCurve()
    for _ in range(samples):
        batch = math.exp(rng.uniform(0.0, math.log(200.0)))
        factor = (
            rng.choice([50.0, 0.02]) if rng.random() < outliers else rng.lognormvariate(0.0, 0.1)
        )
        curve.observe(batch, true_ms(batch) * factor)
    return curve


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf, -math.inf, 60_001.0])
def test_an_absurd_latency_is_refused_and_changes_nothing(ms):
    curve = LatencyCurve.from_points(CPU_POINTS)
    before = curve.points()
    assert curve.observe(8, ms) is False
    assert curve.points() == before


@pytest.mark.parametrize("batch", [0.0, 0.4, -3.0, math.nan, math.inf, 2e6])
def test_an_absurd_batch_is_refused(batch):
    curve = LatencyCurve()
    assert curve.observe(batch, 5.0) is False
    assert curve.points() == []


def test_the_default_is_flat_then_linear():
    curve = LatencyCurve()
    assert curve.ptl(2) == pytest.approx(curve.ptl(1), rel=0.05)
    assert curve.ptl(20_000) == pytest.approx(2 * curve.ptl(10_000), rel=0.01)
    assert curve.elasticity(1) < 0.05 and curve.elasticity(10_000) > 0.95


def test_measured_points_lie_on_the_curve():
    curve = LatencyCurve.from_points(CPU_POINTS)
    for batch, ms in CPU_POINTS:
        # 6.3 at batch 4, then 5.9: the two are pooled.
        assert curve.ptl(batch) == pytest.approx(5.9 if batch == 4 else ms, rel=1e-9)


def test_an_invalid_point_is_an_error():
    with pytest.raises(ValueError, match="-5"):
        LatencyCurve.from_points([(1, 5.0), (8, -5.0)])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0.5, 1e6), st.floats(1e-6, 60_000.0)), max_size=60))
def test_never_falls_and_has_no_negative_slope(reports):
    curve = LatencyCurve()
    for batch, ms in reports:
        assert curve.observe(batch, ms)
    batches = [1.0, 1.5, 2, 3, 7, 16, 40, 64, 100, 300, 1e3, 1e4, 1e6]
    values = [curve.ptl(batch) for batch in batches]
    assert all(high >= low * (1 - 1e-12) for low, high in zip(values, values[1:], strict=False))
    assert all(0.0 <= curve.elasticity(batch) < math.inf for batch in batches)


@pytest.mark.parametrize("outliers", [0.0, 0.2])
def test_fits_noisy_reports_despite_outliers(outliers):
    curve = noisy_curve(seed=0, outliers=outliers)
    for batch in (2, 8, 30, 80, 150):
        assert curve.ptl(batch) == pytest.approx(true_ms(batch), rel=0.12)


def test_the_slope_is_the_true_slope():
    curve = noisy_curve(seed=1)
    for batch in (2, 40, 100):
        assert curve.elasticity(batch) == pytest.approx(0.15 * batch / true_ms(batch), abs=0.15)


def test_single_outliers_in_their_own_bins_do_not_bend_the_curve():
    curve = LatencyCurve()
    curve.observe(1, 24_000.0)  # the first request includes compilation
    for _ in range(10):
        curve.observe(8, 6.0)
        curve.observe(32, 9.0)
    curve.observe(40, 5_000.0)  # a step behind a weight swap
    assert curve.ptl(8) == pytest.approx(6.0) and curve.ptl(1) <= 6.0
    assert curve.ptl(40) < 15.0 and curve.elasticity(32) < 1.0


def test_the_curve_follows_an_engine_that_becomes_faster():
    curve = LatencyCurve()
    for ms in [20.0] * 50 + [10.0] * 20:
        curve.observe(16, ms)
    assert curve.ptl(16) == pytest.approx(10.0)


def test_above_the_last_knot_a_saturated_curve_stays_saturated():
    curve = LatencyCurve.from_points([(1, 35.0), (8, 51.0), (16, 75.0), (32, 159.0)])
    assert curve.ptl(128) == pytest.approx(4 * 159.0, rel=0.01)
    assert curve.elasticity(128) == pytest.approx(1.0, abs=0.01)


def test_below_the_first_knot_latency_is_no_higher():
    curve = LatencyCurve.from_points([(64, 20.0)])
    assert 0.0 < curve.ptl(1) < 20.0


def test_memory_is_bounded():
    curve, rng = LatencyCurve(), random.Random(2)
    for _ in range(5000):
        curve.observe(math.exp(rng.uniform(math.log(0.5), math.log(1e6))), 10.0)
    assert len(curve.points()) <= 85
