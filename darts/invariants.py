"""The invariants of the core's state between two events.

They complement the rules listed in `darts.core`, which are about histories. The property tests
check them after each event, since a check walks over the whole state. Never changes anything.
"""

from __future__ import annotations

from math import inf

from darts.core import Core
from darts.state.engines import Engine
from darts.state.groups import Group, GroupState, Rollout, RolloutState


def validate_state(core: Core) -> None:
    """Raise `AssertionError` with the id of the first inconsistent engine, rollout or group."""
    for engine in core.engines.by_id.values():
        _validate_engine(core, engine)
    for rollout in core.rollouts.values():
        _validate_rollout(core, rollout)
    for group in core.groups.values():
        _validate_group(core, group)
    _validate_outstanding(core)


def _validate_engine(core: Core, engine: Engine) -> None:
    where = engine.engine_id
    assert engine.waiting <= engine.in_flight.keys(), where
    assert engine.version <= core.policy_version, where
    assert all(core.rollouts[i] is r for i, r in engine.in_flight.items()), where
    assert all(r.engine_id == where for r in engine.in_flight.values()), where
    assert not engine.backlog or engine.num_decoding >= engine.slots, (where, "a slot is idle")
    for group in engine.backlog:
        assert group.planned and group.state is GroupState.OPEN, (where, group.group_id)
        assert group.engine_id == where, (where, group.group_id)
    if engine.has_room and engine.version >= 0:
        assert core.engines.offers(engine), (where, "has room, but is never chosen")


def _validate_rollout(core: Core, rollout: Rollout) -> None:
    """A rollout with a slot runs, or was cancelled and waits for its engine's confirmation."""
    where = rollout.rollout_id
    assert rollout.state in (RolloutState.RUNNING, RolloutState.CANCELLED), where
    assert rollout.rollout_id in core.engines.by_id[rollout.engine_id].in_flight, where
    assert 0 <= rollout.tokens <= core.config.max_tokens, where
    assert 0 <= rollout.oldest_version <= core.policy_version, where
    assert rollout.overshoot == 0, where
    if rollout.runs:
        assert core.groups[rollout.group.group_id] is rollout.group, where
        assert rollout.group.running[where] is rollout, where


def _validate_group(core: Core, group: Group) -> None:
    where = group.group_id
    assert group.state is not GroupState.CLOSED, where
    assert group.running == {i: r for i, r in group.rollouts.items() if r.runs}, where
    assert all(core.rollouts[i] is r for i, r in group.running.items()), where
    assert group.finished == sorted(group.finished), where
    assert group.min_version <= group.opened_version <= core.policy_version, where
    assert all(r.oldest_version >= group.min_version for r in group.rollouts.values()), where
    assert group.survivors <= group.rollouts.keys(), where
    assert group.num_survivors_chosen <= group.num_long, where
    if group.state is GroupState.OPEN:
        assert not group.all_ended and group.selection is None, where
        known = len(group.rollouts) + len(group.planned) + group.num_held
        assert known >= group.budget, where
        # A pilot without a verdict has rollouts that have not ended.
        assert not group.num_held or group.running or group.planned, where
    else:
        assert group.selection is not None and group.all_ended, where
        assert group.purpose == "train" and group.review_above == inf, where
    if group.planned:
        engine = core.engines.by_id.get(group.engine_id)
        queued = engine is not None and group in engine.backlog
        assert queued != (group in core.orphaned), (where, "planned rollouts are in no queue")


def _validate_outstanding(core: Core) -> None:
    training = [group for group in core.groups.values() if group.purpose == "train"]
    outstanding = [g for g in training if g.state is not GroupState.SHIPPED]
    assert core.num_outstanding == len(outstanding)
    assert core.num_ready == sum(g.state is GroupState.READY for g in outstanding)
    assert all(group in core.outstanding for group in outstanding)
    for group in core.orphaned:
        assert group.planned and not group.engine_id, group.group_id
    num_taken, num_missing = core.outstanding.num_taken, core.outstanding.num_missing
    num_shipped = sum(g.state is GroupState.SHIPPED for g in training)
    assert 0 <= num_taken <= num_shipped and 0 < num_missing <= core.config.groups_per_step
    num_kept = len(core.outstanding.seated())
    # A requested portion waits only for ready groups, or for those for which it keeps the room.
    if core.requested_step is None:
        return
    if core.config.stream == "group":
        assert not core.num_ready or num_missing <= num_kept
    else:
        assert core.num_ready < num_missing or num_kept
