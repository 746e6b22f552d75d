"""The learner's loop, one process per rank, readable from top to bottom.

    buffer ──Shard──> train_step ──> publish ──NewPolicy, Trained──> buffer ──Pull──> (next step)
                          │             └──snapshot, beside the next step──> actors
                          └──> checkpoint, beside the next steps

    consumes        one `Shard` per step and rank, or one per portion of a step
                    (`batch.stream=group`): token-balanced, of bounded staleness
    waits for       the buffer (a shard is ready), the other ranks (collectives)
    unblocked by    enough finished groups; a `Shutdown` ends every wait on the buffer, and a silent
                    buffer raises `TransportError`

Owns the order of a step and its metrics. Never chooses trajectories, and never
decides when one is too stale. Rank 0 speaks for all: it publishes and acknowledges. Every rank
calls every collective in the same order: micro-batch count, forward and backward, token sums,
gradient norm, publication, and whether all ranks have a shard or one is told to end.

Left out: a critic, and pulling the next shard while this one trains
(docs/decisions/0010-no-prefetch.md).
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from transformers import PreTrainedModel

from buffer.processes import by_hand
from buffer.wire.messages import Evaluated, LearnerFailed, Minibatch, Shard, Trajectory
from buffer.wire.transport import TransportError
from configs.errors import one_line, writing_to
from configs.objectives import objective
from configs.schema import Config
from learner import RunStopped, checkpoint, fsdp, retention
from learner.agreement import Agreement
from learner.fits import check_fits
from learner.metrics import TokenSums, peak_bytes
from learner.optimizer import make_optimizer
from learner.packs.batch import Pack, empty_pack, make_packs
from learner.packs.boundaries import Boundaries
from learner.packs.loss import AGGREGATIONS, kl_penalty, surrogate
from learner.probe import probe_logprobs
from learner.probes.capability import Packing, probe_packing
from learner.probes.sharing import probe_sharing
from learner.publication import Publication
from learner.reference import load_reference
from learner.saving import Saver
from learner.schedule import learning_rate
from learner.session import BufferSession, RunEnded
from learner.snapshots.publish import WeightPublisher
from learner.work import training_work

SURVIVOR_GRACE_S = 5.0
UNPUBLISHED = -1  # no actor ever samples with this version
NOTHING_TO_TRAIN_ON = (
    "nothing to train on, so the weights stay as they are: every response is truncated, or has the "
    "same reward as all others in its group"
)
WHOLE_LOGITS = (
    "the head cannot run in chunks, because its logits are no linear function of hidden states; "
    "all logits of a micro-batch are held at once, so lower batch.max_tokens if memory is short"
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
    shares_prompts: bool
    optimizer: torch.optim.AdamW
    agreement: Agreement
    saver: Saver
    reference: Boundaries | None = None  # the frozen model of the KL penalty, if there is one
    step: int = 0  # the next one to train
    policy_version: int = -1  # the newest published one
    saved_step: int = 0  # the step of the newest save; 0 needs none
    published: bool = False  # whether the weights are exactly those of `policy_version`
    evaluations: list[Evaluated] = field(default_factory=list)  # not noted yet

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
        with _after_the_first(num_ranks):
            state = build_state(config, device, rank, num_ranks)
            if config.run.resume:
                _resume(state)
            incarnation = draw_incarnation(device, rank)
        vocab_size = state.model.config.get_text_config().vocab_size
        work = training_work(state.model, state.shares_prompts)
        with (
            state.saver,
            BufferSession(
                config,
                rank,
                num_ranks,
                incarnation,
                vocab_size,
                stop_requested,
                work,
                lambda standing: int(fsdp.all_max(standing, device)),
            ) as session,
            WeightPublisher(config, rank) as publisher,
        ):
            session.watch(state.saver.check)
            with _after_the_first(num_ranks):
                _join(state, session)
            with (
                _until_told_to_stop(state, session),
                Publication(publisher, session) as publication,
            ):
                _train(state, session, publication)
    return 0


def _train(state: LearnerState, session: BufferSession, publication: Publication) -> None:
    """Take every remaining step. Only an exception ends it, which says how the run ended."""
    config = state.config
    _publish(state, publication)
    _note_evaluations(state, session)
    first = state.step
    while state.step < config.run.steps:
        shard, metrics = _take_step(state, session)
        if state.rank == 0 and state.shares_prompts and shard.step == first:
            saved = metrics["train/shared_tokens_frac"]
            line = f"learner: step {first}: shared prompts save {100 * saved:.1f} % of the tokens"
            print(line, file=sys.stderr, flush=True)
        last = state.step == config.run.steps
        if last or state.step % config.weights.publish_every == 0:
            _publish(state, publication)
        if last:  # before its acknowledgement, which may end the run
            publication.wait()
            save(state)
        if state.rank == 0:
            metrics |= publication.take_metrics() | state.saver.take_metrics()
            session.trained(shard.step, int(metrics["train/tokens"]), metrics)
        if not last and state.step % config.learner.checkpoint_every == 0:
            start_save(state)
        _note_evaluations(state, session)
    session.wait_for_the_end()  # serves the last snapshot while the run is evaluated


def _take_step(state: LearnerState, session: BufferSession) -> tuple[Shard, dict[str, float]]:
    """Train a step as its portions come. Returns its last shard and its metrics."""
    earlier, pull_s = Accumulated(), 0.0
    for shard, waited_s in session.portions(state.step):
        pull_s += waited_s
        if shard.last:
            return shard, train_step(state, shard, earlier) | {"wait/pull_s": pull_s}
        accumulate(state, shard, earlier)
    raise AssertionError("a step has a last portion")


def build_state(
    config: Config, device: torch.device, rank: int = 0, num_ranks: int = 1
) -> LearnerState:
    """Model, sharding, layout of packs and optimizer, fresh from `model.path`. Needs
    `fsdp.process_group`.

    Raises `ValueError` for a model that cannot be loaded, that its GPU cannot hold, or that no
    layout computes correctly.
    """
    if rank == 0 and (slow := fsdp.slow_dtype(config, device)):
        print(f"learner: {slow}", file=sys.stderr, flush=True)
    if (tight := check_fits(config, device)) and rank == 0:
        print(f"learner: {tight}", file=sys.stderr, flush=True)
    model = fsdp.load_sharded(config, device)
    boundaries = Boundaries(model, config.model.head_dtype)
    dtype = fsdp.COMPUTE_DTYPE[config.model.dtype]
    try:
        packing = probe_packing(boundaries, dtype)
    except ValueError as error:
        raise ValueError(f"model.path={config.model.path}: {error}") from error
    if rank == 0 and (packing.split_kinds or packing.one_per_pack):
        print(f"learner: {packing}", file=sys.stderr, flush=True)
    sharing = probe_sharing(boundaries, packing, dtype) if config.batch.share_prompts else None
    if rank == 0 and sharing is not None and not sharing.works:
        print(f"learner: {packing.model_type}: {sharing}", file=sys.stderr, flush=True)
    if rank == 0 and not boundaries.fused:
        print(f"learner: {packing.model_type}: {WHOLE_LOGITS}", file=sys.stderr, flush=True)
    if config.learner.compile:
        from learner.compiling import compile_blocks  # seconds of import, and rarely needed

        shares = sharing is not None and sharing.works
        compiled = compile_blocks(boundaries, packing, dtype, shares)
        if rank == 0:
            print(f"learner: {packing.model_type}: {compiled}", file=sys.stderr, flush=True)
    optimizer = make_optimizer(model, config.optimizer)
    reference = load_reference(config, device, boundaries) if config.loss.kl else None
    return LearnerState(
        config,
        device,
        rank,
        num_ranks,
        boundaries,
        packing,
        sharing is not None and sharing.works,
        optimizer,
        Agreement(config),
        Saver(config, device),
        reference,
    )


@dataclass
class Accumulated:
    """The portions of a step before its last one.

    Their gradients are in the model, as sums: the loss's denominator is a total of the whole step,
    so it is known only at the end.
    """

    sums: TokenSums = field(default_factory=TokenSums)
    loss_tokens: int = 0
    loss_responses: int = 0
    has_gradient: bool = False
    num_portions: int = 0
    seconds: float = 0.0

    @property
    def totals(self) -> Minibatch:
        return Minibatch(
            num_trajectories=0, loss_tokens=self.loss_tokens, loss_responses=self.loss_responses
        )


def accumulate(state: LearnerState, shard: Shard, into: Accumulated) -> None:
    """Add the gradient of a portion, not divided yet. Takes the collectives of `train_step`."""
    started = time.monotonic()
    [(trajectories, minibatch)] = shard.split()
    packs = _packed(state, trajectories)
    into.sums += _accumulate(state, packs, 1)
    into.loss_tokens += minibatch.loss_tokens
    into.loss_responses += minibatch.loss_responses
    into.has_gradient |= bool(packs)
    into.num_portions += 1
    into.seconds += time.monotonic() - started


def train_step(
    state: LearnerState, shard: Shard, earlier: Accumulated | None = None
) -> dict[str, float]:
    """Make the updates of this rank's shard. Returns the step's metrics, equal on every rank.

    The shard is the last portion of its step, and `earlier` has the others, if there are any.
    `state.step` is one higher afterwards. The loss of an update is the weighted sum of the
    surrogate over its tokens, divided by a total over all ranks: neither the packing nor the number
    of ranks changes the gradient. An update in which no trajectory has a gradient leaves weights
    and optimizer as they are, since AdamW would otherwise move on by momentum and decay. Raises
    `FloatingPointError` if a gradient is not finite, before it changes the weights, and
    `Disagreement` if engines and learner do not have the same policy, before any update.
    """
    earlier = earlier or Accumulated()
    started = time.monotonic() - earlier.seconds
    lr = learning_rate(state.config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if earlier.num_portions:
        accumulate(state, shard, earlier)
        sums, norms = _divided_update(state, earlier)
    else:
        sums, norms = _updates(state, shard)
    if state.rank == 0 and not norms:
        print(f"learner: step {state.step}: {NOTHING_TO_TRAIN_ON}", file=sys.stderr, flush=True)
    state.step += 1
    state.published = False
    return sums.metrics(len(shard.minibatches), time.monotonic() - started) | {
        "train/grad_norm": fmean(norms or [0.0]),
        "train/portions": float(max(1, earlier.num_portions)),
        "train/lr": lr,
        "memory/learner_peak_bytes": fsdp.all_max(peak_bytes(state.device), state.device),
    }


def _updates(state: LearnerState, shard: Shard) -> tuple[TokenSums, list[float]]:
    """Make the updates of a whole step. Returns its measurements and the norm of each gradient."""
    updates = [
        (_packed(state, trajectories), _denominator(state, minibatch))
        for trajectories, minibatch in shard.split()
    ]
    if len(updates) > 1:
        updates = [(_with_start_logprobs(state, packs), total) for packs, total in updates]
    sums, norms = TokenSums(), list[float]()
    for packs, denominator in updates:
        part = _accumulate(state, packs, denominator)
        if not norms:  # later on, the weights are no longer those that actors had
            state.agreement.judge(state.step, part)
        if packs:
            norms.append(update(state))
        sums += part
    return sums, norms


def _divided_update(state: LearnerState, step: Accumulated) -> tuple[TokenSums, list[float]]:
    """Make the update of a step that came in portions, of which all are accumulated."""
    denominator = _denominator(state, step.totals)
    sums = replace(step.sums, loss=step.sums.loss / denominator)
    state.agreement.judge(state.step, sums)
    if not step.has_gradient:
        return sums, []
    for parameter in state.model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(denominator)
    return sums, [update(state)]


def _denominator(state: LearnerState, minibatch: Minibatch) -> int:
    """The total by which the loss of an update is divided."""
    aggregation = AGGREGATIONS[objective(state.config.loss).aggregation]
    return max(1, aggregation.denominator(minibatch))


def _packed(state: LearnerState, trajectories: list[Trajectory]) -> list[Pack]:
    """The micro-batches of an update, or of a portion of one. A collective."""
    config = state.config
    current = state.policy_version if state.published else UNPUBLISHED
    capacity = state.packing.capacity(config.batch.max_tokens)
    aggregation = AGGREGATIONS[objective(config.loss).aggregation]
    max_tokens = config.sampling.max_tokens
    packs = make_packs(
        trajectories,
        capacity,
        current,
        lambda n: aggregation.weight(n, max_tokens),
        state.shares_prompts,
    )
    # Ranks with fewer micro-batches take part in the others' collectives with empty ones.
    num_packs = int(fsdp.all_max(len(packs), state.device))
    return packs + [empty_pack()] * (num_packs - len(packs))


@torch.no_grad()
def _with_start_logprobs(state: LearnerState, packs: list[Pack]) -> list[Pack]:
    """The packs with log-probabilities of the present weights, the step's proximal policy."""
    temperature = state.config.sampling.temperature
    found = [
        replace(
            pack,
            start_logprobs_S=state.boundaries.logprobs(pack.to(state.device), temperature)[0],
        )
        for pack in packs
    ]
    fsdp.reshard(state.model)
    return found


