"""A run that resumes with other settings is refused by name, or announces and records them and can
be replayed.
"""

from __future__ import annotations

import json
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


def rows_of(path: Path, *answers: object) -> None:
    texts = [json.dumps({"prompt": f"q{i}", "answer": answer}) for i, answer in enumerate(answers)]
    path.write_text("\n".join(texts))


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_data_that_changed_is_refused_and_restored_data_is_not(
    key: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    file = train if key == "data.train" else held_out
    rows_of(train, *range(40))
    rows_of(held_out, *range(10))
    data = [f"data.train={train}", f"data.eval={held_out}"]
    port = free_port()
    for resumes in ("false", "true"):  # the second time with the same data
        service = Service(make_config(tmp_path, port, *data, f"run.resume={resumes}"))
        service.stop()
        assert service.serve() == 130
    resume = make_config(tmp_path, port, *data, "run.resume=true")
    before = file.read_text()
    another = '\n{"prompt": "new", "answer": 1}'
    for changed in (before.replace('"answer": 7', '"answer": 8'), before + another):
        file.write_text(changed)
        with pytest.raises(ValueError, match=f"{key}={file}: its rows have changed since"):
            Service(resume)
    file.write_text("\n\n" + before + "\n")  # the same rows
    service = Service(resume)
    service.stop()
    assert service.serve() == 130
    file.unlink()
    with pytest.raises(ValueError, match=f"{key}={file}: there is no such file"):
        Service(resume)


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_digests_of_the_data_that_cannot_be_read_are_named(
    content: str | None, stopped: tuple[Path, int]
) -> None:
    folder, port = stopped
    file = folder / "r" / "sources.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ValueError, match=f"{file}: cannot be read .*restore it"):
        Service(make_config(folder, port, "run.resume=true"))
