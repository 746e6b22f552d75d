"""What of a run's configuration the core decides by."""

from __future__ import annotations

from typing import Any

from configs.schema import Config
from darts.core import CoreConfig


def core_config(config: Config) -> CoreConfig:
    """`pipeline.mode=sync` is lag 0 with a learner that waits for its whole window: nothing is released early or dropped."""
    sync = config.pipeline.mode == "sync"
    darts: Any = config.darts  # strings are among the choices: `configs.cli` has seen to it
    redundancy: Any = config.redundancy
    staleness: Any = config.staleness
    return CoreConfig(
        groups_per_step=config.batch.groups,
        steps_per_version=config.weights.every,
        max_lag=0 if sync else config.staleness.max_lag,
        on_deadline="wait" if sync else staleness.on_deadline,
        release_at_deadline=not sync,
        policy=darts.policy,
        group_size=darts.group_size,
        num_long=0 if darts.long_end == "none" else darts.long,
        long_end=darts.long_end,
        cancel=darts.cancel,
        fill_truncated=darts.fill_truncated,
        max_attempts=darts.max_attempts,
        max_reopens=darts.max_reopens,
        redundancy=redundancy.rule,
        upper=redundancy.upper,
        price=redundancy.price,
        max_tokens=config.sampling.max_tokens,
        seed=config.run.seed,
    )
