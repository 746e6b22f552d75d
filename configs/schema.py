"""Every key of a run: its type, default, meaning and allowed values. One schema for all processes.

All processes get the same file and each reads its own sections, so one `config.yaml` describes the
whole run. `configs.cli.load` turns files and `key=value` overrides into a checked
`Config`. The `Shared...` sections hold the keys that a simulation (`darts.simulate`) has too.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]
LongEnd = Literal["none", "survivor", "longest"]

RENAMED = {  # an old name is refused, with the new one in the message
    "actors.engines": "actors.num_engines",
    "batch.tokens": "batch.max_tokens",
    "darts.long": "darts.num_long",
    "data.size": "data.num_prompts",
    "engines.count": "engines.num_engines",
    "eval.prompts": "eval.num_prompts",
    "eval.samples": "eval.samples_per_prompt",
    "learner.gpus": "learner.num_gpus",
    "learner.ranks": "learner.num_ranks",
    "lengths.prompts": "lengths.num_prompts",
    "weights.every": "weights.publish_every",
}

WHOLE_DISTRIBUTION = (
    "responses are sampled from the whole distribution, because the learner has to know the "
    "probability of every token that it trains on. An engine's truncation or penalty depends on "
    "its own weights, so the ratio of learner to actor would be wrong or undefined; use "
    "sampling.temperature"
)
REFUSED = {  # keys of other systems, and why they do not exist here
    f"sampling.{name}": WHOLE_DISTRIBUTION
    for name in (
        "bad_words",
        "frequency_penalty",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "top_k",
        "top_p",
    )
}


def key(
    default: T,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] = (),
    fixed: bool = False,
) -> T:
    """A configuration key, with the metadata that `configs.cli` reads.

    The bounds hold for every item of a list. `choices` is for a set of words that only the running
    program knows; a fixed set is a `Literal` type. If `fixed`, a run keeps the value with which it
    started, and a resume with another one is refused.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata: dict[str, Any] = {"doc": doc, "fixed": fixed}
    metadata |= {name: bound for name, bound in bounds.items() if bound is not None}
    if choices:
        metadata["choices"] = choices
    if isinstance(default, list | dict):
        return cast(T, field(default_factory=partial(copy, default), metadata=metadata))
    return cast(T, field(default=default, metadata=metadata))


@dataclass
class SharedRun:
    name: str = key("run", "Name of the run, shown in reports. It also names the run's directory.")
    seed: int = key(
        0,
        "Seeds the order of prompts, the ties between responses and, with sampling.seeded, the "
        "sampling. Change it to repeat an experiment independently.",
        ge=0,
        fixed=True,
    )
    steps: int = key(100, "Number of learner steps after which the run ends.", ge=1)


@dataclass
class RunConfig(SharedRun):
    dir: str = key("runs", "Folder that holds the runs. This run writes to <run.dir>/<run.name>.")
    resume: bool = key(
        False,
        "Continue the run of this name from its newest complete checkpoint. By default an existing "
        "run is never touched.",
    )
    trackers: list[str] = key(
        ["tensorboard"],
        "Experiment trackers: tensorboard (writes to <run>/tb), wandb, mlflow, trackio, and "
        "prometheus, which serves the newest step (run.prometheus_port). tools.launch feeds them "
        "through `python -m tools.track`, which can also be run by hand, and needs the extra "
        "trackers. [] turns them off.",
        choices=["tensorboard", "wandb", "mlflow", "trackio", "prometheus"],
    )
    prometheus_port: int = key(
        9464,
        "Port of http://127.0.0.1:PORT/metrics, which exists if run.trackers has prometheus. "
        "Change it if another run on this machine has it.",
        ge=1,
        le=65535,
    )
    project: str = key(
        "darts",
        "Project of the run in Weights & Biases and Trackio, and its experiment in MLflow.",
    )
    stop_s: float = key(
        30.0,
        "Seconds after Ctrl-C in which the learner finishes and saves its step and the other "
        "processes end. After that, all are killed. Raise it if a step, with a save, takes longer.",
        gt=0,
    )


