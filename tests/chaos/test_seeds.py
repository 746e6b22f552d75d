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

from buffer.records.row_segments import older_segments, read_rows
from configs import cli
from configs.schema import Config
from darts.state.memory import Memory
from tools.faults import schedule
from tools.faults.recount import read_trained, recount, text_faults
from tools.faults.sampled import (
    END,
    Conversation,
    Life,
    faults_of,
    given,
    logprob,
    score,
    text,
    token,
)
from tools.faults.soak import Limits, Sample, growth, tenths

ROOT = Path(__file__).parents[2]
SEEDS = [0, 1, 2]
TALKS = 2  # a rollout whose first response is answered with an observation
Row = dict[str, Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three seeds that held, run by separate commands at the same time."""
    out = tmp_path_factory.mktemp("chaos") / "runs"
    keys = ["steps=6", "faults=4", "deadline_s=200", f"out={out}"]
    commands = [
        subprocess.Popen([sys.executable, "-m", "tools.chaos", f"seeds=[{seed}]", *keys], cwd=ROOT)
        for seed in SEEDS
    ]
    assert [command.wait(400) for command in commands] == [0, 0, 0]
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
    rows = list(read_rows(path))
    for segment in older_segments(path).values():
        segment.unlink()
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
        ("disk/run/metrics.jsonl", lambda rows: rows[1:], "begins at step 1"),
        ("disk/run/metrics.jsonl", lambda rows: rows[:5] + rows[6:], "has the steps"),
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
    monkeypatch.setattr(Memory, "_learn_lengths", lambda *_: [])
    assert any("replays differently" in fault for fault in count_again(copy))


def test_a_schedule_depends_only_on_its_seed() -> None:
    targets = {"buffer": "buffer", "learner": "learner", "e/0": "actors", "e/1": "actors"}
    first = schedule.draw(5, 20, 50, schedule.KINDS, targets)
    assert first == schedule.draw(5, 20, 50, schedule.KINDS, targets)
    assert first != schedule.draw(6, 20, 50, schedule.KINDS, targets)
    assert {fault.kind for fault in first} == set(schedule.KINDS)
    assert {fault.target for fault in first} == {*targets, schedule.DISK}


@pytest.mark.parametrize("lost", range(3))
def test_a_row_of_several_turns_must_hold_each_observation(lost: int) -> None:
    """`lost`: one token of the observation is missing; 0 means none."""
    life, conversation, tokens, sampled = (
        Life(TALKS, "a"),
        Conversation(),
        [*given("1+1?")],
        [0] * 4,
    )
    answer: str | float = ""
    while isinstance(answer, str):
        response = [token(life, len(tokens), 3), END]
        tokens, sampled = [*tokens, *response], [*sampled, 1, 1]
        answer = conversation.step(text(response))
        if isinstance(answer, str):
            observation = given(answer)[lost:]
            tokens, sampled = [*tokens, *observation], [*sampled, *[0] * len(observation)]
    assert len(conversation.responses) > 1
    trajectory = {
        "tokens": tokens,
        "sampled": sampled,
        "versions": [(3, sum(sampled))],
        "logprobs": [logprob(i) if one else 0.0 for i, one in zip(tokens, sampled, strict=True)],
        "reward": answer,
    }
    assert bool([*faults_of(trajectory, [life])]) == bool(lost)


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("versions", [(3, 1)]), ("logprobs", [0.0, -1.0, 0.5]), ("reward", 0.5), ("reward", 2.0)],
)
def test_a_falsified_row_of_a_real_engine_is_detected(name: str, value: Any) -> None:
    row = {"tokens": [9, 7, 8], "sampled": [0, 1, 1], "versions": [(3, 2)]}
    row |= {"logprobs": [0.0, -1.0, -0.5], "reward": score("", "7 8", "", {})}
    check = text_faults(text)
    assert list(check(row, [])) == []
    assert len(list(check(row | {name: value}, []))) == 1


def test_steps_of_several_ranks_are_merged_and_the_last_time_counts(tmp_path: Path) -> None:
    record = tmp_path / "trained.jsonl"
    """A training begins with its first portion, so another one of the same step replaces it."""
    rows = [
        (0, 0, 0, "a"), (0, 1, 0, "b"), (0, 1, 1, "lost"), (0, 1, 0, "c"), (1, 0, 0, "d"),
        (1, 0, 1, "e"),
    ]  # fmt: skip
    lines = [
        {"step": s, "rank": r, "portion": p, "policy_version": 1, "trajectories": [t]}
        for s, r, p, t in rows
    ]
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = read_trained(record)
    found = {step: row["trajectories"] for step, row in trained.items()}
    assert found == {0: ["a", "c"], 1: ["d", "e"]}


@pytest.mark.parametrize("keys", ["true", "false"])
def test_a_run_beside_hostile_peers_ends_well(keys: str) -> None:
    command = [sys.executable, "-m", "tools.chaos", "fuzz", "frames=2000", "flood_s=3"]
    command += [f"keys={keys}", "deadline_s=200"]
    assert subprocess.run(command, cwd=ROOT, timeout=400).returncode == 0


def test_a_long_run_does_not_grow() -> None:
    command = [sys.executable, "-m", "tools.chaos", "soak", "steps=300", "deadline_s=300"]
    assert subprocess.run(command, cwd=ROOT, timeout=400).returncode == 0


def test_growth_above_its_limit_is_named() -> None:
    samples = [Sample(step, 100 + step, 5 + step // 50, 10 * step) for step in range(101)]
    found = tenths(samples, 100)
    allowed = Limits(memory_bytes=1000, descriptors=5, disk_bytes=1000)
    assert growth(found, allowed) == []
    for name in ("memory", "descriptors", "files"):
        field = {"memory": "memory_bytes", "descriptors": "descriptors", "files": "disk_bytes"}
        [fault] = growth(found, replace(allowed, **{field[name]: 0}))
        assert name in fault
