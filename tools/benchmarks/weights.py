"""`python -m tools.bench weights`: publication and fetch, whole and by differences.

Trains a model in bfloat16 as it is published and float32 as it is held, by real AdamW steps on
random gradients, whose size AdamW removes. Prints seconds and bytes per version; nothing passes or
fails. The engine's swap itself is part of `python -m tools.bench pipeline`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from statistics import median

import torch
from transformers import PreTrainedModel

from actors.inference.fetching import SnapshotReader
from buffer.wire.snapshots import fetch
from configs import cli
from configs.schema import Config
from learner import fsdp
from learner.snapshots.publish import WeightPublisher
from learner.train import build_state, update

STEPS = 20
PARTS = {
    "copy_s": "learner waits for the copy",
    "offer_s": "hash and delta, beside training",
    "whole_s": "fetch, whole",
    "delta_s": "fetch, by differences",
}


def main(options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = cli.load(
            ["model.dtype=bfloat16", f"run.dir={folder}", "optimizer.warmup_steps=0", *options]
        )
        config.weights.deltas, config.weights.transport = True, "zmq"
        rows = measure(config)
    print(f"{config.model.path}, {STEPS} steps at lr = {config.optimizer.lr:g}, medians of a step")
    for name, what in PARTS.items():
        print(f"{what:34} {median(row[name] for row in rows):8.3f} s")
    for name in ("bytes", "delta_bytes"):
        print(f"{name:34} {median(row[name] for row in rows):14,.0f}")


def measure(config: Config) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    reader = SnapshotReader(config)
    with fsdp.process_group(config) as device, WeightPublisher(config, 0) as publisher:
        state = build_state(config, device)
        for version in range(STEPS + 1):
            started = time.perf_counter()
            finish = publisher.copy(state.model, version)
            copied = time.perf_counter()
            assert finish is not None
            snapshot = finish(lambda: None)
            row = {
                "copy_s": copied - started,
                "offer_s": time.perf_counter() - copied,
                "bytes": float(snapshot.num_bytes),
                "delta_bytes": float(snapshot.delta_bytes or snapshot.num_bytes),
            }
            for name, read in (("whole_s", fetch), ("delta_s", reader)):
                started = time.perf_counter()
                read(snapshot)
                row[name] = time.perf_counter() - started
            rows.append(row)
            _step(state.model)
            update(state)
    return rows[1:]


def _step(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
