"""The configurations of runs under faults: small steps, and timeouts of seconds.

Driven by `tools.chaos`.
"""

from __future__ import annotations

import random
from pathlib import Path

from configs.schema import Config
from tools.faults import schedule


def run_config(folder: Path, model: Path, seed: int, steps: int) -> Config:
    """A run of small steps and timeouts of seconds, in a mode that is drawn from its seed."""
    config, rng = Config(), random.Random(f"run {seed}")
    config.run.dir, config.run.name = str(folder / schedule.DISK), "run"
    config.run.seed, config.run.steps, config.run.trackers = seed, steps, []
    config.run.stop_s = 10.0
    config.model.path, config.model.max_context = str(model), 256
    config.data.environment = "tools.faults.sampled:score"
    config.data.num_prompts = 500
    config.batch.groups, config.batch.max_tokens = 4, 512
    config.pipeline.mode = rng.choice(["async", "async", "sync"])
    config.staleness.max_lag = rng.randint(1, 4)
    config.staleness.on_deadline = rng.choice(["wait", "drop"])
    config.weights.publish_every = rng.randint(1, 2)
    config.darts.cancel = rng.choice(["exact", "eager"])
    config.darts.group_size, config.darts.num_long = 4, 1
    config.sampling.max_tokens = 96
    config.actors.name, config.actors.slots, config.actors.stream_interval = "engine", 16, 4
    config.buffer.peer_timeout_s, config.buffer.rejoin_timeout_s = 3.0, 120.0
    config.buffer.segment_bytes = 100_000
    config.learner.device, config.learner.checkpoint_every = "cpu", rng.randint(1, 4)
    config.learner.max_logprob_diff = 100.0  # the engines invent their log-probabilities
    config.optimizer.lr = 1e-4
    config.eval.every, config.eval.num_prompts = 5, 3
    config.launch.max_restarts = 100
    config.batch.stream = "group" if seed % 2 else "batch"
    return config


def of_vllm(config: Config) -> None:
    """Change a run to real engines, which start slowly and whose log-probabilities count."""
    config.model.max_context = 128
    config.sampling.max_tokens = 48
    config.actors.slots, config.actors.kv_cache_gib = 8, 0.25
    config.actors.device = "cpu"
    config.buffer.peer_timeout_s, config.run.stop_s = 15.0, 30.0
    config.learner.max_logprob_diff = Config().learner.max_logprob_diff


def soak_config(folder: Path, num_steps: int) -> Config:
    """The smallest steps that a run can have, and logs that reach their bounds at once."""
    config = run_config(folder, folder, 0, num_steps)
    config.pipeline.mode, config.staleness.max_lag = "async", 4
    config.batch.groups, config.darts.group_size = 2, 2
    config.weights.publish_every, config.learner.checkpoint_every = 4, 10
    config.sampling.max_tokens = 32
    config.actors.slots, config.eval.every = 64, 500
    config.buffer.peer_timeout_s = 15.0
    config.buffer.segment_bytes, config.buffer.keep_event_bytes = 100_000, 1_000_000
    config.buffer.keep_row_bytes = 100_000
    return config