@dataclass
class LoraConfig:
    rank: int = key(
        0,
        "Rank of the adapters that are trained in place of the model's own weights; 0 trains all "
        "weights. Use 8 to 64 if the optimizer's state of all weights does not fit into memory.",
        ge=0,
        fixed=True,
    )
    alpha: int = key(
        32,
        "Scale of the adapters, which count alpha / rank times. Adapters need a learning rate of "
        "about ten times that of all weights.",
        ge=1,
        fixed=True,
    )
    targets: list[str] = key(
        ["all-linear"],
        "Names of the linear layers with an adapter, such as [q_proj,v_proj]. all-linear: all of "
        "them except the head.",
        fixed=True,
    )
    merge: bool = key(
        False,
        "Publish whole weights, with the adapters merged into them, instead of the adapters alone. "
        "Set it if vLLM cannot serve adapters of the model, which it says at start.",
        fixed=True,
    )


@dataclass
class ModelConfig:
    path: str = key(
        "models/tiny-reasoner",
        "Folder, or name on the hub, of a Hugging Face causal language model with its tokenizer.",
        fixed=True,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "float32",
        "Number type in which engines and learner compute. Use bfloat16 on GPUs. The learner's "
        "master weights are always float32, and with float16 it computes in float32.",
        fixed=True,
    )
    head_dtype: Literal["model", "float32"] = key(
        "model",
        "Number type of the logits, in engines and learner: that of model.dtype, or float32, which "
        "makes their log-probabilities agree better in bfloat16.",
        fixed=True,
    )
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = key(
        "sdpa",
        "Attention implementation of the learner. Engines choose their own.",
    )
    max_context: int = key(
        1024,
        "Longest prompt plus response, in tokens. It must exceed sampling.max_tokens by the length "
        "of the longest prompt.",
        ge=16,
        fixed=True,
    )
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    train: str = key(
        "tagged_sum",
        "Source of the training prompts: tagged_sum, reasoning_gym:TASK, "
        "verifiers:ENVIRONMENT[:SPLIT], a .jsonl, .jsonl.gz, .csv or .parquet file, or "
        "hf:DATASET[:SPLIT].",
        fixed=True,
    )
    eval: str = key(
        "",
        "Source of the held-out prompts, in the same forms. Empty: eval.num_prompts of data.train "
        "are held out, chosen by a hash of the prompt.",
        fixed=True,
    )
    environment: str = key(
        "auto",
        "Verifier that scores a response: auto (the one that belongs to the source), exact, "
        "numeric, math_verify, reasoning_gym, verifiers:ENVIRONMENT for one of that package, "
        "MODULE:FUNCTION for your own, or MODULE:CLASS for an environment with turns.",
        fixed=True,
    )
    max_turns: int = key(
        8,
        "Largest number of responses in one rollout of an environment with turns. The last one "
        "ends it with the rewards so far; raise it for long games.",
        ge=1,
        fixed=True,
    )
    prompt_field: str = key(
        "prompt",
        "Column of a file or dataset that holds the prompt: a string or a list of chat messages. "
        "Name a field inside a column with dots.",
        fixed=True,
    )
    answer_field: str = key(
        "answer",
        "Column of a file or dataset that holds the reference answer. Name a field inside a column "
        "with dots, such as reward_model.ground_truth.",
        fixed=True,
    )
    system_prompt: str = key(
        "",
        "System message placed before every prompt: as a message of its own if prompts are "
        "formatted with a chat template, otherwise as text.",
        fixed=True,
    )
    chat_template: Literal["auto", "never"] = key(
        "auto",
        "Whether prompts are formatted with the tokenizer's chat template: auto (if it has one) or "
        "never.",
        fixed=True,
    )
    num_prompts: int = key(
        10000,
        "Number of distinct prompts of a generated source (tagged_sum, reasoning_gym). Files and "
        "datasets are always used whole.",
        ge=1,
        fixed=True,
    )
    verifier_timeout_s: float = key(
        10.0,
        "Time limit of one verification, in seconds. A verifier that exceeds it has failed; raise "
        "it for verifiers that run programs. On each engine it grows to five times the longest "
        "verification that gave a reward.",
        gt=0,
    )
    verifier_memory_mb: int = key(
        16384,
        "Memory limit of each process of a verifier, in MB of address space; 0: none. A verifier "
        "that needs more has failed; libraries for GPUs reserve more than the default.",
        ge=0,
    )
    verifier_workers: int = key(
        0,
        "Number of processes per engine that verify at the same time; 0: half the machine's cores, "
        "at most 16. Raise it if rewards are late.",
        ge=0,
        le=1024,
    )
    on_error: Literal["stop", "skip"] = key(
        "stop",
        "Reaction to a rollout that has failed darts.max_attempts times, for instance because its "
        "verifier raises: stop the run, or skip the prompt and count it. A prompt that is too long "
        "for model.max_context is always skipped.",
    )
    max_skipped_frac: float = key(
        0.1,
        "Largest fraction of the prompts that may be skipped; 1: no limit. Above it, the run fails "
        "with their number and the reasons. Eight are always allowed. Raise it for data with many "
        "bad rows.",
        ge=0,
        le=1,
    )


