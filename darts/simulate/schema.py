"""What a simulation is told: the keys of a real run that the core decides by, and the world around it. Owns no behaviour.

The first sections carry the names, defaults and meanings of `configs.schema`, so that an override means the same here and
there. `configs.cli` reads it, by the metadata of its fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from darts.core import CoreConfig
from darts.latency import LatencyCurve

SCHEDULERS = ["tail_batching", "partial_rollout"]  # not the core: `darts.simulate.baselines`


def key(default: Any, doc: str, **rules: Any) -> Any:
    """A configuration key, with the metadata that `configs.cli` reads."""
    metadata = {"doc": doc, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunKeys:
    name: str = key("simulated", "Name of the run, as reports show it.")
    seed: int = key(
        0,
        "Seeds prompts, lengths, rewards and the core's ties. Same seed, same work, whatever the policy.",
        ge=0,
    )
    steps: int = key(30, "Learner steps to simulate.", ge=1)
    out: str = key(
        "",
        "Folder to write config.yaml, metrics.jsonl and groups.jsonl to, as a run does; empty: none.",
    )


@dataclass
class PipelineKeys:
    mode: str = key(
        "async",
        "async, or sync: generate a step's groups, train on them, repeat.",
        choices=["async", "sync"],
    )


@dataclass
class BatchKeys:
    groups: int = key(16, "Groups (prompts) that one learner step trains on.", ge=1)


@dataclass
class StalenessKeys:
    max_lag: int = key(
        4,
        "Most policy versions between a trajectory's oldest token and the learner that is handed it.",
        ge=0,
    )
    on_deadline: str = key(
        "wait",
        "What happens to a group about to exceed max_lag with too few responses.",
        choices=["wait", "drop"],
    )


@dataclass
class DartsKeys:
    policy: str = key(
        "darts",
        "darts, plain, first_finished and random (any M of those that ended) as in a real run; tail_batching and partial_rollout "
        "are published synchronous schedulers that only the simulator has.",
        choices=["darts", "plain", "first_finished", "random", *SCHEDULERS],
    )
    group_size: int = key(8, "M: trajectories of a group that are trained on.", ge=2)
    long: int = key(1, "L: how many of them are the longest.", ge=0)
    long_end: str = key(
        "survivor", "Who takes the long seat.", choices=["none", "survivor", "longest"]
    )
    cancel: str = key(
        "exact",
        "Cancel what provably cannot be selected, or all once M have finished.",
        choices=["exact", "eager"],
    )
    fill_truncated: bool = key(
        True, "Fill a group that has too few valid responses with truncated ones."
    )


@dataclass
class RedundancyKeys:
    rule: str = key(
        "marginal",
        "How many rollouts a prompt gets.",
        choices=["none", "fixed", "paper", "marginal"],
    )
    upper: float = key(2.0, "M'/M at most this.", ge=1, le=8)
    price: float = key(
        0.3,
        "lambda: what a relative increase in generation time costs against the gain in spread.",
        ge=0,
    )


@dataclass
class SamplingKeys:
    max_tokens: int = key(512, "Longest response; what reaches it is truncated.", ge=1)


@dataclass
class WeightsKeys:
    every: int = key(1, "Learner steps per published version.", ge=1)
    publish_s: float = key(0.1, "From the end of a step to the publication of its weights.", ge=0)
    fetch_s: float = key(
        0.1, "From a publication until an engine has fetched it; it decodes meanwhile.", ge=0
    )
    swap_s: float = key(
        0.1, "An engine's pause while it swaps weights in; its rollouts stay in flight.", ge=0
    )


@dataclass
class EngineKeys:
    count: int = key(1, "Engines.", ge=1)
    slots: int = key(64, "Rollouts in flight per engine.", ge=1)
    speeds: list[float] = key(
        [1.0],
        "Engine i decodes speeds[i mod n] times as fast; each distinct value is an engine type.",
        gt=0,
    )
    batches: list[float] = key(
        [1, 4, 8, 16, 32, 64, 128],
        "Batch sizes at which ms_per_token was measured, ascending.",
        ge=0.5,
    )
    ms_per_token: list[float] = key(
        [5.9, 6.3, 5.9, 7.0, 8.6, 13.7, 22.8],
        "PTL at those batches. Default: 0.8M-parameter Qwen3 in vLLM on 2 CPU cores, measured.",
        gt=0,
    )
    prefill_ms_per_token: float = key(
        0.05, "What one prompt token costs the whole engine; a group's prompt is read once.", ge=0
    )
    kv_tokens: int = key(
        1_000_000,
        "Tokens that the key-value cache holds; above, the youngest rollout is preempted and recomputed.",
        ge=1,
    )
    chunk_tokens: int = key(8, "Tokens that an engine decodes before it reports them.", ge=1)
    latency_every_s: float = key(
        5.0, "An engine reports its measured latency per token this often.", gt=0
    )
    cancel_s: float = key(
        0.006, "From a cancel's decision until the engine stops decoding that rollout.", ge=0
    )


@dataclass
class LearnerKeys:
    gpus: int = key(
        1,
        "Devices that share the learner's work; where engines idle meanwhile (sync) they may be the engines' own.",
        ge=1,
    )
    fixed_s: float = key(0.2, "What a learner step costs beside its tokens.", ge=0)
    ms_per_token: float = key(
        0.5,
        "What a trained token (or its prompt's) costs one device: forward, backward, update.",
        ge=0,
    )
    prepare_ms_per_token: float = key(
        0.0,
        "What scoring, transfer and recomputed log-probabilities of a trained token cost one device before training starts.",
        ge=0,
    )
    streaming: bool = key(
        True,
        "Tokens leave engines in chunks: preparation overlaps generation, and a cancel finds its rollout in flight.",
    )


@dataclass
class LengthKeys:
    recorded: str = key(
        "",
        "A run's groups.jsonl: prompts, lengths and pass rates are fitted to it (cancelled ones as bounds).",
    )
    prompts: int = key(512, "Distinct prompts; drawn in shuffled passes.", ge=1)
    prompt_tokens: int = key(64, "Tokens of a prompt.", ge=1)
    median: float = key(80.0, "Median response length of the median prompt, in tokens.", gt=0)
    between: float = key(0.5, "Standard deviation of log median length between prompts.", ge=0)
    spread: float = key(
        0.8, "Median over prompts of the standard deviation of log length within a prompt.", gt=0
    )
    spread_between: float = key(0.35, "Standard deviation of log spread between prompts.", ge=0)


@dataclass
class PatternKeys:
    verbosity: float = key(
        0.7,
        "Share of prompts of pattern I, where right responses are the shorter ones; the rest is pattern II.",
        ge=0,
        le=1,
    )
    pass_rate: float = key(0.5, "Mean share of right responses.", gt=0, lt=1)
    strength: float = key(
        1.0,
        "How far a response's length tells whether it is right: log-odds per standard deviation of log length.",
        ge=0,
    )


@dataclass
class ShapingKeys:
    rate: float = key(
        0.0,
        "ASSUMPTION, 0 is off: per learner step the policy's log lengths move this share of the way from what was drawn toward what was "
        "trained on, in mean and spread, on pattern I prompts only.",
        ge=0,
        le=1,
    )
    floor: float = key(
        0.5,
        "The least that shaping can leave of a prompt's spread, and of its median length.",
        gt=0,
        le=1,
    )


@dataclass
class BaselineKeys:
    oversample: float = key(
        1.5,
        "tail_batching, partial_rollout: prompts started per prompt that a step trains on.",
        ge=1,
        le=4,
    )
    extra: float = key(
        1.25,
        "tail_batching: responses started per response that is kept, in a short round.",
        ge=1,
        le=4,
    )


@dataclass
class SimulateConfig:
    """A simulation. Refuses what cannot be simulated before anything runs."""

    run: RunKeys = field(default_factory=RunKeys)
    pipeline: PipelineKeys = field(default_factory=PipelineKeys)
    batch: BatchKeys = field(default_factory=BatchKeys)
    staleness: StalenessKeys = field(default_factory=StalenessKeys)
    darts: DartsKeys = field(default_factory=DartsKeys)
    redundancy: RedundancyKeys = field(default_factory=RedundancyKeys)
    sampling: SamplingKeys = field(default_factory=SamplingKeys)
    weights: WeightsKeys = field(default_factory=WeightsKeys)
    engines: EngineKeys = field(default_factory=EngineKeys)
    learner: LearnerKeys = field(default_factory=LearnerKeys)
    lengths: LengthKeys = field(default_factory=LengthKeys)
    pattern: PatternKeys = field(default_factory=PatternKeys)
    shaping: ShapingKeys = field(default_factory=ShapingKeys)
    baseline: BaselineKeys = field(default_factory=BaselineKeys)


def core_config(config: SimulateConfig) -> CoreConfig:
    """What the core decides by. Sync is lag 0 with a learner that waits for its whole window, as in a real run."""
    sync = config.pipeline.mode == "sync"
    darts: Any = config.darts  # its strings are among the choices: `configs.cli` has seen to it
    redundancy: Any = config.redundancy
    staleness: Any = config.staleness
    return CoreConfig(
        groups_per_step=config.batch.groups,
        steps_per_version=config.weights.every,
        max_lag=0 if sync else staleness.max_lag,
        on_deadline="wait" if sync else staleness.on_deadline,
        release_at_deadline=not sync,
        policy="plain" if darts.policy in SCHEDULERS else darts.policy,
        group_size=darts.group_size,
        num_long=0 if darts.long_end == "none" else darts.long,
        long_end=darts.long_end,
        cancel=darts.cancel,
        fill_truncated=darts.fill_truncated,
        redundancy=redundancy.rule,
        upper=redundancy.upper,
        price=redundancy.price,
        max_tokens=config.sampling.max_tokens,
        seed=config.run.seed,
    )


def check(config: SimulateConfig) -> None:
    """Raises ValueError where keys contradict each other: the field, its value, what is allowed, the consequence."""
    engines, darts = config.engines, config.darts
    core_config(config)  # K + L = M
    if len(engines.batches) != len(engines.ms_per_token) or not engines.batches:
        raise ValueError(
            f"engines.batches has {len(engines.batches)} values, engines.ms_per_token {len(engines.ms_per_token)}: "
            "a latency curve needs one time for each batch, and at least one"
        )
    if sorted(set(engines.batches)) != list(engines.batches):
        raise ValueError(
            f"engines.batches={engines.batches}: batch sizes must ascend, or a time belongs to two of them"
        )
    if not all(
        math.isfinite(value)
        for values in (engines.batches, engines.ms_per_token, engines.speeds)
        for value in values
    ):
        raise ValueError(
            "engines.batches, engines.ms_per_token and engines.speeds must be finite numbers, or no clock can follow them"
        )
    if not engines.speeds:
        raise ValueError(
            "engines.speeds is empty: name at least one speed, 1.0 for engines as measured"
        )
    LatencyCurve.from_points(zip(engines.batches, engines.ms_per_token, strict=True))
    longest = config.lengths.prompt_tokens + config.sampling.max_tokens
    if engines.kv_tokens < longest:
        raise ValueError(
            f"engines.kv_tokens={engines.kv_tokens}: one rollout may need {longest} (lengths.prompt_tokens + sampling.max_tokens), "
            "or it is preempted for ever"
        )
    if darts.policy == "random" and config.redundancy.rule == "none":
        raise ValueError(
            "darts.policy=random with redundancy.rule=none: there is nothing to choose from; set redundancy.rule=fixed"
        )
    if darts.policy in SCHEDULERS and config.pipeline.mode != "sync":
        raise ValueError(
            f"darts.policy={darts.policy} is a synchronous scheduler: set pipeline.mode=sync"
        )
    asked, slots = config.redundancy.upper * darts.group_size, engines.count * engines.slots
    if config.redundancy.rule == "fixed" and asked > slots:
        raise ValueError(
            f"redundancy.upper={config.redundancy.upper} asks for {asked:g} rollouts of a group at once: there are {slots} slots "
            "(engines.count x engines.slots), so the budget cannot be met"
        )
