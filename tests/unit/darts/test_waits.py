"""A rollout that waits for its environment holds no slot, and takes one again when it goes on."""

from __future__ import annotations

from darts import checkpoint
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core
from darts.invariants import validate_state


def launches(core: Core, event: ev.Event) -> list[int]:
    launched = [d.rollout_id for d in core.handle(event) if isinstance(d, ev.Launch)]
    validate_state(core)
    return launched


def make_core(num_prompts: int) -> Core:
    """Groups of two on an engine with two slots, so rollouts 0 and 1 have been launched."""
    core = Core(CoreConfig(groups_per_step=2, group_size=2, redundancy="none", max_lag=1))
    core.handle(ev.PolicyPublished(0))
    core.handle(ev.EngineJoined("a", "cpu", 2, 0))
    prompts = ev.PromptsDrawn(tuple(ev.Prompt(f"p{n}") for n in range(num_prompts)))
    assert launches(core, prompts) == [0, 1]
    return core


def test_another_rollout_gets_the_slot_of_one_that_waits() -> None:
    core = make_core(3)
    assert launches(core, ev.RolloutProgressed(0, 4)) == []
    assert launches(core, ev.RolloutWaits(0)) == [2]
    assert launches(core, ev.RolloutWaits(0)) == []  # said again after a lost link
    assert launches(core, ev.RolloutWaits(1)) == [3]


def test_one_that_goes_on_takes_a_slot_again() -> None:
    core = make_core(3)
    core.handle(ev.RolloutWaits(0))
    assert launches(core, ev.RolloutProgressed(0, 5)) == []
    assert core.engines.by_id["a"].num_decoding == 3  # one more than its slots, for a while
    assert launches(core, ev.RolloutFinished(1, 5, False, 1.0, 0)) == []
    assert launches(core, ev.RolloutFinished(2, 5, False, 1.0, 0)) == [3]


def test_the_end_of_one_that_waits_frees_no_second_slot() -> None:
    core = make_core(3)
    assert launches(core, ev.RolloutWaits(0)) == [2]
    assert launches(core, ev.RolloutFinished(0, 5, False, 1.0, 0)) == []
    assert core.engines.by_id["a"].waiting == set()


def test_late_news_of_a_wait_is_ignored() -> None:
    core = make_core(3)
    core.handle(ev.RolloutFinished(0, 5, False, 1.0, 0))
    assert core.handle(ev.RolloutWaits(0)) == []


def test_a_restored_core_knows_which_rollouts_wait() -> None:
    core = make_core(3)
    core.handle(ev.RolloutWaits(0))
    restored = checkpoint.restore(core.config, checkpoint.save(core))
    assert restored.engines.by_id["a"].waiting == {0}
    assert launches(restored, ev.RolloutProgressed(0, 5)) == []


def test_one_whose_engine_is_lost_after_a_turn_begins_again() -> None:
    """Its environment was lost as well, even if another turn decodes by then."""
    core = make_core(1)
    core.handle(ev.EngineJoined("b", "cpu", 2, 0))
    core.handle(ev.RolloutProgressed(0, 5))
    core.handle(ev.RolloutProgressed(1, 7))
    core.handle(ev.RolloutWaits(0))
    core.handle(ev.RolloutProgressed(0, 9))
    again = [d for d in core.handle(ev.EngineLost("a")) if isinstance(d, ev.Launch)]
    assert {(launch.index, launch.continues) for launch in again} == {(0, None), (1, 1)}
    validate_state(core)
