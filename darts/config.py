"""The core's configuration, and how it follows from that of a run or a simulation.

Owns the translation from configuration keys to `CoreConfig`. Never reads files or command lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from configs import schema


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Everything that the core's decisions depend on besides its events.

    `configs/schema.py` documents the fields.
    """

    groups_per_step: int
    steps_per_version: int = 1
    max_lag: int = 4
    on_deadline: Literal["wait", "drop"] = "wait"
    # False in sync mode, as the learner waits for the whole window by design.
    release_at_deadline: bool = True
    stream: Literal["group", "batch"] = "batch"
    policy: Literal["darts", "plain", "first_finished", "random"] = "darts"
    group_size: int = 8
    num_long: int = 1
    long_end: schema.LongEnd = "survivor"
    rank: Literal["length", "reward_per_token"] = "length"
    relative_limit: float = 0.0
    audit: float = 0.0
    cancel: Literal["exact", "eager"] = "exact"
    fill_truncated: bool = True
    uniform: Literal["train", "drop"] = "train"
    max_refill: float = 2.0
    min_spread: float = 0.0
    pilot: int = 0
    min_mixed_prob: float = 0.2
    max_stops: int = 4
    max_attempts: int = 3
    max_reopens: int = 3
    redundancy: Literal["none", "fixed", "paper", "marginal"] = "marginal"
    upper: float = 2.0
    price: float = 0.3
    variance: Literal["censored", "ema"] = "censored"
    alpha: float = 0.3
    max_tokens: int = 512
    seed: int = 0

    @property
    def by_efficiency(self) -> bool:
        """Whether seats go by reward per token."""
        return self.policy == "darts" and self.rank == "reward_per_token"

    def __post_init__(self) -> None:
        if not 0 <= self.num_long < self.group_size:
            raise ValueError(
                f"darts.num_long={self.num_long}: must be >= 0 and < darts.group_size="
                f"{self.group_size}; otherwise no seat is left for the shortest responses"
            )
        if 0 < self.relative_limit <= 1:
            raise ValueError(
                f"darts.relative_limit={self.relative_limit:g}: must be above 1, or 0 for no "
                "limit; otherwise half of all responses would have to end early"
            )
        if self.pilot > self.group_size:
            raise ValueError(
                f"darts.pilot={self.pilot}: must be <= darts.group_size={self.group_size}; "
                "otherwise a group would be complete before its pilot is judged"
            )


class CoreKeys(Protocol):
    """The sections that configure the core, which runs and simulations share."""

    @property
    def run(self) -> schema.SharedRun: ...
    @property
    def pipeline(self) -> schema.PipelineConfig: ...
    @property
    def batch(self) -> schema.SharedBatch: ...
    @property
    def staleness(self) -> schema.StalenessConfig: ...
    @property
    def darts(self) -> schema.SharedDarts: ...
    @property
    def redundancy(self) -> schema.RedundancyConfig: ...
    @property
    def sampling(self) -> schema.SharedSampling: ...
    @property
    def weights(self) -> schema.SharedWeights: ...


def core_config(config: CoreKeys) -> CoreConfig:
    """The core's configuration, for a run or a simulation (in which rollouts never fail).

    `pipeline.mode=sync` means lag 0 and a learner that waits for its whole window, so nothing is
    released early or dropped.
    """
    sync = config.pipeline.mode == "sync"
    darts, redundancy = config.darts, config.redundancy
    return CoreConfig(
        groups_per_step=config.batch.groups,
        steps_per_version=config.weights.publish_every,
        max_lag=0 if sync else config.staleness.max_lag,
        on_deadline="drop" if not sync and config.staleness.on_deadline == "drop" else "wait",
        release_at_deadline=not sync and config.staleness.on_deadline != "complete",
        stream=config.batch.stream,
        policy=darts.policy,
        group_size=darts.group_size,
        num_long=0 if darts.long_end == "none" else darts.num_long,
        long_end=darts.long_end,
        rank=darts.rank,
        relative_limit=darts.relative_limit,
        audit=darts.audit,
        cancel=darts.cancel,
        fill_truncated=darts.fill_truncated,
        uniform=darts.uniform,
        max_refill=darts.max_refill,
        min_spread=darts.min_spread,
        pilot=darts.pilot,
        min_mixed_prob=darts.min_mixed_prob,
        max_stops=darts.max_stops,
        max_attempts=darts.max_attempts if isinstance(darts, schema.DartsConfig) else 1,
        max_reopens=darts.max_reopens,
        redundancy=redundancy.rule,
        upper=redundancy.upper,
        price=redundancy.price,
        variance=redundancy.variance,
        alpha=redundancy.alpha,
        max_tokens=config.sampling.max_tokens,
        seed=config.run.seed,
    )
