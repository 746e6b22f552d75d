"""The core: what happened in, what to do out. The only place where anything is decided.

A deterministic state machine without I/O, clock or hidden randomness. Three drivers share it: the buffer's service
(real messages), `darts.simulate` (a virtual clock) and `tools.replay` (a recorded log). The rules it keeps, each a
property in `tests/properties`:

1. Every launched rollout ends exactly once: selected, discarded, truncated, cancelled, or lost and launched again.
2. Every opened group ends exactly once: shipped and trained, evaluated, or dropped with a reason; no prompt starves.
3. A shipped group has exactly M trajectories, and none whose lag exceeds the bound.
4. An exact cancel never removes a rollout that the selection rule would have kept.
5. Finished-after-cancelled is a legal race: it frees the slot and changes nothing else.
6. An illegal event raises `ProtocolError` and changes nothing.
7. Memory is bounded: closed groups are forgotten.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from configs.schema import LongEnd
from darts import events as ev
from darts import lengths
from darts.admission import PromptQueue
from darts.budgets import Budget, Budgeter
from darts.config import CoreConfig
from darts.engines import Engine, Engines
from darts.groups import Group, GroupState, Planned, Rollout, RolloutState
from darts.handover import Handover
from darts.selection import select_dual_end, select_random

NOTHING: list[ev.Decision] = []


class Core:
    """`handle(event) -> decisions`. `rng` breaks ties and draws the random control; it is the only randomness."""

    def __init__(self, config: CoreConfig, rng: random.Random | None = None) -> None:
        self.config = config
        self.rng = rng or random.Random(config.seed)
        self.engines = Engines()
        self.groups: dict[int, Group] = {}
        self.rollouts: dict[int, Rollout] = {}  # all that hold a slot
        self.pool = lengths.POOL_PRIOR
        self.requested_step: int | None = None
        self.admission_paused = False
        self.run_ended = False
        self.num_ignored_reports = 0
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
        )
        self._prompts = PromptQueue(self._budgeter, config.max_reopens)
        self._handover = Handover(config.max_lag, config.groups_per_step, config.steps_per_version)
        self._homeless: deque[Group] = deque()  # their engine is gone and no other is able yet
        self._next_group = 0
        self._next_rollout = 0
        self._out: list[ev.Decision] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.RolloutProgressed: self._progressed, ev.RolloutFinished: self._finished, ev.RolloutStopped: self._stopped,
            ev.RolloutFailed: self._failed, ev.PromptsDrawn: self._drawn, ev.EvaluationRequested: self._evaluate,
            ev.PoolRestored: self._pool_restored, ev.ActorJoined: self._joined, ev.ActorLost: self._lost,
            ev.PolicyLoaded: self._loaded, ev.LatencyReported: self._latency, ev.LearnerJoined: self._learner_joined,
            ev.PolicyPublished: self._published, ev.ShardsRequested: self._requested, ev.GroupTrained: self._trained,
            ev.AdmissionPaused: self._paused, ev.RunEnded: self._ended,
        }  # fmt: skip

    def handle(self, event: ev.Event) -> Sequence[ev.Decision]:
        """Applies `event`. Raises `ProtocolError`, with nothing changed, where it is illegal in the present state."""
        self._handlers[type(event)](event)
        if not self._out:
            return NOTHING
        decisions, self._out = self._out, []
        return decisions

    # What drivers may read ----------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The learner's newest published version; -1 before the first."""
        return self._handover.learner_version

    @property
    def num_pending(self) -> int:
        """Training prompts drawn and not yet opened; the driver keeps a window of `groups_per_step` here."""
        return len(self._prompts.training)

    @property
    def num_outstanding(self) -> int:
        """Training groups opened and not yet handed over; `num_ready` of them have their selection decided."""
        return self._handover.num_outstanding

    @property
    def num_ready(self) -> int:
        return self._handover.num_ready

    @property
    def evaluating(self) -> bool:
        return bool(self._prompts.held_out) or any(
            g.purpose == "eval" for g in self.groups.values()
        )

    def waiting_for(self) -> str:
        """Who waits for whom, in words; empty when nobody does."""
        if self.requested_step is not None:
            due = [g.group_id for g in self._handover.due() if g.state is GroupState.OPEN]
            if due:
                return f"learner waits for group {due[0]} (lag bound), {len(due)} due in all"
            missing = self.config.groups_per_step - self.num_ready
            why = (
                "no engine has joined"
                if not self.engines.by_id
                else f"{missing} of {self.config.groups_per_step} groups missing"
            )
            return f"learner waits for actors: {why}"
        if self.admission_paused:
            return "actors wait for the learner: the trajectory store is full"
        idle = sum(e.slots - e.load for e in self.engines.by_id.values())
        if idle and self.num_pending and self.policy_version >= 0 and not self.run_ended:
            return f"actors wait for the learner: {self.num_outstanding} groups outstanding at version {self.policy_version}"
        return ""

    # Rollouts -----------------------------------------------------------------------------------------------------

    def _progressed(self, event: ev.RolloutProgressed) -> None:
        rollout = self.rollouts.get(event.rollout_id)
        if rollout is None or rollout.state is not RolloutState.RUNNING:
            self._require_issued(event.rollout_id)
            return
        if not rollout.tokens <= event.num_tokens <= self.config.max_tokens:
            self._bad_length(rollout, event.num_tokens)
        rollout.tokens = event.num_tokens
        group = rollout.group
        if event.num_tokens > group.watch and rollout.rollout_id not in group.survivors:
            self._review(group)

    def _finished(self, event: ev.RolloutFinished) -> None:
        rollout = self.rollouts.get(event.rollout_id)
        if rollout is None:
            return self._require_issued(event.rollout_id)
        if rollout.state is RolloutState.RUNNING:
            if not rollout.tokens <= event.num_tokens <= self.config.max_tokens:
                self._bad_length(rollout, event.num_tokens)
            if not math.isfinite(event.reward):
                raise ev.ProtocolError(
                    f"rollout {rollout.rollout_id} finished with reward {event.reward}: rewards are finite numbers"
                )
            if not rollout.oldest_version <= event.oldest_version <= self.policy_version:
                raise ev.ProtocolError(
                    f"rollout {rollout.rollout_id} claims policy version {event.oldest_version}: it was launched at "
                    f"{rollout.oldest_version} and the newest is {self.policy_version}"
                )
            rollout.tokens, rollout.reward, rollout.oldest_version = (
                event.num_tokens,
                event.reward,
                event.oldest_version,
            )
            rollout.group.end(
                rollout, RolloutState.TRUNCATED if event.truncated else RolloutState.FINISHED
            )
        self._free(rollout)
        self._review(rollout.group)
        self._admit()

    def _stopped(self, event: ev.RolloutStopped) -> None:
        rollout = self.rollouts.get(event.rollout_id)
        if rollout is None:
            return self._require_issued(event.rollout_id)
        if rollout.state is not RolloutState.CANCELLED:
            raise ev.ProtocolError(
                f"rollout {event.rollout_id} stopped, but is {rollout.state.value} and nobody cancelled it"
            )
        self._free(rollout)
        self._admit()

    def _failed(self, event: ev.RolloutFailed) -> None:
        rollout = self.rollouts.get(event.rollout_id)
        if rollout is None:
            return self._require_issued(event.rollout_id)
        if rollout.state is RolloutState.RUNNING:
            self._lose(rollout, keep_tokens=False)
        self._free(rollout)
        self._review(rollout.group)
        self._admit()

    def _lose(self, rollout: Rollout, keep_tokens: bool) -> None:
        """A rollout in flight ended without a result. Another takes its place while attempts are left."""
        group = rollout.group
        group.end(rollout, RolloutState.LOST)
        if rollout.attempt >= self.config.max_attempts:
            group.survivors.discard(rollout.rollout_id)
            return
        group.planned.appendleft(
            Planned(rollout.attempt + 1, rollout if keep_tokens and rollout.tokens else None)
        )
        if (
            rollout.rollout_id in group.survivors
        ):  # the one that takes over is a survivor too, or nobody is
            group.survivors.discard(rollout.rollout_id)
            group.survivors_chosen -= 1
        engine = self.engines.by_id.get(group.engine_id)
        if engine is not None:
            if group not in engine.backlog:
                engine.backlog.appendleft(group)
            engine.queued += 1

    def _free(self, rollout: Rollout) -> None:
        del self.rollouts[rollout.rollout_id]
        engine = self.engines.by_id.get(rollout.engine_id)
        if engine is not None and engine.in_flight.pop(rollout.rollout_id, None) is not None:
            self._launch_backlog(engine)

    def _require_issued(self, rollout_id: int) -> None:
        """News of a rollout that is over is a legal race; of one that never was, a peer's mistake."""
        if not 0 <= rollout_id < self._next_rollout:
            raise ev.ProtocolError(
                f"rollout {rollout_id} was never launched (the last was {self._next_rollout - 1})"
            )

    def _bad_length(self, rollout: Rollout, num_tokens: int) -> None:
        raise ev.ProtocolError(
            f"rollout {rollout.rollout_id} reports {num_tokens} tokens: it had {rollout.tokens}, and the limit is {self.config.max_tokens}"
        )

    # Groups -------------------------------------------------------------------------------------------------------

    def _review(self, group: Group) -> None:
        """Re-reads a group after news of it: cancels what can no longer be selected, settles what is decided."""
        if group.state is not GroupState.OPEN:
            return
        if len(group.finished) >= group.group_size:
            if group.release:
                return self._settle(group, "deadline")
            if self._eager and group.purpose == "train":
                return self._settle(group, "group_full")
            group.watch = group.cut()
            if group.watch < math.inf:
                self._cancel_past(group)
        if group.all_ended:
            self._settle(group, "past_selection")

    def _cancel_past(self, group: Group) -> None:
        past = [
            r
            for r in group.running.values()
            if r.tokens > group.watch and r.rollout_id not in group.survivors
        ]
        seats = group.num_long - group.survivors_chosen if group.mode == "survivor" else 0
        if past and seats > 0:
            self.rng.shuffle(past)  # ties go to whom the generator puts first
            past.sort(key=lambda r: -r.tokens)
            group.survivors |= {r.rollout_id for r in past[:seats]}
            group.survivors_chosen += min(seats, len(past))
            past = past[seats:]
        for rollout in past:
            self._cancel(rollout, "past_selection")

    def _cancel(self, rollout: Rollout, reason: ev.CancelReason) -> None:
        rollout.group.end(rollout, RolloutState.CANCELLED)
        self._out.append(ev.Cancel(rollout.rollout_id, rollout.engine_id, reason))

    def _settle(self, group: Group, reason: ev.CancelReason) -> None:
        """The group's outcome is decided: nothing more is launched, what is in flight is cancelled."""
        self._stop(group, reason)
        if group.purpose == "eval":
            group.move(GroupState.CLOSED)
            del self.groups[group.group_id]
            self._out.append(ev.Evaluated(group.record("evaluated")))
            return
        config = self.config
        if config.policy == "random":
            group.selection = select_random(
                group.finished,
                group.truncated,
                group.group_size,
                group.num_long,
                config.fill_truncated,
                self.rng,
            )
        else:
            group.selection = select_dual_end(
                group.finished,
                group.truncated,
                group.group_size,
                group.num_long,
                config.fill_truncated,
            )
        if group.selection is None:
            lost = any(r.state is RolloutState.LOST for r in group.rollouts.values())
            return self._drop(group, "failed" if lost else "too_few", requeue=True)
        self._learn_lengths(group)
        group.move(GroupState.READY)
        self._handover.ready(group)
        self._serve()

    def _stop(self, group: Group, reason: ev.CancelReason) -> None:
        for rollout in list(group.running.values()):
            self._cancel(rollout, reason)
        if group.planned:
            engine = self.engines.by_id.get(group.engine_id)
            if engine is not None and group in engine.backlog:
                engine.backlog.remove(group)
                engine.queued -= len(group.planned)
                self.engines.touch(engine)
            elif group in self._homeless:
                self._homeless.remove(group)
            group.planned.clear()
        group.watch = math.inf

    def _learn_lengths(self, group: Group) -> None:
        censored = [c.tokens for c in group.truncated]
        censored += [
            r.tokens
            for r in group.rollouts.values()
            if r.state is RolloutState.CANCELLED and r.tokens
        ]
        finished = [c.tokens for c in group.finished]
        if not finished and not censored:
            return
        stats = lengths.update(group.prompt.lengths, finished, censored, self.pool)
        self.pool = lengths.update_pool(self.pool, stats)
        self._out.append(ev.RememberLengths(group.prompt.prompt_id, stats))
        self._out.append(ev.RememberLengths("", self.pool))
        group.prompt = ev.Prompt(group.prompt.prompt_id, stats)

    def _drop(self, group: Group, end: ev.GroupEnd, requeue: bool) -> None:
        self._stop(group, "dropped")
        if group.state is GroupState.OPEN:
            self._learn_lengths(
                group
            )  # the dropped ones are the long ones: leaving them out would lean short
        if group.state is not GroupState.HANDED:
            self._handover.remove(group)
        group.move(GroupState.CLOSED)
        group.selection = None
        del self.groups[group.group_id]
        requeued = requeue and not self.run_ended and self._prompts.put_back(group.prompt)
        self._out.append(ev.Drop(group.record(end), requeued))

    # Admission ----------------------------------------------------------------------------------------------------

    def _drawn(self, event: ev.PromptsDrawn) -> None:
        curve = next(iter(self.engines.curves.values()), None)
        self._prompts.add_window(event.prompts, self.pool, curve, len(self.engines.by_id))
        self._admit()

    def _evaluate(self, event: ev.EvaluationRequested) -> None:
        if event.samples < 1:
            raise ev.ProtocolError(
                f"evaluation with {event.samples} samples per prompt: at least 1"
            )
        self._prompts.add_evaluation(event)
        self._admit()

    def _admit(self) -> None:
        """Opens groups while engines have room, evaluation first; training groups only while they can still be trained in time."""
        queue = self._prompts
        while queue.held_out or queue.training:
            engine = self.engines.best_with_room(self.config.group_size)
            if engine is None:
                return
            if queue.held_out and engine.version >= queue.held_out[0].min_version:
                prompt, samples, _ = queue.held_out.popleft()
                self._open(prompt, "eval", engine, samples, samples, 0, "longest")
            elif (
                queue.training
                and not (self.admission_paused or self.run_ended)
                and self._handover.has_room(engine.version)
            ):
                prompt, budget = queue.training.popleft()
                self._open_training(prompt, budget, engine)
            else:
                return

    def _open_training(self, prompt: ev.Prompt, budget: Budget | None, engine: Engine) -> None:
        config = self.config
        stats = lengths.estimate(prompt.lengths, self.pool)
        if budget is None:
            batch = min(engine.load + config.group_size, engine.slots)
            budget = self._budgeter.one(
                stats, self.pool, self.engines.curves[engine.engine_type], batch
            )
        mode = config.long_end if config.policy == "darts" else "longest"
        if config.policy == "darts" and budget.saturated:
            mode = "none"
        num_long = 0 if mode == "none" else config.num_long
        self._open(prompt, "train", engine, budget.rollouts, config.group_size, num_long, mode)

    def _open(
        self,
        prompt: ev.Prompt,
        purpose: ev.Purpose,
        engine: Engine,
        budget: int,
        size: int,
        num_long: int,
        mode: LongEnd,
    ) -> None:
        group = Group(
            self._next_group, prompt, purpose, engine.engine_id, engine.version, self.policy_version, budget, size, num_long, mode,
            deque(Planned() for _ in range(budget)),
        )  # fmt: skip
        self._next_group += 1
        self.groups[group.group_id] = group
        if purpose == "train":
            self._handover.add(group)
        self._out.append(
            ev.OpenGroup(group.group_id, prompt.prompt_id, purpose, engine.engine_id, budget, mode)
        )
        engine.backlog.append(group)
        engine.queued += budget
        self._launch_backlog(engine)

    def _launch_backlog(self, engine: Engine) -> None:
        while engine.backlog and len(engine.in_flight) < engine.slots:
            group = engine.backlog[0]
            planned = group.planned.popleft()
            engine.queued -= 1
            if not group.planned:
                engine.backlog.popleft()
            before = planned.continues
            rollout = Rollout(
                self._next_rollout, group, engine.engine_id, planned.attempt,
                before.tokens if before else 0, before.oldest_version if before else engine.version,
            )  # fmt: skip
            self._next_rollout += 1
            group.add(rollout)
            engine.in_flight[rollout.rollout_id] = rollout
            self.rollouts[rollout.rollout_id] = rollout
            if before is not None:
                before.tokens = 0  # not lost after all: they are the beginning of this one
            self._out.append(
                ev.Launch(
                    rollout.rollout_id,
                    group.group_id,
                    engine.engine_id,
                    before.rollout_id if before else None,
                )
            )
        self.engines.touch(engine)

    def _paused(self, event: ev.AdmissionPaused) -> None:
        self.admission_paused = event.paused
        self._admit()

    def _ended(self, event: ev.RunEnded) -> None:
        self.run_ended = True
        self.requested_step = None
        self._prompts.training.clear()
        for group in [g for g in self.groups.values() if g.purpose == "train"]:
            self._drop(group, "run_ended", requeue=False)
        self._admit()

    def _pool_restored(self, event: ev.PoolRestored) -> None:
        self.pool = event.lengths

    # Engines ------------------------------------------------------------------------------------------------------

    def _joined(self, event: ev.ActorJoined) -> None:
        if event.engine_id in self.engines.by_id:
            raise ev.ProtocolError(
                f"engine {event.engine_id} has joined already: it must be lost before it can join again"
            )
        if event.slots < 1 or event.policy_version > self.policy_version:
            raise ev.ProtocolError(
                f"engine {event.engine_id} joins with {event.slots} slots and policy version {event.policy_version}: "
                f"at least 1 slot, and no version above {self.policy_version}"
            )
        self.engines.join(
            Engine(event.engine_id, event.engine_type, event.slots, event.policy_version)
        )
        self._rehome()
        self._admit()

    def _lost(self, event: ev.ActorLost) -> None:
        engine = self._engine(event.engine_id)
        self.engines.leave(engine)
        groups = {r.group.group_id: r.group for r in engine.in_flight.values()}
        groups |= {g.group_id: g for g in engine.backlog}
        for rollout in engine.in_flight.values():
            del self.rollouts[rollout.rollout_id]
            if rollout.state is RolloutState.RUNNING:
                self._lose(rollout, keep_tokens=True)
        self._homeless.extend(
            g for g in groups.values() if g.state is GroupState.OPEN and g.planned
        )
        for group in groups.values():
            self._review(group)
        self._rehome()
        self._admit()

    def _loaded(self, event: ev.PolicyLoaded) -> None:
        engine = self._engine(event.engine_id)
        if not engine.version <= event.version <= self.policy_version:
            raise ev.ProtocolError(
                f"engine {event.engine_id} loaded policy version {event.version}: it had {engine.version}, "
                f"the newest is {self.policy_version}"
            )
        engine.version = event.version
        self.engines.touch(engine)
        self._rehome()
        self._admit()

    def _latency(self, event: ev.LatencyReported) -> None:
        engine = self._engine(event.engine_id)
        if not self.engines.curves[engine.engine_type].observe(event.batch, event.ms_per_token):
            self.num_ignored_reports += 1

    def _rehome(self) -> None:
        """Groups whose engine is gone continue on another that samples from a policy no older than theirs."""
        for _ in range(len(self._homeless)):
            group = self._homeless.popleft()
            engine = self.engines.least_loaded(group.floor)
            if engine is None:
                self._homeless.append(group)
                continue
            group.engine_id = engine.engine_id
            engine.backlog.appendleft(group)
            engine.queued += len(group.planned)
            self._launch_backlog(engine)

    def _engine(self, engine_id: str) -> Engine:
        engine = self.engines.by_id.get(engine_id)
        if engine is None:
            raise ev.ProtocolError(
                f"engine {engine_id} has not joined (known: {', '.join(sorted(self.engines.by_id)) or 'none'})"
            )
        return engine

    # Learner ------------------------------------------------------------------------------------------------------

    def _learner_joined(self, event: ev.LearnerJoined) -> None:
        """Whatever its predecessor held and never trained is offered again; `_published` drops what is too old by then."""
        self.requested_step = None
        for group in self.groups.values():
            if group.state is GroupState.HANDED:
                group.move(GroupState.READY)
                self._handover.add(group)

    def _published(self, event: ev.PolicyPublished) -> None:
        if event.version <= self.policy_version:
            raise ev.ProtocolError(
                f"policy version {event.version} published after {self.policy_version}: versions grow"
            )
        self._handover.published(event.version)
        for group in self._handover.stale():
            self._drop(group, "stale", requeue=True)
        self._admit()

    def _requested(self, event: ev.ShardsRequested) -> None:
        if self.requested_step is not None:
            raise ev.ProtocolError(
                f"shards of step {event.step} requested while step {self.requested_step} is still to be answered"
            )
        if self._handover.steps_left < 1:
            raise ev.ProtocolError(
                f"shards of step {event.step} requested, but version {self.policy_version} has been given its "
                f"{self.config.steps_per_version} step(s): publish first"
            )
        self.requested_step = event.step
        for group in self._handover.due():
            if group.state is not GroupState.OPEN:
                continue
            if len(group.finished) < group.group_size and self.config.on_deadline == "drop":
                self._drop(group, "deadline", requeue=True)
                continue
            group.release = self.config.release_at_deadline
            self._review(group)
        self._serve()
        self._admit()

    def _serve(self) -> None:
        """Answers the learner once a full batch is ready, with every group that is due in it; oldest first."""
        if self.requested_step is None:
            return
        batch = self._handover.take_batch()
        if not batch:
            return
        step, self.requested_step = self.requested_step, None
        for group in batch:
            group.shipped_version = self.policy_version
            self._prompts.shipped(group.prompt)
            self._out.append(ev.Ship(step, group.record("shipped")))

    def _trained(self, event: ev.GroupTrained) -> None:
        group = self.groups.get(event.group_id)
        if group is None or group.state is not GroupState.HANDED:
            raise ev.ProtocolError(
                f"group {event.group_id} reported as trained, but no learner has it"
            )
        group.move(GroupState.CLOSED)
        del self.groups[event.group_id]
