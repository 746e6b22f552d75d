"""Two published synchronous schedulers, for comparison in the simulator only.

The core cannot express them. Both use its events and decisions, so the same world drives them.
Neither uses budgets, length statistics or exact cancels. A step is a round, which starts when the
learner asks for shards and every engine has the newest policy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from darts import events as ev
from darts.simulate.schema import SimulateConfig


@dataclass(slots=True, eq=False)
class RoundGroup:
    """A prompt's responses in one round.

    `waiting` holds the ids of rollouts to continue, and None for each new one.
    """

    group_id: int
    prompt: ev.Prompt
    opened_version: int
    budget: int
    waiting: deque[int | None]
    closed: bool = False  # trained or dropped, so its record is made
    # rollout -> engine, oldest version
    running: dict[int, tuple[str, int]] = field(default_factory=dict)
    ended: list[ev.RolloutRecord] = field(default_factory=list)

    def record(self, end: ev.GroupEnd, version: int, group_size: int) -> ev.GroupRecord:
        """How the group ended. The first `group_size` rollouts that finished are selected."""
        rows: list[ev.RolloutRecord] = []
        for row in self.ended:
            seat = (
                row.reward is not None
                and end == "shipped"
                and sum(r.end == "selected_short" for r in rows) < group_size
            )
            rows.append(replace(row, end="selected_short") if seat else row)
        return ev.GroupRecord(
            group_id=self.group_id,
            prompt_id=self.prompt.prompt_id,
            opened_version=self.opened_version,
            shipped_version=version if end == "shipped" else -1,
            budget=self.budget,
            long_end="longest",
            end=end,
            rollouts=tuple(rows),
        )

    def overshot(self, rollout_id: int, num_tokens: int) -> int:
        """A cancelled rollout stopped at `num_tokens`. Returns the tokens after its cancel."""
        for index, row in enumerate(self.ended):
            if row.rollout_id == rollout_id:
                self.ended[index] = replace(row, overshoot=num_tokens - row.tokens)
                return num_tokens - row.tokens
        raise AssertionError(f"rollout {rollout_id} of group {self.group_id} was not cancelled")


class Rounds:
    """The part that both share: free slots, launches in order, and a round's ready groups."""

    def __init__(self, config: SimulateConfig) -> None:
        self.groups_per_step = config.batch.groups
        self.group_size = config.darts.group_size
        self.started = math.ceil(config.batch.groups * config.baseline.oversample)
        self.with_extra = math.ceil(config.darts.group_size * config.baseline.extra)
        self.policy_version = -1
        self._pending: deque[ev.Prompt] = deque()
        self._free: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._open: dict[int, RoundGroup] = {}
        self._launching: deque[RoundGroup] = deque()
        self._holders: dict[int, RoundGroup] = {}  # rollouts that hold a slot
        self._engine_of: dict[int, str] = {}
        self._tokens: dict[int, int] = {}
        self._paused: dict[int, int] = {}  # interrupted rollout -> its oldest version
        self._ready: deque[RoundGroup] = deque()
        self._shipped: dict[int, tuple[RoundGroup, int]] = {}  # with the learner's version then
        self._step: int | None = None
        self._round_open = False
        self._next_group = self._next_rollout = 0
        self._out: list[ev.Decision] = []

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def handle(self, event: ev.Event) -> Sequence[ev.Decision]:
        match event:
            case ev.PromptsDrawn():
                self._pending.extend(event.prompts)
            case ev.EngineJoined():
                self._free[event.engine_id], self._versions[event.engine_id] = (
                    event.slots,
                    event.policy_version,
                )
            case ev.PolicyLoaded():
                self._versions[event.engine_id] = event.version
            case ev.PolicyPublished():
                self.policy_version = event.version
            case ev.ShardsRequested():
                self._step = event.step
            case ev.RolloutFinished():
                self._finished(event)
            case ev.RolloutStopped():
                self._stopped(event)
            case ev.RolloutProgressed():
                self._tokens[event.rollout_id] = event.num_tokens
                return []
            case ev.GroupTrained():
                group, version = self._shipped.pop(event.group_id)
                group.closed = True
                self._out.append(ev.Close(group.record("shipped", version, self.group_size)))
            case _:
                return []  # latencies change nothing in a round
        self._start_round()
        self._launch()
        self._ship()
        decisions, self._out = self._out, []
        return decisions

    def _start_round(self) -> None:
        current = all(version == self.policy_version for version in self._versions.values())
        if (
            self._step is None
            or self._round_open
            or not current
            or len(self._pending) < self.started
        ):
            return
        self._round_open = True
        self.begin()

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """A full batch has shipped: decide about the groups that are still open."""
        raise NotImplementedError

    def open(self, prompt: ev.Prompt, budget: int) -> None:
        group = RoundGroup(
            self._next_group, prompt, self.policy_version, budget, deque([None] * budget)
        )
        self._next_group += 1
        self._open[group.group_id] = group
        engine_id = max(self._free, key=lambda engine: self._free[engine])
        self._out.append(
            ev.OpenGroup(group.group_id, prompt.prompt_id, "train", engine_id, budget, "longest")
        )
        self._launching.append(group)

    def _launch(self) -> None:
        while self._launching:
            group = self._launching[0]
            if not group.waiting:
                self._launching.popleft()
                continue
            engine_id = max(self._free, key=lambda engine: self._free[engine])
            if self._free[engine_id] < 1:
                return
            before = group.waiting.popleft()
            oldest = self._paused.pop(before) if before is not None else self.policy_version
            rollout_id, self._next_rollout = self._next_rollout, self._next_rollout + 1
            self._free[engine_id] -= 1
            group.running[rollout_id] = (engine_id, oldest)
            self._holders[rollout_id], self._engine_of[rollout_id] = group, engine_id
            self._out.append(
                ev.Launch(
                    rollout_id=rollout_id,
                    group_id=group.group_id,
                    prompt_id=group.prompt.prompt_id,
                    visit=group.prompt.visit,
                    index=0,
                    draw=1,
                    purpose="train",
                    engine_id=engine_id,
                    continues=before,
                )
            )

    def _finished(self, event: ev.RolloutFinished) -> None:
        group = self._release(event.rollout_id)
        if event.rollout_id not in group.running:
            return self._count_overshoot(group, event.rollout_id, event.num_tokens)
        engine_id, oldest = group.running.pop(event.rollout_id)
        group.ended.append(
            ev.RolloutRecord(
                rollout_id=event.rollout_id,
                engine_id=engine_id,
                tokens=event.num_tokens,
                reward=event.reward,
                end="discarded",
                oldest_version=oldest,
                truncated=event.truncated,
            )
        )
        if sum(row.reward is not None for row in group.ended) == self.group_size:
            self.cancel(group)
            del self._open[group.group_id]
            self._ready.append(group)

    def _stopped(self, event: ev.RolloutStopped) -> None:
        group = self._release(event.rollout_id)
        if event.rollout_id in group.running:  # interrupted; it continues later
            _, self._paused[event.rollout_id] = group.running.pop(event.rollout_id)
            group.waiting.append(event.rollout_id)
            if self._round_open and group not in self._launching:
                self._launching.append(group)
        else:
            self._count_overshoot(group, event.rollout_id, event.num_tokens)

    def _count_overshoot(self, group: RoundGroup, rollout_id: int, num_tokens: int) -> None:
        overshoot = group.overshot(rollout_id, num_tokens)
        if overshoot and group.closed:
            self._out.append(ev.CountOvershoot(group.group_id, rollout_id, overshoot))

    def _release(self, rollout_id: int) -> RoundGroup:
        self._tokens.pop(rollout_id, None)
        self._free[self._engine_of.pop(rollout_id)] += 1
        return self._holders.pop(rollout_id)

    def cancel(self, group: RoundGroup) -> None:
        """Cancel all rollouts of the group. None of them continues later."""
        for rollout_id, (engine_id, oldest) in group.running.items():
            tokens = self._tokens.get(rollout_id, 0)
            group.ended.append(
                ev.RolloutRecord(rollout_id, engine_id, tokens, None, "cancelled", oldest)
            )
            self._out.append(ev.Cancel(rollout_id, engine_id, "group_full"))
        group.running.clear()
        group.waiting.clear()

    def _ship(self) -> None:
        if self._step is None or not self._round_open or len(self._ready) < self.groups_per_step:
            return
        for _ in range(self.groups_per_step):
            group = self._ready.popleft()
            self._shipped[group.group_id] = (group, self.policy_version)
            self._out.append(
                ev.Ship(self._step, group.record("shipped", self.policy_version, self.group_size))
            )
        self._step, self._round_open = None, False
        self.end()


