"""Stand-ins for engines and learners: a world with drawn lengths that the core can be driven through, step by step.

The world knows what the core does not, every rollout's true length, and so can check each decision against the truth.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from darts import events as ev
from darts.core import Core, CoreConfig


@dataclass
class TrueRollout:
    """A rollout as the world knows it: how long it would get, how far it is, how it ended."""

    rollout_id: int
    group_id: int
    engine_id: str
    length: int
    tokens: int
    oldest_version: int
    end: str = ""
    cancel_reason: str = ""


@dataclass
class World:
    """Engines, a learner and prompts around one core; every decision is checked as it is made."""

    config: CoreConfig
    rng: random.Random
    core: Core = field(init=False)
    now: float = 0.0
    version: int = -1
    engine_versions: dict[str, int] = field(default_factory=dict)
    engine_slots: dict[str, int] = field(default_factory=dict)
    rollouts: dict[int, TrueRollout] = field(default_factory=dict)
    opened: dict[int, ev.OpenGroup] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    handed: dict[int, ev.GroupRecord] = field(default_factory=dict)
    drawn: Counter[str] = field(default_factory=Counter)
    settled: Counter[str] = field(default_factory=Counter)
    ships: list[ev.Ship] = field(default_factory=list)
    drops: list[ev.Drop] = field(default_factory=list)
    evaluated: list[ev.GroupRecord] = field(default_factory=list)
    events: list[ev.Event] = field(default_factory=list)
    decisions: list[ev.Decision] = field(default_factory=list)
    next_step: int = 0
    answered: int = 0  # ships that belong to steps fully answered
    steps_left: int = 0
    step_pending: bool = False

    def __post_init__(self) -> None:
        self.core = Core(self.config)

    def draw_length(self) -> int:
        return min(self.config.max_tokens, max(1, round(self.rng.lognormvariate(2.5, 0.9))))

    # What the world does --------------------------------------------------------------------------------------

    def send(self, event: ev.Event) -> list[ev.Decision]:
        self.events.append(event)
        decisions = list(self.core.handle(event))
        self.decisions += decisions
        for decision in decisions:
            self.check(decision)
        return decisions

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def join(self, engine_id: str, slots: int, version: int) -> None:
        self.engine_versions[engine_id], self.engine_slots[engine_id] = version, slots
        self.send(ev.ActorJoined(self.tick(), engine_id, "fake", slots, version))

    def lose(self, engine_id: str) -> None:
        for rollout in self.on_engine(engine_id):
            rollout.end = "cancelled" if rollout.end == "cancelling" else "lost"
        del self.engine_versions[engine_id]
        self.send(ev.ActorLost(self.tick(), engine_id))

    def load(self, engine_id: str, version: int) -> None:
        self.engine_versions[engine_id] = version
        self.send(ev.PolicyLoaded(self.tick(), engine_id, version))

    def draw(self, prompt_ids: list[str]) -> None:
        self.drawn.update(prompt_ids)
        self.send(ev.PromptsDrawn(self.tick(), tuple(ev.Prompt(p) for p in prompt_ids)))

    def on_engine(self, engine_id: str) -> list[TrueRollout]:
        """Rollouts that hold a slot there: running, or cancelled and not yet confirmed."""
        return [r for r in self.rollouts.values() if r.engine_id == engine_id and r.end in ("", "cancelling")]

    def running(self) -> list[TrueRollout]:
        return [r for r in self.rollouts.values() if not r.end]

    def cancelling(self) -> list[TrueRollout]:
        return [r for r in self.rollouts.values() if r.end == "cancelling"]

    def advance(self, rollout: TrueRollout, num_tokens: int) -> None:
        """Decodes; at its true length the rollout finishes, cancelled meanwhile or not."""
        rollout.tokens = min(rollout.length, rollout.tokens + num_tokens)
        if rollout.tokens < rollout.length:
            self.send(ev.RolloutProgressed(self.tick(), rollout.rollout_id, rollout.tokens))
        else:
            truncated = rollout.length >= self.config.max_tokens
            rollout.end = "raced" if rollout.end == "cancelling" else "finished"
            self.send(
                ev.RolloutFinished(self.tick(), rollout.rollout_id, rollout.tokens, truncated, 1.0, rollout.oldest_version)
            )

    def fail(self, rollout: TrueRollout) -> None:
        rollout.end = "lost"
        self.send(ev.RolloutFailed(self.tick(), rollout.rollout_id))

    def confirm(self, rollout: TrueRollout) -> None:
        rollout.end = "cancelled"
        self.send(ev.RolloutStopped(self.tick(), rollout.rollout_id, rollout.tokens))

    def publish(self) -> None:
        self.version += 1
        self.steps_left = self.config.steps_per_version
        self.send(ev.PolicyPublished(self.tick(), self.version))

    def request(self) -> None:
        self.step_pending = True
        self.send(ev.ShardsRequested(self.tick(), self.next_step))

    def train(self) -> None:
        for group_id in list(self.handed):
            record = self.handed.pop(group_id)
            self.ended[group_id] = "trained"
            self.settled[record.prompt_id] += 1
            self.send(ev.GroupTrained(self.tick(), group_id))

    def rejoin_learner(self) -> None:
        self.handed.clear()
        self.step_pending = False
        self.send(ev.LearnerJoined(self.tick()))
        self.publish()

    def finish_everything(self) -> None:
        """Runs to the end: nothing fails any more, the learner keeps training while there is anything to train on."""
        if not self.engine_versions:
            self.join("last", 4, max(self.version, -1))
        if self.version < 0:
            self.publish()
        for _ in range(10_000):
            for engine_id, version in list(self.engine_versions.items()):
                if version < self.version:
                    self.load(engine_id, self.version)
            for rollout in self.cancelling():
                self.confirm(rollout)
            for rollout in self.running():
                if not rollout.end:
                    self.advance(rollout, 10_000)
            if self.handed:
                self.train()
            if not self.step_pending:
                if self.steps_left == 0:
                    self.publish()
                self.request()
            if not self.running() and not self.cancelling() and not self.core.num_pending and self.step_pending:
                if self.core.num_ready < self.config.groups_per_step and self.core.num_ready == self.core.num_outstanding:
                    return
        raise AssertionError(f"no end in sight: {self.core.waiting_for()}")

    # What must hold of each decision --------------------------------------------------------------------------

    def check(self, decision: ev.Decision) -> None:
        match decision:
            case ev.OpenGroup():
                assert decision.group_id not in self.opened
                self.opened[decision.group_id] = decision
            case ev.Launch():
                self.check_launch(decision)
            case ev.Cancel():
                self.check_cancel(decision)
            case ev.Ship():
                self.check_ship(decision)
            case ev.Drop():
                assert self.ended.setdefault(decision.record.group_id, decision.record.end) == decision.record.end
                assert decision.record.end not in ("shipped", "evaluated")
                self.check_record(decision.record)
                self.drops.append(decision)
                if not decision.requeued:
                    self.settled[decision.record.prompt_id] += 1
            case ev.Evaluated():
                assert decision.record.group_id not in self.ended
                self.ended[decision.record.group_id] = "evaluated"
                self.evaluated.append(decision.record)
            case ev.RememberLengths():
                assert decision.lengths.var_log > 0

    def check_launch(self, launch: ev.Launch) -> None:
        assert launch.rollout_id not in self.rollouts and launch.group_id not in self.ended
        version = self.engine_versions[launch.engine_id]
        assert version >= 0
        before = self.rollouts[launch.continues] if launch.continues is not None else None
        assert before is None or before.end == "lost"
        self.rollouts[launch.rollout_id] = TrueRollout(
            launch.rollout_id,
            launch.group_id,
            launch.engine_id,
            before.length if before else self.draw_length(),
            before.tokens if before else 0,
            before.oldest_version if before else version,
        )
        assert len(self.on_engine(launch.engine_id)) <= self.engine_slots[launch.engine_id]

    def check_cancel(self, cancel: ev.Cancel) -> None:
        rollout = self.rollouts[cancel.rollout_id]
        assert rollout.end == "" and rollout.engine_id == cancel.engine_id
        rollout.end, rollout.cancel_reason = "cancelling", cancel.reason

    def check_ship(self, ship: ev.Ship) -> None:
        record = ship.record
        assert ship.step == self.next_step and record.group_id not in self.ended and record.group_id not in self.handed
        selected = [r for r in record.rollouts if r.end in ("selected_short", "selected_long")]
        assert len(selected) == self.config.group_size
        assert all(0 <= self.version - self.rollouts[r.rollout_id].oldest_version <= self.config.max_lag for r in selected)
        assert record.shipped_version == self.version
        self.check_record(record)
        self.check_short_seats(record)
        self.handed[record.group_id] = record
        self.ships.append(ship)
        if sum(s.step == self.next_step for s in self.ships[self.answered :]) == self.config.groups_per_step:
            self.answered = len(self.ships)
            self.next_step += 1
            self.steps_left -= 1
            self.step_pending = False

    def check_record(self, record: ev.GroupRecord) -> None:
        launched = {r.rollout_id for r in self.rollouts.values() if r.group_id == record.group_id}
        assert {r.rollout_id for r in record.rollouts} == launched
        for row in record.rollouts:
            truth = self.rollouts[row.rollout_id]
            if truth.end == "lost":
                assert row.end == "lost"
            elif truth.end in ("cancelling", "cancelled", "raced"):
                assert row.end == "cancelled"
            else:
                assert row.end in ("selected_short", "selected_long", "discarded", "truncated")

    def check_short_seats(self, record: ev.GroupRecord) -> None:
        """An exact cancel is a proof: whoever was cancelled as past the selection is truly longer than every short seat."""
        short = [r.tokens for r in record.rollouts if r.end == "selected_short"]
        for row in record.rollouts:
            truth = self.rollouts[row.rollout_id]
            if truth.cancel_reason == "past_selection" and short:
                assert truth.length > max(short)
