"""Every key of a run: its type, default, meaning and allowed values. One schema serves every process.

Each process reads its own sections; all of them are given the same file, so one `config.yaml` describes the whole run.
`configs.cli.load` turns files and `key=value` overrides into a checked `Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def key(default: Any, doc: str, **rules: Any) -> Any:
    """A configuration key. Rules: `ge`, `gt`, `le`, `lt` (bounds), `choices`, `consequence` (said when a rule is broken)."""
    metadata = {"doc": doc, **rules}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    name: str = key("run", "Name of the run; its directory is <dir>/<name>.")
    dir: str = key("runs", "Folder that holds the runs.")
    seed: int = key(0, "Seeds the prompt stream, the core's ties and the sampling.", ge=0)
    steps: int = key(100, "Learner steps to take.", ge=1)
    resume: bool = key(
        False,
        "Continue from the newest complete checkpoint instead of refusing to touch an existing run.",
    )


@dataclass
class ModelConfig:
    path: str = key(
        "models/tiny-reasoner",
        "Folder (or hub name) of a Hugging Face causal language model and its tokenizer.",
    )
    dtype: str = key(
        "float32",
        "Compute type of engines and learner.",
        choices=["float32", "bfloat16", "float16"],
    )
    attention: str = key(
        "sdpa",
        "The learner's attention.",
        choices=["sdpa", "eager", "flex_attention", "flash_attention_2"],
    )
    max_context: int = key(1024, "Prompt plus response, in tokens, that an engine accepts.", ge=16)


@dataclass
class DataConfig:
    train: str = key(
        "tagged_sum",
        "Where prompts come from: tagged_sum | reasoning_gym:<task> | file.jsonl | file.parquet | hf:<dataset>[:<split>].",
    )
    eval: str = key(
        "", "Held-out prompts, same forms; empty: held out of `data.train` by hash of the prompt."
    )
    environment: str = key(
        "auto",
        "What scores a response: auto (the source's own verifier) | exact | numeric | math_verify | reasoning_gym | module:function.",
    )
    prompt_field: str = key(
        "prompt",
        "Column of the prompt (a string, or a list of chat messages) in files and datasets.",
    )
    answer_field: str = key("answer", "Column of the reference answer in files and datasets.")
    system_prompt: str = key(
        "", "System message put before each prompt where the tokenizer has a chat template."
    )
    chat_template: str = key(
        "auto", "Apply the tokenizer's chat template.", choices=["auto", "never"]
    )
    size: int = key(
        10000, "How many distinct prompts a generated source (tagged_sum, reasoning_gym) has.", ge=1
    )
    verifier_timeout_s: float = key(10.0, "A verifier that takes longer has failed.", gt=0)
    on_error: str = key(
        "stop",
        "When a rollout has failed darts.max_attempts times (a verifier that raises, say): stop the run, or skip the prompt and count it.",
        choices=["stop", "skip"],
    )


@dataclass
class PipelineConfig:
    mode: str = key(
        "async",
        "async: engines never wait; sync: generate a step's groups, train on them, repeat (a lag of 0, whatever staleness.max_lag says).",
        choices=["async", "sync"],
    )


@dataclass
class BatchConfig:
    groups: int = key(16, "Groups (prompts) that one learner step trains on.", ge=1)
    tokens: int = key(
        4096,
        "Tokens in one packed micro-batch of one rank; gradients accumulate over as many as a step needs.",
        ge=16,
    )


@dataclass
class StalenessConfig:
    max_lag: int = key(
        4,
        "Most policy versions between a trajectory's oldest token and the learner that is handed it.",
        ge=0,
    )
    on_deadline: str = key(
        "wait",
        "A group about to exceed max_lag with too few responses: the learner waits for it, or it is dropped and its prompt put back.",
        choices=["wait", "drop"],
    )


@dataclass
class DartsConfig:
    policy: str = key(
        "darts",
        "darts; plain (as many rollouts as are trained on); first_finished (whoever ends first); "
        "random (a control: any M of those that ended).",
        choices=["darts", "plain", "first_finished", "random"],
    )
    group_size: int = key(8, "M: trajectories of a group that are trained on.", ge=2)
    long: int = key(
        1, "L: how many of them are the longest; the other M - L are the shortest.", ge=0
    )
    long_end: str = key(
        "survivor",
        "Who takes the long seat: none (M shortest), survivor (of the stragglers one may finish), "
        "longest (wait for all; the paper's rule).",
        choices=["none", "survivor", "longest"],
    )
    cancel: str = key(
        "exact",
        "Cancel what provably cannot be selected (exact), or all once M have finished (eager).",
        choices=["exact", "eager"],
    )
    fill_truncated: bool = key(
        True,
        "Fill a group that has too few valid responses with truncated ones, so that hard prompts do not starve.",
    )
    max_attempts: int = key(
        3, "How often one rollout may be launched before it counts as failed.", ge=1
    )
    max_reopens: int = key(3, "How often a dropped group's prompt returns to the queue.", ge=0)


@dataclass
class RedundancyConfig:
    rule: str = key(
        "marginal",
        "How many rollouts a prompt gets: none (M), fixed (upper x M), paper (a window's total by utility, split by spread), "
        "marginal (one by one).",
        choices=["none", "fixed", "paper", "marginal"],
    )
    upper: float = key(2.0, "M'/M at most this.", ge=1, le=8)
    price: float = key(
        0.3,
        "lambda: what a relative increase in generation time costs against the gain in spread.",
        ge=0,
    )


def largest_budget(group_size: int, upper: float) -> int:
    """Rollouts of a prompt with the full budget: `upper` times `group_size`, to the nearest."""
    return int(upper * group_size + 0.5)


@dataclass
class SamplingConfig:
    temperature: float = key(1.0, "Sampling temperature.", gt=0)
    top_p: float = key(1.0, "Nucleus; 1 samples from the whole distribution.", gt=0, le=1)
    max_tokens: int = key(512, "Longest response; what reaches it is truncated.", ge=1)


@dataclass
class ActorsConfig:
    name: str = key(
        "pool",
        "Name of this actor pool; its engines are <name>/0, <name>/1, ... and must be unique in a run.",
    )
    engines: int = key(1, "Engines in this pool.", ge=1)
    slots: int = key(64, "Rollouts in flight per engine.", ge=1)
    tensor_parallel: int = key(1, "Devices per engine.", ge=1)
    device: str = key(
        "auto",
        "Where engines run; auto takes CUDA where there is one.",
        choices=["auto", "cpu", "cuda"],
    )
    gpu_memory_frac: float = key(0.9, "Share of a GPU's memory that an engine takes.", gt=0, le=1)
    kv_cache_gib: float = key(1.0, "Key-value cache of a CPU engine.", gt=0)
    stream_interval: int = key(8, "Tokens that an engine decodes before it reports them.", ge=1)
    flush_s: float = key(
        0.05,
        "Reports of one engine are sent together, this often; grows by itself when the buffer is busy.",
        gt=0,
    )
    max_restarts: int = key(
        5, "How often the pool restarts a dead engine before it gives up.", ge=0
    )


@dataclass
class BufferConfig:
    address: str = key(
        "tcp://127.0.0.1:5577",
        "Where the buffer listens; statistics are published on the next port.",
    )
    keys: str = key(
        "", "Folder with CURVE keys (python -m tools.keys FOLDER); required beyond loopback."
    )
    max_bytes: int = key(
        2_000_000_000, "Trajectory payloads held at most; admission pauses above.", ge=1_000_000
    )
    connect_timeout_s: float = key(
        60.0, "How long a process waits for the buffer to answer at start.", gt=0
    )
    peer_timeout_s: float = key(15.0, "A peer not heard of for this long is lost.", gt=1)
    rejoin_timeout_s: float = key(
        300.0, "With no learner, or no actor, for this long the run stops with an error.", gt=1
    )


@dataclass
class WeightsConfig:
    transport: str = key(
        "zmq",
        "How actors fetch snapshots: zmq (from the learner) or file (a folder that all see).",
        choices=["zmq", "file"],
    )
    every: int = key(1, "Learner steps per published version.", ge=1)
    address: str = key(
        "tcp://127.0.0.1:*", "Where the learner serves snapshots (zmq); * takes a free port."
    )
    dir: str = key("", "Folder of the snapshots (file); empty: <run>/weights.")


@dataclass
class LossConfig:
    kind: str = key(
        "grpo",
        "Group-relative advantages: grpo divides by the group's standard deviation, dr_grpo does not. Clipped surrogate, mean over tokens.",
        choices=["grpo", "dr_grpo"],
    )
    clip_low: float = key(0.2, "Ratios below 1 - clip_low are clipped.", gt=0, lt=1)
    clip_high: float = key(0.28, "Ratios above 1 + clip_high are clipped (clip-higher).", gt=0)
    tis_cap: float = key(
        2.0,
        "Cap of the truncated importance weight that corrects for stale or mismatched actors.",
        gt=0,
    )
    train_truncated: bool = key(
        False,
        "Let truncated responses contribute to the loss (they always count in the group's advantages).",
    )


@dataclass
class OptimizerConfig:
    lr: float = key(1e-6, "AdamW's learning rate.", gt=0)
    betas: list[float] = key([0.9, 0.95], "AdamW's betas.", ge=0, lt=1)
    weight_decay: float = key(0.0, "AdamW's weight decay.", ge=0)
    warmup_steps: int = key(0, "Steps over which the learning rate rises linearly.", ge=0)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this norm.", gt=0)


@dataclass
class LearnerConfig:
    ranks: int = key(1, "Data-parallel (FSDP) ranks on this node.", ge=1)
    device: str = key(
        "auto",
        "Where ranks run; auto takes CUDA where there is one.",
        choices=["auto", "cpu", "cuda"],
    )
    activation_checkpointing: bool = key(
        False, "Recompute activations in the backward pass to save memory."
    )
    checkpoint_every: int = key(
        20, "Steps between checkpoints; the last step always makes one.", ge=1
    )
    keep_checkpoints: int = key(2, "Checkpoints kept.", ge=1)


@dataclass
class EvalConfig:
    every: int = key(
        20,
        "Steps between evaluations; 0: never. The first is before training, the last after it.",
        ge=0,
    )
    prompts: int = key(128, "Held-out prompts.", ge=1)
    samples: int = key(1, "Responses per held-out prompt, at the training temperature.", ge=1)


@dataclass
class LaunchConfig:
    launcher: str = key(
        "local", "Where tools.launch starts the processes.", choices=["local", "ray"]
    )
    ray_address: str = key("", "Ray cluster to use; empty: a local one.")
    pools: list[str] = key(
        [],
        "More actor pools for tools.launch: each a string of overrides, such as 'actors.name=b actors.slots=32'.",
    )
    progress: str = key(
        "auto", "The live view of tools.launch.", choices=["auto", "live", "plain", "none"]
    )


@dataclass
class Config:
    """A run. Every process gets the same one."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    darts: DartsConfig = field(default_factory=DartsConfig)
    redundancy: RedundancyConfig = field(default_factory=RedundancyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
