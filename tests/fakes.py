"""Stand-ins for engines and learners: a world with drawn lengths that drives the core step by step.

Unlike the core, the world knows every rollout's true length, and checks each decision against it.
"""

from __future__ import annotations

import math
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from buffer.wire import messages as msg
from buffer.wire.client import EngineLink, LearnerLink, LinkLost
from darts import events as ev
from darts import waiting
from darts.config import CoreConfig
from darts.core import Core
from darts.sizing.rewards import RewardStats


@dataclass
class TrueRollout:
    """A rollout as the world knows it: its true length, its tokens so far, and its end."""

    rollout_id: int
    group_id: int
    engine_id: str
    length: int
    tokens: int
    oldest_version: int
    end: str = ""
    cancel_reason: str = ""
    waits: bool = False  # for its environment, and holds no slot
    has_waited: bool = False
    curtailed: bool = False  # was told to end at the relative limit


@dataclass
class World:
    """Engines, a learner and prompts around one core. Every decision is checked as it is made."""

    config: CoreConfig
    rng: random.Random
    core: Core = field(init=False)
    # Restored from the state of `core`; it must then make the same decisions.
    twin: Core | None = None
    version: int = -1
    engine_versions: dict[str, int] = field(default_factory=dict)
    engine_slots: dict[str, int] = field(default_factory=dict)
    rollouts: dict[int, TrueRollout] = field(default_factory=dict)
    opened: dict[int, ev.OpenGroup] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    shipped: dict[int, ev.GroupRecord] = field(default_factory=dict)
    drawn: Counter[str] = field(default_factory=Counter)
    settled: Counter[str] = field(default_factory=Counter)
    counted: Counter[int] = field(default_factory=Counter)  # recorded tokens by rollout
    ships: list[ev.Ship] = field(default_factory=list)
    drops: list[ev.Drop] = field(default_factory=list)
    evaluated: list[ev.GroupRecord] = field(default_factory=list)
    events: list[ev.Event] = field(default_factory=list)
    decisions: list[ev.Decision] = field(default_factory=list)
    next_step: int = 0
    taken: int = 0  # groups of the open step that were shipped
    opened_at: int = 0  # number of shipped groups before the newest step
    steps_left: int = 0
    step_pending: bool = False
    portion: int = 0  # of the next step, that was requested last
    portion_pending: bool = False
    num_replaced: int = 0  # groups without signal that were replaced since the last batch
    rewards: dict[str, RewardStats] = field(default_factory=dict)  # as a journal keeps them

    def __post_init__(self) -> None:
        self.core = Core(self.config)

    def draw_length(self) -> int:
        return min(self.config.max_tokens, max(1, round(self.rng.lognormvariate(2.5, 0.9))))

    def reward_of(self, rollout: TrueRollout) -> float:
        """Two prompts are never solved, one is always solved, and the others now and then."""
        constant = {"p1": 0.0, "p3": 0.0, "p5": 1.0}
        prompt_id = self.opened[rollout.group_id].prompt_id
        return constant.get(prompt_id, float(rollout.length % 2))

    # Actions of the world ------------------------------------------------------------------------

    def send(self, event: ev.Event) -> list[ev.Decision]:
        self.events.append(event)
        decisions = list(self.core.handle(event))
        if self.twin is not None:
            assert list(self.twin.handle(event)) == decisions
        self.decisions += decisions
        for decision in decisions:
            self.check(decision)
        self.check_release(decisions)
        return decisions

    @staticmethod
    def check_release(decisions: list[ev.Decision]) -> None:
        """A deadline ends responses only for a batch that ships, or that a uniform group delays."""
        kinds = {type(d) for d in decisions}
        uniform = any(isinstance(d, ev.Drop) and d.record.end == "uniform" for d in decisions)
        if any(isinstance(d, ev.Cancel) and d.reason == "deadline" for d in decisions):
            assert ev.Ship in kinds or uniform, decisions

    def join(self, engine_id: str, slots: int, version: int) -> None:
        self.engine_versions[engine_id], self.engine_slots[engine_id] = version, slots
        self.send(ev.EngineJoined(engine_id, "fake", slots, version))

    def lose(self, engine_id: str, left: bool = False) -> None:
        for rollout in self.on_engine(engine_id):
            rollout.end = "lost cancelled" if rollout.end == "cancelling" else "lost"
        del self.engine_versions[engine_id]
        self.send(ev.EngineLost(engine_id, left=left))

    def load(self, engine_id: str, version: int) -> None:
        self.engine_versions[engine_id] = version
        self.send(ev.PolicyLoaded(engine_id, version))

    def draw(self, prompt_ids: list[str]) -> None:
        self.drawn.update(prompt_ids)
        drawn = (ev.Prompt(p, rewards=self.rewards.get(p)) for p in prompt_ids)
        self.send(ev.PromptsDrawn(tuple(drawn)))

    def on_engine(self, engine_id: str) -> list[TrueRollout]:
        """Rollouts in flight on the engine: running, or cancelled and not yet confirmed."""
        return [
            r
            for r in self.rollouts.values()
            if r.engine_id == engine_id and r.end in ("", "cancelling")
        ]

    def running(self) -> list[TrueRollout]:
        return [r for r in self.rollouts.values() if not r.end]

    def cancelling(self) -> list[TrueRollout]:
        return [r for r in self.rollouts.values() if r.end == "cancelling"]

    def advance(self, rollout: TrueRollout, num_tokens: int) -> None:
        """Decode tokens. A rollout finishes at its true length, even if cancelled meanwhile, or
        soon after it was told to end.
        """
        rollout.waits = False
        if rollout.curtailed:
            num_tokens = min(num_tokens, 2)
        rollout.tokens = min(rollout.length, rollout.tokens + num_tokens)
        rollout.curtailed = rollout.curtailed and rollout.tokens < rollout.length
        if rollout.curtailed:
            rollout.length = rollout.tokens
        if rollout.tokens < rollout.length:
            self.send(ev.RolloutProgressed(rollout.rollout_id, rollout.tokens))
        else:
            truncated = rollout.curtailed or rollout.length >= self.config.max_tokens
            rollout.end = "raced" if rollout.end == "cancelling" else "finished"
            self.send(
                ev.RolloutFinished(
                    rollout.rollout_id,
                    rollout.tokens,
                    truncated,
                    self.reward_of(rollout),
                    rollout.oldest_version,
                )
            )

    def wait(self, rollout: TrueRollout) -> None:
        """The rollout has ended a turn, and decodes nothing until it is advanced again."""
        rollout.waits = rollout.has_waited = True
        self.send(ev.RolloutWaits(rollout.rollout_id))

    def fail(self, rollout: TrueRollout) -> None:
        rollout.end = "lost"
        self.send(ev.RolloutFailed(rollout.rollout_id))

    def confirm(self, rollout: TrueRollout, num_tokens: int = 0) -> None:
        """The engine stops a cancelled rollout after `num_tokens` more tokens."""
        rollout.end = "cancelled"
        rollout.tokens = min(rollout.length, rollout.tokens + num_tokens)
        self.send(ev.RolloutStopped(rollout.rollout_id, rollout.tokens))

    def publish(self) -> None:
        self.version += 1
        self.steps_left = self.config.steps_per_version
        self.send(ev.PolicyPublished(self.version))

    @property
    def is_between_portions(self) -> bool:
        """Whether the learner has some portions of a step, and has not asked for the next one."""
        return self.step_pending and not self.portion_pending

    def request(self) -> None:
        """Ask for the next portion of the open step, or for the first one of the next step."""
        self.portion = self.portion + 1 if self.step_pending else 0
        self.step_pending = self.portion_pending = True
        self.send(ev.ShardsRequested(self.next_step, self.portion))

    def train(self) -> None:
        for group_id in list(self.shipped):
            record = self.shipped.pop(group_id)
            self.ended[group_id] = "trained"
            self.settled[record.prompt_id] += 1
            self.send(ev.GroupTrained(group_id))

    @property
    def unsent_step(self) -> list[ev.GroupRecord]:
        """The newest portion of a step, if it may not have been sent to the learner yet."""
        if self.portion_pending:
            return []  # the learner asked for more, so it has the earlier ones
        return [
            self.shipped[ship.record.group_id]
            for ship in self.ships[self.opened_at :]
            if ship.portion == self.portion and ship.record.group_id in self.shipped
        ]

    def lose_tokens(self, rollout_id: int) -> None:
        """The buffer's machine loses power before `unsent_step` is sent."""
        for record in self.unsent_step:
            del self.shipped[record.group_id]
        if not self.step_pending:  # it was the last portion
            self.next_step -= 1
            self.steps_left += 1
        self.step_pending = bool(self.shipped)
        self.portion -= 1
        self.taken = len(self.shipped)
        self.send(ev.TokensLost(rollout_id, 0))

    def rejoin_learner(self) -> None:
        self.shipped.clear()
        self.step_pending = self.portion_pending = False
        self.taken = 0
        self.send(ev.LearnerJoined())
        self.publish()

    def finish_everything(self, power_cuts: int = 0) -> None:
        """Run to the end. Nothing fails any more, and the learner trains while it gets groups.

        power_cuts: steps that lose tokens before they are sent.
        """
        if not self.engine_versions:
            self.join("last", 4, max(self.version, -1))
        if self.version < 0:
            self.publish()
        for _ in range(10_000):
            for engine_id, version in list(self.engine_versions.items()):
                if version < self.version:
                    self.load(engine_id, self.version)
            for rollout in self.cancelling():
                self.confirm(rollout, num_tokens=3)
            for rollout in self.running():
                if not rollout.end:
                    self.advance(rollout, 10_000)
            if power_cuts and self.unsent_step:
                power_cuts -= 1
                rollouts = self.rng.choice(self.unsent_step).rollouts
                selected = [r.rollout_id for r in rollouts if r.end.startswith("selected")]
                self.lose_tokens(self.rng.choice(selected))
            if self.shipped and not self.step_pending:
                self.train()
            if not self.portion_pending:
                if self.steps_left == 0:
                    self.publish()
                self.request()
            idle = (
                not self.running()
                and not self.cancelling()
                and not self.core.num_pending
                and self.step_pending
            )
            if (
                idle
                and self.core.num_ready == self.core.num_outstanding
                and self.core.num_ready < self.config.groups_per_step - self.taken
            ):
                return
        raise AssertionError(f"no end in sight: {waiting.describe(self.core)}")

    # Invariants of each decision -----------------------------------------------------------------

    def check(self, decision: ev.Decision) -> None:
        match decision:
            case ev.OpenGroup():
                assert decision.group_id not in self.opened
                self.opened[decision.group_id] = decision
            case ev.Launch():
                self.check_launch(decision)
            case ev.Cancel():
                self.check_cancel(decision)
            case ev.Curtail():
                self.check_curtail(decision)
            case ev.Ship():
                self.check_ship(decision)
            case ev.Close():
                assert self.ended[decision.record.group_id] == "trained"
                self.check_record(decision.record)
                self.count(decision.record)
            case ev.CountOvershoot():
                assert decision.num_tokens > 0
                self.counted[decision.rollout_id] += decision.num_tokens
            case ev.Drop():
                self.count(decision.record)
                assert (
                    self.ended.setdefault(decision.record.group_id, decision.record.end)
                    == decision.record.end
                )
                assert decision.record.end not in ("shipped", "evaluated")
                self.check_record(decision.record)
                if decision.record.end in ("uniform", "no_signal"):
                    self.num_replaced += 1
                    self.check_replaced(decision)
                    bound = math.ceil(self.config.max_refill * self.config.groups_per_step)
                    assert self.num_replaced <= bound
                self.drops.append(decision)
                if not decision.requeued:
                    self.settled[decision.record.prompt_id] += 1
            case ev.Evaluated():
                assert decision.record.group_id not in self.ended
                self.ended[decision.record.group_id] = "evaluated"
                self.evaluated.append(decision.record)
                self.count(decision.record)
            case ev.RememberLengths():
                assert decision.lengths.var_log > 0
            case ev.RememberRewards():
                stats = decision.rewards
                assert stats.num_right >= 0 and stats.num_wrong >= 0
                assert stats.num_stops <= self.config.max_stops
                self.rewards[decision.prompt_id] = stats

    def check_replaced(self, drop: ev.Drop) -> None:
        """A group without signal is replaced only if its rewards are equal as far as is known."""
        record = drop.record
        assert not drop.requeued
        ended = [r.reward for r in record.rollouts if r.reward is not None]
        if record.end == "uniform":
            assert self.config.uniform == "drop"
            return
        assert self.config.pilot and max(ended) - min(ended) <= self.config.min_spread
        assert record.mixed_prob is not None and record.mixed_prob < self.config.min_mixed_prob
        # No rollout beyond the pilot was launched; lost ones were replaced.
        assert len([r for r in record.rollouts if r.end != "lost"]) <= record.pilot
        assert all(r.end != "cancelled" for r in record.rollouts)

    def check_launch(self, launch: ev.Launch) -> None:
        assert launch.rollout_id not in self.rollouts and launch.group_id not in self.ended
        version = self.engine_versions[launch.engine_id]
        assert version >= 0
        before = self.rollouts[launch.continues] if launch.continues is not None else None
        assert before is None or (before.end == "lost" and not before.has_waited)
        self.rollouts[launch.rollout_id] = TrueRollout(
            launch.rollout_id,
            launch.group_id,
            launch.engine_id,
            before.length if before else self.draw_length(),
            before.tokens if before else 0,
            before.oldest_version if before else version,
        )
        decoding = [r for r in self.on_engine(launch.engine_id) if not r.waits]
        assert len(decoding) <= self.engine_slots[launch.engine_id]

    def check_cancel(self, cancel: ev.Cancel) -> None:
        rollout = self.rollouts[cancel.rollout_id]
        assert rollout.end == "" and rollout.engine_id == cancel.engine_id
        rollout.end, rollout.cancel_reason = "cancelling", cancel.reason

    def check_curtail(self, curtail: ev.Curtail) -> None:
        """It is longer than the limit, by the shortest median that the group can have."""
        rollout, limit = self.rollouts[curtail.rollout_id], self.config.relative_limit
        assert rollout.end == "" and rollout.engine_id == curtail.engine_id
        assert not rollout.curtailed and limit and self.config.policy == "darts"
        group = [r for r in self.rollouts.values() if r.group_id == rollout.group_id]
        finished = sorted(r.tokens for r in group if r.end == "finished")
        half = math.ceil(self.opened[rollout.group_id].budget / 2)
        assert rollout.tokens > limit * finished[half - 1]
        assert self.opened[rollout.group_id].purpose == "train"
        rollout.curtailed = True

    def check_ship(self, ship: ev.Ship) -> None:
        record = ship.record
        assert (
            ship.step == self.next_step
            and record.group_id not in self.ended
            and record.group_id not in self.shipped
        )
        selected = [r for r in record.rollouts if r.end in ("selected_short", "selected_long")]
        assert len(selected) == self.config.group_size
        assert all(
            0 <= self.version - self.rollouts[r.rollout_id].oldest_version <= self.config.max_lag
            for r in selected
        )
        assert record.shipped_version == self.version
        assert self.step_pending and ship.portion == self.portion
        self.check_record(record)
        self.check_short_seats(record)
        self.shipped[record.group_id] = record
        if self.taken == 0:
            self.opened_at = len(self.ships)
        self.ships.append(ship)
        self.taken += 1
        self.portion_pending = False
        if self.taken == self.config.groups_per_step:
            self.taken = 0
            self.num_replaced = 0
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
            elif truth.end in ("cancelling", "cancelled", "lost cancelled", "raced"):
                assert row.end == "cancelled"
            else:
                assert row.end in ("selected_short", "selected_long", "discarded", "truncated")
                assert row.curtailed == truth.curtailed
                at_limit = truth.length >= self.config.max_tokens
                assert row.truncated == (at_limit and not truth.curtailed)

    def count(self, record: ev.GroupRecord) -> None:
        for row in record.rollouts:
            self.counted[row.rollout_id] += row.tokens + row.overshoot

    def check_counts(self) -> None:
        """Once all groups have ended, every token of a rollout whose end is known counts once."""
        for rollout in self.rollouts.values():
            if rollout.end in ("finished", "raced", "cancelled"):
                assert self.counted[rollout.rollout_id] == rollout.tokens, rollout

    def check_short_seats(self, record: ev.GroupRecord) -> None:
        """An exact cancel is a proof: a rollout that was cancelled as past the selection is longer
        than every short seat.
        """
        short = [r.tokens for r in record.rollouts if r.end == "selected_short"]
        for row in record.rollouts:
            truth = self.rollouts[row.rollout_id]
            if truth.cancel_reason == "past_selection" and short:
                assert truth.length > max(short)


