"""The worked examples of `docs/method.md`: one selection, and one run against the lag bound.

Owns the scenarios: hand-picked response lengths and durations around one engine and one learner.
Every cancel, seat and ship in them is a decision of `darts.core.Core`. Driven by `tools.figures`,
which draws and prints them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core

ENGINE = "engine"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# One selection ------------------------------------------------------------------------------------

LENGTHS = (60, 95, 130, 150, 320, 410, 110, 260)  # of the eight rollouts, if none were cancelled
SELECTION = CoreConfig(
    groups_per_step=1, group_size=4, num_long=1, redundancy="fixed", upper=2.0, max_tokens=512
)
SLOTS = 6  # two rollouts start only when a slot becomes free


@dataclass
class RolloutBar:
    """One rollout of the example; time is counted in decoded tokens of the engine."""

    length: int
    start: int
    tokens: int = 0
    end: str = ""


@dataclass
class SelectionExample:
    """`decided` is the time at which the group's selection was complete."""

    bars: list[RolloutBar]
    decided: int

    def table(self) -> str:
        lines = ["| rollout | starts at | would reach | decoded | end |", "|---|---|---|---|---|"]
        lines += [
            _row(number, bar.start, bar.length, bar.tokens, bar.end.replace("_", " "))
            for number, bar in enumerate(self.bars)
        ]
        return "\n".join(lines)


def selection_example() -> SelectionExample:
    """One group of budget 8. Every rollout decodes one token per unit of time."""
    core, bars, running, now = Core(SELECTION), list[RolloutBar](), set[int](), 0
    records: list[ev.GroupRecord] = []

    def send(event: ev.Event) -> None:
        for decision in core.handle(event):
            match decision:
                case ev.Launch():
                    bars.append(RolloutBar(LENGTHS[decision.rollout_id], now))
                    running.add(decision.rollout_id)
                case ev.Cancel():
                    running.discard(decision.rollout_id)
                    stopped = bars[decision.rollout_id].tokens
                    send(ev.RolloutStopped(decision.rollout_id, stopped))
                case ev.Ship():
                    records.append(decision.record)

    send(ev.PolicyPublished(0))
    send(ev.EngineJoined(ENGINE, "example", SLOTS, 0))
    send(ev.PromptsDrawn((ev.Prompt("prompt"),)))
    send(ev.ShardsRequested(0))
    while not records:
        now += 1
        for rollout_id in sorted(running):
            bar = bars[rollout_id]
            if rollout_id in running and bar.start < now:
                bar.tokens += 1
                if bar.tokens < bar.length:
                    send(ev.RolloutProgressed(rollout_id, bar.tokens))
                else:
                    running.discard(rollout_id)
                    send(ev.RolloutFinished(rollout_id, bar.tokens, False, 1.0, 0))
    for row in records[0].rollouts:
        bars[row.rollout_id].end = row.end
    return SelectionExample(bars, now)


# The lag bound ------------------------------------------------------------------------------------

BOUND = CoreConfig(
    groups_per_step=2, group_size=2, num_long=0, policy="plain", max_lag=2, max_tokens=512
)
DURATIONS = (
    20,
    110,
    25,
    20,
    30,
    25,
    20,
    27,
    25,
    20,
    25,
    20,
)  # of each group, from opening to finish
STEP_TIME, SWAP_TIME, NUM_STEPS = 15, 10, 5


@dataclass
class GroupBar:
    """One group. `min_version` is the policy version of its engine when it opened."""

    opened: int
    min_version: int
    finished: int = 0
    shipped: int = 0
    shipped_version: int = -1

    @property
    def lag(self) -> int:
        return self.shipped_version - self.min_version


@dataclass
class StepRow:
    """One learner step: when its batch was requested and served, and the groups in it."""

    version: int
    requested: int
    served: int = 0
    groups: list[int] = field(default_factory=list)


@dataclass
class LagExample:
    bars: dict[int, GroupBar]
    steps: list[StepRow]

    def table(self) -> str:
        lines = [
            "| step | version | requested at | shipped at | groups | lags |",
            "|---|---|---|---|---|---|",
        ]
        for number, step in enumerate(self.steps):
            groups = ", ".join(map(str, step.groups))
            lags = ", ".join(str(self.bars[group].lag) for group in step.groups)
            lines.append(_row(number, step.version, step.requested, step.served, groups, lags))
        return "\n".join(lines)


class LagWorld:
    """One engine with room for six groups, and a learner that publishes after each step of two."""

    def __init__(self) -> None:
        self.core = Core(BOUND)
        self.now = self.engine_version = self.version = 0
        self.bars: dict[int, GroupBar] = {}
        self.steps: list[StepRow] = []
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self._groups: dict[int, list[int]] = {}  # group -> its rollouts

    def run(self) -> LagExample:
        self._send(ev.PolicyPublished(0))
        self._send(ev.EngineJoined(ENGINE, "example", 6 * BOUND.group_size, 0))
        self._draw()
        self._request()
        while len(self.steps) < NUM_STEPS or not self.steps[-1].served:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
            self._draw()
        return LagExample(self.bars, self.steps)

    def _later(self, delay: int, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._agenda, (self.now + delay, self._serial, action))

    def _draw(self) -> None:
        while self.core.num_pending < BOUND.groups_per_step:
            self._send(ev.PromptsDrawn((ev.Prompt("prompt"),)))

    def _send(self, event: ev.Event) -> None:
        for decision in self.core.handle(event):
            match decision:
                case ev.OpenGroup():
                    self.bars[decision.group_id] = GroupBar(self.now, self.engine_version)
                    finish = partial(self._finish, decision.group_id)
                    self._later(DURATIONS[decision.group_id], finish)
                case ev.Launch():
                    self._groups.setdefault(decision.group_id, []).append(decision.rollout_id)
                case ev.Ship():
                    self._ship(decision.record)

    def _finish(self, group_id: int) -> None:
        self.bars[group_id].finished = self.now
        tokens, min_version = DURATIONS[group_id], self.bars[group_id].min_version
        for rollout_id in self._groups[group_id]:
            self._send(ev.RolloutFinished(rollout_id, tokens, False, 1.0, min_version))

    def _request(self) -> None:
        self.steps.append(StepRow(self.version, self.now))
        self._send(ev.ShardsRequested(len(self.steps) - 1))

    def _ship(self, record: ev.GroupRecord) -> None:
        bar, step = self.bars[record.group_id], self.steps[-1]
        bar.shipped, bar.shipped_version = self.now, record.shipped_version
        step.served = self.now
        step.groups.append(record.group_id)
        if len(step.groups) == BOUND.groups_per_step:
            self._later(STEP_TIME, self._publish)

    def _publish(self) -> None:
        for group_id in self.steps[-1].groups:
            self._send(ev.GroupTrained(group_id))
        self.version += 1
        self._send(ev.PolicyPublished(self.version))
        self._later(SWAP_TIME, partial(self._swap, self.version))
        self._request()

    def _swap(self, version: int) -> None:
        self.engine_version = version
        self._send(ev.PolicyLoaded(ENGINE, version))


def lag_example() -> LagExample:
    return LagWorld().run()
