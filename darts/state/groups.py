"""The tables of groups and rollouts, and the legal moves between their states.

Owns the present state of a group: its rollouts, those that have finished and those in flight.
Decides nothing by itself and does no I/O. Driven by `darts.core.Core`.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from configs.schema import LongEnd
from darts.events import (
    GroupEnd,
    GroupRecord,
    Prompt,
    ProtocolError,
    Purpose,
    RolloutEnd,
    RolloutRecord,
)
from darts.selection import Candidate, Selection
from darts.sizing.rewards import Response


class RolloutState(Enum):
    RUNNING = "running"
    FINISHED = "finished"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"
    LOST = "lost"


class GroupState(Enum):
    OPEN = "open"  # rollouts are in flight or still to be launched
    READY = "ready"  # the selection is decided
    SHIPPED = "shipped"  # the learner has it
    CLOSED = "closed"  # trained, dropped or evaluated


# A shipped group is ready again if the learner dies before it has trained on the group.
GROUP_MOVES: dict[GroupState, frozenset[GroupState]] = {
    GroupState.OPEN: frozenset({GroupState.READY, GroupState.CLOSED}),
    GroupState.READY: frozenset({GroupState.SHIPPED, GroupState.CLOSED}),
    GroupState.SHIPPED: frozenset({GroupState.READY, GroupState.CLOSED}),
    GroupState.CLOSED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Rollout:
    """One response, in flight or ended.

    It keeps its slot until its engine frees it, even after it was cancelled.
    """

    rollout_id: int
    group: Group
    index: int  # of the response in its group
    engine_id: str
    attempt: int
    draw: int  # see `darts.events.Launch`
    tokens: int
    oldest_version: int
    state: RolloutState = RolloutState.RUNNING
    reward: float | None = None
    overshoot: int = 0  # tokens sampled after the decision to cancel
    has_waited: bool = False  # for an environment, which only its engine has
    curtailed: bool = False  # was told to end at `darts.relative_limit`

    @property
    def runs(self) -> bool:
        return self.state is RolloutState.RUNNING


@dataclass(slots=True)
class Planned:
    """A rollout to be launched: a fresh one, or one that continues where a lost one stopped."""

    index: int
    attempt: int = 1
    draw: int = 1
    continues: Rollout | None = None


@dataclass(slots=True, eq=False)
class Group:
    """The responses to one prompt. None of their tokens is older than version `min_version`."""

    group_id: int
    prompt: Prompt
    purpose: Purpose
    engine_id: str
    min_version: int
    opened_version: int
    budget: int
    group_size: int
    num_long: int
    long_end: LongEnd
    planned: deque[Planned]
    pilot: int = 0  # rollouts that were launched first, or 0 if all were
    num_held: int = 0  # rollouts that wait for the verdict on the pilot
    mixed_prob: float | None = None  # at that verdict
    audit: bool = False  # nothing is cancelled before the deadline
    state: GroupState = GroupState.OPEN
    # A rollout in flight that is longer than this may have to be cancelled.
    review_above: float = inf
    # A rollout in flight that is longer than this has to end there.
    curtail_above: float = inf
    at_deadline: bool = False  # may be released once `group_size` rollouts have finished
    shipped_version: int = -1
    portion: int = 0  # of its step, once it has shipped
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    running: dict[int, Rollout] = field(default_factory=dict)
    finished: list[Candidate] = field(default_factory=list)  # sorted by length
    truncated: list[Candidate] = field(default_factory=list)
    survivors: set[int] = field(default_factory=set)
    num_survivors_chosen: int = 0
    selection: Selection | None = None
    is_uniform: bool = False  # the selected rewards are equal, so that all advantages are zero

    @property
    def all_ended(self) -> bool:
        return not self.running and not self.planned and not self.num_held

    def selected_rewards(self) -> list[float]:
        chosen = self.selection
        assert chosen is not None, self.group_id
        rewards = [self.rollouts[i].reward for i in chosen.short + chosen.long + chosen.filled]
        return [reward for reward in rewards if reward is not None]

    def rewards(self) -> dict[int, float]:
        """Rollout -> reward, for rollouts that ended by themselves."""
        return {i: r.reward for i, r in self.rollouts.items() if r.reward is not None}

    def responses(self) -> list[Response]:
        """The rewards of responses that ended, and the lengths of those that were cut off."""
        return [
            Response(r.tokens, r.reward)
            for r in self.rollouts.values()
            if r.reward is not None or r.state is RolloutState.CANCELLED
        ]

    def release_held(self) -> None:
        """Plan the rollouts that waited for the verdict on the pilot."""
        self.planned.extend(Planned(self.pilot + i) for i in range(self.num_held))
        self.num_held = 0

    def move(self, state: GroupState) -> None:
        if state not in GROUP_MOVES[self.state]:
            raise ProtocolError(
                f"group {self.group_id} is {self.state.value} and cannot become {state.value}"
            )
        self.state = state

    def add(self, rollout: Rollout) -> None:
        self.rollouts[rollout.rollout_id] = rollout
        self.running[rollout.rollout_id] = rollout

    def end(self, rollout: Rollout, state: RolloutState) -> None:
        """Take `rollout` out of flight. A rollout ends once."""
        assert rollout.runs and state is not RolloutState.RUNNING, (rollout.rollout_id, state)
        rollout.state = state
        del self.running[rollout.rollout_id]
        if state is RolloutState.FINISHED:
            insort(self.finished, Candidate(rollout.tokens, rollout.rollout_id))
        elif state is RolloutState.TRUNCATED:
            self.truncated.append(Candidate(rollout.tokens, rollout.rollout_id))

    def observed_lengths(self) -> tuple[list[int], list[int]]:
        """Exact lengths, and lower bounds from rollouts that were cut off before their end."""
        curtailed = [c for c in self.finished if self.rollouts[c.rollout_id].curtailed]
        bounds = [c.tokens for c in (*self.truncated, *curtailed)]
        bounds += [
            r.tokens
            for r in self.rollouts.values()
            if r.state is RolloutState.CANCELLED and r.tokens
        ]
        return [c.tokens for c in self.finished if c not in curtailed], bounds

    def ended_lengths(self) -> list[int]:
        """Lengths of responses that ended by themselves or at the limit."""
        return [c.tokens for c in (*self.finished, *self.truncated)]

    def record(self, end: GroupEnd) -> GroupRecord:
        seats: dict[int, RolloutEnd] = {}
        if self.selection is not None and end != "evaluated":
            seats = dict.fromkeys(self.selection.short, "selected_short")
            seats |= dict.fromkeys(self.selection.long + self.selection.filled, "selected_long")
        rows = [
            RolloutRecord(
                rollout_id=r.rollout_id,
                engine_id=r.engine_id,
                tokens=r.tokens,
                reward=r.reward,
                end=seats.get(r.rollout_id) or _end_unselected(r),
                oldest_version=r.oldest_version,
                truncated=r.state is RolloutState.TRUNCATED,
                curtailed=r.curtailed and r.state is RolloutState.FINISHED,
                overshoot=r.overshoot,
                index=r.index,
            )
            for r in self.rollouts.values()
        ]
        return GroupRecord(
            group_id=self.group_id,
            prompt_id=self.prompt.prompt_id,
            opened_version=self.opened_version,
            shipped_version=self.shipped_version,
            budget=self.budget,
            long_end=self.long_end,
            end=end,
            rollouts=tuple(rows),
            visit=self.prompt.visit,
            pilot=self.pilot,
            mixed_prob=self.mixed_prob,
            audit=self.audit,
            uniform=self.is_uniform and self.selection is not None,
        )


def _end_unselected(rollout: Rollout) -> RolloutEnd:
    match rollout.state:
        case RolloutState.FINISHED:
            return "discarded"
        case RolloutState.TRUNCATED:
            return "truncated"
        case RolloutState.CANCELLED:
            return "cancelled"
        case RolloutState.LOST:
            return "lost"
        case RolloutState.RUNNING:
            raise AssertionError(f"rollout {rollout.rollout_id} is recorded while it runs")
