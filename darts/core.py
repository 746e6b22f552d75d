"""The core: every decision of a run is made here, one handler per event.

A deterministic state machine without I/O, clock or hidden randomness. Three drivers share it: the
buffer's service (real messages), `darts.simulate` (a virtual clock) and `tools.replay` (a recorded
log). It keeps these rules, each of them a property in `tests/properties`:

1. Every launched rollout ends exactly once: selected, discarded, truncated, cancelled, or lost and
   launched again.
2. Every opened group ends exactly once: shipped and trained, evaluated, or dropped with a reason.
   No prompt starves.
3. A shipped group has exactly M trajectories, none of which has a lag above the bound.
4. An exact cancel never removes a rollout that the selection rule would have kept.
5. A rollout that finishes after it was cancelled is a legal race: it frees its slot, its extra
   tokens are counted, and nothing else changes.
6. An illegal event raises `ProtocolError` and changes nothing.
7. Memory is bounded: closed groups are forgotten.

`darts.invariants.validate_state` checks the invariants of the state between two events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, ClassVar

from configs.schema import LongEnd
from darts import events as ev
from darts.config import CoreConfig
from darts.legality import check_length, check_result
from darts.sizing.budgets import Budget, Budgeter
from darts.state import pilot, survivors
from darts.state.admission import PromptQueue
from darts.state.engines import Engine, Engines
from darts.state.groups import Group, GroupState, Planned, Rollout, RolloutState
from darts.state.memory import Memory
from darts.state.seats import fill_seats, generator, is_audited
from darts.state.staleness import OutstandingGroups

NOTHING: list[ev.Decision] = []
FIXED = ("groups_per_step", "steps_per_version", "group_size", "max_tokens", "seed")
BY_RESTART = ("stale", "tokens_lost")  # ends of groups that no fault of their prompts causes
# Ids skipped after a restart: more than could have been launched without being recorded.
SKIPPED_IDS = 1_000_000


class Core:
    """The state machine: `handle(event)` returns decisions.

    `darts.checkpoint` saves its whole state and restores it.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.engines = Engines()
        self.groups: dict[int, Group] = {}
        self.rollouts: dict[int, Rollout] = {}  # those that hold a slot
        self.outstanding = OutstandingGroups(config.groups_per_step, config.steps_per_version)
        # Groups whose engine is gone and that no other engine can continue.
        self.orphaned: deque[Group] = deque()
        self.memory = Memory(config)
        self.requested_step: int | None = None
        self.requested_portion = 0  # of that step
        self.num_refilled = 0  # groups without signal that were replaced since the last batch
        self.admission_paused = False
        self.run_ended = False
        self.num_ignored_reports = 0
        self.prompts = PromptQueue()
        self.next_group = 0
        self.next_rollout = 0
        self._decisions: list[ev.Decision] = []
        self._configure(config)

    def _configure(self, config: CoreConfig) -> None:
        """Decide by `config` from now on. Groups that are open keep their budgets and seats."""
        self.config = config
        self.outstanding.max_lag = config.max_lag
        self._eager = config.policy == "first_finished" or (
            config.policy == "darts" and config.cancel == "eager"
        )
        self._budgeter = Budgeter(
            rule="none" if config.policy == "plain" else config.redundancy,
            group_size=config.group_size,
            num_long=config.num_long,
            long_end="none" if self._eager else config.long_end,
            upper=config.upper,
            price=config.price,
            max_tokens=config.max_tokens,
            variance=config.variance,
        )

    def handle(self, event: ev.Event) -> Sequence[ev.Decision]:
        """Apply `event` and return the decisions that follow from it.

        Raises `ProtocolError`, with nothing changed, if the event is illegal in the present state.
        """
        self._handlers[type(event)](self, event)
        if not self._decisions:
            return NOTHING
        decisions, self._decisions = self._decisions, []
        return decisions

    # For drivers to read
    # ----------------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The learner's newest published version; -1 before the first."""
        return self.outstanding.learner_version

    @property
    def num_pending(self) -> int:
        """Training prompts drawn and not yet opened. Drivers keep `groups_per_step` here."""
        return len(self.prompts.training)

    @property
    def num_outstanding(self) -> int:
        """Training groups opened and not yet shipped."""
        return self.outstanding.num_outstanding

    @property
    def num_ready(self) -> int:
        """Outstanding groups whose selection is decided."""
        return self.outstanding.num_ready

    # Events: prompts and the run
    # ----------------------------------------------------------------------------------------------

    def _prompts_drawn(self, event: ev.PromptsDrawn) -> None:
        curve = next(iter(self.engines.curves.values()), None)
        self.prompts.add_window(
            event.prompts, self._budgeter, self.memory.lengths, curve, len(self.engines.by_id)
        )
        self._admit()

    def _evaluation_requested(self, event: ev.EvaluationRequested) -> None:
        if event.samples < 1:
            raise ev.ProtocolError(
                f"evaluation with {event.samples} samples per prompt: at least 1 is needed"
            )
        self.prompts.add_evaluation(event)
        self._admit()

    def _settings_changed(self, event: ev.SettingsChanged) -> None:
        for name in FIXED:
            before, after = getattr(self.config, name), getattr(event.config, name)
            if before != after:
                raise ev.ProtocolError(f"{name} cannot change from {before} to {after} in a run")
        self._configure(event.config)
        for group in self.outstanding.stale():
            self._drop(group, "stale", requeue=True)
        for group in self.groups.values():
            self._curtail(group)
        self._ship()
        self._admit()

    def _admission_changed(self, event: ev.AdmissionPaused) -> None:
        self.admission_paused = event.paused
        self._admit()

    def _buffer_restarted(self, event: ev.BufferRestarted) -> None:
        self.next_group += SKIPPED_IDS
        self.next_rollout += SKIPPED_IDS

    def _tokens_lost(self, event: ev.TokensLost) -> None:
        rollout = self._recorded(event.rollout_id)
        if rollout is None or event.num_tokens >= rollout.tokens:
            return
        if rollout.runs:
            rollout.tokens = event.num_tokens
            rollout.curtailed = False
        elif rollout.state is RolloutState.LOST:
            rollout.tokens = event.num_tokens  # its replacement continues from there
        elif rollout.group.purpose == "train":
            if rollout.group.state is GroupState.SHIPPED:
                # Shards wait until their tokens are durable, so the learner has none of this
                # portion, and this is the newest one.
                self._reopen(rollout.group.portion)
            self._drop(rollout.group, "tokens_lost", requeue=True)
            self._admit()

    def _recorded(self, rollout_id: int) -> Rollout | None:
        """A rollout of a group that has not closed, whether or not it still holds a slot."""
        groups = self.groups.values()
        return next((g.rollouts[rollout_id] for g in groups if rollout_id in g.rollouts), None)

    def _run_ended(self, event: ev.RunEnded) -> None:
        self.run_ended = True
        self.requested_step = None
        self.outstanding.num_taken = 0
        self.prompts.training.clear()
        for group in [g for g in self.groups.values() if g.purpose == "train"]:
            self._drop(group, "run_ended", requeue=False)
        self._admit()

    # Events: engines
    # ----------------------------------------------------------------------------------------------

    def _engine_joined(self, event: ev.EngineJoined) -> None:
        if event.engine_id in self.engines.by_id:
            raise ev.ProtocolError(
                f"engine {event.engine_id} has joined already: "
                "it must be lost before it can join again"
            )
        if event.slots < 1 or event.policy_version > self.policy_version:
            raise ev.ProtocolError(
                f"engine {event.engine_id} joins with {event.slots} slots and policy version "
                f"{event.policy_version}: it needs at least 1 slot, and its version must not be "
                f"above {self.policy_version}"
            )
        self.engines.join(
            Engine(event.engine_id, event.engine_type, event.slots, event.policy_version)
        )
        self._reassign()
        self._admit()

    def _engine_lost(self, event: ev.EngineLost) -> None:
        engine = self._engine(event.engine_id)
        self.engines.leave(engine)
        groups = {r.group.group_id: r.group for r in engine.in_flight.values()}
        groups |= {group.group_id: group for group in engine.backlog}
        for rollout in engine.in_flight.values():
            del self.rollouts[rollout.rollout_id]
            if rollout.runs:
                self._lose(rollout, event.keep_tokens, handed_over=event.left)
        for group in groups.values():
            group.engine_id = ""  # another process may join under the name
        self.orphaned.extend(
            group for group in groups.values() if group.state is GroupState.OPEN and group.planned
        )
        for group in groups.values():
            self._review(group)
        self._reassign()
        self._admit()

    def _policy_loaded(self, event: ev.PolicyLoaded) -> None:
        engine = self._engine(event.engine_id)
        if not engine.version <= event.version <= self.policy_version:
            raise ev.ProtocolError(
                f"engine {event.engine_id} loaded policy version {event.version}: "
                f"it had {engine.version}, and the newest is {self.policy_version}"
            )
        self.engines.load_version(engine, event.version)
        self._reassign()
        self._admit()

    def _latency_reported(self, event: ev.LatencyReported) -> None:
        engine = self._engine(event.engine_id)
        if not self.engines.curves[engine.engine_type].observe(event.batch, event.ms_per_token):
            self.num_ignored_reports += 1

    # Events: rollouts
    # ----------------------------------------------------------------------------------------------

    def _rollout_progressed(self, event: ev.RolloutProgressed) -> None:
        rollout = self._holding_slot(event.rollout_id)
        if rollout is None or not rollout.runs:
            return
        check_length(rollout, event.num_tokens, self.config.max_tokens)
        rollout.tokens = event.num_tokens
        self.engines.take_slot(rollout)
        group = rollout.group
        is_past = event.num_tokens > group.review_above and event.rollout_id not in group.survivors
        if is_past or (event.num_tokens > group.curtail_above and not rollout.curtailed):
            self._review(group)

    def _rollout_waits(self, event: ev.RolloutWaits) -> None:
        rollout = self._holding_slot(event.rollout_id)
        if rollout is None or not rollout.runs:
            return
        rollout.has_waited = True
        self._launch(self.engines.lend_slot(rollout))
        self._admit()

    def _rollout_finished(self, event: ev.RolloutFinished) -> None:
        rollout = self._holding_slot(event.rollout_id)
        if rollout is None:
            return
        check_length(rollout, event.num_tokens, self.config.max_tokens)
        if rollout.runs:
            check_result(rollout, event, self.policy_version)
            rollout.tokens, rollout.reward = event.num_tokens, event.reward
            rollout.oldest_version = event.oldest_version
            rollout.curtailed = rollout.curtailed and event.truncated  # else it got there first
            is_valid = rollout.curtailed or not event.truncated
            end = RolloutState.FINISHED if is_valid else RolloutState.TRUNCATED
            rollout.group.end(rollout, end)
        else:
            self._count_overshoot(rollout, event.num_tokens)
        self._free(rollout)
        self._review(rollout.group)
        self._admit()

    def _rollout_failed(self, event: ev.RolloutFailed) -> None:
        rollout = self._holding_slot(event.rollout_id)
        if rollout is None:
            return
        if rollout.runs:
            self._lose(rollout, keep_tokens=False, failed=True)
        self._free(rollout)
        self._review(rollout.group)
        self._admit()

    def _rollout_stopped(self, event: ev.RolloutStopped) -> None:
        rollout = self._holding_slot(event.rollout_id)
        if rollout is None:
            return
        if rollout.state is not RolloutState.CANCELLED:
            raise ev.ProtocolError(
                f"rollout {event.rollout_id} stopped, but it is {rollout.state.value} "
                "and was not cancelled"
            )
        check_length(rollout, event.num_tokens, self.config.max_tokens)
        self._count_overshoot(rollout, event.num_tokens)
        self._free(rollout)
        self._admit()

    # Events: learner
    # ----------------------------------------------------------------------------------------------

    def _learner_joined(self, event: ev.LearnerJoined) -> None:
        """Offer again every group that shipped and was never trained.

        The next publication drops those that are stale by then.
        """
        self.requested_step = None
        self._take_back()
        self.outstanding.num_taken = 0

    def _reopen(self, portion: int) -> None:
        """Take back this portion of the newest batch. The learner asks for it again."""
        outstanding = self.outstanding
        if not outstanding.num_taken:  # the batch was full
            outstanding.num_taken = self.config.groups_per_step
            outstanding.steps_left += 1
        self.requested_step = None
        outstanding.num_taken -= self._take_back(portion)

    def _take_back(self, portion: int = 0) -> int:
        """Offer shipped groups again, from `portion` on. Returns their number."""
        taken = [
            group
            for group in self.groups.values()
            if group.state is GroupState.SHIPPED and group.portion >= portion
        ]
        for group in taken:
            group.move(GroupState.READY)
            self.outstanding.add(group)
        return len(taken)

    def _policy_published(self, event: ev.PolicyPublished) -> None:
        if event.version <= self.policy_version:
            raise ev.ProtocolError(
                f"policy version {event.version} published after {self.policy_version}: "
                "versions must grow"
            )
        self.outstanding.published(event.version)
        for group in self.outstanding.stale():
            self._drop(group, "stale", requeue=True)
        self._admit()

    def _shards_requested(self, event: ev.ShardsRequested) -> None:
        if self.requested_step is not None:
            raise ev.ProtocolError(
                f"shards of step {event.step} requested before those of step "
                f"{self.requested_step} were shipped"
            )
        if (event.portion > 0) != (self.outstanding.num_taken > 0):
            raise ev.ProtocolError(
                f"portion {event.portion} of step {event.step} requested, but "
                f"{self.outstanding.num_taken} of its {self.config.groups_per_step} groups were "
                "shipped"
            )
        if self.outstanding.steps_left < 1:
            raise ev.ProtocolError(
                f"shards of step {event.step} requested, but version {self.policy_version} has "
                f"had its {self.config.steps_per_version} step(s): publish the next version first"
            )
        self.requested_step, self.requested_portion = event.step, event.portion
        for group in self.outstanding.due() if event.portion == 0 else ():
            if len(group.finished) < group.group_size and self.config.on_deadline == "drop":
                self._drop(group, "deadline", requeue=True)
                continue
            group.at_deadline = self.config.release_at_deadline
            self._review(group)
        self._ship()
        self._admit()

    def _group_trained(self, event: ev.GroupTrained) -> None:
        group = self.groups.get(event.group_id)
        if group is None or group.state is not GroupState.SHIPPED:
            raise ev.ProtocolError(
                f"group {event.group_id} reported as trained, but the learner does not hold it"
            )
        self._close(group)
        self._decisions.append(ev.Close(group.record("shipped")))

    # Legality
    # ----------------------------------------------------------------------------------------------

    def _engine(self, engine_id: str) -> Engine:
        engine = self.engines.by_id.get(engine_id)
        if engine is None:
            known = ", ".join(sorted(self.engines.by_id)) or "none"
            raise ev.ProtocolError(f"engine {engine_id} has not joined (known: {known})")
        return engine

    def _holding_slot(self, rollout_id: int) -> Rollout | None:
        """The rollout, or None if it is over, since late news of it is a legal race."""
        if not 0 <= rollout_id < self.next_rollout:
            raise ev.ProtocolError(
                f"rollout {rollout_id} was never launched (the last was {self.next_rollout - 1})"
            )
        return self.rollouts.get(rollout_id)

    # Rollouts
    # ----------------------------------------------------------------------------------------------

    def _lose(
        self, rollout: Rollout, keep_tokens: bool, handed_over: bool = False, failed: bool = False
    ) -> None:
        """A rollout in flight ended without a result: plan another attempt if any is left.

        A rollout that was handed over continues in the same attempt. One that failed by itself
        would fail in the same way again, so it is drawn again. One whose environment was lost with
        its engine begins again.
        """
        group = rollout.group
        group.end(rollout, RolloutState.LOST)
        attempt = rollout.attempt if handed_over else rollout.attempt + 1
        replaced = attempt <= self.config.max_attempts
        survivors.lose_survivor(group, rollout, replaced)
        if replaced:
            is_kept = keep_tokens and rollout.tokens and not rollout.has_waited
            continues = rollout if is_kept else None
            draw = rollout.draw + failed
            group.planned.appendleft(Planned(rollout.index, attempt, draw, continues))
            self.engines.enqueue(group, first=True)

    def _count_overshoot(self, rollout: Rollout, num_tokens: int) -> None:
        """Count the tokens that the engine decoded after the decision to cancel.

        They go into the group's record or, if that was made already, into a decision of their own.
        """
        rollout.overshoot = num_tokens - rollout.tokens
        if rollout.overshoot and rollout.group.state is GroupState.CLOSED:
            self._decisions.append(
                ev.CountOvershoot(rollout.group.group_id, rollout.rollout_id, rollout.overshoot)
            )

    def _free(self, rollout: Rollout) -> None:
        del self.rollouts[rollout.rollout_id]
        engine = self.engines.free(rollout)
        if engine is not None:
            self._launch(engine)

    def _launch(self, engine: Engine) -> None:
        """Launch queued rollouts while the engine has free slots."""
        while (launch := self.engines.next_launch(engine)) is not None:
            group, planned = launch
            before = planned.continues
            rollout = Rollout(
                rollout_id=self.next_rollout,
                group=group,
                index=planned.index,
                engine_id=engine.engine_id,
                attempt=planned.attempt,
                draw=planned.draw,
                tokens=before.tokens if before else 0,
                oldest_version=before.oldest_version if before else engine.version,
            )
            self.next_rollout += 1
            group.add(rollout)
            engine.in_flight[rollout.rollout_id] = rollout
            self.rollouts[rollout.rollout_id] = rollout
            if before is not None:
                # They are the beginning of the new rollout, so they are not lost.
                before.tokens = 0
            self._decisions.append(
                ev.Launch(
                    rollout_id=rollout.rollout_id,
                    group_id=group.group_id,
                    prompt_id=group.prompt.prompt_id,
                    visit=group.prompt.visit,
                    index=rollout.index,
                    draw=rollout.draw,
                    purpose=group.purpose,
                    engine_id=engine.engine_id,
                    continues=before.rollout_id if before else None,
                )
            )

    def _reassign(self) -> None:
        """Continue orphaned groups on an engine that samples from a policy no older than theirs."""
        for _ in range(len(self.orphaned)):
            group = self.orphaned.popleft()
            engine = self.engines.least_loaded(group.min_version)
            if engine is None:
                self.orphaned.append(group)
                continue
            group.engine_id = engine.engine_id
            self.engines.enqueue(group, first=True)
            self._launch(engine)

    # Groups
    # ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Open groups while engines have room, evaluation first.

        Training groups open only while they can still be trained within the lag bound.
        """
        queue = self.prompts
        while queue.held_out or queue.training:
            engine = self.engines.best_with_room(self.config.group_size)
            if engine is None:
                return
            if queue.held_out and engine.version >= queue.held_out[0].min_version:
                prompt, samples, _ = queue.held_out.popleft()
                self._open(
                    prompt, "eval", engine, budget=samples, size=samples, num_long=0,
                    long_end="longest",
                )  # fmt: skip
            elif (
                queue.training
                and not (self.admission_paused or self.run_ended)
                and self.outstanding.has_room(engine.version)
            ):
                prompt, budget = queue.training.popleft()
                self._open_training(prompt, budget, engine)
            else:
                return

    def _open_training(self, prompt: ev.Prompt, budget: Budget | None, engine: Engine) -> None:
        config = self.config
        if budget is None:
            pool = self.memory.lengths
            stats = self._budgeter.estimate(prompt.lengths, pool)
            batch = min(engine.load + config.group_size, engine.slots)
            curve = self.engines.curves[engine.engine_type]
            budget = self._budgeter.one(stats, pool, curve, batch)
        long_end = config.long_end if config.policy == "darts" else "longest"
        if config.policy == "darts" and budget.saturated:
            long_end = "none"
        if config.by_efficiency:
            long_end = "none"
        audit = is_audited(prompt, config)
        self._open(
            prompt, "train", engine, budget=budget.rollouts, size=config.group_size,
            num_long=0 if long_end == "none" else config.num_long, long_end=long_end,
            pilot=config.pilot if config.pilot < budget.rollouts and not audit else 0,
            audit=audit,
        )  # fmt: skip

    def _open(
        self,
        prompt: ev.Prompt,
        purpose: ev.Purpose,
        engine: Engine,
        *,
        budget: int,
        size: int,
        num_long: int,
        long_end: LongEnd,
        pilot: int = 0,
        audit: bool = False,
    ) -> None:
        first = pilot or budget
        group = Group(
            group_id=self.next_group,
            prompt=prompt,
            purpose=purpose,
            engine_id=engine.engine_id,
            min_version=engine.version,
            opened_version=self.policy_version,
            budget=budget,
            group_size=size,
            num_long=num_long,
            long_end=long_end,
            planned=deque(Planned(index) for index in range(first)),
            pilot=pilot,
            num_held=budget - first,
            audit=audit,
        )
        self.next_group += 1
        self.groups[group.group_id] = group
        if purpose == "train":
            self.outstanding.add(group)
        self._decisions.append(
            ev.OpenGroup(
                group_id=group.group_id,
                prompt_id=prompt.prompt_id,
                purpose=purpose,
                engine_id=engine.engine_id,
                budget=budget,
                long_end=long_end,
            )
        )
        self.engines.enqueue(group)
        self._launch(engine)

    def _review(self, group: Group) -> None:
        """React to news of an open group: cancel rollouts, and settle it once it is decided."""
        if group.state is not GroupState.OPEN:
            return
        if group.num_held and not self._pilot_is_over(group):
            return
        if len(group.finished) >= group.group_size:
            if self._eager and group.purpose == "train" and not group.audit:
                return self._settle(group, "group_full")
            group.review_above = survivors.short_cutoff(group, self.config)
            if group.review_above < inf and group.running:
                rng = generator(group, self.config.seed)
                for rollout in survivors.take_past_selection(group, rng):
                    self._cancel(rollout, "past_selection")
        if group.all_ended:
            self._settle(group, "past_selection")
        elif group.at_deadline:
            self._ship()
        self._curtail(group)

    def _curtail(self, group: Group) -> None:
        """Have rollouts end that are longer than the group's relative limit.

        They run until their engine reports their ends, which count like those of others.
        """
        if group.state is not GroupState.OPEN:
            return
        group.curtail_above = survivors.relative_cutoff(group, self.config)
        for rollout in group.running.values() if group.curtail_above < inf else ():
            if rollout.tokens > group.curtail_above and not rollout.curtailed:
                rollout.curtailed = True
                self._decisions.append(ev.Curtail(rollout.rollout_id, rollout.engine_id))

    def _pilot_is_over(self, group: Group) -> bool:
        """Judge the pilot: launch the rest, stop the group, or go on waiting (False)."""
        judgement = pilot.judge(group, self.config, self.memory.rewards)
        group.mixed_prob = judgement.mixed_prob
        if judgement.verdict is pilot.Verdict.WAIT:
            return False
        if judgement.verdict is pilot.Verdict.STOP and self._may_refill:
            self.num_refilled += 1
            self._drop(group, "no_signal", requeue=False)
            self._ship()
            return False
        group.release_held()
        self.engines.enqueue(group, first=True)
        engine = self.engines.by_id.get(group.engine_id)
        if engine is not None:
            self._launch(engine)
        elif group not in self.orphaned:
            self.orphaned.append(group)
        return True

    def _settle(self, group: Group, reason: ev.CancelReason) -> None:
        """The group is decided, and the batch may be full with it."""
        self._decide(group, reason)
        self._ship()

    def _decide(self, group: Group, reason: ev.CancelReason) -> None:
        """Launch nothing more, cancel rollouts in flight, and select."""
        self._stop(group, reason)
        if group.purpose == "eval":
            self._close(group)
            self._decisions.append(ev.Evaluated(group.record("evaluated")))
            return
        fill_seats(group, self.config)
        if group.selection is None:
            lost = any(r.state is RolloutState.LOST for r in group.rollouts.values())
            self._drop(group, "failed" if lost else "too_few", requeue=True)
        elif group.is_uniform and self.config.uniform == "drop" and self._may_refill:
            self.num_refilled += 1
            self._drop(group, "uniform", requeue=False)
        else:
            self._decisions += self.memory.learn(group, "shipped", self.config)
            group.move(GroupState.READY)
            self.outstanding.ready(group)

    @property
    def _may_refill(self) -> bool:
        """Whether a group without signal may be replaced. A bound per step lets every batch fill.

        Source: DAPO (arXiv 2503.14476), dynamic sampling. Differs: beyond the bound such groups are
        trained, since a batch of fixed size keeps the lag bound feasible.
        """
        return self.num_refilled < self.config.max_refill * self.config.groups_per_step

    def _cancel(self, rollout: Rollout, reason: ev.CancelReason) -> None:
        rollout.group.end(rollout, RolloutState.CANCELLED)
        self._decisions.append(ev.Cancel(rollout.rollout_id, rollout.engine_id, reason))

    def _stop(self, group: Group, reason: ev.CancelReason) -> None:
        for rollout in list(group.running.values()):
            self._cancel(rollout, reason)
        if group.planned:
            if group in self.orphaned:
                self.orphaned.remove(group)
            self.engines.withdraw(group)
        group.num_held = 0
        group.review_above = group.curtail_above = inf

    def _ship(self) -> None:
        """Answer the learner once its batch, or the next portion of it, is ready.

        A full batch leaves no open group without a seat.
        """
        if self.requested_step is None:
            return
        for group in self.outstanding.releasable():
            self._decide(group, "deadline")
        shipped = self.outstanding.take_portion(self.config.stream == "group")
        if not shipped:
            return
        step, self.requested_step = self.requested_step, None
        if not self.outstanding.num_taken:  # the batch is full
            self.num_refilled = 0
        for group in shipped:
            group.shipped_version, group.portion = self.policy_version, self.requested_portion
            self.prompts.forget(group.prompt)
            self._decisions.append(ev.Ship(step, group.record("shipped"), group.portion))

    def _drop(self, group: Group, end: ev.GroupEnd, requeue: bool) -> None:
        self._stop(group, "dropped")
        if group.state is GroupState.OPEN:
            # Dropped groups are the long ones. Without them the statistics would be too short.
            self._decisions += self.memory.learn(group, end, self.config)
        if group.state is not GroupState.SHIPPED:
            self.outstanding.remove(group)
        self._close(group)
        group.selection = None
        if end in ("uniform", "no_signal"):
            self.prompts.forget(group.prompt)
        requeued = requeue and not self.run_ended
        if requeued and end in BY_RESTART:
            self.prompts.put_back(group.prompt)
        elif requeued:
            requeued = self.prompts.reopen(group.prompt, self.config.max_reopens)
        self._decisions.append(ev.Drop(group.record(end), requeued))

    def _close(self, group: Group) -> None:
        group.move(GroupState.CLOSED)
        del self.groups[group.group_id]

    _handlers: ClassVar[dict[type, Callable[[Core, Any], None]]] = {
        ev.PromptsDrawn: _prompts_drawn,
        ev.EvaluationRequested: _evaluation_requested,
        ev.SettingsChanged: _settings_changed,
        ev.AdmissionPaused: _admission_changed,
        ev.BufferRestarted: _buffer_restarted,
        ev.TokensLost: _tokens_lost,
        ev.RunEnded: _run_ended,
        ev.EngineJoined: _engine_joined,
        ev.EngineLost: _engine_lost,
        ev.PolicyLoaded: _policy_loaded,
        ev.LatencyReported: _latency_reported,
        ev.RolloutProgressed: _rollout_progressed,
        ev.RolloutWaits: _rollout_waits,
        ev.RolloutFinished: _rollout_finished,
        ev.RolloutFailed: _rollout_failed,
        ev.RolloutStopped: _rollout_stopped,
        ev.LearnerJoined: _learner_joined,
        ev.PolicyPublished: _policy_published,
        ev.ShardsRequested: _shards_requested,
        ev.GroupTrained: _group_trained,
    }
