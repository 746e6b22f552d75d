"""What each tracker's own library has stored equals the files of the run."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from configs import cli
from configs.schema import Config
from tests.pages import explained_metrics
from tools import track
from tools.reporting import trackers
from tools.reporting.new_rows import NewSteps
from tools.reporting.trackers import Identity, Step

ROOT = Path(__file__).parents[3]
GROUPS, STEPS = 2, 3


def write_run(folder: Path, steps: range, mode: str = "a") -> None:
    """The files of a run with two groups of two responses per step."""
    folder.mkdir(parents=True, exist_ok=True)
    config = cli.load([f"run.dir={folder.parent}", f"run.name={folder.name}", "batch.groups=2"])
    (folder / "config.yaml").write_text(cli.to_yaml(config))
    with (
        (folder / "groups.jsonl").open(mode) as groups,
        (folder / "samples.jsonl").open(mode) as samples,
        (folder / "metrics.jsonl").open(mode) as metrics,
    ):
        for step in steps:
            for group in range(GROUPS):
                lengths = [{"tokens": 10 * step + group}, {"tokens": 100}]
                row = {"step": step, "end": "shipped", "rollouts": lengths}
                dropped = {"step": step, "end": "uniform", "rollouts": []}
                groups.write(json.dumps(dropped) + "\n")
                groups.write(json.dumps(row) + "\n")
                for tokens in (7, 3, 5):
                    sample = {
                        "step": step, "prompt_id": str(group), "prompt": "1|1", "tokens": tokens,
                        "response": f"r{tokens}", "reward": 1.0, "end": "selected_short",
                    }  # fmt: skip
                    samples.write(json.dumps(sample) + "\n")
                for tokens in (8, 6):
                    cut = {**sample, "tokens": tokens, "response": f"r{tokens}", "reward": None}
                    samples.write(json.dumps({**cut, "end": "cancelled"}) + "\n")
            row = {"step": step, "reward/mean": step + 0.5, "lag/max": step, "note": "text"}
            metrics.write(json.dumps(row) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs" / "one", range(STEPS))
    return tmp_path / "runs" / "one"


def track_in_process(folder: Path, *names: str, **environment: str) -> str:
    """`tools.track` in a process of its own, as the libraries keep state. Returns its output."""
    home = {"HOME": str(folder.parent), "TRACKIO_DIR": str(folder.parent / "trackio")}
    unset = {"WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "COVERAGE_PROCESS_START"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-m", "tools.track", str(folder), *names],
        cwd=ROOT, env={**kept, **home, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_steps_have_their_values_lengths_and_extreme_responses(folder: Path) -> None:
    steps = NewSteps(folder, 0)
    read = steps.read()
    assert [step.number for step in read] == [0, 1, 2]
    assert read[1].values == {"reward/mean": 1.5, "lag/max": 1.0}
    assert read[1].lengths == [10, 100, 11, 100]
    assert [one["response"] for one in read[1].responses] == ["r3", "r7", "r8"] * 2
    assert steps.read() == []
    write_run(folder, range(3, 4))
    assert [(step.number, step.lengths[0]) for step in steps.read()] == [(3, 30)]


def test_half_a_line_is_left_for_the_next_call(folder: Path) -> None:
    steps = NewSteps(folder, STEPS)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/mean"')
        file.flush()
        assert steps.read() == []
        file.write(": 9.0}\n")
    assert [step.values for step in steps.read()] == [{"reward/mean": 9.0}]


def test_steps_that_a_run_takes_back_are_read_again(folder: Path) -> None:
    steps = NewSteps(folder, 0)
    for step in steps.read():
        steps.next_step = step.number + 1
    for name in ("groups.jsonl", "samples.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    write_run(folder, range(2))
    assert [step.number for step in steps.read()] == []
    write_run(folder, range(2, 4))
    assert [(step.number, step.lengths[0]) for step in steps.read()] == [(2, 20), (3, 30)]


@pytest.mark.slow
def test_tensorboard_stores_the_metrics_of_the_run(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track_in_process(folder)  # the default of run.trackers
    write_run(folder, range(STEPS, STEPS + 1))
    track_in_process(folder)
    stored = EventAccumulator(str(folder / "tb"))
    stored.Reload()
    tensors = {tag: stored.Tensors(tag) for tag in stored.Tags()["tensors"]}
    rewards = [(one.step, one.tensor_proto.float_val[0]) for one in tensors["reward/mean"]]
    assert rewards == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]
    assert len(tensors[trackers.LENGTHS]) == len(tensors[trackers.RESPONSES]) == 4


def test_prometheus_scrapes_the_newest_step(folder: Path, free_port: Callable[[], int]) -> None:
    port = free_port()
    config = {"run": {"prometheus_port": port}}
    url = f"http://127.0.0.1:{port}/metrics"
    with closing(trackers.Prometheus(Identity(folder, "p", "one", config))) as tracker:
        assert tracker.where == url
        for step in NewSteps(folder, 0).read():
            tracker.log(step)
        with urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    served = {
        (sample.name, sample.labels["run"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert served == {
        ("darts_step", "one"): 2.0,
        ("darts_reward_mean", "one"): 2.5,
        ("darts_lag_max", "one"): 2.0,
    }
    with pytest.raises(URLError):
        urlopen(url, timeout=10)


def test_the_dashboard_shows_metrics_that_runs_have() -> None:
    dashboard = json.loads((ROOT / "examples/grafana/dashboard.json").read_text())
    shown = [query["expr"] for panel in dashboard["panels"] for query in panel["targets"]]
    names = {name for expr in shown for name in re.findall(r"darts_\w+", expr)}
    known = {trackers.gauge_name(metric) for metric in explained_metrics()}
    assert len(shown) >= 12
    assert names <= known | {"darts_step"}


@pytest.mark.slow
def test_mlflow_stores_the_metrics_of_the_run_in_one_run(folder: Path) -> None:
    track_in_process(folder, "mlflow")
    write_run(folder, range(STEPS, STEPS + 1))
    track_in_process(folder, "mlflow")
    [metric] = (folder.parent / "mlruns").rglob("reward/mean")
    stored = [line.split() for line in metric.read_text().splitlines()]
    assert [(int(step), float(value)) for _, value, step in stored] == [
        (0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5),
    ]  # fmt: skip
    [text] = (folder.parent / "mlruns").rglob("step_000002.md")
    assert "| 1\\|1 | r3 | 3 | 1.0 | selected_short |" in text.read_text()


def records_of(log: bytes) -> Iterator[bytes]:
    """The records of a file in the log format of LevelDB, as W&B writes it."""
    position, block, record = 7, 32_768, b""
    while position + 7 <= len(log):
        if block - position % block < 7:  # no header fits: padding
            position += block - position % block
        length, kind = struct.unpack_from("<HB", log, position + 4)
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_stores_the_run_offline_without_a_login(folder: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    assert "wandb sync" in track_in_process(folder, "wandb")
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in records_of(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if "reward/mean" in items:
            rows.append((items["step"], items["reward/mean"], items["lag/max"]))
    assert rows == [(0, 0.5, 0.0), (1, 1.5, 1.0), (2, 2.5, 2.0)]


@pytest.mark.slow
def test_trackio_stores_the_metrics_of_the_run(folder: Path) -> None:
    import sqlite3

    track_in_process(folder, "trackio")
    [path] = (folder.parent / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    values = [(step, json.loads(row)["reward/mean"]) for step, row in rows]
    assert values == [(0, 0.5), (1, 1.5), (2, 2.5)]


class Flaky:
    """A tracker that fails once, at step 1."""

    known, where = "id", "memory"
    failed = False
    logged: list[int] = []
    opened: list[str] = []  # under which name of the tracker's own
    num_closed = 0

    def __init__(self, run: Identity) -> None:
        assert run.project == Config().run.project
        Flaky.opened.append(run.known)

    def log(self, step: Step) -> None:
        if step.number == 0 and not Flaky.failed:
            Flaky.failed = True
            raise OSError("no network")
        Flaky.logged.append(step.number)

    def close(self) -> None:
        Flaky.num_closed += 1


class Hangs(Flaky):
    def log(self, step: Step) -> None:
        time.sleep(60)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(track, "RETRY_S", 0.05)
    monkeypatch.setattr(track, "POLL_S", 0.02)
    monkeypatch.setattr(track, "CLOSE_S", 1.0)
    Flaky.failed, Flaky.logged, Flaky.opened, Flaky.num_closed = False, [], [], 0
    return iter([None])


def mirrored(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> track.Mirror:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", kind)
    (folder / track.STATES).mkdir(exist_ok=True)
    return track.Mirror("tensorboard", folder, track.run_config(folder))


def test_a_tracker_that_fails_gets_the_same_step_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, short_waits: None
) -> None:
    mirror = mirrored(folder, monkeypatch, Flaky)
    deadline = time.monotonic() + 20
    while len(Flaky.logged) < STEPS and time.monotonic() < deadline:
        time.sleep(0.01)
    mirror.finish.set()
    assert mirror.has_ended(20)
    assert Flaky.logged == [0, 1, 2] and mirror.complaint == ""
    assert Flaky.opened == ["", "id"] and Flaky.num_closed == 2  # one run of the tracker


def test_a_tracker_that_hangs_does_not_hold_the_others_or_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, short_waits: None
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Hangs)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Flaky)
    Flaky.failed = True
    assert track.track(folder, ["wandb", "tensorboard"], follow=False) == 1
    assert Flaky.logged == [0, 1, 2]


def test_an_unknown_tracker_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no tracker neptune; there are tensorboard"):
        track.track(folder, ["neptune"], follow=False)