@dataclass
class PipelineConfig:
    mode: Literal["async", "sync"] = key(
        "async",
        "async: engines generate without a pause. sync: generate the groups of one step, train on "
        "them, repeat; the lag is then 0, regardless of staleness.max_lag.",
        fixed=True,
    )


@dataclass
class SharedBatch:
    groups: int = key(
        16,
        "Number of groups (one prompt each) in the batch of one learner step.",
        ge=1,
        fixed=True,
    )
    stream: Literal["batch", "group"] = key(
        "batch",
        "When the learner gets the groups of a step. batch: all at once, when the batch is full. "
        "group: in portions, as groups are decided; the learner accumulates their gradients while "
        "the others are still decoded, and the step ends with the last portion. The gradient is "
        "the same up to rounding. Set it to group if the learner waits for long responses; it "
        "needs batch.updates=1.",
    )


@dataclass
class BatchConfig(SharedBatch):
    updates: int = key(
        1,
        "Number of optimizer updates in one learner step. Each takes its share of the groups, so "
        "it must divide batch.groups. Above 1 the learner first computes the log-probabilities of "
        "the whole batch, and loss.correction=decoupled clips against them. Raise it for large "
        "batches: a step then moves the policy further.",
        ge=1,
    )
    max_tokens: int = key(
        4096,
        "Largest packed micro-batch of one rank, in tokens. It changes memory and speed but not "
        "the gradient: raise it until the memory is used.",
        ge=16,
    )
    share_prompts: bool = key(
        True,
        "Whether the learner forwards the prompt of a group once for all its responses in a "
        "micro-batch. The gradient is the same up to rounding. Before the first step the learner "
        "compares the results on its model; if they differ, or if the model has layers without "
        "plain causal attention, it says so and repeats the prompts. Set it to false to compare.",
    )


@dataclass
class StalenessConfig:
    max_lag: int = key(
        4,
        "Largest lag of a trajectory, in policy versions: the version of the learner that trains "
        "it minus that of its oldest token. Raise it if the learner waits for long responses.",
        ge=0,
    )
    on_deadline: Literal["wait", "drop", "complete"] = key(
        "wait",
        "Treatment of a group that must be in the next batch because of staleness.max_lag. wait: "
        "the learner waits until darts.group_size responses have finished, and selects from those. "
        "drop: a group with fewer is given up, and its prompt returns to the queue. complete: the "
        "learner waits until the rule of selection is satisfied, which keeps the long responses of "
        "a tight bound, and takes longer.",
    )


