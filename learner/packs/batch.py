"""Trajectories as packed tensors: several sequences in one row, without padding.

Owns the layout of a micro-batch. Never touches the model, and never chooses trajectories: the shard
comes balanced from the buffer. Driven by `learner.train`.

Shapes: T tokens in a pack, S of its positions that predict a trained token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from buffer.prompts import common_prompt
from buffer.wire.messages import Trajectory
from darts.events import ProtocolError


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch.

    Position p of a sequence predicts its token p + 1, so a sequence's last token is only a target.
    The common prompt of several responses may be a sequence of its own, their trunk. Each of them
    is then a branch, which begins with the last token of the prompt, because that token predicts
    the first one of the response.
    """

    input_ids_T: torch.Tensor  # int64
    # int64, from 0 in each sequence, which keeps them apart; a branch goes on where its trunk ends
    position_ids_T: torch.Tensor
    predicts_S: torch.Tensor  # int64, indices into T
    targets_S: torch.Tensor  # int64
    actor_logprobs_S: torch.Tensor  # float32
    advantages_S: torch.Tensor  # float32
    weights_S: torch.Tensor  # float32, before the division by the step's denominator
    response_S: torch.Tensor  # int64: the number of its sequence in the pack
    current_S: torch.Tensor  # bool: sampled by the weights that are about to be trained
    fresh_S: torch.Tensor  # bool: all tokens of its response are current
    lengths: tuple[int, ...]  # of the sequences; they sum to T
    parents: tuple[int, ...]  # for each sequence the number of its trunk, -1 if it is no branch
    # float32, of the weights at the start of a step; None if it has one update
    start_logprobs_S: torch.Tensor | None = None

    def to(self, device: torch.device) -> Pack:
        return Pack(
            **{name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS},
            lengths=self.lengths,
            parents=self.parents,
            start_logprobs_S=self.start_logprobs_S,  # there already
        )

    @property
    def num_saved(self) -> int:
        """Number of input tokens that it would have in addition without trunks."""
        trunks = [parent for parent in self.parents if parent >= 0]
        return sum(self.lengths[t] for t in trunks) - sum(self.lengths[t] for t in set(trunks))


OTHERS = ("lengths", "parents", "start_logprobs_S")
TENSORS = tuple(column.name for column in fields(Pack) if column.name not in OTHERS)


def make_packs(
    trajectories: Sequence[Trajectory],
    max_tokens: int,
    current_version: int,
    weight: Callable[[int], float] = lambda _: 1.0,
    share_prompts: bool = False,
) -> list[Pack]:
    """Micro-batches of at most `max_tokens` input tokens.

    Every trajectory appears once; one longer than `max_tokens` has a pack to itself.
    `current_version` is the policy version whose weights the learner holds, or one that no actor
    can have, such as -1, if it holds unpublished weights. `weight` is that of a token in the loss,
    given the number of sampled tokens in its response. With `share_prompts`, responses of a group
    have the common tokens of their prompts once in a pack; a group with more tokens than fit into
    a pack is split. Raises `ProtocolError` for a malformed trajectory.
    """
    sequences = [_sequence(trajectory, current_version, weight) for trajectory in trajectories]
    if share_prompts:
        sequences = list(_trees(trajectories, sequences, max_tokens))
    bins = first_fit([len(sequence.input_ids_T) for sequence in sequences], max_tokens)
    return [concatenate(sequences[index] for index in members) for members in bins]


def _trees(
    trajectories: Sequence[Trajectory], sequences: Sequence[Pack], max_tokens: int
) -> Iterator[Pack]:
    """Each group as a trunk and its branches, or as several of these of at most `max_tokens`.

    Responses without a common prompt stay single sequences.
    """
    groups: dict[int, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group_id, []).append(index)
    for members in groups.values():
        trunk = common_prompt([trajectories[index] for index in members])
        if not trunk:
            yield from (sequences[index] for index in members)
            continue
        branches = [len(sequences[index].input_ids_T) - trunk for index in members]
        for part in first_fit(branches, max_tokens - trunk):
            yield tree([sequences[members[number]] for number in sorted(part)], trunk)


def tree(sequences: Sequence[Pack], trunk: int) -> Pack:
    """Single sequences with `trunk` equal tokens at their beginning, which the result has once."""
    if len(sequences) == 1:
        return sequences[0]
    first = replace(
        empty_pack(),
        input_ids_T=sequences[0].input_ids_T[:trunk],
        position_ids_T=sequences[0].position_ids_T[:trunk],
        lengths=(trunk,),
    )
    branches = [
        replace(
            sequence,
            input_ids_T=sequence.input_ids_T[trunk:],
            position_ids_T=sequence.position_ids_T[trunk:],
            predicts_S=sequence.predicts_S - trunk,
            lengths=(sequence.lengths[0] - trunk,),
        )
        for sequence in sequences
    ]
    return replace(concatenate([first, *branches]), parents=(-1, *[0] * len(branches)))


