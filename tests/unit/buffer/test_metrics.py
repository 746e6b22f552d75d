"""The sums from which a row of metrics is made."""

from __future__ import annotations

import pytest

from buffer.records.metrics import Metrics
from buffer.wire.messages import EngineReport, VerifierReport
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


def test_selected_tokens_count_as_trained_once_the_learner_reports_them() -> None:
    metrics = Metrics()
    metrics.closed(record(ev.RolloutRecord(0, "e", 10, 1.0, "selected_short", 0)))
    metrics.trained(4)
    assert metrics.tokens == {"generated": 10, "trained": 4, "without_signal": 6, "cancelled": 0}


def test_an_evaluation_without_a_single_reward_has_no_mean() -> None:
    lost = ev.RolloutRecord(0, "e", 10, None, "lost", 0)
    assert Metrics().evaluated([record(lost)], step=4) == {"eval/step": 4, "eval/responses": 0}


def test_an_evaluation_is_also_reported_for_the_kind_of_its_prompts() -> None:
    right = record(ev.RolloutRecord(0, "e", 10, 1.0, "selected_short", 0))
    row = Metrics().evaluated([right], step=4, kinds={right.prompt_id: "deep"})
    assert (row["eval/accuracy"], row["eval/deep/accuracy"]) == (1.0, 1.0)
    assert (row["eval/length_mean"], row["eval/deep/length_mean"]) == (10.0, 10.0)
    assert not any("/deep/" in name for name in Metrics().evaluated([right], step=4))


def report(**verifier: float) -> EngineReport:
    load = VerifierReport(num_workers=4, **verifier)
    return EngineReport(batch=1, ms_per_token=1, tokens_per_s=1, busy_frac=1, verifier=load)


def test_a_row_has_the_load_of_the_verifiers_since_the_last_row() -> None:
    metrics, shipped = Metrics(), record(ev.RolloutRecord(0, "e", 10, 1.0, "selected_short", 0))
    metrics.note_report("a", report(num_waiting=6, num_busy=4, num_verified=1, time_s=2, queue_s=8))
    metrics.note_report("a", report(num_waiting=2, num_busy=4, num_verified=2, time_s=7, queue_s=1,
                                    longest_s=6, num_failed=2, num_timeouts=1))  # fmt: skip
    metrics.note_report("b", report(num_busy=2))
    row = metrics.row([shipped])
    assert {name: row[name] for name in row if name.startswith("verifier/")} == {
        "verifier/time_s_mean": 3.0,
        "verifier/time_s_max": 6.0,
        "verifier/queue_s_mean": 3.0,
        "verifier/queue_mean": 4.0,
        "verifier/busy_frac": pytest.approx(2.5 / 3),
        "verifier/failures": 2,
        "verifier/timeouts": 1,
    }
    later = metrics.row([shipped])
    assert all(later[name] == 0 for name in later if name.startswith("verifier/"))