def _accumulate(state: LearnerState, packs: list[Pack], denominator: int) -> TokenSums:
    """Add the gradient of an update. Returns its measurements over all ranks."""
    totals = TokenSums()
    for pack in packs:
        micro_batch_loss(state, pack.to(state.device), denominator, totals).backward()
    return TokenSums(*fsdp.all_sum(totals.as_list(), state.device))


def micro_batch_loss(
    state: LearnerState, pack: Pack, denominator: int, totals: TokenSums
) -> torch.Tensor:
    """This pack's part of an update's loss, as a scalar with a gradient.

    Its measurements are added to `totals`.
    """
    loss = state.config.loss
    temperature = state.config.sampling.temperature
    logprobs_S, entropy_S = state.boundaries.logprobs(pack, temperature)
    policy = surrogate(logprobs_S, pack, loss)
    kl_S = torch.zeros_like(logprobs_S)
    if state.reference is not None:
        with torch.no_grad():
            reference_S, _ = state.reference.logprobs(pack, temperature)
        fsdp.reshard(state.reference.model)
        kl_S = kl_penalty(logprobs_S, reference_S, loss.kl_estimator)
    policy = policy._replace(loss_S=policy.loss_S + loss.kl * kl_S)
    start_S = logprobs_S.detach() if pack.start_logprobs_S is None else pack.start_logprobs_S
    totals.add(pack, start_S, entropy_S, policy, kl_S, denominator)
    return (policy.loss_S * pack.weights_S).sum() / denominator


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


