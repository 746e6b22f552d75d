"""The whole pipeline with its real parts in separate processes: vLLM engines, the ZeroMQ buffer and
an FSDP learner.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from buffer.records.event_log import read_sessions
from darts import events as ev

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("tiny_reasoner"),
]
MODEL = Path("models/tiny-reasoner")


def launch(folder: Path, port: int, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "tools.launch",
        "--config",
        "configs/demo.yaml",
        f"run.dir={folder}",
        "run.name=r",
    ]
    command += [
        f"buffer.address=tcp://127.0.0.1:{port}",
        f"model.path={MODEL}",
        "launch.progress=none",
        *overrides,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], timeout_s: float = 400) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "r" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(
    folder: Path, num_steps: int, process: subprocess.Popen[str], timeout_s: float = 240
) -> None:
    deadline = time.monotonic() + timeout_s
    while len(rows(folder, "metrics.jsonl")) < num_steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.1)


def descendants(process: subprocess.Popen[str], module: str) -> list[psutil.Process]:
    return [
        p for p in psutil.Process(process.pid).children(recursive=True) if module in p.cmdline()
    ]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], tiny_reasoner: Path
) -> tuple[Path, int, str]:
    folder = tmp_path_factory.mktemp("trained")
    code, output = finish(
        launch(
            folder,
            free_port(),
            "run.steps=16",
            "redundancy.rule=fixed",  # so that something is cancelled in each step
            "redundancy.upper=1.5",
            "eval.every=16",
            "eval.num_prompts=128",
            "eval.samples_per_prompt=2",
        )
    )
    return folder, code, output


def test_run_ends_well_and_reports(trained: tuple[Path, int, str]) -> None:
    folder, code, output = trained
    assert code == 0, output
    assert output.rstrip().endswith(str(folder / "r" / "report.html"))
    files = {path.name for path in (folder / "r").iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "groups.jsonl",
        "events",
        "samples.jsonl",
        "checkpoints",
        "tb",
        "report.html",
    } <= files


def test_held_out_accuracy_rises(trained: tuple[Path, int, str]) -> None:
    accuracy = [
        row["eval/accuracy"] for row in rows(trained[0], "metrics.jsonl") if "eval/accuracy" in row
    ]
    assert len(accuracy) == 2
    assert accuracy[1] >= accuracy[0] + 0.1


def test_lag_stays_within_its_bound_at_every_step(trained: tuple[Path, int, str]) -> None:
    assert all(0 <= row["lag/max"] <= 4 for row in rows(trained[0], "metrics.jsonl"))


def test_actor_and_learner_agree_on_logprobs(trained: tuple[Path, int, str]) -> None:
    diffs = [
        row["train/logprob_diff"]
        for row in rows(trained[0], "metrics.jsonl")
        if "train/logprob_diff" in row
    ]
    # A response in flight keeps the key-value cache of the weights before the swap. New responses
    # agree within 1e-4; test_engine.py checks that.
    assert diffs and median(diffs) < 1e-3 and max(diffs) < 5e-3


def test_cancels_free_their_slots(trained: tuple[Path, int, str]) -> None:
    metrics = rows(trained[0], "metrics.jsonl")
    assert sum("cancel/freed_p99_ms" in row for row in metrics) >= len(metrics) // 2
    ends = [r["end"] for row in rows(trained[0], "groups.jsonl") for r in row["rollouts"]]
    assert ends.count("cancelled") > len(metrics)  # more than one in a step


def test_responses_at_the_relative_limit_are_scored_and_trained_on(
    trained: tuple[Path, int, str],
) -> None:
    """A real engine ends them soon after the limit, three times their group's median."""
    groups = [row for row in rows(trained[0], "groups.jsonl") if row["end"] == "shipped"]
    seated = 0
    for group in groups:
        ended = sorted(r["tokens"] for r in group["rollouts"] if r["reward"] is not None)
        half = math.ceil(group["budget"] / 2)
        for rollout in group["rollouts"]:
            if not rollout["curtailed"]:
                continue
            assert rollout["reward"] is not None and not rollout["truncated"]
            assert rollout["tokens"] > 3 * ended[half - 1]
            seated += rollout["end"] == "selected_long"
    assert seated > len(groups) // 20


