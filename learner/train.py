"""The learner's loop, one process per rank, readable from top to bottom.

    buffer ──Shard──> train_step ──> publish ──Published, Trained──> buffer ──Pull──> (next step)
                          │             └──snapshot──> actors
                          └──> checkpoint

    consumes        one `Shard` per step and rank: token-balanced, of bounded staleness
    waits for       the buffer (a shard is ready), the other ranks (collectives)
    unblocked by    enough finished groups; a `Shutdown` ends every wait on the buffer, a silent buffer raises `TransportError`

Owns: the order of things in a step, the learning rate, the metrics. Never decides what is trained on, nor when a trajectory is too stale.
Rank 0 alone speaks for all: it publishes and acknowledges. Every collective is called by every rank in the same order: token sums and
micro-batch count, forward and backward, gradient norm, publication, checkpoint.

Left out: several updates per shard, a KL penalty and its reference model, a critic, pulling the next shard while this one trains.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from buffer.client import LearnerLink
from buffer.messages import LearnerFailed, LearnerHello, LearnerWelcome, Published, Pull, Shard, Shutdown, Trained
from buffer.transport import TransportError
from configs.schema import Config
from darts.events import ProtocolError
from learner import RunStopped, checkpoint, fsdp
from learner.batch import Pack, empty_pack, make_packs
from learner.loss import clipped_surrogate, token_logprobs
from learner.publish import Publisher

POLL_S = 1.0
SURVIVOR_GRACE_S = 5.0
UNPUBLISHED = -1  # no actor ever samples with this version


@dataclass
class LearnerState:
    """What a rank carries from step to step."""

    config: Config
    device: torch.device
    rank: int
    num_ranks: int
    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    step: int = 0  # next to train
    policy_version: int = -1  # newest published
    published: bool = False  # whether the weights are exactly those of `policy_version`


def run_rank(config: Config, rank: int = 0, num_ranks: int = 1, local_rank: int = 0) -> int:
    """Train until the buffer says that the run is over; 0 if it ended well.

    Raises `RunStopped` (the buffer's error), `TransportError` (no buffer), `ValueError` (configuration), or whatever broke.
    """
    with fsdp.process_group(config, rank, num_ranks, local_rank) as device, _link(config, rank) as link:
        state = build_state(config, device, rank, num_ranks)
        if config.run.resume:
            _resume(state)
        with Publisher(config, rank) as publisher:
            _join(state, link)
            with _until_told_to_stop(state, link):
                _publish(state, publisher, link)
                while state.step < config.run.steps:
                    shard, pull_s = _pull(state, link)
                    metrics = train_step(state, shard) | {"wait/pull_s": pull_s}
                    if _due(state, config.weights.every):
                        metrics |= _publish(state, publisher, link)
                    if _due(state, config.learner.checkpoint_every):
                        _save(state)
                    if rank == 0:
                        link.send(Trained(step=shard.step, metrics=metrics))
                _receive(link)  # serves the last snapshot while the run is evaluated
    return 0


def build_state(config: Config, device: torch.device, rank: int = 0, num_ranks: int = 1) -> LearnerState:
    """Model, sharding and optimizer, fresh from `model.path`. Needs `fsdp.process_group`."""
    model = fsdp.load_sharded(config, device)
    beta1, beta2 = config.optimizer.betas
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, betas=(beta1, beta2), weight_decay=config.optimizer.weight_decay, fused=True
    )
    return LearnerState(config, device, rank, num_ranks, model, optimizer)


def train_step(state: LearnerState, shard: Shard) -> dict[str, float]:
    """One update on this rank's shard; afterwards `state.step` is one higher. Returns the step's metrics, equal on every rank.

    The loss is the sum of the surrogate over trained tokens, divided by their number on all ranks: neither the packing nor the number of
    ranks changes the gradient. Raises `FloatingPointError` before the weights are touched if the gradient is not finite.
    """
    started = time.monotonic()
    config = state.config
    truncated = config.loss.train_truncated
    packs = make_packs(shard, config.batch.tokens, truncated, state.policy_version if state.published else UNPUBLISHED)
    # Ranks short of a micro-batch take part in the collectives of the others with an empty one.
    packs += [empty_pack()] * (int(fsdp.all_max(len(packs), state.device)) - len(packs))
    num_trained = max(1, shard.step_sampled_tokens if truncated else shard.step_trained_tokens)
    lr = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    totals = TokenSums()
    for pack in packs:
        loss = micro_batch_loss(state, pack.to(state.device), num_trained, totals)
        loss.backward()
    grad_norm = update(state)
    sums = TokenSums(*fsdp.all_sum(totals.as_list(), state.device))
    state.step += 1
    state.published = False
    step_s = time.monotonic() - started
    peak_bytes = fsdp.all_max(_peak_bytes(state.device), state.device)
    return sums.metrics(num_trained) | {
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/step_s": step_s,
        "train/tokens_per_s": sums.inputs / step_s,
        "memory/learner_peak_bytes": peak_bytes,
    }


@dataclass
class TokenSums:
    """Sums over tokens, of a rank and then of all ranks. All but `inputs` are over the tokens that are trained on."""

    inputs: float = 0.0  # tokens that went through the model, prompts included
    trained: float = 0.0
    loss: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    capped: float = 0.0
    ratio: float = 0.0
    logprob_diff: float = 0.0
    current: float = 0.0  # sampled by the very weights that were trained
    current_logprob_diff: float = 0.0

    def as_list(self) -> list[float]:
        return list(vars(self).values())

    def metrics(self, num_trained: int) -> dict[str, float]:
        trained = max(1.0, self.trained)
        metrics = {
            "train/loss": self.loss / num_trained,
            "train/entropy": self.entropy / trained,
            "train/clip_frac": self.clipped / trained,
            "train/tis_clip_frac": self.capped / trained,
            "train/ratio_mean": self.ratio / trained,
            "train/logprob_diff_all": self.logprob_diff / trained,
        }
        if self.current:  # same weights on both sides: what remains is how far engine and learner differ numerically
            metrics["train/logprob_diff"] = self.current_logprob_diff / self.current
        return metrics


def micro_batch_loss(state: LearnerState, pack: Pack, num_trained: int, totals: TokenSums) -> torch.Tensor:
    """This pack's part of the step's loss, a scalar to call `backward` on; what it measured is added to `totals`."""
    logits_SV = state.model(
        input_ids=pack.input_ids_T[None],
        position_ids=pack.position_ids_T[None],
        use_cache=False,  # with a cache, packed sequences see one another
        logits_to_keep=pack.predicts_S,
    ).logits[0]
    logprobs_S, entropy_S = token_logprobs(logits_SV, pack.targets_S, state.config.sampling.temperature)
    surrogate = clipped_surrogate(logprobs_S, pack.actor_logprobs_S, pack.advantages_S, state.config.loss)
    diff_S = (logprobs_S.detach() - pack.actor_logprobs_S).abs()
    measured = torch.stack(
        [surrogate.loss_S.detach(), entropy_S, surrogate.clipped_S, surrogate.capped_S, surrogate.ratio_S, diff_S, pack.current_S,
         diff_S * pack.current_S]
    ).sum(1, dtype=torch.float64)  # fmt: skip
    sums = [float(len(pack.input_ids_T) if len(pack.targets_S) else 0), float(len(pack.targets_S)), *measured.tolist()]
    for name, value in zip(vars(totals), sums, strict=True):
        setattr(totals, name, getattr(totals, name) + value)
    return surrogate.loss_S.sum() / num_trained


def update(state: LearnerState) -> float:
    """Clip the accumulated gradient, step the optimizer, clear the gradient. Returns its norm before clipping, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.config.optimizer.max_grad_norm)
    grad_norm = fsdp.whole(norm).item()
    if not grad_norm < float("inf"):
        raise FloatingPointError(f"step {state.step}: the gradient's norm is {grad_norm}; lower optimizer.lr, or look at the rewards")
    state.optimizer.step()
    state.optimizer.zero_grad()
    return grad_norm


