"""`python -m tools.bench compile`: training steps with `learner.compile` and without.

Owns the measurement: the groups of `tools.benchmarks.shared_prompts` through the learner's own
training step, by two learners in one process that take turns, so that the ratio does not depend on
what else the machine does. On a CPU it counts seconds of the processor. Prints the cost of
compilation and the ratio; nothing passes or fails.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch

from configs.schema import Config
from learner import fsdp
from learner.train import LearnerState, build_state, train_step
from tools.benchmarks.shared_prompts import make_shard, save_model

STEPS = 6


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        with fsdp.process_group(_config(folder, compiled=False)) as device:
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            learners, starts = dict[bool, LearnerState](), dict[bool, float]()
            for compiled in (False, True):
                started = time.perf_counter()
                learners[compiled] = build_state(_config(folder, compiled), device)
                starts[compiled] = time.perf_counter() - started
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for step in range(1 + STEPS):
                for compiled, state in learners.items():
                    seconds[compiled].append(_step(state, step, clock))
            threads = torch.get_num_threads()
    of = "the clock" if device.type == "cuda" else "the processor"
    print(f"training steps on {device.type}, {threads} thread(s), float32; seconds of {of}")
    for compiled, what in ((False, "as it is"), (True, "compiled")):
        times = seconds[compiled][1:]
        print(f"{what}: {median(times):6.2f} s a step; the start took {starts[compiled]:.0f} s")
    ratios = [a / b for a, b in zip(seconds[False][1:], seconds[True][1:], strict=True)]
    print(f"ratio, median of {STEPS} pairs: {median(ratios):.2f}")


def _config(folder: str, compiled: bool) -> Config:
    config = Config()
    config.model.path, config.model.dtype = folder, "float32"
    config.learner.compile = compiled
    config.learner.max_logprob_diff = float("inf")  # the actors' log-probabilities are made up
    return config


def _step(state: LearnerState, step: int, clock: Callable[[], float]) -> float:
    started = clock()
    train_step(state, make_shard(step))
    return clock() - started
