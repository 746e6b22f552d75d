"""The buffer's side of the learner: pulls become shards, trained steps become rows of the run's records.

Driven by the service. Holds the step that is being handed over: who asked since when, what was shipped for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from buffer.peers import Peer
from buffer.run_state import Run, RunFailed
from buffer.shards import balance
from buffer.wire import messages as msg
from darts import events as ev

SAMPLED_GROUPS = 2  # per step, written to samples.jsonl


class LearnerSide:
    """Handlers by message type in `handlers`; `ship` takes the core's decisions. `on_published` and `on_step` say what follows."""

    def __init__(
        self, run: Run, on_published: Callable[[], None], on_step: Callable[[dict[str, Any]], None]
    ) -> None:
        self.run = run
        self.handlers: dict[type, Any] = {
            msg.Pull: self._pull, msg.Trained: self._trained, msg.Published: self._published, msg.LearnerFailed: self._failed,
        }  # fmt: skip
        self._on_published, self._on_step = on_published, on_step
        self._num_ranks = 0
        self._pulls: dict[
            int, tuple[int, float]
        ] = {}  # rank -> the step whose shard it asks for, and since when
        self._shards: dict[int, msg.Shard] = {}  # rank -> its shard, until it has asked for it
        self._shipped: list[ev.GroupRecord] = []  # the step's groups
        self._waited_s = 0.0
        self._row_s = time.monotonic()

    def hello(self, identity: bytes, hello: msg.LearnerHello) -> None:
        """Rank 0 speaks last, so its hello means that a whole learner is there, and that an earlier one is gone."""
        run = self.run
        if (
            not 0
            <= hello.rank
            < hello.num_ranks
            <= run.config.batch.groups * run.config.darts.group_size
        ):
            raise ev.ProtocolError(
                f"a learner's rank {hello.rank} of {hello.num_ranks}: each rank trains on at least one trajectory"
            )
        run.require_own(hello.run)
        known = run.peers.rank(hello.rank)
        if known is None or known.identity != identity:
            if known is not None:
                run.send(
                    known,
                    msg.Shutdown(
                        error=f"process {hello.pid} has joined as learner rank {hello.rank}"
                    ),
                )
                run.peers.remove(known)
            run.peers.add(Peer(identity, time.monotonic(), rank=hello.rank))
            if hello.rank == 0:
                if hello.step != run.step:
                    run.rewind(hello.step)
                self._num_ranks = hello.num_ranks
                for held in (self._shards, self._shipped, self._pulls):
                    held.clear()
                run.apply(ev.LearnerJoined(run.now()))
                run.say(f"learner joined with {hello.num_ranks} rank(s) at step {hello.step}")
        run.router.send(
            identity,
            msg.LearnerWelcome(
                policy_version=max(run.core.policy_version, run.base_version), run=run.run_id
            ),
        )

    @property
    def trains(self) -> bool:
        """Whether a learner has a step in its hands."""
        return bool(self._shipped) and bool(self.run.peers.ranks())

    def lose(self, peer: Peer, reason: str) -> None:
        self.run.peers.remove(peer)
        self.run.warn(f"{peer.name} is lost ({reason}); restart the learner with run.resume=true")

    def ship(self, decision: ev.Ship) -> None:
        self._shipped.append(decision.record)
        if len(self._shipped) == self.run.config.batch.groups:
            self._make_shards(decision.step)
            self._answer()

    def _pull(self, peer: Peer, message: msg.Pull) -> None:
        """Rank 0 publishes and acknowledges before it pulls, so its pull asks for the step; another rank's may be early by one."""
        if not self.run.step <= message.step <= self.run.step + (peer.rank > 0):
            raise ev.ProtocolError(
                f"{peer.name} pulls step {message.step}, but step {self.run.step} is next"
            )
        self._pulls[peer.rank] = (message.step, time.monotonic())
        if peer.rank == 0 and not self._shipped and self.run.core.requested_step is None:
            self.run.apply(ev.ShardsRequested(self.run.now(), message.step))
        self._answer()

    def _make_shards(self, step: int) -> None:
        trajectories = [t for record in self._shipped for t in self._trajectories(record)]
        sampled = [t.sampled.count(1) for t in trajectories]
        self._waited_s = time.monotonic() - self._pulls[0][1]
        for rank, indices in enumerate(
            balance([len(t.tokens) // 4 for t in trajectories], self._num_ranks)
        ):
            self._shards[rank] = msg.Shard(
                step=step,
                policy_version=self.run.core.policy_version,
                trajectories=[trajectories[i] for i in indices],
                step_sampled_tokens=sum(sampled),
                step_trained_tokens=sum(
                    n for n, t in zip(sampled, trajectories, strict=True) if not t.truncated
                ),
            )

    def _trajectories(self, record: ev.GroupRecord) -> list[msg.Trajectory]:
        scored = [
            (r.rollout_id, r.reward)
            for r in record.rollouts
            if r.end.startswith("selected") and r.reward is not None
        ]
        rewards = [reward for _, reward in scored]
        return [
            self.run.store.trajectory(i, reward, self.run.texts[i][1], rewards)
            for i, reward in scored
        ]

    def _answer(self) -> None:
        for peer in self.run.peers.ranks():
            shard = self._shards.get(peer.rank)
            if shard is not None and self._pulls.get(peer.rank, (-1, 0.0))[0] == shard.step:
                self.run.send(peer, self._shards.pop(peer.rank))

    def _published(self, peer: Peer, message: msg.Published) -> None:
        run = self.run
        run.policy = message.policy
        run.apply(ev.PolicyPublished(run.now(), message.policy.version))
        for engine in run.peers.engines():
            run.send(engine, msg.PolicyPublished(policy=message.policy))
        self._on_published()

    def _trained(self, peer: Peer, message: msg.Trained) -> None:
        run = self.run
        if message.step != run.step or len(self._shipped) != run.config.batch.groups:
            raise ev.ProtocolError(
                f"{peer.name} trained step {message.step}, which it was not handed (step {run.step} is next)"
            )
        records, self._shipped = self._shipped, []
        for record in records:
            if record.group_id in [r.group_id for r in records[:SAMPLED_GROUPS]]:
                self._write_samples(record, message.step)
            run.apply(ev.GroupTrained(run.now(), record.group_id))
            run.forget(record)
            run.prompts.done(record.prompt_id)
            run.record(record)
        now = time.monotonic()
        row: dict[str, Any] = {
            "step": message.step,
            "time_s": run.now(),
            "policy_version": records[0].shipped_version,
        }
        row |= run.metrics.row(records) | message.metrics
        row |= {
            "wait/learner_s": self._waited_s,
            "wait/learner_frac": min(1.0, self._waited_s / max(1e-9, now - self._row_s)),
        }
        row["engine/ignored_reports"] = run.core.num_ignored_reports
        self._row_s = now
        run.step += 1
        run.journal.save_cursor(run.step, run.prompts.cursor)
        run.log.flush()
        self._on_step(row)

    def _write_samples(self, record: ev.GroupRecord, step: int) -> None:
        payload = self.run.prompts.payload(record.prompt_id)
        prompt = payload.text or "\n".join(f"{m['role']}: {m['content']}" for m in payload.messages)
        for r in record.rollouts:
            if r.end.startswith("selected"):
                text = self.run.texts[r.rollout_id][0]
                row = {
                    "step": step,
                    "prompt_id": record.prompt_id,
                    "prompt": prompt,
                    "response": text,
                    "tokens": r.tokens,
                }
                self.run.recorder.sample(row | {"reward": r.reward, "end": r.end})

    def _failed(self, peer: Peer, message: msg.LearnerFailed) -> None:
        raise RunFailed(f"learner rank {message.rank} failed: {message.error}")