@dataclass
class SharedDarts:
    policy: Literal["darts", "plain", "first_finished", "random"] = key(
        "darts",
        "Rule that selects the responses for training: darts (by length), plain (all of them, "
        "without a surplus), first_finished (in order of finishing), or random (a control).",
    )
    group_size: int = key(
        8, "M: number of trajectories per group that are selected for training.", ge=2, fixed=True
    )
    num_long: int = key(
        1,
        "L: number of the M trajectories that are chosen among the longest. The other M - L are "
        "the shortest.",
        ge=0,
    )
    long_end: LongEnd = key(
        "survivor",
        "How the L long trajectories are chosen: none (take the M shortest), survivor (let L of "
        "the longest running rollouts finish and cancel the rest) or longest (wait for every "
        "rollout, as published).",
    )
    rank: Literal["length", "reward_per_token"] = key(
        "length",
        "Order in which responses take the seats that are not long: length (shortest first) or "
        "reward_per_token (highest first, with rewards limited to 0..1, as in GFPO; needs "
        "darts.long_end=none).",
    )
    relative_limit: float = key(
        0.0,
        "Length limit of a group's responses, as a multiple of its median: once half of its "
        "responses have finished, one that is longer ends there, gets the reward of its text so "
        "far, and may take a seat. So no group waits long for its longest response, and the policy "
        "learns to be concise: a length penalty in effect. 3 to 4 leaves room for second thoughts. "
        "0: none. Applies to darts.policy=darts.",
        ge=0,
    )
    audit: float = key(
        0.0,
        "Share of the groups in which no rollout is cancelled, so that the ledger shows the "
        "outcome of responses that are cancelled elsewhere. About 0.05 measures the bias of the "
        "selection during a run. A group at its deadline is not waited for.",
        ge=0,
        le=1,
    )
    cancel: Literal["exact", "eager"] = key(
        "exact",
        "Which rollouts are cancelled: exact (only those that provably cannot be selected) or "
        "eager (all that remain once M have finished).",
    )
    fill_truncated: bool = key(
        True,
        "Complete a group that has too few valid responses with truncated ones, so that hard "
        "prompts are trained, too. If false, such a group is dropped.",
    )
    uniform: Literal["train", "drop"] = key(
        "train",
        "What happens to a group whose selected rewards are all equal, so that it has no gradient "
        "(but for an overlong penalty): train (ship it with the others) or drop (replace it by a "
        "group of another prompt, as in DAPO). Drop if many prompts are always or never solved; a "
        "step then costs more tokens.",
    )
    max_refill: float = key(
        2.0,
        "Largest number of groups without signal that a step may replace, as a multiple of "
        "batch.groups. Further ones are trained on, so that a run continues if every prompt is "
        "solved, or none. Applies to darts.uniform=drop and darts.pilot.",
        gt=0,
    )
    min_spread: float = key(
        0.0,
        "Largest difference between the rewards of a group that still count as equal. Raise it if "
        "rewards are not just 0 and 1 and small differences are noise.",
        ge=0,
    )
    pilot: int = key(
        0,
        "Number of rollouts that a group launches first. It launches the others only if its "
        "rewards will probably differ; otherwise it is stopped and another prompt takes its place. "
        "0: launch all at once. About half of darts.group_size saves the most when many prompts "
        "are always or never solved.",
        ge=0,
    )
    min_mixed_prob: float = key(
        0.2,
        "Smallest probability of different rewards with which a group continues after its pilot. "
        "Lower it if groups are stopped too often. Applies to darts.pilot.",
        gt=0,
        lt=1,
    )
    max_stops: int = key(
        4,
        "How many groups of a prompt in a row may be stopped after their pilots. The next one gets "
        "its whole budget, so that no prompt is given up forever. Applies to darts.pilot.",
        ge=0,
    )
    max_reopens: int = key(
        3,
        "How many times the prompt of a failed or overdue group returns to the queue. Returns "
        "after a restart do not count.",
        ge=0,
    )


@dataclass
class DartsConfig(SharedDarts):
    max_attempts: int = key(
        3, "How many times one rollout is launched before it counts as failed.", ge=1
    )


@dataclass
class RedundancyConfig:
    rule: Literal["none", "fixed", "paper", "marginal"] = key(
        "marginal",
        "How many rollouts a prompt gets: none (M), fixed (redundancy.upper times M), paper (a "
        "total for one step's prompts, split by their spread, as published) or marginal (per "
        "prompt, as long as one more rollout is worth its price).",
    )
    upper: float = key(
        2.0, "Largest budget of a prompt, as a multiple of darts.group_size.", ge=1, le=8
    )
    price: float = key(
        0.3,
        "Weight of the relative increase in generation time against the gain from a larger budget "
        "(lambda), for the rules paper and marginal. Raise it if engines are the bottleneck.",
        ge=0,
    )
    variance: Literal["censored", "ema"] = key(
        "censored",
        "How the spread of a prompt's lengths is tracked: censored (a lognormal, to which a "
        "cancelled response contributes a lower bound) or ema (a moving average of the standard "
        "deviation of responses that ended, as published; it is too small where long ones are "
        "cancelled).",
        fixed=True,
    )
    alpha: float = key(
        0.3,
        "Weight of a prompt's newest group in its moving average; the groups before it have the "
        "rest. Raise it if lengths change quickly. Applies to redundancy.variance=ema.",
        gt=0,
        le=1,
    )


def largest_budget(group_size: int, upper: float) -> int:
    """Rollouts of a prompt with the full budget: `upper` times `group_size`, to the nearest."""
    return int(upper * group_size + 0.5)


