"""A synchronous run that is killed and resumed has the curve of an undisturbed one, bit for bit.

Real processes: the buffer, the learner on a tiny model with one thread, and two engines whose
tokens depend on their seeds and weights alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from buffer.records.row_segments import read_rows
from configs.schema import Config
from tools.faults import schedule
from tools.faults.cluster import Cluster
from tools.faults.schedule import Fault
from tools.faults.small_run import run_config
from tools.faults.tiny_model import save_model

STEPS = 6
# Metrics of the training itself. The others count time, memory, or work that a kill repeats.
CURVE = (
    "train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/entropy",
    "train/clip_frac", "train/logprob_diff_all", "reward/mean", "reward/std",
    "length/selected_mean", "length/selected_p90", "length/selected_max", "lag/max",
)  # fmt: skip
BUFFER, LEARNER, ENGINES = "buffer", "learner", ("engine/0", "engine/1")


def make_config(folder: Path, model: Path, seed: int) -> Config:
    config = run_config(folder, model, seed, STEPS)
    config.pipeline.mode, config.darts.policy, config.redundancy.rule = "sync", "plain", "none"
    config.weights.publish_every = 1
    config.batch.stream = "batch"  # portions depend on the time at which groups are decided
    config.optimizer.lr = 1e-3
    config.eval.every = 0
    return config


def run(folder: Path, model: Path, seed: int, faults: list[Fault]) -> Cluster:
    folder.mkdir()
    cluster = Cluster(
        make_config(folder, model, seed),
        folder,
        num_engines=2,
        learner="tools.faults.real_learner",
        engine="tools.faults.repeatable_engine",
    )
    assert cluster.run(faults, deadline_s=150) == ""
    return cluster


def curve(cluster: Cluster) -> list[dict[str, Any]]:
    rows = list(read_rows(cluster.run_folder / "metrics.jsonl"))
    assert rows[0].keys() >= set(CURVE)
    return [{name: row[name] for name in ("step", *CURVE)} for row in rows]


def trained(cluster: Cluster) -> list[list[dict[str, Any]]]:
    """The batch of each step as the learner last trained it, without ids that a kill changes."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in cluster.record.open():
        row = json.loads(line)
        steps[row["step"]] = [
            {name: t[name] for name in ("tokens", "sampled", "logprobs", "reward")}
            for t in row["trajectories"]
        ]
    return [steps[step] for step in range(STEPS)]


def prompts(cluster: Cluster) -> list[list[tuple[int, list[int]]]]:
    """For each step: the visits that were trained, and which responses to each."""
    rows = list(read_rows(cluster.run_folder / "groups.jsonl"))
    shipped = [
        (row["visit"], sorted(r["index"] for r in row["rollouts"] if "selected" in r["end"]))
        for row in rows
        if row["end"] == "shipped"
    ]
    size = cluster.config.batch.groups
    return [sorted(shipped[i : i + size]) for i in range(0, len(shipped), size)]


def weights(cluster: Cluster) -> str:
    """A digest of the last checkpoint, with the optimizer's state."""
    folder = cluster.run_folder / "checkpoints" / f"step_{STEPS:06d}"
    tensors = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_has_the_curve_of_an_undisturbed_one(
    tmp_path: Path, model: Path, seed: int
) -> None:
    whole = run(tmp_path / "whole", model, seed, [])
    targets = dict.fromkeys(ENGINES, "actors") | {BUFFER: "buffer", LEARNER: "learner"}
    faults = schedule.draw(seed, STEPS - 1, 8, ["kill"], targets)
    killed = run(tmp_path / "killed", model, seed, faults)
    assert prompts(killed) == prompts(whole)
    assert prompts(whole)[0] == [(visit, [0, 1, 2, 3]) for visit in range(4)]
    for step in range(STEPS):
        assert trained(killed)[step] == trained(whole)[step], f"step {step}"
    assert curve(killed) == curve(whole)
    assert len({row["train/loss"] for row in curve(whole)}) == STEPS
    assert weights(killed) == weights(whole)
