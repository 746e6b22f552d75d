"""Progress deadlines: a heartbeat proves that a process lives, and this module that it works.

Looks at the core's state once a second and keeps when each piece of work last moved: a rollout in
flight (its tokens), a cancel (its confirmation), a policy load (the engine's version), and the
learner (its step or its publication). Work that has stood still for longer than its deadline is
named. Pure apart from what it remembers. Driven by `buffer.service`, which acts on it.

A deadline is the configured one, or `PATIENCE` times the longest wait of that kind that ended well
if that is longer. Time in which this process itself did not run is not counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Literal, NamedTuple

from configs.schema import BufferConfig
from darts.core import Core
from darts.state.engines import Engine
from darts.state.groups import GroupState

PATIENCE = 5.0
LONGEST_TICK_S = 5.0  # a longer time between two looks means that the buffer itself stood still

Kind = Literal["rollout", "policy load", "learner step"]


class Overdue(NamedTuple):
    """Work that stands still. `engine_id` is "" for the learner's."""

    engine_id: str
    problem: str  # as the rest of a sentence that begins with the engine or the learner


class _Wait(NamedTuple):
    value: object
    since_s: float


class Standing(NamedTuple):
    """The longest wait of one kind at present, and its deadline."""

    what: str
    waited_s: float
    limit_s: float
    key: str


class Deadlines:
    """`look` at a core, as often as wanted, at times that never go back."""

    def __init__(self, config: BufferConfig) -> None:
        self._least_s: dict[Kind, tuple[str, float]] = {
            "rollout": ("buffer.rollout_timeout_s", config.rollout_timeout_s),
            "policy load": ("buffer.load_timeout_s", config.load_timeout_s),
            "learner step": ("buffer.step_timeout_s", config.step_timeout_s),
        }
        self._longest_s: dict[Kind, float] = dict.fromkeys(self._least_s, 0.0)
        self._waits: dict[tuple[Kind, Hashable], _Wait] = {}
        self._clock_s = 0.0  # counts only time in which this process ran
        self._looked_s: float | None = None

    def look(
        self, core: Core, now_s: float, learner_is_there: bool, offered_version: int
    ) -> list[Overdue]:
        """Everything that is overdue now, at most one line per engine.

        `offered_version` is the newest policy that engines can fetch.
        """
        if self._looked_s is not None:
            self._clock_s += min(now_s - self._looked_s, LONGEST_TICK_S)
        self._looked_s = now_s
        before, self._waits = self._waits, {}
        overdue: list[Overdue] = []
        for engine in core.engines.by_id.values():
            problem = next(self._of_engine(engine, before, offered_version), "")
            if problem:
                overdue.append(Overdue(engine.engine_id, problem))
        if learner_is_there and (problem := self._of_learner(core, before, offered_version)):
            overdue.append(Overdue("", problem))
        return overdue

    def longest(self) -> list[Standing]:
        """The longest wait of each kind at the last look."""
        longest: dict[Kind, Standing] = {}
        for (kind, of), wait in self._waits.items():
            waited_s = self._clock_s - wait.since_s
            if kind in longest and longest[kind].waited_s >= waited_s:
                continue
            what = {
                "rollout": f"news of rollout {of}",
                "policy load": f"{of} to load a policy",
                "learner step": f"the learner's {of or 'step'}",
            }[kind]
            limit_s = self._limit_s(kind)
            longest[kind] = Standing(what, waited_s, limit_s, self._least_s[kind][0])
        return list(longest.values())

    def _limit_s(self, kind: Kind) -> float:
        return max(self._least_s[kind][1], PATIENCE * self._longest_s[kind])

    def _of_engine(
        self, engine: Engine, before: dict[tuple[Kind, Hashable], _Wait], offered_version: int
    ) -> Iterator[str]:
        loading = self._stands("policy load", engine.engine_id, engine.version, before)
        if engine.version >= offered_version:
            del self._waits["policy load", engine.engine_id]
        elif loading:
            yield f"has not loaded policy version {offered_version} for {loading}"
        for rollout in list(engine.in_flight.values()):
            value = rollout.tokens, rollout.state
            if standing := self._stands("rollout", rollout.rollout_id, value, before):
                if rollout.runs:
                    yield (
                        f"has had no news of rollout {rollout.rollout_id}, at {rollout.tokens} "
                        f"tokens, for {standing}"
                    )
                else:
                    yield (
                        f"has not confirmed the cancel of rollout {rollout.rollout_id} "
                        f"for {standing}"
                    )

    def _of_learner(
        self, core: Core, before: dict[tuple[Kind, Hashable], _Wait], offered_version: int
    ) -> str:
        """It owes something from the shipment of a batch until it asks for the next, and the
        snapshot of a new policy.
        """
        if offered_version < core.policy_version:
            standing = self._stands("learner step", "snapshot", core.policy_version, before)
            if standing:
                return f"has not offered policy version {core.policy_version} for {standing}"
        if core.policy_version < 0 or core.requested_step is not None or core.run_ended:
            return ""
        num_shipped = sum(g.state is GroupState.SHIPPED for g in core.groups.values())
        value = core.policy_version, core.outstanding.steps_left, num_shipped
        standing = self._stands("learner step", "", value, before)
        return f"has neither trained nor published for {standing}" if standing else ""

    def _stands(
        self,
        kind: Kind,
        key: Hashable,
        value: object,
        before: dict[tuple[Kind, Hashable], _Wait],
    ) -> str:
        """How long `key` has had `value`, in words, if that is too long."""
        wait = before.get((kind, key))
        if wait is None or wait.value != value:
            if wait is not None:
                self._longest_s[kind] = max(self._longest_s[kind], self._clock_s - wait.since_s)
            wait = _Wait(value, self._clock_s)
        self._waits[kind, key] = wait
        name, least_s = self._least_s[kind]
        waited_s = self._clock_s - wait.since_s
        if waited_s <= self._limit_s(kind):
            return ""
        return (
            f"{waited_s:.0f} s ({name}={least_s:g}; longest so far {self._longest_s[kind]:.0f} s)"
        )