@dataclass
class SharedSampling:
    max_tokens: int = key(
        512,
        "Longest response, in tokens. A response that reaches it is truncated.",
        ge=1,
        fixed=True,
    )


@dataclass
class SamplingConfig(SharedSampling):
    temperature: float = key(
        1.0,
        "Sampling temperature, in training and in evaluation. vLLM would raise values below 0.01, "
        "so that the learner would train another distribution, and refuses values above 2.",
        ge=0.01,
        le=2.0,
        fixed=True,
    )
    seeded: bool = key(
        False,
        "Sample each response with a seed of its own, derived from run.seed, its prompt and its "
        "place in the group, so that the same policy samples it again in a resumed run. vLLM "
        "then draws for one response after the other, which may slow large batches down.",
        fixed=True,
    )


@dataclass
class ActorsConfig:
    name: str = key(
        "pool",
        "Name of this pool of engines, unique in the run. Its engines are <name>/0, <name>/1, ...",
    )
    num_engines: int = key(1, "Number of engines in this pool.", ge=1)
    slots: int = key(
        64,
        "Largest number of rollouts in flight per engine. Raise it up to the batch size at which "
        "the latency per token starts to grow.",
        ge=1,
        le=8192,
    )
    min_step_ms: list[list[float]] = key(
        [],
        "Least duration of a decoding step, in milliseconds, at some batch sizes, to emulate "
        "another machine's latency on a CPU: [[1,12],[64,26]] interpolates between 12 ms for one "
        "rollout and 26 ms for 64. Reports say emulated. Empty: as fast as this machine can.",
    )
    tensor_parallel: int = key(
        1, "Number of GPUs per engine. Raise it if the model does not fit on one.", ge=1
    )
    device: Device = key(
        "auto", "Device of the engines; auto takes the one that the installed vLLM was built for."
    )
    gpu_memory_frac: float = key(
        0.9,
        "Share of a GPU's memory that an engine takes. Lower it if the engine shares the GPU.",
        gt=0,
        le=1,
    )
    kv_cache_gib: float = key(1.0, "Size of a CPU engine's key-value cache, in GiB.", gt=0)
    vllm: dict[str, Any] = key(
        {},
        "Further options of vLLM, by its own names, such as {max_num_batched_tokens: 16384}; one "
        "of them is set with actors.vllm.NAME=VALUE. Options that another key sets, or with which "
        "log-probabilities would not be exact, are refused.",
    )
    stream_interval: int = key(
        8,
        "Number of tokens that a rollout decodes between two progress reports. Smaller values "
        "cancel earlier and send more messages.",
        ge=1,
    )
    flush_s: float = key(
        0.05,
        "Shortest time between two batches of progress reports of one engine, in seconds. It grows "
        "by itself while the buffer is busy.",
        gt=0,
    )
    max_restarts: int = key(
        5,
        "How many times the pool restarts an engine that died, within actors.restart_window_s, "
        "before it gives that engine up.",
        ge=0,
    )
    restart_window_s: float = key(
        600.0,
        "Seconds after which a restart no longer counts towards actors.max_restarts. Raise it if "
        "an engine takes minutes to load.",
        gt=0,
    )


