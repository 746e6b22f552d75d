"""Runs of real processes under seeded faults keep every promise; the recount detects breaches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs import cli
from configs.schema import Config
from darts.state.memory import Memory
from tools.faults import schedule
from tools.faults.recount import recount
from tools.faults.sampled import Life, faults_of, logprob, score, text, token
from tools.faults.soak import Limits, Sample, growth, tenths

ROOT = Path(__file__).parents[2]
SEEDS = [0, 1, 2]
Row = dict[str, Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three seeds that held, run by separate commands at the same time."""
    out = tmp_path_factory.mktemp("chaos") / "runs"
    keys = ["steps=6", "faults=4", "deadline_s=100", f"out={out}"]
    commands = [
        subprocess.Popen([sys.executable, "-m", "tools.chaos", f"seeds=[{seed}]", *keys], cwd=ROOT)
        for seed in SEEDS
    ]
    assert [command.wait(200) for command in commands] == [0, 0, 0]
    return out


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """A copy of one seed's folder, in which a test may falsify records."""
    return shutil.copytree(runs / "seed-0", tmp_path / "seed")


def count_again(folder: Path) -> list[str]:
    config = cli.load(["--config", str(folder / "disk" / "run" / "config.yaml")])
    assert isinstance(config, Config)
    return recount(folder / "disk" / "run", config, folder / "trained.jsonl")


def rewrite(path: Path, change: Callable[[list[Row]], list[Row]]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def first_trajectory(rows: list[Row]) -> Row:
    """The first trajectory of the last step, which no restart has repeated."""
    return rows[-1]["trajectories"][0]


def test_seeds_hold_and_a_second_count_agrees(runs: Path) -> None:
    for seed in SEEDS:
        assert count_again(runs / f"seed-{seed}") == []


@pytest.mark.parametrize(
    ("file", "falsify", "expected"),
    [
        ("trained.jsonl", lambda rows: swap(rows, "tokens", 17), "sampled token"),
        ("trained.jsonl", lambda rows: swap(rows, "logprobs", -0.5), "log-probabilities"),
        ("trained.jsonl", lambda rows: assign(rows, "reward", 0.5), "reward"),
        ("trained.jsonl", lambda rows: assign(rows, "rollout_id", 10**9), "was never launched"),
        ("trained.jsonl", lambda rows: rows[:-1], "were not trained"),
        ("trained.jsonl", lambda rows: repeat(rows), "occurs 2 times"),
        ("trained.jsonl", lambda rows: later(rows), "its lag is"),
        ("disk/run/metrics.jsonl", lambda rows: rows[1:], "has the steps"),
        ("disk/run/groups.jsonl", lambda rows: [*rows, rows[-1]], "occurs 2 times"),
        ("disk/run/groups.jsonl", lambda rows: without_shipped(rows), "neither trained, dropped"),
    ],
)
def test_a_falsified_record_is_detected(
    copy: Path, file: str, falsify: Callable[[list[Row]], list[Row]], expected: str
) -> None:
    rewrite(copy / file, falsify)
    assert any(expected in fault for fault in count_again(copy))


def swap(rows: list[Row], name: str, value: float) -> list[Row]:
    """Replaces one sampled token, or its log-probability."""
    trajectory = first_trajectory(rows)
    place = trajectory["sampled"].index(1)
    trajectory[name][place] = value
    return rows


def assign(rows: list[Row], name: str, value: float) -> list[Row]:
    first_trajectory(rows)[name] = value
    return rows


def repeat(rows: list[Row]) -> list[Row]:
    rows[-1]["trajectories"].append(first_trajectory(rows))
    return rows


def later(rows: list[Row]) -> list[Row]:
    rows[-1]["policy_version"] += 10
    return rows


def without_shipped(rows: list[Row]) -> list[Row]:
    last = max(place for place, row in enumerate(rows) if row["end"] == "shipped")
    return rows[:last] + rows[last + 1 :]


def test_an_event_log_with_different_decisions_is_detected(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "_learn_lengths", lambda self, group: [])
    assert any("replays differently" in fault for fault in count_again(copy))


def test_a_schedule_depends_only_on_its_seed() -> None:
    targets = {"buffer": "buffer", "learner": "learner", "e/0": "actors", "e/1": "actors"}
    first = schedule.draw(5, 20, 50, schedule.KINDS, targets)
    assert first == schedule.draw(5, 20, 50, schedule.KINDS, targets)
    assert first != schedule.draw(6, 20, 50, schedule.KINDS, targets)
    assert {fault.kind for fault in first} == set(schedule.KINDS)
    assert {fault.target for fault in first} == {*targets, schedule.DISK}


def test_a_row_must_follow_the_order_of_the_lives_of_its_rollout() -> None:
    lives = [Life(1, "a"), Life(9, "b")]
    tokens = [token(lives[0], 0, 3), token(lives[1], 1, 4)]
    trajectory = {
        "tokens": tokens,
        "sampled": [1, 1],
        "versions": [(3, 1), (4, 1)],
        "logprobs": [*map(logprob, tokens)],
        "reward": score("", text(tokens), "", {}),
    }
    assert list(faults_of(trajectory, lives)) == []
    assert list(faults_of(trajectory, lives[::-1])) != []
    assert list(faults_of(trajectory | {"versions": [(3, 2)]}, lives)) != []


def test_a_run_beside_hostile_peers_ends_well() -> None:
    command = [sys.executable, "-m", "tools.chaos", "fuzz", "frames=4000", "deadline_s=100"]
    assert subprocess.run(command, cwd=ROOT, timeout=200).returncode == 0


def test_a_long_run_does_not_grow() -> None:
    command = [sys.executable, "-m", "tools.chaos", "soak", "steps=300", "deadline_s=150"]
    assert subprocess.run(command, cwd=ROOT, timeout=200).returncode == 0


def test_growth_above_its_limit_is_named() -> None:
    samples = [Sample(step, 100 + step, 5 + step // 50, step, 10 * step) for step in range(101)]
    found = tenths(samples, 100)
    allowed = Limits(memory_bytes=1000, descriptors=5, disk_bytes=1000)
    assert growth(found, allowed) == []
    for name in ("memory", "descriptors", "files"):
        field = {"memory": "memory_bytes", "descriptors": "descriptors", "files": "disk_bytes"}
        [fault] = growth(found, replace(allowed, **{field[name]: 0}))
        assert name in fault
