"""A run that resumes with other settings is refused by name, or announces and records them and can
be replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.service import Service
from configs import cli
from tests.fakes import FakeEngine, FakeLearner
from tests.integration.test_service import STEPS, Running, make_config, rows
from tools.replay import compare


@pytest.fixture
def stopped(tmp_path: Path, free_port: Callable[[], int]) -> tuple[Path, int]:
    """The folder of a run with 2 of 5 steps done, and its port."""
    port = free_port()
    running = Running(make_config(tmp_path, port))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, 2)
    engine.start()
    learner.start()
    while running.service.run.step < 2:
        time.sleep(0.01)
    running.service.stop()
    assert running.wait() == 130
    return tmp_path, port


def test_a_setting_that_makes_it_another_run_is_refused_by_name(stopped: tuple[Path, int]) -> None:
    folder, port = stopped
    before = (folder / "r/config.yaml").read_text()
    with pytest.raises(ValueError) as refused:
        Service(make_config(folder, port, "run.resume=true", "run.seed=7", "darts.group_size=3"))
    for part in ("run.seed=7 (it has 0)", "darts.group_size=3 (it has 4)"):
        assert part in str(refused.value)
    assert (folder / "r/config.yaml").read_text() == before


def test_other_settings_apply_after_the_resume_and_the_log_replays(
    stopped: tuple[Path, int], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, port = stopped
    changed = ["run.resume=true", "staleness.max_lag=0", "optimizer.lr=3e-5"]
    running = Running(make_config(folder, port, *changed))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS, start=2)
    engine.start()
    learner.start()
    assert running.wait() == 0
    assert [row["step"] for row in rows(folder, "metrics.jsonl")] == list(range(STEPS))
    assert all(row["lag/max"] == 0 for row in rows(folder, "metrics.jsonl")[2:])
    recorded = (folder / "r/config.yaml").read_text()
    assert "# from step 2: staleness.max_lag=0 (before: 2)\n" in recorded
    assert "# from step 2: optimizer.lr=3e-05 (before: 1e-06)\n" in recorded
    now = cli.load(["--config", str(folder / "r/config.yaml")])
    assert (now.staleness.max_lag, now.optimizer.lr) == (0, 3e-5)
    assert "from step 2: staleness.max_lag=0 (before: 2)" in capfd.readouterr().out
    assert compare(folder / "r/events") == 0


def test_settings_changed_twice_are_both_recorded(stopped: tuple[Path, int]) -> None:
    folder, port = stopped
    for lag in (1, 0):
        service = Service(make_config(folder, port, "run.resume=true", f"staleness.max_lag={lag}"))
        service.stop()
        assert service.serve() == 130
    comments = [
        line for line in (folder / "r/config.yaml").read_text().splitlines() if line[:1] == "#"
    ]
    assert [c.split(": ")[1].split()[0] for c in comments] == [
        "staleness.max_lag=1",
        "staleness.max_lag=0",
    ]
    assert compare(folder / "r/events") == 0