def empty_pack() -> Pack:
    """A micro-batch without a loss, for a rank that has fewer than the others.

    Collectives need every rank.
    """
    nothing = torch.zeros(0)
    start = torch.zeros(2, dtype=torch.int64)
    return Pack(
        input_ids_T=start,
        position_ids_T=torch.arange(2),
        predicts_S=nothing.long(),
        targets_S=nothing.long(),
        actor_logprobs_S=nothing,
        advantages_S=nothing,
        weights_S=nothing,
        response_S=nothing.long(),
        current_S=nothing.bool(),
        fresh_S=nothing.bool(),
        lengths=(2,),
        parents=(-1,),
    )


def plain_pack(
    tokens: torch.Tensor, advantages_S: torch.Tensor | None = None, num_given: int = 1
) -> Pack:
    """One sequence in which every token after the first `num_given` is predicted, for a probe."""
    num_predicted = len(tokens) - num_given
    nothing = torch.zeros(num_predicted)
    return Pack(
        input_ids_T=tokens[:-1],
        position_ids_T=torch.arange(len(tokens) - 1),
        predicts_S=torch.arange(num_given - 1, len(tokens) - 1),
        targets_S=tokens[num_given:],
        actor_logprobs_S=nothing,
        advantages_S=nothing if advantages_S is None else advantages_S,
        weights_S=nothing,
        response_S=nothing.long(),
        current_S=nothing.bool(),
        fresh_S=nothing.bool(),
        lengths=(len(tokens) - 1,),
        parents=(-1,),
    )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`, longest first.

    A length above `capacity` has a bin to itself.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for number, room in enumerate(free):
            if lengths[index] <= room:
                bins[number].append(index)
                free[number] -= lengths[index]
                break
        else:
            bins.append([index])
            free.append(capacity - lengths[index])
    return bins


def _sequence(trajectory: Trajectory, current_version: int, weight: Callable[[int], float]) -> Pack:
    tokens_T = np.frombuffer(trajectory.tokens, dtype="<i4")
    sampled_T = np.frombuffer(trajectory.sampled, dtype=np.uint8).astype(bool)
    logprobs_T = np.frombuffer(trajectory.actor_logprobs, dtype="<f4")
    versions_S = np.repeat(
        [version for version, _ in trajectory.versions], [count for _, count in trajectory.versions]
    )
    _check(trajectory, tokens_T, sampled_T, logprobs_T, versions_S)
    predicts_S, current_S = np.flatnonzero(sampled_T[1:]), versions_S == current_version
    return Pack(
        input_ids_T=torch.from_numpy(tokens_T[:-1].astype(np.int64)),
        position_ids_T=torch.arange(len(tokens_T) - 1),
        predicts_S=torch.from_numpy(predicts_S),
        targets_S=torch.from_numpy(tokens_T[predicts_S + 1].astype(np.int64)),
        actor_logprobs_S=torch.from_numpy(logprobs_T[predicts_S + 1].copy()),
        advantages_S=torch.full((len(predicts_S),), trajectory.advantage),
        weights_S=torch.full((len(predicts_S),), weight(len(predicts_S))),
        response_S=torch.zeros(len(predicts_S), dtype=torch.int64),
        current_S=torch.from_numpy(current_S),
        fresh_S=torch.from_numpy(current_S & current_S.all()),
        lengths=(len(tokens_T) - 1,),
        parents=(-1,),
    )


def _check(
    trajectory: Trajectory,
    tokens_T: np.ndarray,
    sampled_T: np.ndarray,
    logprobs_T: np.ndarray,
    versions_S: np.ndarray,
) -> None:
    wrong = ""
    if not len(tokens_T) == len(sampled_T) == len(logprobs_T):
        wrong = (
            f"has {len(tokens_T)} tokens, {len(sampled_T)} marks and {len(logprobs_T)} "
            "log-probabilities"
        )
    elif len(tokens_T) < 2 or sampled_T[0]:
        wrong = (
            "begins with a sampled token, or has fewer than two tokens: no token precedes the "
            "first one to be predicted"
        )
    elif len(versions_S) != sampled_T.sum():
        wrong = f"has {sampled_T.sum()} sampled tokens, but policy versions for {len(versions_S)}"
    elif not np.isfinite(logprobs_T).all():
        wrong = "has log-probabilities that are not finite"
    if wrong:
        raise ProtocolError(
            f"rollout {trajectory.rollout_id} of group {trajectory.group_id} {wrong}"
        )


def concatenate(packs: Iterable[Pack]) -> Pack:
    """Join packs into one, in the given order."""
    members = list(packs)
    lengths = tuple(length for member in members for length in member.lengths)
    columns = {name: torch.cat([getattr(member, name) for member in members]) for name in TENSORS}
    tokens = np.cumsum([0, *(len(member.input_ids_T) for member in members)])
    numbers = np.cumsum([0, *(len(member.lengths) for member in members)])
    columns["predicts_S"] = torch.cat(
        [member.predicts_S + int(start) for member, start in zip(members, tokens, strict=False)]
    )
    columns["response_S"] = torch.cat(
        [member.response_S + int(n) for member, n in zip(members, numbers, strict=False)]
    )
    parents = tuple(
        parent + int(n) if parent >= 0 else -1
        for member, n in zip(members, numbers, strict=False)
        for parent in member.parents
    )
    return Pack(**columns, lengths=lengths, parents=parents)
