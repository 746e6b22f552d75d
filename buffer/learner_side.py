"""The buffer's side of the learner: pulls become shards, trained steps become rows of the run's records.

    consumes       LearnerHello, Pull, Trained, Published, LearnerFailed
    waits for      a full batch of ready groups, which the core ships
    unblocked by   the core's `Ship`, and `Close` once the learner says that it has trained

Owns the step that is being shipped: since when it was asked for, and its groups and shards. Driven by
`buffer.service`.
"""

from __future__ import annotations

import time
from typing import Any

from buffer.peers import Peer
from buffer.run_state import RunFailed, RunState
from buffer.shards import balance
from buffer.wire import messages as msg
from darts import events as ev

SAMPLED_GROUPS = 2  # per step, written to samples.jsonl


class LearnerSide:
    """`handle` takes messages, `ship` and `group_trained` take decisions."""

    def __init__(self, run: RunState) -> None:
        self.run = run
        self._handlers: dict[type, Any] = {
            msg.Pull: self._pull,
            msg.Trained: self._trained,
            msg.Published: self._published,
            msg.LearnerFailed: self._failed,
        }
        self._num_ranks = 0
        self._pulls: dict[int, tuple[int, float]] = {}  # rank -> step asked for, and since when
        self._shards: dict[int, msg.Shard] = {}  # rank -> its shard, until it has asked for it
        self._shipped: list[ev.GroupRecord] = []  # the groups of the step in the learner's hands
        self._closed: list[ev.GroupRecord] = []  # those of them that were trained
        self._num_loss_tokens = 0  # of that step
        self._num_trained = 0
        self._trained_metrics: dict[str, float] = {}
        self._waited_s = 0.0
        self._row_s = time.monotonic()

    @property
    def trains(self) -> bool:
        """Whether a step is in a learner's hands."""
        return bool(self._shipped) and bool(self.run.peers.ranks())

    # Peers --------------------------------------------------------------------------------------------

    def hello(self, identity: bytes, hello: msg.LearnerHello) -> list[ev.Event]:
        """Rank 0 says hello last: then a whole learner is there, and an earlier one is gone."""
        run = self.run
        if (
            not 0
            <= hello.rank
            < hello.num_ranks
            <= run.config.batch.groups * run.config.darts.group_size
        ):
            raise ev.ProtocolError(
                f"a learner's rank {hello.rank} of {hello.num_ranks}: "
                "each rank trains on at least one trajectory"
            )
        run.require_own(hello.run)
        events: list[ev.Event] = []
        known = run.peers.rank(hello.rank)
        if known is None or known.identity != identity:
            if known is not None:
                error = f"process {hello.pid} has joined as learner rank {hello.rank}"
                run.send(known, msg.Shutdown(error=error))
                run.peers.remove(known)
            run.peers.add(Peer(identity, time.monotonic(), rank=hello.rank))
            if hello.rank == 0:
                if hello.step != run.step:
                    run.rewind(hello.step)
                self._num_ranks = hello.num_ranks
                for held in (self._shards, self._shipped, self._pulls):
                    held.clear()
                events.append(ev.LearnerJoined())
                run.say(f"learner joined with {hello.num_ranks} rank(s) at step {hello.step}")
        version = max(run.core.policy_version, run.base_version)
        run.router.send(identity, msg.LearnerWelcome(policy_version=version, run=run.run_id))
        return events

    def lose(self, peer: Peer, reason: str) -> list[ev.Event]:
        self.run.peers.remove(peer)
        self.run.warn(f"{peer.name} is lost ({reason}); restart the learner with run.resume=true")
        return []

    # Decisions ----------------------------------------------------------------------------------------

    def ship(self, decision: ev.Ship) -> None:
        self._shipped.append(decision.record)
        if len(self._shipped) == self.run.config.batch.groups:
            self._make_shards(decision.step)
            self._answer()

    def _make_shards(self, step: int) -> None:
        selected = [t for record in self._shipped for t in self._trajectories(record)]
        whole = self.run.config.loss.train_truncated
        trajectories = [t for t in selected if whole or not t.truncated]
        self._num_loss_tokens = sum(t.sampled.count(1) for t in trajectories)
        self._waited_s = time.monotonic() - self._pulls[0][1]
        costs = [len(t.tokens) // 4 for t in trajectories]
        for rank, indices in enumerate(balance(costs, self._num_ranks)):
            self._shards[rank] = msg.Shard(
                step=step,
                policy_version=self.run.core.policy_version,
                trajectories=[trajectories[i] for i in indices],
                step_loss_tokens=self._num_loss_tokens,
            )

    def _trajectories(self, record: ev.GroupRecord) -> list[msg.Trajectory]:
        selected = [r for r in record.rollouts if r.end.startswith("selected")]
        rewards = [r.reward for r in selected if r.reward is not None]
        assert len(rewards) == len(selected), "a selected rollout has no reward"
        return [
            self.run.store.trajectory(r.rollout_id, reward, r.truncated, rewards)
            for r, reward in zip(selected, rewards, strict=True)
        ]

    def _answer(self) -> None:
        for peer in self.run.peers.ranks():
            shard = self._shards.get(peer.rank)
            if shard is not None and self._pulls.get(peer.rank, (-1, 0.0))[0] == shard.step:
                self.run.send(peer, self._shards.pop(peer.rank))

    def group_trained(self, record: ev.GroupRecord) -> dict[str, Any] | None:
        """Record a group that was trained. Returns the row of its step once all of them are in."""
        run = self.run
        if len(self._closed) < SAMPLED_GROUPS:
            self._write_samples(record)
        self._closed.append(record)
        run.forget(record)
        run.prompts.done(record.prompt_id)
        run.record(record)
        if len(self._closed) < run.config.batch.groups:
            return None
        records, self._closed = self._closed, []
        return self._finish_step(records)

    def _finish_step(self, records: list[ev.GroupRecord]) -> dict[str, Any]:
        run, now = self.run, time.monotonic()
        row: dict[str, Any] = {
            "step": run.step,
            "time_s": run.now(),
            "policy_version": records[0].shipped_version,
        }
        run.metrics.trained(self._num_trained)
        row |= run.metrics.row(records) | self._trained_metrics
        row["wait/learner_s"] = self._waited_s
        row["wait/learner_frac"] = min(1.0, self._waited_s / max(1e-9, now - self._row_s))
        row["engine/ignored_reports"] = run.core.num_ignored_reports
        row["wire/refused_frames"] = run.router.num_rejected
        self._row_s = now
        run.step += 1
        run.journal.save_cursor(run.step, run.prompts.cursor)
        run.log.flush()
        return row

    def _write_samples(self, record: ev.GroupRecord) -> None:
        payload = self.run.prompts.payload(record.prompt_id)
        prompt = payload.text or "\n".join(f"{m['role']}: {m['content']}" for m in payload.messages)
        for r in record.rollouts:
            if r.end.startswith("selected"):
                self.run.files.sample(
                    {
                        "step": self.run.step,
                        "prompt_id": record.prompt_id,
                        "prompt": prompt,
                        "response": self.run.texts[r.rollout_id],
                        "tokens": r.tokens,
                        "reward": r.reward,
                        "end": r.end,
                    }
                )

    # Messages -----------------------------------------------------------------------------------------

    def handle(self, peer: Peer, message: msg.Message) -> list[ev.Event]:
        """The events that a message means. Raises ProtocolError, with nothing changed."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ev.ProtocolError(f"a {type(message).__name__} is not {peer.name}'s to send")
        return handler(peer, message)

    def _pull(self, peer: Peer, message: msg.Pull) -> list[ev.Event]:
        """Rank 0 publishes and acknowledges before it pulls; another rank may be early by one step."""
        step = self.run.step
        if not step <= message.step <= step + (peer.rank > 0):
            raise ev.ProtocolError(
                f"{peer.name} pulls step {message.step}, but step {step} is next"
            )
        self._pulls[peer.rank] = (message.step, time.monotonic())
        self._answer()
        if peer.rank == 0 and not self._shipped and self.run.core.requested_step is None:
            return [ev.ShardsRequested(message.step)]
        return []

    def _published(self, peer: Peer, message: msg.Published) -> list[ev.Event]:
        run, version = self.run, message.policy.version
        if version <= run.core.policy_version:
            raise ev.ProtocolError(
                f"{peer.name} published version {version} after {run.core.policy_version}: versions grow"
            )
        run.policy = message.policy
        for engine in run.peers.engines():
            run.send(engine, msg.PolicyPublished(policy=message.policy))
        return [ev.PolicyPublished(version)]

    def _trained(self, peer: Peer, message: msg.Trained) -> list[ev.Event]:
        run = self.run
        if message.step != run.step or len(self._shipped) != run.config.batch.groups:
            raise ev.ProtocolError(
                f"{peer.name} trained step {message.step}, which it was not handed "
                f"(step {run.step} is next)"
            )
        if not 0 <= message.num_tokens <= self._num_loss_tokens:
            raise ev.ProtocolError(
                f"{peer.name} trained on {message.num_tokens} tokens of step {message.step}, which "
                f"has {self._num_loss_tokens}"
            )
        records, self._shipped = self._shipped, []
        self._num_trained, self._trained_metrics = message.num_tokens, message.metrics
        return [ev.GroupTrained(record.group_id) for record in records]

    def _failed(self, peer: Peer, message: msg.LearnerFailed) -> list[ev.Event]:
        raise RunFailed(f"learner rank {message.rank} failed: {message.error}")
