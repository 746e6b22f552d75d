"""Peers that send heartbeats but make no progress, over real sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import FakeEngine, FakeLearner, FakeRollout
from tests.integration.test_service import STEPS, Running, make_config, rows


class HangingEngine(FakeEngine):
    """Decodes nothing after its first ten rollouts, but still sends heartbeats."""

    def decode(self) -> list[FakeRollout]:
        return super().decode() if self.num_launched < 10 else []


def test_an_engine_that_hangs_is_restarted_and_its_rollouts_continue_elsewhere(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port(), "buffer.rollout_timeout_s=1.5"))
    address = running.service.run.router.address
    hanging, healthy = HangingEngine(address, "hangs"), FakeEngine(address, "works")
    learner = FakeLearner(address, STEPS)
    for peer in (hanging, healthy, learner):
        peer.start()
    assert running.wait() == 0
    for peer in (hanging, healthy, learner):
        peer.join(5)
    assert hanging.shutdown is not None and hanging.shutdown.restart
    assert "buffer.rollout_timeout_s" in hanging.shutdown.error
    assert healthy.shutdown is not None and healthy.shutdown.error == ""
    assert len(rows(tmp_path, "metrics.jsonl")) == STEPS


def test_a_learner_that_hangs_ends_the_run_and_is_named(
    tmp_path: Path, free_port: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    running = Running(make_config(tmp_path, free_port(), "buffer.step_timeout_s=1.5"))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS, step_s=600)
    for peer in (engine, learner):
        peer.start()
    assert running.wait() == 1
    assert "the learner has neither trained nor published" in running.service.error
    learner.over.set()
    engine.join(5)
    assert engine.shutdown is not None and engine.shutdown.error == running.service.error