def fake_probe(version: int, nats: float = 0.0) -> bytes:
    """The probe that a fake learner sends for `version`, or a fake engine that is off by `nats`."""
    return (np.linspace(-3.0, -1.0, 8) - version + nats).astype("<f4").tobytes()


# Over real sockets -------------------------------------------------------------------------------


PROMPT = [1, 2, 3]
FIRST_TOKEN = 10  # sampled token number i is FIRST_TOKEN + i on every engine


@dataclass
class FakeRollout:
    """A rollout on a fake engine. `start` is the length of its prefix."""

    rollout_id: int
    start: int
    length: int
    versions: list[int] = field(default_factory=list)  # version of each token sampled here
    num_sent: int = 0  # tokens of the whole row, including the prompt
    curtailed: bool = False
    answer: msg.Finished | msg.Failed | msg.Stopped | None = None

    @property
    def num_tokens(self) -> int:
        return self.start + len(self.versions)

    def take(self) -> list[msg.Chunk]:
        """Its tokens from `num_sent` on."""
        chunks: list[msg.Chunk] = []
        if self.num_sent == 0:
            chunks.append(chunk(self.rollout_id, 0, PROMPT, None))
            self.num_sent = len(PROMPT) + self.start
        first = self.num_sent - len(PROMPT)
        assert first >= self.start, "it cannot send its prefix"
        for index in range(first, self.num_tokens):
            version = self.versions[index - self.start]
            offset = len(PROMPT) + index
            chunks.append(chunk(self.rollout_id, offset, [FIRST_TOKEN + index], version))
        self.num_sent = len(PROMPT) + self.num_tokens
        return chunks


