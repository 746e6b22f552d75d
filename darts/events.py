"""The vocabulary of `darts.core.Core`: events go in, decisions come out.

Both are frozen, typed and free of I/O. Tokens never appear here, only ids, lengths, rewards and
policy versions. Lengths are counted in sampled tokens. Events carry no time, since no decision
depends on it; the event log stores the time beside each event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, Union, dataclass_transform

from configs.schema import LongEnd
from darts.config import CoreConfig
from darts.sizing.lengths import LengthStats
from darts.sizing.rewards import RewardStats

Purpose = Literal["train", "eval"]
RolloutEnd = Literal[
    "selected_short", "selected_long", "discarded", "truncated", "cancelled", "lost"
]
GroupEnd = Literal[
    "shipped",
    "evaluated",
    "uniform",
    "no_signal",
    "failed",
    "too_few",
    "deadline",
    "stale",
    "tokens_lost",
    "run_ended",
]
CancelReason = Literal["past_selection", "group_full", "deadline", "dropped"]


Kind = TypeVar("Kind")


@dataclass_transform(frozen_default=True)
def frozen(kind: type[Kind]) -> type[Kind]:
    """A dataclass that the type checker freezes: `make lint` refuses an assignment to a field.

    One that `dataclass(frozen=True)` guards at run time as well takes three times as long to make.
    """
    return dataclass(slots=True, unsafe_hash=True)(kind)


class ProtocolError(Exception):
    """A peer's mistake: an event that is illegal in the present state, which stays unchanged.

    The message names the ids and the state.
    """


@frozen
class Prompt:
    """A task to answer. `lengths` and `rewards` are the journal's statistics of it, if any.

    `visit` is the position in the prompt stream, which tells the draws of one prompt apart.
    """

    prompt_id: str
    lengths: LengthStats | None = None
    visit: int = 0
    rewards: RewardStats | None = None


# Events
# --------------------------------------------------------------------------------------------------


@frozen
class PromptsDrawn:
    """The prompt stream yielded a window of training prompts, in order."""

    prompts: tuple[Prompt, ...]


@frozen
class EvaluationRequested:
    """Answer held-out prompts `samples` times each.

    Only engines whose policy is at least `min_version` answer them.
    """

    prompts: tuple[Prompt, ...]
    samples: int
    min_version: int


@frozen
class SettingsChanged:
    """A run was resumed with other settings, which apply from here on."""

    config: CoreConfig


@frozen
class EngineJoined:
    """An engine joined with `slots` slots and the policy version that it has loaded."""

    engine_id: str
    engine_type: str
    slots: int
    policy_version: int


@frozen
class EngineLost:
    """An engine is gone, together with everything that it had in flight.

    If `keep_tokens`, other engines continue its rollouts from the tokens received so far. It is
    False for an engine that broke the protocol, whose tokens cannot be trusted. If `left`, the
    engine was asked to leave and handed its rollouts over, which is no failed attempt.
    """

    engine_id: str
    keep_tokens: bool = True
    left: bool = False


@frozen
class PolicyLoaded:
    """An engine swapped in a published policy: from now on it samples from that version."""

    engine_id: str
    version: int


@frozen
class LatencyReported:
    """An engine measured `ms_per_token` with `batch` requests decoding at once.

    Impossible values are counted and ignored.
    """

    engine_id: str
    batch: float
    ms_per_token: float


@frozen
class RolloutProgressed:
    """A rollout in flight has now sampled `num_tokens` tokens."""

    rollout_id: int
    num_tokens: int


@frozen
class RolloutWaits:
    """A rollout in flight has ended a turn, and decodes nothing until its environment answers.

    Its next `RolloutProgressed` says that it decodes again.
    """

    rollout_id: int


@frozen
class RolloutFinished:
    """A rollout ended by itself and was scored, which frees its slot.

    If `truncated`, it reached its length limit: `sampling.max_tokens`, the end of the context, or
    where a `Curtail` met it.
    """

    rollout_id: int
    num_tokens: int
    truncated: bool
    reward: float
    oldest_version: int


@frozen
class RolloutFailed:
    """The engine or the environment failed on a rollout, which frees its slot.

    The rollout is never scored.
    """

    rollout_id: int


@frozen
class RolloutStopped:
    """The engine confirmed a cancel, which frees the slot.

    `num_tokens` counts all tokens sampled until the rollout stopped.
    """

    rollout_id: int
    num_tokens: int


@frozen
class LearnerJoined:
    """A learner joined, perhaps after an earlier one died.

    Groups that were shipped and never trained are offered again, or dropped as stale.
    """


@frozen
class PolicyPublished:
    """The learner has new weights, which engines may get later. Versions count from 0 and grow."""

    version: int


@frozen
class ShardsRequested:
    """The learner asks for the next portion of its present step, or for the first of its next one.

    The answer is one or more `Ship` decisions, at once or later. The portions of a step have
    `groups_per_step` groups in total; without `stream=group` the first one has all of them.
    """

    step: int
    portion: int = 0


@frozen
class GroupTrained:
    """The learner has trained on a group that was shipped to it."""

    group_id: int


@frozen
class AdmissionPaused:
    """Stop opening training groups because the trajectory store is full, or resume."""

    paused: bool


@frozen
class BufferRestarted:
    """The buffer was started again and its state restored from the log.

    Launches whose records are lost may have used the next ids, so these ids are skipped.
    """


@frozen
class TokensLost:
    """After a power cut, the buffer holds only `num_tokens` of a rollout's tokens."""

    rollout_id: int
    num_tokens: int