def test_recorded_run_replays_to_identical_decisions(trained: tuple[Path, int, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.replay", str(trained[0] / "r")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout


def test_checkpoints_are_evaluated_after_the_run(trained: tuple[Path, int, str]) -> None:
    run = trained[0] / "r"
    after = [
        row["eval/accuracy"] for row in rows(trained[0], "metrics.jsonl") if "eval/accuracy" in row
    ][-1]
    subprocess.run([sys.executable, "-m", "tools.evaluate", str(run)], check=True)
    (judged,) = rows(trained[0], "evaluations.jsonl")
    assert (judged["step"], judged["responses"]) == (16, 256)
    # With the same weights and prompts, allow four standard errors of a difference.
    assert abs(judged["accuracy"] - after) < 0.15


def test_a_checkpoint_is_exported_as_an_ordinary_model(
    trained: tuple[Path, int, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tools.export", str(trained[0] / "r"), str(tmp_path / "model")]
    subprocess.run(command, check=True)
    start, exported = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (MODEL, tmp_path / "model")
    )
    assert start.keys() == exported.keys()
    assert any(not torch.equal(exported[name], tensor) for name, tensor in start.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode(
        "A1B2="
    ) == AutoTokenizer.from_pretrained(MODEL).encode("A1B2=")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_killed_engine_is_restarted_and_the_run_ends_well(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    process = launch(
        tmp_path,
        free_port(),
        "run.steps=8",
        "eval.every=0",
        "actors.num_engines=2",
        "actors.slots=32",
    )
    wait_for_steps(tmp_path, 1, process)
    first, _ = descendants(process, "actors.process")
    first.send_signal(signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    metrics = rows(tmp_path, "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(8)) and max(
        row["lag/max"] for row in metrics
    ) <= 4
    ledger = rows(tmp_path, "groups.jsonl")
    assert sum(row["end"] == "shipped" for row in ledger) == 8 * 16
    assert any(r["end"] == "lost" for row in ledger for r in row["rollouts"])


def logged(folder: Path) -> list[ev.Event | ev.Decision]:
    sessions = read_sessions(folder / "r" / "events")
    return [
        entry for session in sessions for e in session.events for entry in (e.event, *e.decisions)
    ]


def test_a_killed_buffer_costs_no_rollout(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """The launcher restarts it. The engine has kept decoding, and sends the missing tokens."""
    process = launch(tmp_path, free_port(), "run.steps=8", "eval.every=0")
    wait_for_steps(tmp_path, 3, process)
    (buffer,) = descendants(process, "buffer")
    buffer.send_signal(signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert [row["step"] for row in rows(tmp_path, "metrics.jsonl")] == list(range(8))
    events = logged(tmp_path)
    assert any(isinstance(event, ev.BufferRestarted) for event in events)
    assert not any(isinstance(event, ev.EngineLost) for event in events)
    ends = [r["end"] for group in rows(tmp_path, "groups.jsonl") for r in group["rollouts"]]
    assert "lost" not in ends


def test_an_engine_that_is_told_to_leave_hands_over_its_rollouts(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    overrides = ("run.steps=8", "eval.every=0", "actors.num_engines=2", "darts.max_attempts=1")
    process = launch(tmp_path, free_port(), *overrides)
    wait_for_steps(tmp_path, 3, process)
    descendants(process, "actors.process")[0].send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    events = logged(tmp_path)
    (left,) = [event for event in events if isinstance(event, ev.EngineLost)]
    assert left.left
    launches = [event for event in events if isinstance(event, ev.Launch)]
    assert left.engine_id not in {d.engine_id for d in launches if d.continues is not None}
    assert "failed" not in {group["end"] for group in rows(tmp_path, "groups.jsonl")}


def test_killed_learner_resumes_from_its_checkpoint(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    overrides = [
        "run.steps=6",
        "eval.every=0",
        "learner.checkpoint_every=2",
        "learner.num_ranks=2",
        "weights.transport=file",
        "launch.max_restarts=0",
    ]
    process = launch(tmp_path, free_port(), *overrides)
    wait_for_steps(tmp_path, 3, process)
    for rank in descendants(process, "learner"):
        rank.send_signal(signal.SIGKILL)
    code, output = finish(process)
    assert code != 0 and "learner" in output and "run.resume=true" in output
    code, output = finish(launch(tmp_path, free_port(), *overrides, "run.resume=true"))
    assert code == 0, output
    metrics = rows(tmp_path, "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(6))
    versions = [row["policy_version"] for row in metrics]
    assert versions == sorted(set(versions)) and max(row["lag/max"] for row in metrics) <= 4
    shipped = [
        row["prompt_id"] for row in rows(tmp_path, "groups.jsonl") if row["end"] == "shipped"
    ]
    assert len(shipped) == 6 * 16 and len(set(shipped)) == len(shipped)