@dataclass
class BufferConfig:
    address: str = key(
        "tcp://127.0.0.1:5577",
        "Address on which the buffer listens. Statistics are published on the next port.",
    )
    keys: str = key(
        "",
        "Folder of the CURVE keys, made by `python -m tools.keys FOLDER`. They are required as "
        "soon as an address is not on the loopback interface. Empty: tools.launch makes keys for "
        "a run on one machine, and processes started by hand use none.",
    )
    fsync_s: float = key(
        0.05,
        "Time after which new records are made durable together, in seconds; 0: each one at once. "
        "A power cut loses at most the tokens streamed in that time. A killed process loses "
        "nothing.",
        ge=0,
    )
    segment_bytes: int = key(
        64_000_000,
        "Size at which a segment of the event log, or of metrics.jsonl, groups.jsonl or "
        "samples.jsonl, ends, in bytes. A restarted buffer reads the newest one of each; lower it "
        "if restarts take long.",
        ge=1,
    )
    keep_event_bytes: int = key(
        1_000_000_000,
        "Size of the event log that is kept for tools.replay, in bytes; older segments are "
        "removed.",
        ge=0,
    )
    keep_row_bytes: int = key(
        1_000_000_000,
        "Size of each of metrics.jsonl, groups.jsonl and samples.jsonl that is kept with its older "
        "segments, in bytes; the oldest rows above it are removed. Lower it if the disk is small. "
        "Rows that the learner's checkpoints need are kept.",
        ge=0,
    )
    max_bytes: int = key(
        2_000_000_000,
        "Memory for trajectories, in bytes. While it is full, no new group is opened.",
        ge=1_000_000,
    )
    connect_timeout_s: float = key(
        60.0,
        "How long a process waits for the buffer's first answer, in seconds. Raise it if the "
        "buffer starts later than the others.",
        gt=0,
    )
    peer_timeout_s: float = key(
        15.0,
        "Silence after which an engine, a rank or the buffer counts as lost, in seconds. Raise it "
        "on machines that stall.",
        gt=1,
    )
    rejoin_timeout_s: float = key(
        300.0,
        "How long the run continues without a learner or without any engine before it fails, and "
        "how long those wait for a lost buffer, in seconds. Raise it if a restart takes longer.",
        gt=1,
    )
    rollout_timeout_s: float = key(
        600.0,
        "How long an engine may give no sign of a rollout (no token, score or confirmed cancel), "
        "in seconds. Then the engine is restarted, and its rollouts continue on other engines. "
        "This and the next two deadlines grow to five times the longest such wait that was seen.",
        gt=1,
    )
    load_timeout_s: float = key(
        600.0,
        "How long an engine may take to load a newer policy, in seconds. Then it is restarted.",
        gt=1,
    )
    step_timeout_s: float = key(
        1800.0,
        "How long the learner may take for a step or a publication, in seconds. Then the run fails "
        "with an error.",
        gt=1,
    )


@dataclass
class SharedWeights:
    publish_every: int = key(
        1,
        "Number of learner steps between two published policy versions.",
        ge=1,
        fixed=True,
    )


@dataclass
class WeightsConfig(SharedWeights):
    transport: Literal["zmq", "file"] = key(
        "zmq",
        "How engines fetch the weights: zmq (from the learner) or file (from a folder that every "
        "machine shares).",
    )
    address: str = key(
        "tcp://127.0.0.1:*",
        "Address on which the learner serves weights (zmq); port * takes a free one. Set the "
        "learner's own address if engines run on other machines.",
    )
    dir: str = key("", "Folder of the weights (file). Empty: weights/ in the run's directory.")
    deltas: bool = key(
        False,
        "Engines that hold the version before fetch only the numbers that changed (zmq), whenever "
        "those are fewer bytes. Each engine then keeps a copy of the weights in the machine's "
        "memory. Set it if fetches take long and model.dtype is bfloat16 or float16.",
    )


