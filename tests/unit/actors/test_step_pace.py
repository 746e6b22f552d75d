"""The least duration of a step: linear between the points of its curve, constant beyond them."""

from __future__ import annotations

import pytest

from actors.inference.device import engine_type
from actors.inference.step_pace import least_step_ms
from configs import cli
from configs.schema import Config

CURVE = [[1.0, 10.0], [5.0, 30.0], [9.0, 30.0], [10.0, 50.0]]


@pytest.mark.parametrize(
    ("batch", "ms"),
    [(0, 10), (1, 10), (2, 15), (3, 20), (5, 30), (7, 30), (9, 30), (10, 50), (1000, 50)],
)
def test_a_step_lasts_as_long_as_its_batch_demands(batch: int, ms: float) -> None:
    assert least_step_ms(CURVE, batch) == ms


def test_without_a_curve_a_step_has_no_least_duration() -> None:
    assert least_step_ms([], 8) == 0


def test_engines_of_another_curve_are_of_another_type() -> None:
    types = [
        engine_type(cli.load(["actors.device=cpu", *overrides]))
        for overrides in (
            [],
            ["actors.min_step_ms=[[1,12]]"],
            ["actors.min_step_ms=[[1,12],[9,20]]"],
        )
    ]
    assert types == [
        "cpu/float32/tp1",
        "cpu/float32/tp1/emulated 1:12",
        "cpu/float32/tp1/emulated 1:12 9:20",
    ]


def test_every_preset_of_a_latency_is_a_curve_of_the_engines_only() -> None:
    for name in ("h100_14b", "a10_7b"):
        changes = cli.changes(Config(), cli.load(["--config", f"latency/{name}"]))
        assert [change.path for change in changes] == ["actors.min_step_ms"]
