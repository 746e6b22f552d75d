"""A core's whole state as plain data, from which another core continues exactly as it would have.

Owns the translation in both directions and nothing else: `save` changes nothing, and `restore`
decides nothing. The data holds no reference to the core and needs no pickle. The buffer writes it
at the head of a segment of its event log. The configuration is not part of it, since a run may be
resumed with other settings.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf

from configs.schema import LongEnd
from darts.config import CoreConfig
from darts.core import Core
from darts.events import Prompt, Purpose
from darts.selection import Candidate, Selection
from darts.sizing.latency import LatencyCurve, SavedCurve
from darts.sizing.lengths import LengthStats
from darts.sizing.rewards import RewardPool
from darts.state.admission import HeldOut, Waiting
from darts.state.engines import Engine
from darts.state.groups import Group, GroupState, Planned, Rollout, RolloutState


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRollout:
    """A `darts.state.groups.Rollout`. Its group is the `SavedGroup` that holds it."""

    rollout_id: int
    index: int
    engine_id: str
    attempt: int
    draw: int
    tokens: int
    oldest_version: int
    state: RolloutState
    reward: float | None
    overshoot: int
    has_waited: bool
    curtailed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedGroup:
    """A `darts.state.groups.Group`.

    `planned` holds (index, attempt, draw, rollout to continue, if any).
    """

    group_id: int
    prompt: Prompt
    purpose: Purpose
    engine_id: str
    min_version: int
    opened_version: int
    budget: int
    group_size: int
    num_long: int
    long_end: LongEnd
    state: GroupState
    planned: tuple[tuple[int, int, int, int | None], ...]
    pilot: int
    num_held: int
    mixed_prob: float | None
    audit: bool
    is_uniform: bool
    rollouts: tuple[SavedRollout, ...]
    truncated: tuple[int, ...]
    survivors: tuple[int, ...]
    num_survivors_chosen: int
    selection: Selection | None
    review_above: float
    at_deadline: bool
    shipped_version: int
    portion: int
    curtail_above: float = inf


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedEngine:
    """A `darts.state.engines.Engine`.

    `in_flight` and `backlog` hold the ids of its rollouts and groups, in order; `waiting` those of
    rollouts in flight.
    """

    engine_id: str
    engine_type: str
    slots: int
    version: int
    in_flight: tuple[int, ...]
    waiting: tuple[int, ...]
    backlog: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreState:
    """Everything that a `Core` knows.

    `groups` includes closed groups of which a rollout still holds a slot.
    """

    groups: tuple[SavedGroup, ...]
    rollouts: tuple[int, ...]
    engines: tuple[SavedEngine, ...]
    offers: dict[str, tuple[tuple[int, int, str], ...]]
    curves: dict[str, SavedCurve]
    training: tuple[Waiting, ...]
    held_out: tuple[HeldOut, ...]
    reopens: dict[str, int]
    orphaned: tuple[int, ...]
    outstanding: tuple[int, ...]
    learner_version: int
    steps_left: int
    num_taken: int
    pool: LengthStats
    reward_pool: RewardPool
    requested_step: int | None
    requested_portion: int
    num_refilled: int
    admission_paused: bool
    run_ended: bool
    num_ignored_reports: int
    next_group: int
    next_rollout: int


def save(core: Core) -> CoreState:
    """The present state of `core`, which must be between two events."""
    held = {r.group.group_id: r.group for r in core.rollouts.values()}
    return CoreState(
        groups=tuple(_save_group(g) for g in (held | core.groups).values()),
        rollouts=tuple(core.rollouts),
        engines=tuple(_save_engine(engine) for engine in core.engines.by_id.values()),
        offers=core.engines.save_offers(),
        curves={name: curve.save() for name, curve in core.engines.curves.items()},
        training=tuple(core.prompts.training),
        held_out=tuple(core.prompts.held_out),
        reopens=dict(core.prompts.reopens),
        orphaned=tuple(group.group_id for group in core.orphaned),
        outstanding=tuple(group.group_id for group in core.outstanding),
        learner_version=core.outstanding.learner_version,
        steps_left=core.outstanding.steps_left,
        num_taken=core.outstanding.num_taken,
        pool=core.memory.lengths,
        reward_pool=core.memory.rewards,
        requested_step=core.requested_step,
        requested_portion=core.requested_portion,
        num_refilled=core.num_refilled,
        admission_paused=core.admission_paused,
        run_ended=core.run_ended,
        num_ignored_reports=core.num_ignored_reports,
        next_group=core.next_group,
        next_rollout=core.next_rollout,
    )


def restore(config: CoreConfig, state: CoreState) -> Core:
    """A core that answers every event as the saved one would have, under `config`."""
    core = Core(config)
    groups: dict[int, Group] = {}
    rollouts: dict[int, Rollout] = {}
    for saved in state.groups:
        group = groups[saved.group_id] = _restore_group(saved)
        rollouts |= group.rollouts
        if group.state is not GroupState.CLOSED:
            core.groups[group.group_id] = group
    core.groups = dict(sorted(core.groups.items()))
    core.rollouts = {rollout_id: rollouts[rollout_id] for rollout_id in state.rollouts}
    for name, curve in state.curves.items():
        core.engines.curves[name] = LatencyCurve.restore(curve)
    for saved in state.engines:
        engine = Engine(saved.engine_id, saved.engine_type, saved.slots, saved.version)
        engine.in_flight = {rollout_id: rollouts[rollout_id] for rollout_id in saved.in_flight}
        engine.waiting = set(saved.waiting)
        engine.backlog = deque(groups[group_id] for group_id in saved.backlog)
        core.engines.by_id[engine.engine_id] = engine
    core.engines.restore_offers(state.offers)
    core.prompts.training.extend(state.training)
    core.prompts.held_out.extend(state.held_out)
    core.prompts.reopens.update(state.reopens)
    core.orphaned.extend(groups[group_id] for group_id in state.orphaned)
    core.outstanding.published(state.learner_version)
    core.outstanding.steps_left = state.steps_left
    core.outstanding.num_taken = state.num_taken
    for group_id in state.outstanding:
        core.outstanding.add(groups[group_id])
    core.memory.lengths, core.memory.rewards = state.pool, state.reward_pool
    core.requested_step = state.requested_step
    core.requested_portion = state.requested_portion
    core.num_refilled = state.num_refilled
    core.admission_paused = state.admission_paused
    core.run_ended = state.run_ended
    core.num_ignored_reports = state.num_ignored_reports
    core.next_group, core.next_rollout = state.next_group, state.next_rollout
    return core


def _save_engine(engine: Engine) -> SavedEngine:
    return SavedEngine(
        engine_id=engine.engine_id,
        engine_type=engine.engine_type,
        slots=engine.slots,
        version=engine.version,
        in_flight=tuple(engine.in_flight),
        waiting=tuple(sorted(engine.waiting)),
        backlog=tuple(group.group_id for group in engine.backlog),
    )


def _save_group(group: Group) -> SavedGroup:
    return SavedGroup(
        group_id=group.group_id,
        prompt=group.prompt,
        purpose=group.purpose,
        engine_id=group.engine_id,
        min_version=group.min_version,
        opened_version=group.opened_version,
        budget=group.budget,
        group_size=group.group_size,
        num_long=group.num_long,
        long_end=group.long_end,
        state=group.state,
        planned=tuple(
            (p.index, p.attempt, p.draw, p.continues.rollout_id if p.continues else None)
            for p in group.planned
        ),
        pilot=group.pilot,
        num_held=group.num_held,
        mixed_prob=group.mixed_prob,
        audit=group.audit,
        is_uniform=group.is_uniform,
        rollouts=tuple(_save_rollout(rollout) for rollout in group.rollouts.values()),
        truncated=tuple(candidate.rollout_id for candidate in group.truncated),
        survivors=tuple(sorted(group.survivors)),
        num_survivors_chosen=group.num_survivors_chosen,
        selection=group.selection,
        review_above=group.review_above,
        curtail_above=group.curtail_above,
        at_deadline=group.at_deadline,
        shipped_version=group.shipped_version,
        portion=group.portion,
    )


def _save_rollout(rollout: Rollout) -> SavedRollout:
    return SavedRollout(
        rollout_id=rollout.rollout_id,
        index=rollout.index,
        engine_id=rollout.engine_id,
        attempt=rollout.attempt,
        draw=rollout.draw,
        tokens=rollout.tokens,
        oldest_version=rollout.oldest_version,
        state=rollout.state,
        reward=rollout.reward,
        overshoot=rollout.overshoot,
        has_waited=rollout.has_waited,
        curtailed=rollout.curtailed,
    )


def _restore_group(saved: SavedGroup) -> Group:
    group = Group(
        group_id=saved.group_id,
        prompt=saved.prompt,
        purpose=saved.purpose,
        engine_id=saved.engine_id,
        min_version=saved.min_version,
        opened_version=saved.opened_version,
        budget=saved.budget,
        group_size=saved.group_size,
        num_long=saved.num_long,
        long_end=saved.long_end,
        planned=deque(),
        pilot=saved.pilot,
        num_held=saved.num_held,
        mixed_prob=saved.mixed_prob,
        audit=saved.audit,
        is_uniform=saved.is_uniform,
        state=saved.state,
        review_above=saved.review_above,
        curtail_above=saved.curtail_above,
        at_deadline=saved.at_deadline,
        shipped_version=saved.shipped_version,
        portion=saved.portion,
        survivors=set(saved.survivors),
        num_survivors_chosen=saved.num_survivors_chosen,
        selection=saved.selection,
    )
    for row in saved.rollouts:
        group.rollouts[row.rollout_id] = Rollout(
            rollout_id=row.rollout_id,
            group=group,
            index=row.index,
            engine_id=row.engine_id,
            attempt=row.attempt,
            draw=row.draw,
            tokens=row.tokens,
            oldest_version=row.oldest_version,
            state=row.state,
            reward=row.reward,
            overshoot=row.overshoot,
            has_waited=row.has_waited,
            curtailed=row.curtailed,
        )
    group.running = {r.rollout_id: r for r in group.rollouts.values() if r.runs}
    group.finished = sorted(
        Candidate(r.tokens, r.rollout_id)
        for r in group.rollouts.values()
        if r.state is RolloutState.FINISHED
    )
    group.truncated = [Candidate(group.rollouts[i].tokens, i) for i in saved.truncated]
    group.planned.extend(
        Planned(index, attempt, draw, None if continues is None else group.rollouts[continues])
        for index, attempt, draw, continues in saved.planned
    )
    return group