@dataclass
class LossConfig:
    kind: Literal["dapo", "grpo", "dr_grpo", "rloo", "gspo", "cispo", "decoupled_ppo"] = key(
        "dapo",
        "Objective of the training, by the name of its publication. It decides every key below "
        "that is auto or 0; docs/objectives.md has the table.",
    )
    ratio: Literal["auto", "token", "sequence"] = key(
        "auto",
        "Level of the ratio of learner to actor: of each token, or the geometric mean over its "
        "response (sequence), which fits rewards that judge a whole response.",
    )
    correction: Literal["auto", "clip", "truncated", "mask", "cispo", "decoupled"] = key(
        "auto",
        "Use of the ratio: clip (PPO), truncated (a weight of at most loss.tis_cap), mask (no "
        "gradient outside loss.mask_low..mask_high), cispo (a weight of at most 1 + "
        "loss.clip_high) or decoupled (clip against the policy at the start of the step).",
    )
    aggregation: Literal["auto", "token_mean", "sequence_mean", "constant"] = key(
        "auto",
        "Weight of a token in the loss: token_mean (all tokens of a step count the same), "
        "sequence_mean (all responses do) or constant (a response's sum divided by "
        "sampling.max_tokens, and the mean over responses).",
    )
    baseline: Literal["auto", "group", "leave_one_out"] = key(
        "auto",
        "Reward from which an advantage is measured: the mean of the group, or of the other "
        "responses in it (leave_one_out).",
    )
    scale: Literal["auto", "std", "none"] = key(
        "auto",
        "Divisor of advantages: the standard deviation of the group's rewards, or none. Without "
        "it, prompts that are nearly always or nearly never solved count less.",
    )
    overlong_buffer: int = key(
        0,
        "Length of the zone below sampling.max_tokens in which a response's reward falls, in "
        "tokens; 0: no penalty. In it, responses learn to end before they are truncated. DAPO took "
        "a fifth of the limit. Only advantages see the penalty; recorded rewards do not have it.",
        ge=0,
    )
    overlong_factor: float = key(
        1.0,
        "Penalty of a response that reaches sampling.max_tokens; it grows linearly from 0 over "
        "loss.overlong_buffer.",
        gt=0,
    )
    clip_low: float = key(
        0.0,
        "Policy ratios below 1 - loss.clip_low are clipped. 0: as published for loss.kind.",
        ge=0,
        lt=1,
    )
    clip_high: float = key(
        0.0,
        "Policy ratios above 1 + loss.clip_high are clipped. A value above loss.clip_low "
        "(clip-higher) keeps exploration alive. 0: as published for loss.kind.",
        ge=0,
    )
    tis_cap: float = key(
        2.0,
        "Cap of the truncated importance weight that corrects for the difference between the "
        "policy that sampled a token and the learner's. Applies to loss.correction=clip, truncated "
        "and decoupled.",
        gt=0,
    )
    mask_low: float = key(
        0.5, "Smallest ratio with a gradient. Applies to loss.correction=mask.", ge=0, lt=1
    )
    mask_high: float = key(
        5.0, "Largest ratio with a gradient. Applies to loss.correction=mask.", gt=1
    )
    kl: float = key(
        0.0,
        "Weight of the KL penalty that keeps the policy near a reference. Above 0, the learner "
        "holds a second, frozen model and trains on responses without an advantage, too.",
        ge=0,
    )
    kl_estimator: Literal["k1", "k2", "k3"] = key(
        "k3",
        "Estimator of the KL penalty per token, with d = log policy - log reference: k1 (d, whose "
        "gradient is zero on average), k2 (d^2 / 2) or k3 (exp(-d) - 1 + d).",
    )
    reference: str = key(
        "",
        "Folder, or name on the hub, of the reference model of the KL penalty. Empty: model.path, "
        "the policy before training.",
        fixed=True,
    )
    train_truncated: bool = key(
        False,
        "Let the tokens of truncated responses contribute to the loss. Their rewards count in the "
        "group's advantages in any case.",
    )


@dataclass
class OptimizerConfig:
    lr: float = key(1e-6, "Learning rate of AdamW.", gt=0)
    betas: list[float] = key([0.9, 0.95], "The two betas of AdamW.", ge=0, lt=1)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = key(
        "constant",
        "Course of the learning rate after optimizer.warmup_steps: constant, or a decline towards "
        "0 at run.steps, linear or as a half cosine. If run.steps changes at a resume, the decline "
        "continues towards the new end.",
    )
    warmup_steps: int = key(
        0, "Number of steps over which the learning rate rises linearly from 0.", ge=0
    )
    moments: Literal["float32", "bfloat16"] = key(
        "float32",
        "Type in which AdamW holds its two moments between steps. bfloat16 takes 4 bytes per "
        "parameter less, and rounds them at random, so that they are exact on average; the noise "
        "is small with the default betas (docs/sizing.md).",
    )
    max_grad_norm: float = key(
        1.0, "Largest norm of the gradient; larger ones are scaled down.", gt=0
    )