class FakeEngine(threading.Thread):
    """An engine that follows the protocol and draws lengths instead of decoding.

    If its link breaks, it rejoins with its rollouts and the tokens decoded meanwhile. `kill` ends
    it without a message.
    """

    def __init__(
        self,
        address: str,
        engine_id: str,
        slots: int = 8,
        seed: int = 0,
        max_tokens: int = 64,
        peer_timeout_s: float = 10,
    ) -> None:
        super().__init__(daemon=True)
        self.address, self.engine_id, self.slots, self.max_tokens = (
            address,
            engine_id,
            slots,
            max_tokens,
        )
        self.peer_timeout_s = peer_timeout_s
        self.rng = random.Random(f"{seed}/{engine_id}")
        self.incarnation = secrets.token_hex(8)
        self.version = -1
        self.held: dict[int, FakeRollout] = {}  # launched and not yet settled
        self.launched: list[int] = []
        self.most_in_flight = self.num_rejoined = 0
        self.fail_rollouts = ""
        self.pass_rate = 0.5
        self.num_to_fail = 0  # rollouts that fail before others succeed
        self.too_long: Callable[[str], bool] = lambda prompt_id: False
        self.probe_nats = 0.0  # its difference from the learner
        self.pause_s = 0.0  # between two rounds of decoding
        self.killed, self.told_to_leave = threading.Event(), threading.Event()
        self.shutdown: msg.Shutdown | None = None

    @property
    def num_launched(self) -> int:
        return len(self.launched)

    def run(self) -> None:
        with EngineLink(self.address, self.engine_id, peer_timeout_s=self.peer_timeout_s) as link:
            self.load(link, self.join_buffer(link).policy)
            while not self.killed.is_set():
                if self.told_to_leave.is_set() and self.has_begun:
                    return link.send(msg.Leaving())
                try:
                    self.turn(link)
                except LinkLost:
                    for _ in range(3):
                        self.decode()
                    self.catch_up(link, self.join_buffer(link))
                    self.num_rejoined += 1
                if self.shutdown is not None:
                    return
                time.sleep(self.pause_s)

    def join_buffer(self, link: EngineLink) -> msg.Welcome:
        hello = msg.EngineHello(
            engine_id=self.engine_id,
            engine_type="fake",
            slots=self.slots,
            policy_version=self.version,
            pid=id(self) % 10**6,
            incarnation=self.incarnation,
            rollouts=list(self.held),
        )
        return link.connect(hello, 20)

    def turn(self, link: EngineLink) -> None:
        message = link.receive(0.002)
        while message is not None:
            if isinstance(message, msg.Shutdown):
                self.shutdown = message
                return
            self.obey(link, message)
            message = link.receive(0)
        for rollout in self.decode():
            self.tell(link, rollout)
        in_flight = sum(r.answer is None for r in self.held.values())
        link.send(
            msg.EngineReport(
                batch=in_flight or 1, ms_per_token=1.0, tokens_per_s=100.0, busy_frac=1.0
            )
        )

    def kill(self) -> None:
        self.killed.set()
        self.join(5)

    @property
    def has_begun(self) -> bool:
        """Whether a rollout in flight has tokens."""
        return any(r.answer is None and r.versions for r in self.held.values())

    def leave(self) -> None:
        """Hand over all rollouts in flight, at least one of which has tokens."""
        self.told_to_leave.set()
        self.join(5)

    def load(self, link: EngineLink, policy: msg.SnapshotRef | None) -> None:
        if policy is not None and policy.version > self.version:
            if self.version == -1:
                self.probe(link)
            self.version = policy.version
            link.send(msg.PolicyLoaded(version=policy.version, fetch_s=0.0, pause_s=0.0))
            self.probe(link)

    def probe(self, link: EngineLink) -> None:
        logprobs = fake_probe(max(self.version, 0), self.probe_nats)
        link.send(msg.Probed(version=self.version, model_type="fake", logprobs=logprobs))

    def obey(self, link: EngineLink, message: msg.EngineCommand) -> None:
        match message:
            case msg.PolicyPublished():
                self.load(link, message.policy)
            case msg.Launch():
                for launched in message.rollouts:
                    if self.too_long(message.prompt.prompt_id):
                        self.launched.append(launched.rollout_id)
                        line = f"{message.prompt.name} is too long"
                        link.send(
                            msg.Failed(rollout_id=launched.rollout_id, error=line, unusable=True)
                        )
                    elif launched.rollout_id not in self.held:
                        self.tell(link, self.start_rollout(launched))
            case msg.Cancel():
                for rollout_id in message.rollout_ids:
                    rollout = self.held.get(rollout_id)
                    if rollout is not None and rollout.answer is None:
                        rollout.answer = msg.Stopped(
                            rollout_id=rollout_id,
                            num_tokens=rollout.num_tokens,
                            text=f"cut {rollout_id}",
                        )
                        link.send(rollout.answer)
            case msg.Curtail():
                for rollout_id in message.rollout_ids:
                    rollout = self.held.get(rollout_id)
                    if rollout is not None and rollout.answer is None:
                        rollout.curtailed, rollout.length = True, rollout.num_tokens
            case msg.Settled():
                for rollout_id in message.rollout_ids:
                    self.held.pop(rollout_id, None)
            case _:
                pass

    def start_rollout(self, launched: msg.LaunchedRollout) -> FakeRollout:
        length = min(self.max_tokens, max(1, round(self.rng.lognormvariate(2.5, 0.9))))
        start = len(launched.prefix) // 4
        rollout = FakeRollout(launched.rollout_id, start, max(length, start + 1))
        self.held[launched.rollout_id] = rollout
        self.launched.append(launched.rollout_id)
        in_flight = sum(r.answer is None for r in self.held.values())
        self.most_in_flight = max(self.most_in_flight, in_flight)
        return rollout

    def decode(self) -> list[FakeRollout]:
        """Decode some tokens of each rollout without an answer, and return these rollouts."""
        decoding = [r for r in self.held.values() if r.answer is None]
        for rollout in decoding:
            num = min(rollout.length - rollout.num_tokens, self.rng.randint(1, 6))
            rollout.versions += [self.version] * num
            if rollout.num_tokens < rollout.length:
                continue
            if self.fail_rollouts or self.num_to_fail:
                self.num_to_fail = max(0, self.num_to_fail - 1)
                rollout.answer = msg.Failed(rollout_id=rollout.rollout_id, error=self.fail_rollouts)
            else:
                rollout.answer = msg.Finished(
                    rollout_id=rollout.rollout_id,
                    num_tokens=rollout.length,
                    truncated=rollout.curtailed or rollout.length >= self.max_tokens,
                    reward=float(self.rng.random() < self.pass_rate),
                    text="x" * rollout.length,
                )
        return decoding

    def tell(self, link: EngineLink, rollout: FakeRollout) -> None:
        """Send its unsent tokens, followed by its answer."""
        if chunks := rollout.take():
            link.send(msg.Progress(chunks=chunks))
        if rollout.answer is not None:
            link.send(rollout.answer)

    def catch_up(self, link: EngineLink, welcome: msg.Welcome) -> None:
        for rollout_id in welcome.forget:
            del self.held[rollout_id]
        for rollout_id, num_tokens in welcome.resend.items():
            self.held[rollout_id].num_sent = num_tokens
        for rollout in self.held.values():
            if rollout.rollout_id in welcome.resend:
                self.tell(link, rollout)
            elif rollout.answer is not None:
                link.send(rollout.answer)
        self.load(link, welcome.policy)


