"""The keys of a simulation: those of a run that configure the core, and those of its world.

Owns the keys of that world. The shared sections are those of `configs.schema`, so an override means
the same here and in a run. `configs.cli` reads the metadata of the fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from configs.schema import (
    PipelineConfig,
    RedundancyConfig,
    SharedBatch,
    SharedDarts,
    SharedRun,
    SharedSampling,
    SharedWeights,
    StalenessConfig,
    key,
)
from darts.config import core_config
from darts.sizing.latency import LatencyCurve


@dataclass
class SimulatedRun(SharedRun):
    out: str = key(
        "",
        "Folder for the files that a run writes: config.yaml, metrics.jsonl and groups.jsonl. "
        "Empty: write nothing.",
    )


@dataclass
class SimulatedWeights(SharedWeights):
    publish_s: float = key(
        0.1, "Time from the end of a step to the publication of its weights, in seconds.", ge=0
    )
    fetch_s: float = key(
        0.1,
        "Time from a publication until an engine has fetched the weights, in seconds. It decodes "
        "meanwhile.",
        ge=0,
    )
    swap_s: float = key(
        0.1,
        "Pause of an engine while it swaps weights in, in seconds. Its rollouts stay in flight.",
        ge=0,
    )


@dataclass
class SimulatedEngines:
    num_engines: int = key(1, "Number of engines.", ge=1)
    slots: int = key(64, "Largest number of rollouts in flight per engine.", ge=1)
    speeds: list[float] = key(
        [1.0],
        "Relative decoding speeds; engine i takes speeds[i mod n]. Each distinct value is an "
        "engine type.",
        gt=0,
    )
    batches: list[float] = key(
        [1, 4, 8, 16, 32, 64, 128],
        "Batch sizes at which engines.ms_per_token was measured, in ascending order.",
        ge=0.5,
    )
    ms_per_token: list[float] = key(
        [5.9, 6.3, 5.9, 7.0, 8.6, 13.7, 22.8],
        "Latency per token at those batch sizes, in milliseconds. The default was measured on 2 "
        "CPU cores with a 0.8M-parameter Qwen3 in vLLM.",
        gt=0,
    )
    prefill_ms_per_token: float = key(
        0.05,
        "Time that one prompt token takes the whole engine, in milliseconds. A group's prompt is "
        "read once.",
        ge=0,
    )
    kv_tokens: int = key(
        1_000_000,
        "Size of the key-value cache, in tokens. When it is full, the youngest rollout is "
        "preempted and recomputed later.",
        ge=1,
    )
    chunk_tokens: int = key(
        8, "Number of tokens that a rollout decodes between two progress reports.", ge=1
    )
    latency_every_s: float = key(
        5.0, "Time between two latency reports of an engine, in seconds.", gt=0
    )
    cancel_s: float = key(
        0.006,
        "Time from the decision to cancel a rollout until its engine stops decoding, in seconds.",
        ge=0,
    )


@dataclass
class SimulatedLearner:
    num_gpus: int = key(
        1,
        "Number of devices that share the learner's work. In sync mode they may be those of the "
        "engines, which idle while the learner works.",
        ge=1,
    )
    fixed_s: float = key(
        0.2, "Time of a learner step that does not depend on its tokens, in seconds.", ge=0
    )
    ms_per_token: float = key(
        0.5,
        "Time of one device per token (of a prompt or a trained response) for forward pass, "
        "backward pass and update, in milliseconds.",
        ge=0,
    )
    prepare_ms_per_token: float = key(
        0.0,
        "Time of one device per trained token for the work before training starts (scoring, "
        "transfer, recomputed log-probabilities), in milliseconds.",
        ge=0,
    )
    streaming: bool = key(
        True,
        "Whether tokens leave engines in chunks, so that preparation overlaps with generation and "
        "a rollout can be cancelled while it is in flight.",
    )


@dataclass
class LengthKeys:
    recorded: str = key(
        "",
        "Path of a run's groups.jsonl, which is read with its older segments. Prompts, lengths and "
        "pass rates are fitted to it; cancelled rollouts count as lower bounds. Empty: draw them "
        "from the keys below.",
    )
    num_prompts: int = key(512, "Number of distinct prompts, drawn in shuffled passes.", ge=1)
    prompt_tokens: int = key(64, "Length of every prompt, in tokens.", ge=1)
    median: float = key(80.0, "Median response length of the median prompt, in tokens.", gt=0)
    between: float = key(
        0.5, "Standard deviation, between prompts, of the log of their median lengths.", ge=0
    )
    spread: float = key(
        0.8,
        "Standard deviation of log length within a prompt, for the median prompt.",
        gt=0,
    )
    spread_between: float = key(
        0.35, "Standard deviation, between prompts, of the log of that spread.", ge=0
    )


@dataclass
class PatternKeys:
    verbosity: float = key(
        0.7,
        "Share of prompts whose right responses are the shorter ones (pattern I). On the other "
        "prompts they are the longer ones (pattern II).",
        ge=0,
        le=1,
    )
    pass_rate: float = key(0.5, "Mean share of responses that are right.", gt=0, lt=1)
    strength: float = key(
        1.0,
        "How strongly the length of a response predicts whether it is right, in log-odds per "
        "standard deviation of log length. 0: not at all.",
        ge=0,
    )


@dataclass
class ShapingKeys:
    rate: float = key(
        0.0,
        "Assumed learning. In each step the mean and the spread of log length move by this share "
        "from the drawn responses toward the trained ones, on pattern I prompts only. 0: no "
        "learning.",
        ge=0,
        le=1,
    )
    floor: float = key(
        0.5,
        "Smallest share of a prompt's spread, and of its median length, that learning can leave.",
        gt=0,
        le=1,
    )


@dataclass
class BaselineKeys:
    scheduler: Literal["core", "tail_batching", "partial_rollout"] = key(
        "core",
        "Scheduler of the rollouts: core (by the keys of darts and redundancy), or one of two "
        "published synchronous schedulers that only the simulator has, tail_batching and "
        "partial_rollout.",
    )
    oversample: float = key(
        1.5,
        "Prompts that tail_batching and partial_rollout start per round, as a multiple of "
        "batch.groups.",
        ge=1,
        le=4,
    )
    extra: float = key(
        1.25,
        "Responses per prompt that tail_batching starts in a short round, as a multiple of "
        "darts.group_size.",
        ge=1,
        le=4,
    )


@dataclass
class SimulateConfig:
    """A simulation. `check` refuses keys that contradict each other before anything runs."""

    run: SimulatedRun = field(default_factory=SimulatedRun)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    batch: SharedBatch = field(default_factory=SharedBatch)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    darts: SharedDarts = field(default_factory=SharedDarts)
    redundancy: RedundancyConfig = field(default_factory=RedundancyConfig)
    sampling: SharedSampling = field(default_factory=SharedSampling)
    weights: SimulatedWeights = field(default_factory=SimulatedWeights)
    engines: SimulatedEngines = field(default_factory=SimulatedEngines)
    learner: SimulatedLearner = field(default_factory=SimulatedLearner)
    lengths: LengthKeys = field(default_factory=LengthKeys)
    pattern: PatternKeys = field(default_factory=PatternKeys)
    shaping: ShapingKeys = field(default_factory=ShapingKeys)
    baseline: BaselineKeys = field(default_factory=BaselineKeys)


def check(config: SimulateConfig) -> None:
    """Raise `ValueError` if keys contradict each other."""
    core_config(config)  # refuses num_long >= group_size
    _check_engines(config)
    _check_scheduling(config)


def _check_engines(config: SimulateConfig) -> None:
    engines = config.engines
    if len(engines.batches) != len(engines.ms_per_token) or not engines.batches:
        raise ValueError(
            f"engines.batches has {len(engines.batches)} values and engines.ms_per_token has "
            f"{len(engines.ms_per_token)}: a latency curve needs one time per batch size, and at "
            "least one"
        )
    if sorted(set(engines.batches)) != list(engines.batches):
        raise ValueError(
            f"engines.batches={engines.batches}: batch sizes must ascend; otherwise one size has "
            "two latencies"
        )
    values = (*engines.batches, *engines.ms_per_token, *engines.speeds)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(
            "engines.batches, engines.ms_per_token and engines.speeds must be finite numbers; "
            "otherwise simulated time does not advance"
        )
    if not engines.speeds:
        raise ValueError(
            "engines.speeds=[]: must hold at least one speed (1.0: as measured); otherwise no "
            "engine has one"
        )
    LatencyCurve.from_points(zip(engines.batches, engines.ms_per_token, strict=True))
    longest = config.lengths.prompt_tokens + config.sampling.max_tokens
    if engines.kv_tokens < longest:
        raise ValueError(
            f"engines.kv_tokens={engines.kv_tokens}: must be >= {longest} (lengths.prompt_tokens + "
            "sampling.max_tokens); otherwise a long rollout is preempted forever"
        )


def _check_scheduling(config: SimulateConfig) -> None:
    darts, redundancy, engines = config.darts, config.redundancy, config.engines
    if config.baseline.scheduler != "core":
        if config.pipeline.mode != "sync":
            raise ValueError(
                f"baseline.scheduler={config.baseline.scheduler}: needs pipeline.mode=sync, "
                "because it schedules whole steps"
            )
        if config.batch.stream != "batch":
            raise ValueError(
                f"batch.stream={config.batch.stream}: needs baseline.scheduler=core, not "
                f"{config.baseline.scheduler}, which ships whole batches"
            )
        return
    if darts.policy == "random" and redundancy.rule == "none":
        raise ValueError(
            "darts.policy=random: needs another rule than redundancy.rule=none, such as fixed; "
            "otherwise there is nothing to choose from"
        )
    asked, slots = redundancy.upper * darts.group_size, engines.num_engines * engines.slots
    if redundancy.rule == "fixed" and asked > slots:
        raise ValueError(
            f"redundancy.upper={redundancy.upper}: asks for {asked:g} rollouts of a group at once, "
            f"but there are {slots} slots (engines.num_engines x engines.slots); otherwise the "
            "budget is never reached"
        )