def _due(state: LearnerState, every: int) -> bool:
    return state.step % every == 0 or state.step == state.config.run.steps


def learning_rate(config: Config, step: int) -> float:
    """Linear over the first `warmup_steps`, then constant."""
    return config.optimizer.lr * min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))


# With the buffer ---------------------------------------------------------------------------------------------------


class _RunEnded(Exception):
    """The buffer says that the run ended well."""


def _link(config: Config, rank: int) -> LearnerLink:
    return LearnerLink(config.buffer.address, f"learner/{rank}", config.buffer.keys, config.buffer.peer_timeout_s)


def _join(state: LearnerState, link: LearnerLink) -> None:
    """Greet the buffer. Rank 0 goes last, so its hello means that every rank is ready."""
    hello = LearnerHello(rank=state.rank, num_ranks=state.num_ranks, step=state.step, pid=os.getpid())
    if state.rank == 0:
        fsdp.barrier()
    state.policy_version = link.connect(hello, state.config.buffer.connect_timeout_s).policy_version
    if state.rank != 0:
        fsdp.barrier()


def _pull(state: LearnerState, link: LearnerLink) -> tuple[Shard, float]:
    """This rank's shard of the next step, and the seconds it took to come."""
    started = time.monotonic()
    link.send(Pull(rank=state.rank, step=state.step))
    shard = _receive(link)
    if shard.step != state.step:
        raise ProtocolError(f"rank {state.rank} asked for step {state.step} and was handed step {shard.step}")
    return shard, time.monotonic() - started


