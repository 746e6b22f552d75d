"""The tables of groups and rollouts, and the legal moves between their states.

Owns what is true about a group right now: its rollouts, which have finished, which are in flight, what may be cancelled.
Decides nothing by itself and never does I/O; `darts.core.Core` drives it.
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


class RolloutState(Enum):
    RUNNING = "running"
    FINISHED = "finished"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"
    LOST = "lost"


class GroupState(Enum):
    OPEN = "open"  # rollouts are in flight or still to be launched
    READY = "ready"  # the selection is decided
    HANDED = "handed"  # a learner has it
    CLOSED = "closed"  # trained, dropped or evaluated


# A rollout ends once. READY -> HANDED -> READY is a learner that died with the group in its hands.
ROLLOUT_MOVES: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.RUNNING: frozenset(RolloutState) - {RolloutState.RUNNING},
    RolloutState.FINISHED: frozenset(),
    RolloutState.TRUNCATED: frozenset(),
    RolloutState.CANCELLED: frozenset(),
    RolloutState.LOST: frozenset(),
}
GROUP_MOVES: dict[GroupState, frozenset[GroupState]] = {
    GroupState.OPEN: frozenset({GroupState.READY, GroupState.CLOSED}),
    GroupState.READY: frozenset({GroupState.HANDED, GroupState.CLOSED}),
    GroupState.HANDED: frozenset({GroupState.READY, GroupState.CLOSED}),
    GroupState.CLOSED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Rollout:
    """One response in flight or ended. It keeps its slot on `engine_id` until the engine says so, cancelled or not."""

    rollout_id: int
    group: Group
    engine_id: str
    attempt: int
    tokens: int
    oldest_version: int
    state: RolloutState = RolloutState.RUNNING
    reward: float | None = None

    def move(self, state: RolloutState) -> None:
        assert state in ROLLOUT_MOVES[self.state], (self.rollout_id, self.state, state)
        self.state = state


@dataclass(slots=True)
class Planned:
    """A rollout still to be launched: a fresh one, or one that takes over where a lost one stopped."""

    attempt: int = 1
    continues: Rollout | None = None


@dataclass(slots=True, eq=False)
class Group:
    """One prompt's responses. `floor`: no token of the group is older than this policy version."""

    group_id: int
    prompt: Prompt
    purpose: Purpose
    engine_id: str
    floor: int
    opened_version: int
    budget: int
    group_size: int
    num_long: int
    mode: LongEnd
    planned: deque[Planned]
    state: GroupState = GroupState.OPEN
    watch: float = inf  # a rollout in flight that grows past this many tokens makes the group worth another look
    release: bool = False  # its deadline has come: it ships as soon as M have finished
    shipped_version: int = -1
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    running: dict[int, Rollout] = field(default_factory=dict)
    finished: list[Candidate] = field(default_factory=list)  # sorted by length
    truncated: list[Candidate] = field(default_factory=list)
    survivors: set[int] = field(default_factory=set)
    survivors_chosen: int = 0
    selection: Selection | None = None

    @property
    def all_ended(self) -> bool:
        return not self.running and not self.planned

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
        """Takes `rollout` out of flight."""
        rollout.move(state)
        del self.running[rollout.rollout_id]
        if state is RolloutState.FINISHED:
            insort(self.finished, Candidate(rollout.tokens, rollout.rollout_id))
        elif state is RolloutState.TRUNCATED:
            self.truncated.append(Candidate(rollout.tokens, rollout.rollout_id))

    def cut(self) -> float:
        """Length past which a rollout in flight provably cannot take a short seat (strictly longer); inf while unknown.

        Source: our online rule. s_j is the j-th smallest finished length; in flight and longer than s_j means past j.
        """
        seats = self.group_size if self.mode == "none" else self.group_size - self.num_long
        if self.mode == "longest" or len(self.finished) < self.group_size or seats == 0:
            return inf
        return self.finished[seats - 1].tokens

    def record(self, end: GroupEnd) -> GroupRecord:
        seats: dict[int, RolloutEnd] = {}
        if self.selection is not None and end != "evaluated":
            seats = dict.fromkeys(self.selection.short, "selected_short")
            seats |= dict.fromkeys(self.selection.long + self.selection.filled, "selected_long")
        rows = tuple(
            RolloutRecord(
                r.rollout_id,
                r.engine_id,
                r.tokens,
                r.reward,
                seats.get(r.rollout_id, _end_unselected(r)),
                r.oldest_version,
            )
            for r in self.rollouts.values()
        )
        return GroupRecord(
            self.group_id,
            self.prompt.prompt_id,
            self.opened_version,
            self.shipped_version,
            self.budget,
            self.mode,
            end,
            rows,
        )


def _end_unselected(rollout: Rollout) -> RolloutEnd:
    match rollout.state:
        case RolloutState.FINISHED:
            return "discarded"
        case RolloutState.TRUNCATED:
            return "truncated"
        case (
            RolloutState.CANCELLED | RolloutState.RUNNING
        ):  # RUNNING: being dropped at this very moment
            return "cancelled"
        case RolloutState.LOST:
            return "lost"