class TailBatching(Rounds):
    """Short rounds keep the prompts that complete first; long rounds answer the others.

    A short round starts more prompts, and more responses per prompt, than it needs. Prompts that do
    not complete are answered again together in a long round, which waits for every response.
    Source: RollPacker (arXiv 2509.21009).
    """

    def __init__(self, config: SimulateConfig) -> None:
        super().__init__(config)
        self._deferred: deque[ev.Prompt] = deque()

    def begin(self) -> None:
        if len(self._deferred) >= self.groups_per_step:
            for _ in range(self.groups_per_step):
                self.open(self._deferred.popleft(), self.group_size)
            return
        for _ in range(self.started):
            self.open(self._pending.popleft(), self.with_extra)

    def end(self) -> None:
        for group in [*self._open.values(), *self._ready]:
            self.cancel(group)
            self._deferred.append(group.prompt)
            group.closed = True
            self._out.append(
                ev.Drop(
                    group.record("deadline", self.policy_version, self.group_size), requeued=True
                )
            )
        self._open.clear()
        self._ready.clear()
        self._launching.clear()


class PartialRollout(Rounds):
    """A round starts more prompts than it needs, and interrupts the rest once enough are complete.

    Interrupted rollouts continue under the next policy in the next round. Source: partial rollouts
    as in Kimi k1.5 (arXiv 2501.12599) and APRIL.
    """

    def begin(self) -> None:
        self._launching.extend(self._open.values())
        for _ in range(max(0, self.started - len(self._open) - len(self._ready))):
            self.open(self._pending.popleft(), self.group_size)

    def end(self) -> None:
        self._launching.clear()
        for group in self._open.values():
            for rollout_id, (engine_id, _) in group.running.items():
                self._out.append(ev.Cancel(rollout_id, engine_id, "deadline"))