# With the buffer --------------------------------------------------------------------------------


def _join(state: LearnerState, session: BufferSession) -> None:
    """Greet the buffer. Rank 0 goes last, so its hello means that every rank is ready."""
    if state.rank == 0:
        fsdp.barrier()
    state.policy_version = session.join(state.step)
    if state.rank != 0:
        fsdp.barrier()
    else:
        run = state.config.run
        place = f"{state.config.buffer.address} at step {state.step} of {run.steps}"
        by_hand.tell(f"learner: joined the run at {place}, with {state.num_ranks} rank(s)")


def draw_incarnation(device: torch.device, rank: int) -> str:
    """A name that all ranks of this learner share and no other learner has. A collective."""
    drawn = secrets.randbits(48) if rank == 0 else -1
    return f"{int(fsdp.all_max(drawn, device)):012x}"


def _publish(state: LearnerState, publication: Publication) -> None:
    version = state.policy_version + 1
    publication.publish(
        state.model, version, lambda: probe_logprobs(state.boundaries, state.device)
    )
    state.policy_version = version
    state.published = True


@contextmanager
def _after_the_first(num_ranks: int) -> Iterator[None]:
    """A rank that died breaks the collectives of all others. They wait here before they fail, so
    that the supervisor, which ends them, reports the one that died first.
    """
    try:
        yield
    except RuntimeError:
        if num_ranks > 1:
            time.sleep(SURVIVOR_GRACE_S)
        raise


