"""`python -m tests.step_memory FOLDER key=value ...`: peak memory of training steps in a process of
its own, beyond that of the imports.

Owns one measurement: the model in FOLDER trains on full packs, with all buffers of snapshots in
use and a checkpoint being saved. Prints the peak in bytes. Driven by
tests/unit/learner/test_model_shape.py.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

import numpy as np

from configs import cli
from configs.schema import Config
from learner import fsdp
from learner.snapshots.publish import WeightPublisher
from learner.train import build_state, start_save, train_step
from tests.learner_cases import make_shards, make_trajectory, with_advantages

NUM_PROMPT, NUM_RESPONSE = 4, 252


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS now, or VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measured(config: Config) -> int:
    rng, number = np.random.default_rng(0), config.batch.max_tokens // (NUM_PROMPT + NUM_RESPONSE)
    rollouts = [
        make_trajectory(rng, NUM_PROMPT, NUM_RESPONSE, float(n % 2), n // 2)
        for n in range(2 * number)  # two packs
    ]
    shard = make_shards(with_advantages(rollouts))[0]
    with fsdp.process_group(config) as device, WeightPublisher(config, 0) as publisher:
        gc.collect()
        before = resident("VmRSS")
        state = build_state(config, device)
        for version in range(3):
            publisher.publish(state.model, version)
            if not version:
                train_step(state, shard)
            start_save(state)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        train_step(state, shard)
        peak = resident("VmHWM") - before
        state.saver.wait()
        return peak


def main(folder: str, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as runs:
        given = [f"model.path={folder}", f"run.dir={runs}", "learner.device=cpu", *overrides]
        print(measured(cli.load(["learner.max_logprob_diff=9", *given])))


if __name__ == "__main__":
    main(*sys.argv[1:])
