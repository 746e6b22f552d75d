"""`python -m tools.bench pipeline`: the cost of the pipeline over bare vLLM and a bare loop.

Owns the table and the order of measurements: bare and pipeline take turns in one process on one
machine, so that noise affects both alike. The actors' half is `tools.benchmarks.actors`; the
learner's half trains on the shards that it produced. The target is a ratio of 0.95, but nothing
here passes or fails: the reader compares.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import NoReturn

import msgspec
import torch

from buffer.processes.private_folder import private_folder
from buffer.wire.messages import Shard
from buffer.wire.snapshots import fetch
from configs.checks import check
from configs.command import run_command
from configs.schema import Config, key
from learner import fsdp
from learner.packs.attention import PACKED_SDPA
from learner.packs.batch import Pack, make_packs
from learner.snapshots.publish import WeightPublisher
from learner.train import UNPUBLISHED, LearnerState, build_state, train_step
from tools.benchmarks.actors import BARE, ONE_POLICY, SEEDS, SWAPS, Window, measure_actors


@dataclass
class BenchOptions:
    seconds: float = key(15.0, "Length of one measurement of the actors, in seconds.", gt=0)
    warmup_s: float = key(
        4.0,
        "Generation before each measurement, in seconds. It mixes the lengths in flight.",
        ge=0,
    )
    rounds: int = key(3, "Number of measurements of each kind; the kinds take turns.", ge=1)
    steps: int = key(8, "Largest number of learner steps to measure, after one warm-up step.", ge=1)


@dataclass
class BenchConfig(Config):
    bench: BenchOptions = field(default_factory=BenchOptions)


def main(argv: Sequence[str]) -> NoReturn:
    run_command(
        "Measure the tokens/s of the pipeline against bare vLLM at the same concurrency, and those "
        "of the learner against a bare FSDP2 loop on the same packs. The configuration starts from "
        "the preset demo. One engine serves both sides in turn; the learner has one rank.",
        run,
        schema=BenchConfig,
        argv=["--config", "demo", *argv],
        program="python -m tools.bench pipeline",
    )


def run(options: BenchConfig) -> None:
    config = Config(**{section.name: getattr(options, section.name) for section in fields(Config)})
    # Nothing is cancelled, so that both sides decode the same work.
    config.darts.policy, config.redundancy.rule = "plain", "none"
    config.eval.every = 0
    config.learner.num_ranks = 1
    check(config)
    bench = options.bench
    # With a KL penalty, the buffer ships responses without an advantage, too.
    with_all = replace(config, loss=replace(config.loss, kl=1.0))
    with private_folder():
        windows, shards = asyncio.run(
            measure_actors(
                with_all, _initial_snapshot(config), bench.seconds, bench.warmup_s, bench.rounds
            )
        )
    if len(shards) < 2:
        raise ValueError(
            f"bench.seconds={bench.seconds:g}: responses for {len(shards)} learner steps were "
            "generated, but 2 are needed; raise it"
        )
    steps = measure_learner(config, shards[: bench.steps + 1])
    print(
        f"\n{'':<28}{'bare':>10}{'pipeline':>10}{'ratio':>8}   "
        "medians of tokens/s; median ratio of paired measurements (range)"
    )
    if config.actors.min_step_ms:
        print("the decode latency of the actors is emulated (actors.min_step_ms)")
    seeding = f"bare, {'unseeded' if config.sampling.seeded else 'seeded'}"
    for name, label in ((SEEDS, seeding), (ONE_POLICY, ONE_POLICY), (SWAPS, SWAPS)):
        _row(
            f"actors, {label}",
            [w.tokens_per_s for w in windows[BARE]],
            [w.tokens_per_s for w in windows[name]],
        )
    _row(
        "learner",
        [s.num_tokens / s.bare_s for s in steps],
        [s.num_tokens / s.train_s for s in steps],
    )
    print("\nwhere the time goes, actors:")
    for name, of_kind in windows.items():
        _explain(name, of_kind, config.actors.slots)
    shares = [
        f"{label} {1e3 * median(getattr(s, name) for s in steps):.1f}"
        for name, label in LEARNER_PARTS.items()
    ]
    print(
        "where the time goes, learner, ms per step of "
        f"{median(s.num_tokens for s in steps):,.0f} tokens: {', '.join(shares)}"
    )


def _row(name: str, bare: Sequence[float], pipeline: Sequence[float]) -> None:
    ratios = sorted(ours / theirs for ours, theirs in zip(pipeline, bare, strict=True))
    spread = f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} pairs)"
    print(
        f"{name:<28}{median(bare):>10,.0f}{median(pipeline):>10,.0f}"
        f"{median(ratios):>8.3f}   {spread}"
    )


def _explain(name: str, windows: Sequence[Window], slots: int) -> None:
    cpu = {
        part: median(1e6 * w.cpu_s[part] / max(1, w.num_tokens) for w in windows)
        for part in windows[0].cpu_s
    }
    shares = ", ".join(f"{part} {value:.0f}" for part, value in cpu.items())
    paused = (
        f"; paused for {median(w.num_swaps for w in windows):.0f} swaps, "
        f"{median(w.paused_frac for w in windows):.1%} of the time"
    )
    occupied = f"; {median(w.busy_frac for w in windows):.1%} of {slots} slots occupied{paused}"
    print(f"  {name:<20}CPU µs per token: {shares}{occupied if name != BARE else ''}")


# Learner ------------------------------------------------------------------------------------------

LEARNER_PARTS = {
    "bare_s": "bare loop",
    "train_s": "train_step",
    "packs_s": "including packing",
    "publish_s": "and separately publishing",
}


@dataclass
class LearnerStep:
    """One shard, trained on by both loops. `num_tokens` counts the tokens that enter the model."""

    num_tokens: int
    train_s: float
    bare_s: float
    packs_s: float
    publish_s: float


def measure_learner(config: Config, shards: Sequence[Shard]) -> list[LearnerStep]:
    """Train on every shard once by `train_step` and once by a bare loop, in alternating order.

    The first shard only warms up.
    """
    steps = []
    with fsdp.process_group(config) as device, WeightPublisher(config, 0) as publisher:
        state = build_state(config, device)
        for index, shard in enumerate(shards):
            shard = _with_signal(shard)
            steps.append(_measure_step(state, publisher, shard, bare_first=index % 2 == 0))
    return steps[1:]


def _with_signal(shard: Shard) -> Shard:
    """The same trajectories with advantages of alternating sign."""
    trajectories = [
        msgspec.structs.replace(trajectory, advantage=(-1.0) ** index)
        for index, trajectory in enumerate(shard.trajectories)
    ]
    return msgspec.structs.replace(shard, trajectories=trajectories)


def _measure_step(
    state: LearnerState, publisher: WeightPublisher, shard: Shard, bare_first: bool
) -> LearnerStep:
    def pack() -> list[Pack]:
        return make_packs(shard.trajectories, state.config.batch.max_tokens, UNPUBLISHED)

    packs = pack()
    measured: dict[str, Callable[[], object]] = {
        "bare_s": lambda: bare_step(state, packs),
        "train_s": lambda: train_step(state, shard),
        "packs_s": pack,
        "publish_s": lambda: publisher.publish(state.model, state.step),
    }
    took = {
        name: _seconds(measured[name]) for name in (measured if bare_first else reversed(measured))
    }
    return LearnerStep(sum(len(pack.input_ids_T) for pack in packs), **took)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def bare_step(state: LearnerState, packs: Sequence[Pack]) -> None:
    """A plain FSDP2 step on finished packs: forward, cross-entropy, backward, clip and step."""
    model, optimizer = state.model, state.optimizer
    for pack in packs:
        batch = pack.to(state.device)
        packed = (
            {"lengths": batch.lengths} if model.config._attn_implementation == PACKED_SDPA else {}
        )
        ids, positions = batch.input_ids_T[None], batch.position_ids_T[None]
        logits_SV = model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=batch.predicts_S,
            **packed,
        ).logits[0]
        torch.nn.functional.cross_entropy(logits_SV.float(), batch.targets_S).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), state.config.optimizer.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if state.device.type == "cuda":
        torch.cuda.synchronize()


def _initial_snapshot(config: Config) -> bytes:
    """The weights of `model.path` in the form in which the learner would publish them."""
    with fsdp.process_group(config) as device, WeightPublisher(config, 0) as publisher:
        snapshot = publisher.publish(fsdp.load_sharded(config, device), 0)
        assert snapshot is not None
        return fetch(snapshot, config.buffer.keys)