@contextmanager
def _until_told_to_stop(state: LearnerState, session: BufferSession) -> Iterator[None]:
    """Return quietly if the run ended well, and report an exception of ours to the buffer."""
    try:
        with _after_the_first(state.num_ranks):
            yield
    except RunEnded:
        state.saver.wait()
        _note_evaluations(state, session)
        if state.rank == 0:
            saved = state.saver.folder
            by_hand.tell(f"learner: the run has ended after {state.step} steps; see {saved}")
    except RunStopped:
        save(state)  # every rank raises this, at the same step
        _note_evaluations(state, session)
        session.leave()
        raise
    except TransportError:
        raise  # the buffer cannot be reached
    except Exception as error:
        session.link.send(LearnerFailed(rank=state.rank, error=one_line(error, with_type=True)))
        raise


# Checkpoints ------------------------------------------------------------------------------------


def save(state: LearnerState) -> None:
    """Write a checkpoint of the present step, complete when this returns. A collective."""
    start_save(state)
    state.saver.wait()


def start_save(state: LearnerState) -> None:
    """Begin a checkpoint of the present step, unless it was saved already. A collective."""
    if state.saved_step == state.step:
        return
    state.saved_step = state.step
    meta = {"step": state.step, "policy_version": state.policy_version}
    state.saver.start(state.model, state.optimizer, meta)


def _note_evaluations(state: LearnerState, session: BufferSession) -> None:
    """Write the results to their checkpoints. One that is still being saved gets its own later."""
    found, under_way = state.evaluations + session.take_evaluations(), state.saver.under_way
    state.evaluations = [result for result in found if result.step == under_way]
    folder = state.saver.folder
    with writing_to(folder):
        for result in found:
            if result.step != under_way:
                retention.note_evaluation(folder, state.config, result.step, result.reward_mean)


def _resume(state: LearnerState) -> None:
    meta = checkpoint.load_latest(state.saver.folder, state.model, state.optimizer)
    state.step = state.saved_step = meta["step"] if meta else 0
