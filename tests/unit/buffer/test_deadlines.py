"""Work without progress is named after its deadline, and nothing else is ever named."""

from __future__ import annotations

from buffer.deadlines import Deadlines, Overdue
from configs.schema import BufferConfig
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core


class Watched:
    """A core with two rollouts on engine `a`, which is checked once per second."""

    def __init__(self) -> None:
        self.core = Core(CoreConfig(groups_per_step=1, group_size=2, redundancy="none", max_lag=9))
        self.deadlines = Deadlines(
            BufferConfig(rollout_timeout_s=10, load_timeout_s=20, step_timeout_s=30)
        )
        self.now_s = 0.0
        self.offered_version: int | None = None  # None: that of the core
        self.apply(ev.PolicyPublished(0), ev.EngineJoined("a", "cpu", 2, 0))
        self.apply(ev.PromptsDrawn((ev.Prompt("p"), ev.Prompt("q"))), ev.ShardsRequested(0))

    def apply(self, *events: ev.Event) -> None:
        for event in events:
            self.core.handle(event)

    def wait(self, seconds: int, tick_s: float = 1.0) -> list[Overdue]:
        overdue: list[Overdue] = []
        for _ in range(seconds):
            self.now_s += tick_s
            overdue += self.deadlines.look(
                self.core,
                self.now_s,
                learner_is_there=True,
                offered_version=(
                    self.core.policy_version
                    if self.offered_version is None
                    else self.offered_version
                ),
            )
        return overdue

    def grow(self, num_tokens: int, *rollout_ids: int) -> None:
        self.apply(*(ev.RolloutProgressed(i, num_tokens) for i in rollout_ids))


def test_an_engine_that_decodes_nothing_is_named() -> None:
    watched = Watched()
    assert watched.wait(10) == []
    (overdue,) = watched.wait(2)[:1]
    assert overdue.engine_id == "a"
    assert "rollout 0" in overdue.problem and "buffer.rollout_timeout_s=10" in overdue.problem


def test_a_single_rollout_that_does_not_grow_is_named() -> None:
    watched = Watched()
    for tokens in range(1, 12):
        watched.grow(tokens, 0)
        overdue = watched.wait(1)
    watched.grow(12, 0)
    overdue = watched.wait(1)
    assert [o.engine_id for o in overdue] == ["a"] and "rollout 1" in overdue[0].problem


def test_a_rollout_that_stands_still_is_named_although_its_engine_loads_policies() -> None:
    watched = Watched()
    for version in range(1, 7):
        watched.apply(ev.PolicyPublished(version), ev.PolicyLoaded("a", version))
        watched.grow(version, 0)
        overdue = watched.wait(2)
    assert [o.engine_id for o in overdue] == ["a"] and "rollout 1" in overdue[0].problem


def test_progress_is_never_named() -> None:
    watched = Watched()
    for tokens in range(1, 60):
        watched.grow(tokens, 0, 1)
        assert watched.wait(1) == []


def test_a_cancel_that_is_not_confirmed_is_named() -> None:
    watched = Watched()
    watched.apply(ev.RunEnded())
    (overdue, *_) = watched.wait(12)
    assert "cancel of rollout" in overdue.problem


def test_a_policy_that_is_not_loaded_is_named_and_a_load_counts_as_progress() -> None:
    watched = Watched()
    watched.apply(ev.PolicyPublished(1))
    for tokens in range(1, 20):
        watched.grow(tokens, 0, 1)
        assert watched.wait(1) == []
    watched.grow(20, 0, 1)
    (overdue, *_) = watched.wait(3)
    assert "policy version 1" in overdue.problem
    watched.apply(ev.PolicyLoaded("a", 1))
    assert watched.wait(1) == []


def test_a_learner_that_neither_trains_nor_publishes_is_named() -> None:
    watched = Watched()
    for rollout_id in (0, 1):
        watched.apply(ev.RolloutFinished(rollout_id, 5, False, 1.0, 0))
    watched.apply(*(ev.RolloutFinished(i, 5, False, 1.0, 0) for i in (2, 3)))
    assert watched.wait(31) == []
    (overdue,) = watched.wait(1)
    assert overdue.engine_id == "" and "buffer.step_timeout_s=30" in overdue.problem
    watched.apply(ev.GroupTrained(0), ev.PolicyPublished(1), ev.PolicyLoaded("a", 1))
    assert watched.wait(1) == []


def test_the_longest_wait_of_each_kind_is_known_with_its_deadline() -> None:
    watched = Watched()
    watched.apply(ev.PolicyPublished(1))
    watched.wait(1)
    watched.grow(3, 0)
    watched.wait(2)
    waits = {wait.key: wait for wait in watched.deadlines.longest()}
    assert waits["buffer.load_timeout_s"].what == "a to load a policy"
    assert waits["buffer.load_timeout_s"].waited_s == 2
    rollout = waits["buffer.rollout_timeout_s"]
    assert (rollout.what, rollout.waited_s) == ("news of rollout 1", 2)
    watched.apply(ev.PolicyLoaded("a", 1))
    watched.wait(1)
    assert "buffer.load_timeout_s" not in {wait.key for wait in watched.deadlines.longest()}


def test_a_snapshot_that_does_not_come_is_the_learners_fault_and_no_engines() -> None:
    watched = Watched()
    watched.apply(ev.PolicyPublished(1))
    watched.offered_version = 0
    for tokens in range(1, 31):  # longer than engines have for a load
        watched.grow(tokens, 0, 1)
        assert watched.wait(1) == []
    watched.grow(31, 0, 1)
    (overdue,) = watched.wait(2)[:1]
    assert overdue.engine_id == "" and "policy version 1" in overdue.problem
    watched.offered_version = 1
    assert watched.wait(1) == []


def test_deadlines_grow_with_the_longest_wait_that_ended_well() -> None:
    watched = Watched()
    watched.wait(9)
    watched.grow(1, 0, 1)
    assert watched.wait(40) == []
    assert watched.wait(10) != []


def test_time_in_which_the_buffer_itself_was_frozen_does_not_count() -> None:
    watched = Watched()
    watched.wait(1)
    assert watched.wait(1, tick_s=1000.0) == []
