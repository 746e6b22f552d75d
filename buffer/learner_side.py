"""The buffer's side of the learner: pulls become shards, and trained steps become records.

    consumes       LearnerHello, Pull, Trained, NewPolicy, Published, LearnerFailed, Leaving
    waits for      a full batch of ready groups, or a portion of it, which the core ships
    unblocked by   the core's `Ship`, and `Close` once the learner says that it has trained

Owns the step that is being shipped: the times of its requests, its groups and its shards. Driven by
`buffer.service`.
"""

from __future__ import annotations

import time
from statistics import fmean
from typing import Any

from buffer.advantages import group_advantages, overlong_penalty
from buffer.peers import Peer
from buffer.records.event_log import Learner, Policy, Trained
from buffer.records.signal_watch import SignalWatch
from buffer.run_state import RunFailed, RunState
from buffer.shards import make_shards
from buffer.wire import messages as msg
from configs.objectives import objective
from darts import events as ev
from darts.state.groups import GroupState

SAMPLED_GROUPS = 2  # per step, written to samples.jsonl
# A publication may skip versions that were lost with an earlier buffer, but not more than this.
MAX_VERSIONS_AHEAD = 1000


class LearnerSide:
    """`handle` takes messages, `ship` and `group_trained` take decisions.

    `answer` sends a portion once all decisions of an event were taken.
    """

    def __init__(self, run: RunState) -> None:
        self.run = run
        self._handlers: dict[type, Any] = {
            msg.Pull: self._pull,
            msg.Trained: self._trained,
            msg.NewPolicy: self._new_policy,
            msg.Published: self._published,
            msg.LearnerFailed: self._failed,
            msg.Leaving: self._leaving,
        }
        self._signal = SignalWatch(run.config.run.steps)
        self._pulls: dict[int, tuple[msg.Pull, float]] = {}  # rank -> request, and since when
        self._shipped: list[ev.Ship] = []  # groups of the step that the learner has or may pull
        # Portion of that step -> its shards by rank, once a rank asked for them.
        self._shards: dict[int, list[msg.Shard]] = {}
        self._closed: list[ev.GroupRecord] = []  # those of its groups that were trained
        self._num_trained = 0  # tokens of that step, as reported by the learner
        self._trained_metrics: dict[str, float] = {}
        self._waited_s = 0.0
        self._row_s = time.monotonic()

    @property
    def trains(self) -> bool:
        """Whether a learner has a whole step to train."""
        return self._is_shipped and bool(self.run.peers.ranks())

    # Peers
    # ----------------------------------------------------------------------------------------------

    def hello(self, identity: bytes, hello: msg.LearnerHello) -> list[ev.Event]:
        """A rank joins, over its first connection or another one.

        Rank 0 of a new learner says hello last, so the whole learner is then ready, and replaces an
        earlier one.
        """
        run = self.run
        known = run.peers.rank(hello.rank)
        is_same = run.learner is not None and hello.incarnation == run.learner.incarnation
        events: list[ev.Event] = []
        if known is None or known.identity != identity:
            self._check_hello(hello, is_same)
            if known is not None and not self._gives_way(known, hello):
                return []  # it is asked again in a second
            if known is not None:
                error = f"process {hello.pid} has joined as learner rank {hello.rank}"
                run.send(known, msg.Shutdown(error=error))
                run.peers.remove(known)
            if hello.rank == 0 and not is_same:
                events += self._new_learner(hello)
            peer = Peer(identity, time.monotonic(), incarnation=hello.incarnation, rank=hello.rank)
            run.peers.add(peer)
        welcome = msg.LearnerWelcome(
            policy_version=run.core.policy_version,
            offered_version=run.offered_version,
            run=run.run_id,
            evaluated=run.evaluated if hello.rank == 0 else None,
        )
        run.send_to(identity, welcome)
        return events

    def tell_evaluated(self) -> None:
        """Send the newest evaluation to the rank that keeps or removes checkpoints."""
        leader = self.run.peers.rank(0)
        if leader is not None and self.run.evaluated is not None:
            self.run.send(leader, self.run.evaluated)

    def _check_hello(self, hello: msg.LearnerHello, is_same: bool) -> None:
        run = self.run
        most = run.config.batch.groups * run.config.darts.group_size
        if not 0 <= hello.rank < hello.num_ranks <= most:
            raise ev.ProtocolError(
                f"a learner has rank {hello.rank} of {hello.num_ranks}: "
                "each rank needs at least one trajectory of a step"
            )
        run.require_own(hello.run)
        if is_same:
            return
        if not hello.resumed and (run.step or self._shipped):
            raise ev.ProtocolError(
                f"this learner starts from the beginning, but {run.folder} is at step {run.step}: "
                "start it with run.resume=true"
            )
        if hello.step > run.step + bool(self._is_shipped):
            raise ev.ProtocolError(
                f"this learner has trained {hello.step} steps, but {run.folder} records "
                f"{run.step}: its checkpoint is from another folder, or the folder is an older copy"
            )
        if hello.step < (first := run.files.first_rewind(run.step)):
            raise ev.ProtocolError(
                f"this learner resumes at step {hello.step}, but the records of {run.folder} allow "
                f"that only from step {first} on: buffer.keep_row_bytes="
                f"{run.config.buffer.keep_row_bytes} bounds them. Resume from a newer checkpoint"
            )
        if run.core.run_ended and hello.step < run.step:
            raise ev.ProtocolError(
                f"this learner resumes at step {hello.step}, but all {run.step} steps of "
                f"{run.folder} are done: its last checkpoint is missing"
            )

    def _gives_way(self, known: Peer, hello: msg.LearnerHello) -> bool:
        """Whether the place of `known` is free. Raises ProtocolError if another learner lives."""
        if known.incarnation == hello.incarnation or hello.take_over:
            return True
        free = self.run.gives_way(known, hello.incarnation)
        if free is False:
            raise ev.ProtocolError(
                f"{known.name} is training this run already; stop that learner, "
                "or start this one with learner.take_over=true"
            )
        return bool(free)

    def _new_learner(self, hello: msg.LearnerHello) -> list[ev.Event]:
        run = self.run
        events: list[ev.Event] = []
        if hello.step == run.step + 1:  # it trained the batch, and its report was lost
            self._log_trained(Trained(run.step, 0, {}))
            events += self._all_trained()
        elif hello.step < run.step:
            run.rewind(hello.step)
        self.forget_step()
        learner = Learner(hello.incarnation, hello.num_ranks, hello.vocab_size, hello.work)
        run.set_learner(learner)
        run.log.note(learner, run.now())
        run.say(f"learner joined with {hello.num_ranks} rank(s) at step {hello.step}")
        return [*events, ev.LearnerJoined()]

    def forget_step(self) -> None:
        """Forget the shipped step, because a new learner has none yet."""
        self._closed, self._shipped, self._waited_s = [], [], 0.0
        self._shards.clear()
        self._pulls.clear()

    def forget_taken_back(self) -> None:
        """Forget groups of a portion that lost tokens before it was sent."""
        groups = self.run.core.groups
        self._shipped = [
            ship
            for ship in self._shipped
            if (group := groups.get(ship.record.group_id)) and group.state is GroupState.SHIPPED
        ]

    def lose(self, peer: Peer, reason: str, keep_tokens: bool = True) -> list[ev.Event]:
        self.run.peers.remove(peer)
        self.run.warn(f"{peer.name} is lost ({reason}); restart the learner with run.resume=true")
        return []

    def restore(self) -> list[ev.Event]:
        """After a restart of the buffer, keep the groups that the learner still has, or may pull.

        If the learner had reported their step, those that are still open close now. A portion is
        not kept if tokens of it were lost.
        """
        self.forget_taken_back()
        return [] if self.run.reported_step < self.run.step else self._all_trained()

    # Decisions
    # ----------------------------------------------------------------------------------------------

    @property
    def _is_shipped(self) -> bool:
        """Whether the learner has a whole batch, including groups that closed already."""
        return len(self._shipped) + len(self._closed) == self.run.config.batch.groups

    @property
    def _num_portions(self) -> int:
        """Portions of the step that were shipped."""
        return self._shipped[-1].portion + 1 if self._shipped else 0

    def ship(self, decision: ev.Ship) -> None:
        self._shipped.append(decision)

    def answer(self) -> None:
        """Send its shard to each rank that has asked for it, as often as it asks."""
        run = self.run
        if not self._shipped or run.learner is None or run.replaying or self._closed:
            return
        for rank, (pull, since_s) in list(self._pulls.items()):
            peer, portion = run.peers.rank(rank), pull.portion
            if peer is None or pull.step != run.step or rank >= run.learner.num_ranks:
                continue
            if portion < self._num_portions:
                if portion not in self._shards:
                    self._waited_s += time.monotonic() - since_s
                    self._shards[portion] = self._make_shards(run.learner, portion)
                del self._pulls[rank]
                run.send(peer, self._shards[portion][peer.rank])

    def _make_shards(self, learner: Learner, portion: int) -> list[msg.Shard]:
        """One shard per rank. The same portion always gives the same shards.

        Its order is that of the visits, and of the responses to each. Groups and rollouts have
        other numbers after a restart, and sums of floating-point numbers depend on their order.
        """
        run = self.run
        run.make_durable()
        records = [ship.record for ship in self._shipped if ship.portion == portion]
        records.sort(key=lambda record: record.visit)
        is_whole = len(records) == run.config.batch.groups
        size = len(records) // (run.config.batch.updates if is_whole else 1)
        return make_shards(
            [
                [t for record in records[start : start + size] for t in self._trajectories(record)]
                for start in range(0, len(records), size)
            ],
            run.config.loss,
            learner,
            step=run.step,
            policy_version=records[0].shipped_version,
            portion=portion,
            last=self._is_shipped and portion == self._num_portions - 1,
        )

    def _trajectories(self, record: ev.GroupRecord) -> list[msg.Trajectory]:
        selected = [r for r in record.rollouts if r.end.startswith("selected")]
        selected.sort(key=lambda rollout: rollout.index)
        rewards = [r.reward for r in selected if r.reward is not None]
        assert len(rewards) == len(selected), "a selected rollout has no reward"
        shaped = [
            reward + self._overlong_penalty(r) for r, reward in zip(selected, rewards, strict=True)
        ]
        advantages = group_advantages(shaped, objective(self.run.config.loss))
        return [
            self.run.store.trajectory(r.rollout_id, reward, r.truncated, advantage)
            for r, reward, advantage in zip(selected, rewards, advantages, strict=True)
        ]

    def _overlong_penalty(self, rollout: ev.RolloutRecord) -> float:
        config = self.run.config
        return overlong_penalty(rollout.tokens, config.sampling.max_tokens, config.loss)

    def note_trained(self, note: Trained) -> None:
        """Take the learner's report about the step whose groups are about to close."""
        self.run.reported_step = note.step
        self._num_trained, self._trained_metrics = note.num_tokens, note.metrics

    def group_trained(self, record: ev.GroupRecord) -> dict[str, Any] | None:
        """Record a group that was trained. Returns the row of its step after the last group."""
        run = self.run
        self._closed.append(record)
        run.forget(record)
        run.record(record)
        run.prompts.done(record.visit)
        if len(self._closed) < run.config.batch.groups:
            return None
        records, self._closed = sorted(self._closed, key=lambda record: record.visit), []
        return self._finish_step(records)

    def _finish_step(self, records: list[ev.GroupRecord]) -> dict[str, Any]:
        run, now = self.run, time.monotonic()
        row: dict[str, Any] = {
            "step": run.step,
            "time_s": run.now(),
            "policy_version": records[0].shipped_version,
        }
        run.metrics.trained(self._num_trained)
        # The learner's metrics come first, so that none of them can replace one of the buffer's.
        row = self._trained_metrics | row | run.metrics.row(records) | run.probes.row()
        row["reward/overlong_mean"] = fmean(
            self._overlong_penalty(rollout)
            for record in records
            for rollout in record.rollouts
            if rollout.end.startswith("selected")
        )
        row["wait/learner_s"] = self._waited_s
        row["wait/learner_frac"] = min(1.0, self._waited_s / max(1e-9, now - self._row_s))
        row["data/skipped_prompts"] = run.skipped.num_skipped
        row["engine/ignored_reports"] = run.core.num_ignored_reports
        row["wire/refused_frames"] = run.router.num_rejected
        line = self._signal.look(row)
        if line and not run.replaying:
            run.warn(line)
        self._row_s = now
        self._shipped, self._waited_s = [], 0.0
        run.step += 1
        return row

    def _write_samples(self, record: ev.GroupRecord) -> None:
        payload = self.run.prompts.payload(record.visit)
        prompt = payload.text or "\n".join(f"{m['role']}: {m['content']}" for m in payload.messages)
        cancelled = self.run.cancelled_texts.of(record)
        for r in record.rollouts:
            selected = r.end.startswith("selected")
            if selected or r.rollout_id in cancelled:
                text = self.run.store.text(r.rollout_id) if selected else cancelled[r.rollout_id]
                self.run.files.samples.append(
                    {
                        "step": self.run.step,
                        "prompt_id": record.prompt_id,
                        "prompt": prompt,
                        "response": text,
                        "tokens": r.tokens,
                        "reward": r.reward,
                        "end": r.end,
                    }
                )

    # Messages
    # ----------------------------------------------------------------------------------------------

    def handle(self, peer: Peer, message: msg.Message) -> list[ev.Event]:
        """The events that follow from a message. Raises `ProtocolError`, with nothing changed."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ev.ProtocolError(f"{peer.name} may not send a {type(message).__name__}")
        if self.run.learner is None or peer.incarnation != self.run.learner.incarnation:
            raise ev.ProtocolError(f"{peer.name} is none of the learner that trains this run")
        return handler(peer, message)

    def _pull(self, peer: Peer, message: msg.Pull) -> list[ev.Event]:
        """Rank 0 publishes and reports before it pulls. Another rank may be one step early."""
        step, portion = self.run.step, message.portion
        if not step <= message.step <= step + (peer.rank > 0):
            raise ev.ProtocolError(
                f"{peer.name} pulls step {message.step}, but step {step} is next"
            )
        num_portions = self._num_portions if message.step == step else 0
        is_next = portion == num_portions
        if portion > num_portions or (is_next and message.step == step and self._is_shipped):
            raise ev.ProtocolError(
                f"{peer.name} pulls portion {portion} of step {message.step}, of which "
                f"{num_portions} were shipped"
            )
        self._pulls[peer.rank] = (message, time.monotonic())
        self.answer()
        if peer.rank == 0 and is_next and self.run.core.requested_step is None:
            return [ev.ShardsRequested(message.step, portion)]
        return []

    def _new_policy(self, peer: Peer, message: msg.NewPolicy) -> list[ev.Event]:
        """Count from now on with the learner's new version. A repeated message changes nothing."""
        newest, version = self.run.core.policy_version, message.version
        if not newest <= version <= newest + MAX_VERSIONS_AHEAD:
            raise ev.ProtocolError(
                f"{peer.name} has version {version} after {newest}: versions must grow, by at "
                f"most {MAX_VERSIONS_AHEAD}"
            )
        return [ev.PolicyPublished(version)] if version > newest else []

    def _published(self, peer: Peer, message: msg.Published) -> list[ev.Event]:
        """Tell engines of a snapshot. A repeated message changes nothing.

        After a restart of the buffer it may come before the `NewPolicy` of its version.
        """
        run, version = self.run, message.policy.version
        events = self._new_policy(peer, msg.NewPolicy(version=version))
        if run.policy == message.policy:
            return []
        if version <= run.offered_version:
            raise ev.ProtocolError(
                f"{peer.name} published another snapshot of version {version}: a version has one"
            )
        run.policy = message.policy
        run.log.note(Policy(message.policy), run.now())
        run.probes.published(version, message.probe)
        for engine in run.peers.engines():
            run.send(engine, msg.PolicyPublished(policy=message.policy))
        return events

    def _trained(self, peer: Peer, message: msg.Trained) -> list[ev.Event]:
        run = self.run
        if peer.rank != 0:
            raise ev.ProtocolError(f"{peer.name} reports a step, but only rank 0 may")
        if message.step < run.step:
            self.acknowledge(message.step)
            return []
        if message.step != run.step or not self._is_shipped:
            raise ev.ProtocolError(
                f"{peer.name} trained step {message.step}, which it was not sent "
                f"(step {run.step} is next)"
            )
        most = sum(
            r.tokens
            for record in [*(ship.record for ship in self._shipped), *self._closed]
            for r in record.rollouts
            if r.end.startswith("selected")
        )
        if not 0 <= message.num_tokens <= most:
            raise ev.ProtocolError(
                f"{peer.name} trained on {message.num_tokens} tokens of step {message.step}, which "
                f"has only {most}"
            )
        self._log_trained(Trained(message.step, message.num_tokens, message.metrics))
        trained = self._all_trained()
        self._shipped = []
        self._shards.clear()
        return trained

    def _all_trained(self) -> list[ev.Event]:
        return [ev.GroupTrained(ship.record.group_id) for ship in self._shipped]

    def _log_trained(self, note: Trained) -> None:
        """Record the report, and samples of its step before it.

        After a restart, a step that the log records has its samples, and those of a later step are
        cut.
        """
        for ship in self._shipped[:SAMPLED_GROUPS]:
            self._write_samples(ship.record)
        self.run.files.sync()
        self.note_trained(note)
        self.run.log.note(note, self.run.now())

    def acknowledge(self, step: int) -> None:
        """Tell the learner that the step is durably recorded."""
        run = self.run
        rank0 = run.peers.rank(0)
        if rank0 is not None and not run.replaying:
            run.make_durable()
            run.send(rank0, msg.Acknowledged(step=step))

    def _leaving(self, peer: Peer, message: msg.Leaving) -> list[ev.Event]:
        self.run.peers.remove(peer)
        self.run.say(f"{peer.name} has left; a learner with run.resume=true may take its place")
        return []

    def _failed(self, peer: Peer, message: msg.LearnerFailed) -> list[ev.Event]:
        raise RunFailed(f"learner rank {message.rank} failed: {message.error}")