@frozen
class RunEnded:
    """No step will follow: every open training group is dropped, while evaluation goes on."""


Event = Union[
    PromptsDrawn, EvaluationRequested, SettingsChanged, EngineJoined, EngineLost, PolicyLoaded,
    LatencyReported, RolloutProgressed, RolloutWaits, RolloutFinished, RolloutFailed,
    RolloutStopped, LearnerJoined, PolicyPublished, ShardsRequested, GroupTrained, AdmissionPaused,
    BufferRestarted, TokensLost, RunEnded,
]  # fmt: skip


# Decisions
# --------------------------------------------------------------------------------------------------


@frozen
class RolloutRecord:
    """How one rollout ended. Only a rollout that ended by itself has a reward.

    tokens: number of tokens sampled until its end was decided. For a cancelled or lost rollout, the
        number last reported.
    truncated: whether its length limit ended it. It may have been selected all the same.
    overshoot: number of tokens sampled between the decision to cancel it and its engine's stop.
    curtailed: whether it ended at `darts.relative_limit`. It is not `truncated` then.
    index: which response of its group it is. A rollout that continues a lost one has its index.
    """

    rollout_id: int
    engine_id: str
    tokens: int
    reward: float | None
    end: RolloutEnd
    oldest_version: int
    truncated: bool = False
    overshoot: int = 0
    index: int = 0
    curtailed: bool = False


@frozen
class GroupRecord:
    """The story of one group: a row of the selection ledger.

    `shipped_version` is -1 if the group never shipped. `pilot` is the number of rollouts that were
    launched first, if not all were, and `mixed_prob` the probability on which the verdict on them
    rested. `uniform` says that the selected rewards are all equal, and `audit` that
    nothing was cancelled before the deadline.

    Example: M = 3 with one long seat. Four rollouts started at version 4, and one was cancelled.

        GroupRecord(
            group_id=17, prompt_id="train/42", opened_version=4, shipped_version=5, budget=4,
            long_end="survivor", end="shipped",
            rollouts=(
                RolloutRecord(68, "host/0", 31, 1.0, "selected_short", 4),
                RolloutRecord(69, "host/0", 55, 0.0, "selected_short", 4),
                RolloutRecord(70, "host/0", 140, 1.0, "selected_long", 4),
                RolloutRecord(71, "host/0", 64, None, "cancelled", 4, overshoot=3),
            ),
        )
    """

    group_id: int
    prompt_id: str
    opened_version: int
    shipped_version: int
    budget: int
    long_end: LongEnd
    end: GroupEnd
    rollouts: tuple[RolloutRecord, ...]
    visit: int = 0
    pilot: int = 0
    mixed_prob: float | None = None
    uniform: bool = False
    audit: bool = False


@frozen
class OpenGroup:
    """A group begins, with at most `budget` rollouts of `prompt_id`.

    All of them run on `engine_id`, unless that engine is lost.
    """

    group_id: int
    prompt_id: str
    purpose: Purpose
    engine_id: str
    budget: int
    long_end: LongEnd


@frozen
class Launch:
    """Start a rollout. `continues` names a lost rollout whose tokens so far are its beginning.

    `visit`, `index` (of the response in its group) and `draw` seed its sampling. `draw` is 1, and
    one more after each failure of the rollout. A rollout that lost its engine keeps its draw, so
    that a resumed run samples the same response again.
    """

    rollout_id: int
    group_id: int
    prompt_id: str
    visit: int
    index: int
    draw: int
    purpose: Purpose
    engine_id: str
    continues: int | None


@frozen
class Cancel:
    """Abort a rollout while it decodes.

    Its end is decided now, and its slot is free once the engine confirms.
    """

    rollout_id: int
    engine_id: str
    reason: CancelReason


@frozen
class Curtail:
    """End a rollout where it is, as if at its length limit: it is scored, and may be selected.

    It runs until it has finished. One that ends by itself before it hears of this is a legal race.
    """

    rollout_id: int
    engine_id: str


@frozen
class Ship:
    """Hand the selected trajectories of this group to the learner, for a portion of `step`."""

    step: int
    record: GroupRecord
    portion: int = 0


@frozen
class Close:
    """A shipped group was trained: record it and forget its rollouts."""

    record: GroupRecord


@frozen
class Drop:
    """This group will not be trained: record it and forget its rollouts.

    `requeued` says whether its prompt returned to the head of the queue.
    """

    record: GroupRecord
    requeued: bool


@frozen
class Evaluated:
    """A held-out group has ended; each of its rollouts counts."""

    record: GroupRecord


@frozen
class CountOvershoot:
    """A cancelled rollout stopped after its group's record was made: count these tokens as well."""

    group_id: int
    rollout_id: int
    num_tokens: int


@frozen
class RememberLengths:
    """Keep these length statistics for the next draw of the prompt.

    The prompt id "" stands for the pool of all prompts.
    """

    prompt_id: str
    lengths: LengthStats


@frozen
class RememberRewards:
    """Keep these reward statistics for the next draw of the prompt."""

    prompt_id: str
    rewards: RewardStats


Decision = Union[
    OpenGroup, Launch, Cancel, Curtail, Ship, Close, Drop, Evaluated, CountOvershoot,
    RememberLengths, RememberRewards,
]  # fmt: skip
