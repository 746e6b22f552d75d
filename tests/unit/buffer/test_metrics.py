"""The sums behind a row of metrics."""

from __future__ import annotations

from buffer.records.metrics import Metrics
from darts import events as ev


def record(*rollouts: ev.RolloutRecord) -> ev.GroupRecord:
    return ev.GroupRecord(0, "p", 0, 0, len(rollouts), "survivor", "shipped", rollouts)


def test_tokens_decoded_after_a_cancel_are_generated_and_cancelled() -> None:
    metrics = Metrics()
    metrics.closed(
        record(
            ev.RolloutRecord(0, "e", 10, 1.0, "selected_short", 0),
            ev.RolloutRecord(1, "e", 20, None, "cancelled", 0, overshoot=3),
        )
    )
    metrics.count_overshoot(ev.CountOvershoot(0, 1, 2))
    assert metrics.tokens == {"generated": 35, "without_signal": 10, "cancelled": 25}


def test_selected_tokens_are_trained_once_the_learner_has_said_so() -> None:
    metrics = Metrics()
    metrics.closed(record(ev.RolloutRecord(0, "e", 10, 1.0, "selected_short", 0)))
    metrics.trained(4)
    assert metrics.tokens == {"generated": 10, "trained": 4, "without_signal": 6, "cancelled": 0}
