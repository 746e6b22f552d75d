"""What happened, and what to do about it: the whole vocabulary that `darts.core.Core` speaks.

Events go in, decisions come out; both are frozen, typed and free of I/O. Tokens never appear here, only ids,
lengths, rewards and policy versions. Lengths are counted in sampled tokens; `time_s` is the driver's clock
(wall clock in the buffer, virtual in the simulator, recorded in a replay) and never runs backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from darts.lengths import LengthStats

Purpose = Literal["train", "eval"]
RolloutEnd = Literal[
    "selected_short", "selected_long", "discarded", "truncated", "cancelled", "lost"
]
GroupEnd = Literal["shipped", "evaluated", "failed", "too_few", "deadline", "stale", "run_ended"]
CancelReason = Literal["past_selection", "group_full", "deadline", "dropped"]


class ProtocolError(Exception):
    """An event that cannot happen in the present state; the core is unchanged. Names the ids and the state."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task to answer. `lengths` is what the journal remembers of this prompt's response lengths, if anything."""

    prompt_id: str
    lengths: LengthStats | None = None


# Events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptsDrawn:
    """The prompt stream yielded a window of training prompts, in order."""

    time_s: float
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class EvaluationRequested:
    """Answer held-out prompts `samples` times each, on engines whose policy is at least `min_version`."""

    time_s: float
    prompts: tuple[Prompt, ...]
    samples: int
    min_version: int


@dataclass(frozen=True, slots=True)
class PoolRestored:
    """A resumed run: the length statistics pooled over all prompts, as they were."""

    time_s: float
    lengths: LengthStats


@dataclass(frozen=True, slots=True)
class ActorJoined:
    """An engine announced itself with `slots` credits and the policy version that it has loaded."""

    time_s: float
    engine_id: str
    engine_type: str
    slots: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class ActorLost:
    """An engine is gone, and with it everything it had in flight."""

    time_s: float
    engine_id: str


@dataclass(frozen=True, slots=True)
class PolicyLoaded:
    """An engine swapped in a published policy; what it samples from now on is of that version."""

    time_s: float
    engine_id: str
    version: int


@dataclass(frozen=True, slots=True)
class LatencyReported:
    """An engine measured `ms_per_token` at `batch` requests decoding at once. Absurd values are counted and ignored."""

    time_s: float
    engine_id: str
    batch: float
    ms_per_token: float


@dataclass(frozen=True, slots=True)
class RolloutProgressed:
    """A rollout in flight has now sampled `num_tokens` tokens."""

    time_s: float
    rollout_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RolloutFinished:
    """A rollout ended by itself and was scored. `truncated`: it hit the length limit. Frees its slot."""

    time_s: float
    rollout_id: int
    num_tokens: int
    truncated: bool
    reward: float
    oldest_version: int


@dataclass(frozen=True, slots=True)
class RolloutFailed:
    """The engine or the environment failed on a rollout: it is launched again, never scored. Frees its slot."""

    time_s: float
    rollout_id: int


@dataclass(frozen=True, slots=True)
class RolloutStopped:
    """The engine confirms a cancel: the slot is free. `num_tokens` is what had been sampled by then."""

    time_s: float
    rollout_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LearnerJoined:
    """A learner (re)joined. Groups handed to its predecessor and never trained are offered again, or dropped as stale."""

    time_s: float


@dataclass(frozen=True, slots=True)
class PolicyPublished:
    """The learner published an update: its version counts from 0 and grows."""

    time_s: float
    version: int


@dataclass(frozen=True, slots=True)
class ShardsRequested:
    """The learner asks for the groups of its next step. Answered by `groups_per_step` `Ship`s, at once or later."""

    time_s: float
    step: int


@dataclass(frozen=True, slots=True)
class GroupTrained:
    """The learner has trained on a group that was shipped to it."""

    time_s: float
    group_id: int


@dataclass(frozen=True, slots=True)
class AdmissionPaused:
    """The trajectory store is full (or no longer is): open no training group until told otherwise."""

    time_s: float
    paused: bool


@dataclass(frozen=True, slots=True)
class RunEnded:
    """No step will follow: every open training group is dropped; evaluation goes on."""

    time_s: float


Event = Union[
    PromptsDrawn, EvaluationRequested, PoolRestored, ActorJoined, ActorLost, PolicyLoaded, LatencyReported,
    RolloutProgressed, RolloutFinished, RolloutFailed, RolloutStopped, LearnerJoined, PolicyPublished,
    ShardsRequested, GroupTrained, AdmissionPaused, RunEnded,
]  # fmt: skip


# Decisions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """How one rollout ended. A cancelled or lost one has no reward; its `tokens` are what was seen of it."""

    rollout_id: int
    engine_id: str
    tokens: int
    reward: float | None
    end: RolloutEnd
    oldest_version: int


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """The whole story of a closed group: one row of the selection ledger. `shipped_version` is -1 unless shipped."""

    group_id: int
    prompt_id: str
    opened_version: int
    shipped_version: int
    budget: int
    mode: str
    end: GroupEnd
    rollouts: tuple[RolloutRecord, ...]


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """A group begins: at most `budget` rollouts of `prompt_id`, all on `engine_id` while it lives."""

    group_id: int
    prompt_id: str
    purpose: Purpose
    engine_id: str
    budget: int
    mode: str


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a rollout. `continues` names a lost rollout whose tokens so far are its beginning."""

    rollout_id: int
    group_id: int
    engine_id: str
    continues: int | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Abort a rollout while it decodes. Its end is decided now; its slot is free once the engine confirms."""

    rollout_id: int
    engine_id: str
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class Ship:
    """Hand this group's selected trajectories to the learner, for `step`."""

    step: int
    record: GroupRecord


@dataclass(frozen=True, slots=True)
class Drop:
    """This group will not be trained on. `requeued`: its prompt returns to the head of the queue."""

    record: GroupRecord
    requeued: bool


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A held-out group has ended; every rollout counts."""

    record: GroupRecord


@dataclass(frozen=True, slots=True)
class RememberLengths:
    """Keep these length statistics for the next time the prompt is drawn; `prompt_id` "" is the pool of all prompts."""

    prompt_id: str
    lengths: LengthStats


Decision = Union[OpenGroup, Launch, Cancel, Ship, Drop, Evaluated, RememberLengths]