def _receive(link: LearnerLink) -> Shard:
    """The next shard, however long the buffer gathers it: its heartbeat is the deadline. Raises what a `Shutdown` means."""
    while True:
        message = link.receive(POLL_S)
        if isinstance(message, Shard):
            return message
        if isinstance(message, Shutdown):
            raise RunStopped(f"the buffer stopped the run: {message.error}") if message.error else _RunEnded
        assert message is None or isinstance(message, LearnerWelcome), message  # a repeated hello may be answered twice


def _publish(state: LearnerState, publisher: Publisher, link: LearnerLink) -> dict[str, float]:
    started = time.monotonic()
    snapshot = publisher.publish(state.model, state.policy_version + 1)
    state.policy_version += 1
    state.published = True
    if snapshot is None:
        return {}
    seconds = time.monotonic() - started
    link.send(Published(policy=snapshot, seconds=seconds))
    return {"publish/seconds": seconds, "publish/bytes": float(snapshot.num_bytes)}


@contextmanager
def _until_told_to_stop(state: LearnerState, link: LearnerLink) -> Iterator[None]:
    """Leave quietly when the run ended well; tell the buffer of any exception of ours before it ends this process."""
    try:
        yield
    except _RunEnded:
        return
    except (RunStopped, TransportError):
        raise  # the buffer knows, or cannot be told
    except Exception as error:
        if state.num_ranks > 1 and isinstance(error, RuntimeError):
            # A dead rank breaks the collectives of all others: let whoever watches us find it, before we are taken for the cause.
            time.sleep(SURVIVOR_GRACE_S)
        link.send(LearnerFailed(rank=state.rank, error=" ".join(f"{type(error).__name__}: {error}".split())[:500]))
        raise


# Checkpoints -------------------------------------------------------------------------------------------------------


def _checkpoints(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name / "checkpoints"


def _save(state: LearnerState) -> None:
    meta = {"step": state.step, "policy_version": state.policy_version}
    checkpoint.save(_checkpoints(state.config), state.model, state.optimizer, meta, state.config.learner.keep_checkpoints)


def _resume(state: LearnerState) -> None:
    meta = checkpoint.load_latest(_checkpoints(state.config), state.model, state.optimizer)
    state.step = meta["step"] if meta else 0


def _peak_bytes(device: torch.device) -> float:
    """Most memory this rank ever held: on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(kibibytes * (1 if sys.platform == "darwin" else 1024))
