"""The learner's loop, one process per rank, readable from top to bottom.

    buffer ──Shard──> train_step ──> publish ──Published, Trained──> buffer ──Pull──> (next step)
                          │             └──snapshot──> actors
                          └──> checkpoint

    consumes        one `Shard` per step and rank: token-balanced, of bounded staleness
    waits for       the buffer (a shard is ready), the other ranks (collectives)
    unblocked by    enough finished groups; a `Shutdown` ends every wait on the buffer, and a silent
                    buffer raises `TransportError`

Owns the order of a step, the learning rate and the metrics. Never chooses trajectories, and never
decides when one is too stale. Rank 0 speaks for all: it publishes and acknowledges. Every rank
calls every collective in the same order: micro-batch count, forward and backward, token sums,
gradient norm, publication, checkpoint.

Left out: several updates per shard, a critic, pulling the next shard while this one trains.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from buffer.wire.messages import LearnerFailed, Shard
from buffer.wire.transport import TransportError
from configs.errors import one_line, writing_to
from configs.objectives import objective
from configs.schema import Config
from learner import RunStopped, checkpoint, fsdp
from learner.agreement import Agreement
from learner.capability import Packing, probe_packing
from learner.metrics import TokenSums, peak_bytes
from learner.packs.batch import Pack, empty_pack, make_packs
from learner.packs.boundaries import Boundaries
from learner.packs.logprobs import token_logprobs
from learner.packs.loss import AGGREGATIONS, kl_penalty, surrogate
from learner.probe import probe_logprobs
from learner.publish import WeightPublisher
from learner.reference import load_reference
from learner.session import BufferSession, RunEnded
from learner.work import training_work

SURVIVOR_GRACE_S = 5.0
UNPUBLISHED = -1  # no actor ever samples with this version
NOTHING_TO_TRAIN_ON = (
    "nothing to train on, so the weights stay as they are: every response is truncated, or has the "
    "same reward as all others in its group"
)


@dataclass
class LearnerState:
    """The state of a rank from one step to the next."""

    config: Config
    device: torch.device
    rank: int
    num_ranks: int
    boundaries: Boundaries  # the model, as a function of packs
    packing: Packing
    optimizer: torch.optim.AdamW
    agreement: Agreement
    reference: Boundaries | None = None  # the frozen model of the KL penalty, if there is one
    step: int = 0  # the next one to train
    policy_version: int = -1  # the newest published one
    saved_step: int = 0  # the step of the newest checkpoint; 0 needs none
    published: bool = False  # whether the weights are exactly those of `policy_version`

    @property
    def model(self) -> PreTrainedModel:
        return self.boundaries.model


def run_rank(
    config: Config,
    rank: int = 0,
    num_ranks: int = 1,
    local_rank: int = 0,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:
    """Train until the buffer says that the run is over; 0 if it ended well.

    Raises `RunStopped` (the buffer's error, or `stop_requested`), `TransportError` (no buffer) or
    `ValueError` (configuration). Any other exception is a failure of the training itself.
    """
    with fsdp.process_group(config, rank, num_ranks, local_rank) as device:
        state = build_state(config, device, rank, num_ranks)
        if config.run.resume:
            _resume(state)
        incarnation = draw_incarnation(device, rank)
        vocab_size = state.model.config.get_text_config().vocab_size
        work = training_work(state.model)
        with (
            BufferSession(
                config, rank, num_ranks, incarnation, vocab_size, stop_requested, work
            ) as session,
            WeightPublisher(config, rank) as publisher,
        ):
            _join(state, session)
            with _until_told_to_stop(state, session):
                _train(state, session, publisher)
    return 0


def _train(state: LearnerState, session: BufferSession, publisher: WeightPublisher) -> None:
    """Take every remaining step. Only an exception ends it, which says how the run ended."""
    config = state.config
    _publish(state, publisher, session)
    while state.step < config.run.steps:
        shard, pull_s = session.pull(state.step)
        metrics = train_step(state, shard) | {"wait/pull_s": pull_s}
        last = state.step == config.run.steps
        if last or state.step % config.weights.publish_every == 0:
            metrics |= _publish(state, publisher, session)
        if last:  # before its acknowledgement, which may end the run
            save(state)
        if state.rank == 0:
            session.trained(shard.step, int(metrics["train/tokens"]), metrics)
        if not last and state.step % config.learner.checkpoint_every == 0:
            save(state)
    session.wait_for_the_end()  # serves the last snapshot while the run is evaluated


def build_state(
    config: Config, device: torch.device, rank: int = 0, num_ranks: int = 1
) -> LearnerState:
    """Model, sharding, layout of packs and optimizer, fresh from `model.path`. Needs
    `fsdp.process_group`.

    Raises `ValueError` for a model that cannot be loaded or that no layout computes correctly.
    """
    if rank == 0 and (slow := fsdp.slow_dtype(config, device)):
        print(f"learner: {slow}", file=sys.stderr, flush=True)
    model = fsdp.load_sharded(config, device)
    boundaries = Boundaries(model)
    try:
        packing = probe_packing(boundaries, fsdp.COMPUTE_DTYPE[config.model.dtype])
    except ValueError as error:
        raise ValueError(f"model.path={config.model.path}: {error}") from error
    if rank == 0 and (packing.split_kinds or packing.one_per_pack):
        print(f"learner: {packing}", file=sys.stderr, flush=True)
    beta1, beta2 = config.optimizer.betas
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.lr,
        betas=(beta1, beta2),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    reference = load_reference(config, device, boundaries) if config.loss.kl else None
    return LearnerState(
        config,
        device,
        rank,
        num_ranks,
        boundaries,
        packing,
        optimizer,
        Agreement(config),
        reference,
    )


def train_step(state: LearnerState, shard: Shard) -> dict[str, float]:
    """Make one update with this rank's shard. Returns the step's metrics, equal on every rank.

    `state.step` is one higher afterwards. The loss is the weighted sum of the surrogate over
    tokens, divided by a total over all ranks: neither the packing nor the number of ranks changes
    the gradient. A step in which no trajectory has a gradient leaves weights and optimizer as they
    are, since AdamW would otherwise move on by momentum and decay. Raises
    `FloatingPointError` if the gradient is not finite, and `Disagreement` if engines and learner do
    not have the same policy, both before the weights change.
    """
    started = time.monotonic()
    config = state.config
    current = state.policy_version if state.published else UNPUBLISHED
    capacity = state.packing.capacity(config.batch.max_tokens)
    aggregation = AGGREGATIONS[objective(config.loss).aggregation]
    max_tokens = config.sampling.max_tokens
    packs = make_packs(
        shard.trajectories, capacity, current, lambda n: aggregation.weight(n, max_tokens)
    )
    # Ranks with fewer micro-batches take part in the others' collectives with empty ones.
    num_packs = int(fsdp.all_max(len(packs), state.device))
    packs += [empty_pack()] * (num_packs - len(packs))
    denominator = max(1, aggregation.denominator(shard))
    lr = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    totals = TokenSums()
    for pack in packs:
        micro_batch_loss(state, pack.to(state.device), denominator, totals).backward()
    sums = TokenSums(*fsdp.all_sum(totals.as_list(), state.device))
    state.agreement.judge(state.step, sums)
    grad_norm = update(state) if num_packs else 0.0
    if state.rank == 0 and not num_packs:
        print(f"learner: step {state.step}: {NOTHING_TO_TRAIN_ON}", file=sys.stderr, flush=True)
    state.step += 1
    state.published = False
    return sums.metrics(denominator, time.monotonic() - started) | {
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "memory/learner_peak_bytes": fsdp.all_max(peak_bytes(state.device), state.device),
    }


def micro_batch_loss(
    state: LearnerState, pack: Pack, denominator: int, totals: TokenSums
) -> torch.Tensor:
    """This pack's part of the step's loss, as a scalar with a gradient.

    Its measurements are added to `totals`.
    """
    loss = state.config.loss
    logprobs_S, entropy_S = pack_logprobs(state, state.boundaries, pack)
    policy = surrogate(logprobs_S, pack, loss)
    kl_S = torch.zeros_like(logprobs_S)
    if state.reference is not None:
        with torch.no_grad():
            reference_S, _ = pack_logprobs(state, state.reference, pack)
        fsdp.reshard(state.reference.model)
        kl_S = kl_penalty(logprobs_S, reference_S, loss.kl_estimator)
    policy = policy._replace(loss_S=policy.loss_S + loss.kl * kl_S)
    totals.add(pack, logprobs_S, entropy_S, policy, kl_S)
    return (policy.loss_S * pack.weights_S).sum() / denominator


def pack_logprobs(
    state: LearnerState, boundaries: Boundaries, pack: Pack
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each predicted token, and entropy of its distribution."""
    return token_logprobs(
        boundaries.logits(pack), pack.targets_S, state.config.sampling.temperature
    )


def update(state: LearnerState) -> float:
    """Clip the accumulated gradient, step the optimizer and clear the gradient.

    Returns the norm before clipping, over all ranks. Raises `FloatingPointError`, with the weights
    unchanged, if it is not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(
        state.model.parameters(), state.config.optimizer.max_grad_norm
    )
    grad_norm = fsdp.whole(norm).item()
    if not grad_norm < float("inf"):
        raise FloatingPointError(
            f"step {state.step}: the gradient's norm is {grad_norm}; lower optimizer.lr, or check "
            "the rewards"
        )
    state.optimizer.step()
    state.optimizer.zero_grad()
    return grad_norm


def learning_rate(config: Config, step: int) -> float:
    """Linear over the first `warmup_steps`, then constant."""
    return config.optimizer.lr * min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))


# With the buffer --------------------------------------------------------------------------------


def _join(state: LearnerState, session: BufferSession) -> None:
    """Greet the buffer. Rank 0 goes last, so its hello means that every rank is ready."""
    if state.rank == 0:
        fsdp.barrier()
    state.policy_version = session.join(state.step)
    if state.rank != 0:
        fsdp.barrier()


def draw_incarnation(device: torch.device, rank: int) -> str:
    """A name that all ranks of this learner share and no other learner has. A collective."""
    drawn = secrets.randbits(48) if rank == 0 else -1
    return f"{int(fsdp.all_max(drawn, device)):012x}"


def _publish(
    state: LearnerState, publisher: WeightPublisher, session: BufferSession
) -> dict[str, float]:
    started = time.monotonic()
    snapshot = publisher.publish(state.model, state.policy_version + 1)
    probe = probe_logprobs(state.boundaries, state.device)
    state.policy_version += 1
    state.published = True
    if snapshot is None:
        return {}
    seconds = time.monotonic() - started
    session.announce(snapshot, seconds, probe)
    return {"publish/seconds": seconds, "publish/bytes": float(snapshot.num_bytes)}


@contextmanager
def _until_told_to_stop(state: LearnerState, session: BufferSession) -> Iterator[None]:
    """Return quietly if the run ended well, and report an exception of ours to the buffer."""
    try:
        yield
    except RunEnded:
        return
    except RunStopped:
        save(state)  # every rank is at the same step and waits for its shard
        session.leave()
        raise
    except TransportError:
        raise  # the buffer cannot be reached
    except Exception as error:
        if state.num_ranks > 1 and isinstance(error, RuntimeError):
            # A dead rank breaks the collectives of all others. Wait, so that the supervisor reports
            # the rank that died first.
            time.sleep(SURVIVOR_GRACE_S)
        session.link.send(LearnerFailed(rank=state.rank, error=one_line(error, with_type=True)))
        raise


# Checkpoints ------------------------------------------------------------------------------------


def _checkpoints(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name / "checkpoints"


def save(state: LearnerState) -> None:
    """Write a checkpoint of the present step, unless it was saved already. A collective."""
    if state.saved_step == state.step:
        return
    state.saved_step = state.step
    meta = {"step": state.step, "policy_version": state.policy_version}
    folder = _checkpoints(state.config)
    with writing_to(folder):
        checkpoint.save(
            folder, state.model, state.optimizer, meta, state.config.learner.keep_checkpoints
        )


def _resume(state: LearnerState) -> None:
    meta = checkpoint.load_latest(_checkpoints(state.config), state.model, state.optimizer)
    state.step = state.saved_step = meta["step"] if meta else 0