def chunk(rollout_id: int, offset: int, tokens: list[int], version: int | None) -> msg.Chunk:
    """A chunk sampled by `version`, or a given one if that is None."""
    data = np.array(tokens, "<i4").tobytes()
    logprobs = b"" if version is None else np.full(len(tokens), -0.5, "<f4").tobytes()
    return msg.Chunk(
        rollout_id=rollout_id,
        offset=offset,
        sampled=version is not None,
        version=version or 0,
        tokens=data,
        logprobs=logprobs,
    )


class FakeLearner(threading.Thread):
    """A learner rank that pulls and keeps shards, and publishes only version numbers."""

    def __init__(
        self,
        address: str,
        steps: int,
        start: int = 0,
        stop_after: int | None = None,
        step_s: float = 0.0,
    ) -> None:
        super().__init__(daemon=True)
        self.address, self.steps, self.step, self.stop_after, self.step_s = (
            address,
            steps,
            start,
            stop_after,
            step_s,
        )
        self.over = threading.Event()  # ends it in the middle of a step
        self.shards: list[msg.Shard] = []
        self.evaluations: list[msg.Evaluated] = []
        self.shutdown: msg.Shutdown | None = None

    def run(self) -> None:
        hello = msg.LearnerHello(
            rank=0,
            num_ranks=1,
            step=self.step,
            pid=id(self) % 10**6,
            incarnation=f"{id(self):x}",
            vocab_size=100,
            resumed=True,
        )
        with LearnerLink(self.address, "learner/0", peer_timeout_s=10) as link:
            version = link.connect(hello, 20).policy_version + 1
            self.publish(link, version)
            while self.step < self.steps:
                link.send(msg.Pull(rank=0, step=self.step))
                shard = self.wait(link)
                if shard is None:
                    return
                self.shards.append(shard)
                if self.stop_after is not None and len(self.shards) == self.stop_after:
                    return  # dies while it holds a shard
                if self.over.wait(self.step_s):
                    return
                version += 1
                self.publish(link, version)
                num_tokens = max(0, shard.loss_tokens - 1)  # one token has no signal
                link.send(
                    msg.Trained(step=self.step, num_tokens=num_tokens, metrics={"train/loss": 0.0})
                )
                self.step += 1
            self.wait(link)

    def publish(self, link: LearnerLink, version: int) -> None:
        policy = msg.SnapshotRef(
            version=version, digest="", num_bytes=0, address="", path="nowhere"
        )
        link.send(msg.Published(policy=policy, seconds=0.0, probe=fake_probe(version)))

    def wait(self, link: LearnerLink) -> msg.Shard | None:
        while True:
            message = link.receive(0.5)
            if isinstance(message, msg.Shard):
                return message
            if isinstance(message, msg.Evaluated):
                self.evaluations.append(message)
            if isinstance(message, msg.Shutdown):
                self.shutdown = message
                return None