@dataclass
class LearnerConfig:
    num_ranks: int = key(
        1, "Number of data-parallel (FSDP) processes on this node, one per GPU.", ge=1
    )
    shard_ranks: int = key(
        0,
        "Number of ranks that a copy of the model is divided among; it must divide the number of "
        "all ranks, which then hold several copies (HSDP). 0: all ranks. With the ranks of one "
        "node, weights are exchanged within nodes and only gradients between them, and a rank "
        "holds more.",
        ge=0,
    )
    device: Device = key("auto", "Device of the ranks; auto uses CUDA if there is a GPU.")
    take_over: bool = key(
        False,
        "Replace a learner of this run that is still alive. Without it a second learner is "
        "refused; set it if the first one hangs where you cannot stop it.",
    )
    activation_checkpointing: bool = key(
        False,
        "Recompute activations in the backward pass. It saves memory and costs about a third more "
        "time.",
    )
    compile: bool = key(
        False,
        "Compile each block of the model with torch.compile; attention and the head stay as they "
        "are. The first start takes minutes, and on a CPU, where it needs a C++ compiler, steps "
        "are hardly shorter. It was never run on a GPU: set it there to try it. A model that it "
        "does not fit is refused.",
    )
    offload: bool = key(
        False,
        "Hold weights, gradients and moments of the optimizer in the machine's memory, and step "
        "the optimizer on its processors. For a model that does not fit on its GPUs otherwise; "
        "each pass copies all weights to them, so steps take longer. On a CPU it changes nothing.",
    )
    checkpoint_every: int = key(
        20, "Number of steps between two checkpoints. The last step always writes one.", ge=1
    )
    keep_checkpoints: int = key(2, "Number of newest checkpoints that are kept.", ge=1)
    keep_best: int = key(
        1,
        "Number of checkpoints with the highest eval/reward_mean that are kept besides. Only "
        "checkpoints at a step with an evaluation have one: let learner.checkpoint_every divide "
        "eval.every, or the reverse.",
        ge=0,
    )
    max_logprob_diff: float = key(
        0.0,
        "Largest difference between engine and learner, in nats per token at equal weights; a run "
        "above it stops. 0: 0.005 in float32, 0.05 in float16, 0.1 in bfloat16, and for the probe, "
        "whose tokens are fixed, 0.0001, 0.05 and 0.3. Raise it only for an engine that is known "
        "to round more.",
        ge=0,
    )


@dataclass
class EvalConfig:
    every: int = key(
        20,
        "Number of steps between two evaluations. There is also one before the first step and one "
        "after the last. 0 disables evaluation.",
        ge=0,
    )
    num_prompts: int = key(
        128,
        "Number of held-out prompts. Raise it if the accuracy fluctuates.",
        ge=1,
        fixed=True,
    )
    samples_per_prompt: int = key(
        1, "Number of responses per held-out prompt, sampled as in training.", ge=1
    )


@dataclass
class LaunchConfig:
    launcher: Literal["local", "ray", "commands", "slurm", "kubernetes"] = key(
        "local",
        "Where tools.launch starts the processes: on this machine, or on a Ray cluster. commands, "
        "slurm and kubernetes start nothing: they print the commands of each machine, a batch "
        "script or the manifests.",
    )
    ray_address: str = key("", "Address of the Ray cluster. Empty: start a local one.")
    pools: list[str] = key(
        [],
        "Further actor pools that tools.launch starts, each a string of overrides such as "
        "'actors.name=b actors.slots=32'.",
    )
    max_restarts: int = key(
        3,
        "How many times tools.launch restarts a learner or a pool that was killed, within "
        "launch.restart_window_s, before the run fails. 0: never.",
        ge=0,
    )
    restart_window_s: float = key(
        600.0,
        "Seconds after which a restart no longer counts towards launch.max_restarts. Raise it if "
        "the learner takes minutes to load.",
        gt=0,
    )
    progress: Literal["auto", "live", "plain", "none"] = key(
        "auto",
        "Progress view of tools.launch: live (redraws in place), plain (lines), none, or auto "
        "(live on a terminal, otherwise plain).",
    )


@dataclass
class Place:
    """The machines that a process of a run needs on a cluster."""

    num_nodes: int = key(1, "Number of machines, each with a process of its own.", ge=1)
    num_gpus: float = key(
        0.0,
        "Number of GPUs of each machine. 0: one for each rank, or as many as the engines have.",
        ge=0,
    )
    accelerator_type: str = key("", "Type of the GPUs by Ray's name, such as H100. Empty: any.")
    resources: dict[str, Any] = key({}, "Custom resources of Ray that a machine must have left.")
    labels: dict[str, Any] = key({}, "Labels that the machine must have, such as {zone: a}.")


@dataclass
class ClusterConfig:
    learner: Place = field(default_factory=Place)
    pools: dict[str, Any] = key(
        {},
        "Actor pools by name, in place of the pool of the section actors. Each has the keys of "
        "cluster.learner, and keys of the run that differ in it, such as {a10: {num_nodes: 2, "
        "accelerator_type: A10, actors: {num_engines: 4, slots: 48}}}. On one machine, places "
        "mean nothing.",
    )


@dataclass
class Config:
    """The configuration of a run, which all its processes share."""

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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
