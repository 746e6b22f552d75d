"""The core's invariants, listed in `darts/core.py`, under arbitrary orders of arbitrary events."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from math import nan
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from configs.schema import LongEnd
from darts import checkpoint
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core
from darts.invariants import validate_state
from darts.selection import Candidate, select_dual_end, select_efficient
from tests.fakes import World

CONFIGS = st.builds(
    CoreConfig,
    groups_per_step=st.integers(1, 3),
    steps_per_version=st.integers(1, 2),
    max_lag=st.integers(0, 3),
    on_deadline=st.sampled_from(["wait", "drop"]),
    release_at_deadline=st.booleans(),
    stream=st.sampled_from(["batch", "group"]),
    policy=st.sampled_from(["darts", "darts", "darts", "plain", "first_finished", "random"]),
    group_size=st.just(3),
    num_long=st.integers(0, 2),
    long_end=st.sampled_from(["none", "survivor", "longest"]),
    cancel=st.sampled_from(["exact", "eager"]),
    rank=st.sampled_from(["length", "length", "reward_per_token"]),
    relative_limit=st.sampled_from([0.0, 0.0, 1.5, 3.0]),
    audit=st.sampled_from([0.0, 0.0, 0.5]),
    fill_truncated=st.booleans(),
    uniform=st.sampled_from(["train", "drop"]),
    max_refill=st.sampled_from([0.5, 1.0, 2.0]),
    min_spread=st.sampled_from([0.0, 0.0, 1.0]),
    pilot=st.integers(0, 3),
    min_mixed_prob=st.sampled_from([0.1, 0.5, 0.9]),
    max_stops=st.integers(0, 3),
    max_attempts=st.integers(1, 3),
    max_reopens=st.integers(0, 2),
    redundancy=st.sampled_from(["none", "fixed", "paper", "marginal"]),
    upper=st.sampled_from([1.0, 1.5, 2.0]),
    variance=st.sampled_from(["censored", "ema"]),
    max_tokens=st.just(30),
)


def state_of(core: Core) -> bytes:
    return pickle.dumps(vars(core))


class CoreMachine(RuleBasedStateMachine):
    """Rules act on a `World`, which checks the invariants of each decision. The global invariants
    are checked here.
    """

    @initialize(config=CONFIGS, seed=st.integers(0, 2**16))
    def start(self, config: CoreConfig, seed: int) -> None:
        self.world = World(config, random.Random(seed))
        self.serial = 0

    @rule(slots=st.integers(1, 6), back=st.integers(0, 2), again=st.integers(0, 5))
    def join(self, slots: int, back: int, again: int) -> None:
        """A new engine joins, or one under the name of an earlier one that was lost."""
        self.serial += 1
        engine_id = f"e{max(1, self.serial - again)}"
        if engine_id in self.world.engine_versions:
            engine_id = f"e{self.serial}"
        self.world.join(engine_id, slots, max(-1, self.world.version - back))

    @precondition(lambda self: self.world.engine_versions)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        engine_id = data.draw(st.sampled_from(sorted(self.world.engine_versions)))
        self.world.lose(engine_id, left=data.draw(st.booleans()))

    @precondition(
        lambda self: any(v < self.world.version for v in self.world.engine_versions.values())
    )
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        behind = sorted(e for e, v in self.world.engine_versions.items() if v < self.world.version)
        self.world.load(data.draw(st.sampled_from(behind)), self.world.version)

    @rule(num=st.integers(1, 5))
    def draw(self, num: int) -> None:
        self.serial += 1
        self.world.draw([f"p{(self.serial + i) % 7}" for i in range(num)])

    @rule(num=st.integers(1, 3), samples=st.integers(1, 3))
    def evaluate(self, num: int, samples: int) -> None:
        prompts = tuple(ev.Prompt(f"held-out {i}") for i in range(num))
        self.world.send(ev.EvaluationRequested(prompts, samples, max(self.world.version, 0)))

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), num_tokens=st.integers(1, 30))
    def advance(self, data: st.DataObject, num_tokens: int) -> None:
        self.world.advance(data.draw(st.sampled_from(self.world.running())), num_tokens)

    @precondition(lambda self: self.world.running())
    @rule(num_tokens=st.integers(1, 12))
    def advance_all(self, num_tokens: int) -> None:
        for rollout in self.world.running():
            if not rollout.end:
                self.world.advance(rollout, num_tokens)

    @precondition(lambda self: self.world.running())
    @rule(data=st.data())
    def wait_for_environment(self, data: st.DataObject) -> None:
        self.world.wait(data.draw(st.sampled_from(self.world.running())))

    @precondition(lambda self: self.world.running())
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.world.fail(data.draw(st.sampled_from(self.world.running())))

    @precondition(lambda self: self.world.cancelling())
    @rule(data=st.data(), raced=st.booleans(), num_tokens=st.integers(0, 5))
    def confirm(self, data: st.DataObject, raced: bool, num_tokens: int) -> None:
        rollout = data.draw(st.sampled_from(self.world.cancelling()))
        if raced:
            self.world.advance(rollout, 10_000)
        else:
            self.world.confirm(rollout, num_tokens)

    @rule(
        max_lag=st.integers(0, 3),
        on_deadline=st.sampled_from(["wait", "drop"]),
        stream=st.sampled_from(["batch", "group"]),
        uniform=st.sampled_from(["train", "drop"]),
        pilot=st.integers(0, 3),
        min_mixed_prob=st.sampled_from([0.1, 0.5, 0.9]),
        max_reopens=st.integers(0, 2),
        redundancy=st.sampled_from(["none", "fixed", "paper", "marginal"]),
    )
    def resume_with_other_settings(self, **changes: Any) -> None:
        self.world.config = replace(self.world.config, **changes)
        self.world.send(ev.SettingsChanged(self.world.config))

    @precondition(lambda self: self.world.steps_left == 0 and not self.world.step_pending)
    @rule()
    def publish(self) -> None:
        self.world.publish()

    @precondition(lambda self: self.world.steps_left > 0 and not self.world.step_pending)
    @rule()
    def request(self) -> None:
        self.world.request()

    @precondition(lambda self: self.world.is_between_portions)
    @rule()
    def request_more(self) -> None:
        self.world.request()

    @precondition(lambda self: self.world.shipped and not self.world.step_pending)
    @rule()
    def train(self) -> None:
        self.world.train()

    @rule()
    def learner_dies_and_returns(self) -> None:
        self.world.rejoin_learner()

    @rule()
    def restart(self) -> None:
        """A core restored from saved bytes has the same state and makes the same decisions."""
        state = checkpoint.save(self.world.core)
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=checkpoint.CoreState)
        self.world.twin = checkpoint.restore(self.world.config, decoded)
        assert checkpoint.save(self.world.twin) == state == decoded
        validate_state(self.world.twin)

    @rule()
    def skip_ids(self) -> None:
        self.world.send(ev.BufferRestarted())

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.world.send(ev.AdmissionPaused(paused))

    @precondition(lambda self: self.world.rollouts)
    @rule(data=st.data())
    def late_news(self, data: st.DataObject) -> None:
        """Reports about rollouts that ended long ago are ignored."""
        over = [r for r in self.world.rollouts.values() if r.end not in ("", "cancelling")]
        if over:
            rollout = data.draw(st.sampled_from(over))
            before = state_of(self.world.core)
            assert not self.world.core.handle(
                ev.RolloutProgressed(rollout.rollout_id, rollout.tokens)
            )
            assert not self.world.core.handle(
                ev.RolloutFinished(rollout.rollout_id, rollout.length, False, 1.0, 0)
            )
            assert state_of(self.world.core) == before

    @rule(data=st.data())
    def illegal(self, data: st.DataObject) -> None:
        """Each of these events is impossible now: it raises an error and changes nothing."""
        world, core = self.world, self.world.core
        events: list[ev.Event] = [
            ev.RolloutProgressed(10**9, 1),
            ev.RolloutFinished(-1, 1, False, 1.0, 0),
            ev.EngineLost("nobody"),
            ev.LatencyReported("nobody", 1.0, 1.0),
            ev.GroupTrained(10**9),
            ev.PolicyPublished(world.version),
            ev.EvaluationRequested((ev.Prompt("x"),), 0, 0),
        ]
        if world.step_pending or world.steps_left == 0:
            events.append(ev.ShardsRequested(0))
        if not world.is_between_portions:
            events.append(ev.ShardsRequested(world.next_step, 1))
        if world.engine_versions:
            engine_id = sorted(world.engine_versions)[0]
            events += [
                ev.PolicyLoaded(engine_id, world.version + 1),
                ev.EngineJoined(engine_id, "fake", 1, -1),
            ]
        if world.running():
            rollout = world.running()[0]
            events += [
                ev.RolloutFinished(
                    rollout.rollout_id, rollout.length, False, nan, rollout.oldest_version
                ),
                ev.RolloutFinished(
                    rollout.rollout_id, rollout.length, False, 1.0, world.version + 1
                ),
                ev.RolloutProgressed(rollout.rollout_id, rollout.tokens - 1),
                ev.RolloutProgressed(rollout.rollout_id, world.config.max_tokens + 1),
                ev.RolloutStopped(rollout.rollout_id, rollout.tokens),
            ]
        event = data.draw(st.sampled_from(events))
        before = state_of(core)
        with pytest.raises(ev.ProtocolError):
            core.handle(event)
        assert state_of(core) == before

    @invariant()
    def slots_and_memory_are_bounded(self) -> None:
        if not hasattr(self, "world"):
            return
        world, core = self.world, self.world.core
        in_flight = {r.rollout_id for r in world.rollouts.values() if r.end in ("", "cancelling")}
        assert set(core.rollouts) == in_flight
        assert set(core.groups) == set(world.opened) - set(world.ended)
        assert core.num_outstanding == len(
            [g for g in core.groups.values() if g.purpose == "train"]
        ) - len(world.shipped)
        validate_state(core)

    def teardown(self) -> None:
        """Given time, every rollout and group ends, and every prompt was trained on, or dropped
        after its last attempt.
        """
        if not hasattr(self, "world"):
            return
        self.world.send(ev.AdmissionPaused(False))
        self.world.finish_everything()
        self.slots_and_memory_are_bounded()
        left = {g.prompt.prompt_id for g in self.world.core.groups.values()}
        for prompt_id, count in self.world.drawn.items():
            still_there = sum(
                g.prompt.prompt_id == prompt_id for g in self.world.core.groups.values()
            )
            assert self.world.settled[prompt_id] + still_there == count, (prompt_id, left)
        self.world.send(ev.RunEnded())
        for rollout in self.world.cancelling():
            self.world.confirm(rollout, num_tokens=3)
        assert (
            not self.world.core.rollouts
            and not self.world.core.groups
            and not self.world.core.num_outstanding
        )
        assert set(self.world.opened) == set(self.world.ended)
        self.world.check_counts()


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("stream", ["batch", "group"])
@pytest.mark.parametrize("max_lag", [0, 1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_a_step_that_lost_tokens_before_it_was_sent_is_made_again(
    seed: int, max_lag: int, stream: Literal["batch", "group"]
) -> None:
    """The group that lost them is drawn again. Every prompt is trained exactly once."""
    config = CoreConfig(
        3, max_lag=max_lag, group_size=4, redundancy="fixed", upper=1.5, max_tokens=60,
        stream=stream,
    )  # fmt: skip
    world = World(config, random.Random(seed))
    world.publish()
    for engine in ("a", "b"):
        world.join(engine, 16, 0)
    prompts = [f"q{number}" for number in range(12)]
    world.draw(prompts)
    world.finish_everything(power_cuts=3)
    assert [drop.record.end for drop in world.drops] == ["tokens_lost"] * 3
    if stream == "batch":
        assert len(world.ships) == 4 * 3 + 3 * 3
    else:  # of each step, the portion that lost tokens is made again, and no other
        assert 4 * 3 + 3 <= len(world.ships) <= 4 * 3 + 3 * 3
    assert world.settled == dict.fromkeys(prompts, 1)


def random_steps(world: World, num_actions: int, faults: bool) -> None:
    """Let engines decode and the learner ask, train and publish, in an arbitrary order."""
    rng = world.rng
    for _ in range(num_actions):
        for engine_id, version in list(world.engine_versions.items()):
            if version < world.version and rng.random() < 0.3:
                world.load(engine_id, world.version)
        for rollout in world.cancelling():
            world.confirm(rollout)
        if world.running():
            world.advance(rng.choice(world.running()), rng.randint(1, 9))
        if world.shipped and not world.step_pending:
            world.train()
        if not world.step_pending and world.steps_left == 0:
            world.publish()
        if not world.portion_pending and world.steps_left and rng.random() < 0.3:
            world.request()
        if rng.random() < 0.05:
            state = checkpoint.save(world.core)
            world.twin = checkpoint.restore(world.config, state)
            assert checkpoint.save(world.twin) == state
        validate_state(world.core)
        if faults and rng.random() < 0.02:
            world.rejoin_learner()


@pytest.mark.parametrize("max_lag", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("stream", ["group", "batch"])
def test_every_prompt_is_trained_once(
    seed: int, max_lag: int, faults: bool, stream: Literal["group", "batch"]
) -> None:
    """Batches and portions leave room for the groups that are due, so that none becomes stale."""
    rng = random.Random(seed)
    config = CoreConfig(
        rng.randint(2, 4), steps_per_version=rng.randint(1, 2), max_lag=max_lag, group_size=3,
        redundancy="fixed", upper=1.5, max_tokens=60, stream=stream,
        release_at_deadline=rng.random() < 0.5,
    )  # fmt: skip
    world = World(config, rng)
    world.publish()
    for engine in ("a", "b"):
        world.join(engine, 16, 0)
    prompts = [f"q{number}" for number in range(12 * config.groups_per_step)]
    world.draw(prompts)
    random_steps(world, 800, faults)
    if not faults:
        assert (max(ship.portion for ship in world.ships) > 0) == (stream == "group")
        assert not [drop for drop in world.drops if drop.record.end == "stale"]
    world.finish_everything()
    assert world.settled == dict.fromkeys(prompts, 1)
    assert Counter(ship.record.group_id for ship in world.ships).most_common(1)[0][1] == 1 or faults


@pytest.mark.parametrize("long_end", ["none", "longest"])
@pytest.mark.parametrize("seed", range(30))
def test_online_selection_equals_the_offline_rule(long_end: LongEnd, seed: int) -> None:
    """With the whole budget launched, the core keeps exactly the rollouts that the pure rule
    selects from all true lengths.
    """
    rng = random.Random(seed)
    num_long = 0 if long_end == "none" else 2
    config = CoreConfig(
        1,
        group_size=5,
        num_long=num_long,
        long_end=long_end,
        redundancy="fixed",
        upper=2.0,
        max_tokens=60,
    )
    world = World(config, rng)
    world.publish()
    world.join("e", 64, 0)
    world.draw(["p"])
    while world.running():
        world.advance(rng.choice(world.running()), rng.randint(1, 5))
    world.request()
    truth = world.rollouts.values()
    valid = [Candidate(r.length, r.rollout_id) for r in truth if r.length < config.max_tokens]
    cut = [Candidate(r.length, r.rollout_id) for r in truth if r.length >= config.max_tokens]
    expected = select_dual_end(valid, cut, 5, num_long, True)
    assert expected is not None
    kept = {r.rollout_id for r in world.ships[0].record.rollouts if r.end.startswith("selected")}
    assert kept == set(expected.short + expected.long + expected.filled)


@pytest.mark.parametrize("seed", range(40))
def test_online_selection_by_reward_per_token_equals_the_offline_rule(seed: int) -> None:
    """A cancelled rollout could not have been selected, whatever its reward."""
    rng = random.Random(seed)
    config = CoreConfig(
        1,
        group_size=3,
        num_long=0,
        long_end="none",
        rank="reward_per_token",
        redundancy="fixed",
        upper=4.0,
        max_tokens=100_000,
    )
    world = World(config, rng)
    world.publish()
    world.join("e", 64, 0)
    world.draw(["p"])
    while world.running():
        world.advance(rng.choice(world.running()), rng.randint(1, 5))
    world.request()
    truth = world.rollouts.values()
    rewards = {r.rollout_id: world.reward_of(r) for r in truth}
    every = [Candidate(r.length, r.rollout_id) for r in truth]
    expected = select_efficient(every, [], 3, True, rewards)
    assert expected is not None
    record = world.ships[0].record
    assert {r.rollout_id for r in record.rollouts if r.end.startswith("selected")} == set(
        expected.short
    )


@pytest.mark.parametrize("seed", range(10))
def test_an_audited_group_cancels_nothing(seed: int) -> None:
    rng = random.Random(seed)
    config = CoreConfig(
        1, group_size=3, redundancy="fixed", upper=2.0, audit=0.5, max_tokens=1000, pilot=2,
        cancel=rng.choice(["exact", "eager"]), max_lag=3,
    )  # fmt: skip
    world = World(config, rng)
    world.publish()
    world.join("e", 64, 0)
    world.draw([f"p{i}" for i in range(4)] * 2)
    world.finish_everything()
    records = [g.record("shipped") for g in world.core.groups.values()]
    records += [s.record for s in world.ships]
    audited = [r for r in records if r.audit]
    assert audited
    assert all(len(r.rollouts) == r.budget for r in audited)
    assert all(row.end != "cancelled" for r in audited for row in r.rollouts)


@pytest.mark.parametrize("seed", range(30))
def test_survivor_keeps_the_shortest_and_one_longer_than_them(seed: int) -> None:
    rng = random.Random(seed)
    config = CoreConfig(
        1,
        group_size=5,
        num_long=1,
        long_end="survivor",
        redundancy="fixed",
        upper=2.0,
        max_tokens=100_000,
    )
    world = World(config, rng)
    world.publish()
    world.join("e", 64, 0)
    world.draw(["p"])
    while world.running():
        world.advance(rng.choice(world.running()), rng.randint(1, 5))
    world.request()
    short = sorted(r.tokens for r in world.ships[0].record.rollouts if r.end == "selected_short")
    long = [r.tokens for r in world.ships[0].record.rollouts if r.end == "selected_long"]
    assert short == sorted(r.length for r in world.rollouts.values())[:4]
    assert len(long) == 1 and long[0] >= short[-1]


def test_an_engine_that_leaves_costs_its_rollouts_no_attempt() -> None:
    config = CoreConfig(1, group_size=2, redundancy="none", max_tokens=50, max_attempts=2)
    world = World(config, random.Random(0))
    world.publish()
    world.join("e0", 2, 0)
    world.draw(["p"])
    for number in range(1, 6):
        for rollout in world.running():
            world.advance(rollout, 1)
        world.join(f"e{number}", 2, 0)
        world.lose(f"e{number - 1}", left=True)
        assert [rollout.engine_id for rollout in world.running()] == [f"e{number}"] * 2
    world.join("e6", 2, 0)
    world.lose("e5")
    assert [rollout.engine_id for rollout in world.running()] == ["e6"] * 2
    world.lose("e6")
    assert not world.running() and [drop.record.end for drop in world.drops] == ["failed"]


def test_adversarial_lengths_starve_no_prompt() -> None:
    """One prompt is always truncated, one is always slow, and one fails often. Each is still
    trained on or accounted for.
    """
    config = CoreConfig(
        2,
        max_lag=1,
        group_size=3,
        num_long=1,
        redundancy="fixed",
        upper=2.0,
        max_tokens=50,
        max_attempts=2,
    )
    world = World(config, random.Random(0))
    world.publish()
    world.join("e", 7, 0)
    prompts = [f"p{i}" for i in range(6)] * 20
    world.draw(prompts)
    for step in range(40_000):
        if not world.running():
            break
        rollout = world.running()[step % len(world.running())]
        prompt_id = world.opened[rollout.group_id].prompt_id
        if prompt_id == "p0":
            rollout.length = 50
        if prompt_id == "p2" and step % 5 == 0:
            world.fail(rollout)
        elif prompt_id != "p1" or step % 4 == 0:
            world.advance(rollout, 3)
        for r in world.cancelling():
            world.confirm(r)
        if world.shipped and not world.step_pending:
            world.train()
            world.publish()
            world.load("e", world.version)
        if not world.step_pending and world.steps_left:
            world.request()
    world.finish_everything()
    trained = {p: world.settled[p] for p in world.drawn}
    assert all(trained[p] >= 19 for p in trained), trained
    shipped = {s.record.prompt_id for s in world.ships}
    assert shipped == set(world.drawn)
