"""The buffer's only loop: a message becomes an event, the core decides, decisions become messages.

    actors  ──Progress, Finished, Failed, Stopped, EngineReport──>  ┐          ┌ ──Launch, Cancel, PolicyPublished──> actors
                                                                    │ Service  │
    learner ──Pull, Published, Trained──────────────────────────>   ┘  (Core)  └ ──Shard──> learner     ──Snapshot──> monitors

    consumes       whatever peers send; garbage is counted and refused
    waits for      the next message, at most `POLL_S`
    unblocked by   the clock: heartbeats, statistics, peers that fell silent

Owns the run's directory, the trajectory store and the sockets. Decides nothing: what to launch, cancel, ship or drop is
`darts.core.Core`'s. One thread, so no message is handled while another is.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from buffer import messages as msg
from buffer import recorder
from buffer.event_log import EventLog
from buffer.metrics import Metrics
from buffer.peers import Peer, Peers
from buffer.prompts import make_sources
from buffer.shards import balance
from buffer.statistics import Latest, snapshot
from buffer.store import Journal, TrajectoryStore
from buffer.stream import PromptsOut
from buffer.transport import Publisher, Router, next_port
from configs.cli import to_yaml
from configs.core import core_config
from configs.schema import Config
from darts import events as ev
from darts.core import Core
from darts.lengths import LengthStats, spread

POLL_S = 0.05
HEARTBEAT_S = 1.0
STATISTICS_S = 0.5
SAMPLED_GROUPS = 2  # per step, written to samples.jsonl


class RunFailed(Exception):
    """The run cannot go on; one line says why."""


class Service:
    """One run's buffer, from its first prompt to its last metrics row. `serve` returns when the run is over."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.run.dir) / config.run.name
        sources = make_sources(config)
        self.router = Router(config.buffer.address, msg.Inbound, config.buffer.keys)
        self.publisher = Publisher(next_port(self.router.address), config.buffer.keys)
        self.step, self.base_version = self._open_folder()
        self.journal = Journal(self.folder / "journal.sqlite")
        self.prompts = PromptsOut(sources.train, self.journal.cursor(self.step) if self.step else None)
        self.eval_payloads = {p.prompt_id: p for p in sources.eval_prompts}
        self.store = TrajectoryStore(config.buffer.max_bytes)
        self.recorder = recorder.Recorder(self.folder)
        self.metrics = Metrics()
        self.metrics.restore(self.last_row)
        self.core = Core(core_config(config))
        self.log = EventLog(self.folder / "events.msgpack", self.core.config)
        self.peers = Peers()
        self.latest = Latest()
        self.num_ranks = 0
        self.policy: msg.SnapshotRef | None = None
        self.phase = "starting"
        self.started_s = time.monotonic() - self.last_row.get("time_s", 0.0)
        self.row_s = self.last_peer_s = time.monotonic()
        self.error = ""
        self._stopping = False
        self._texts: dict[int, tuple[str, bool]] = {}  # rollout -> its text, and whether it was truncated
        self._errors: dict[int, str] = {}  # group -> what went wrong with it last
        self._cancelled_s: dict[int, float] = {}
        self._pulls: dict[int, float] = {}  # rank -> when it asked for the step's shard
        self._shards: dict[int, msg.Shard] = {}
        self._shipped: list[ev.GroupRecord] = []
        self._learned: dict[str, LengthStats] = {}  # to be journalled
        self._waited_s = 0.0
        self._evaluations: list[int] = []  # steps whose evaluation is under way
        self._evaluated: list[ev.GroupRecord] = []
        self._final_row: dict[str, Any] | None = None
        self._outbox: dict[str, list[ev.Launch | ev.Cancel]] = defaultdict(list)
        self._handlers: dict[type, Callable[[Peer, Any], None]] = {
            msg.Progress: self._progress, msg.Finished: self._finished, msg.Failed: self._failed, msg.Stopped: self._stopped,
            msg.PolicyLoaded: self._loaded, msg.EngineReport: self._report,
            msg.Pull: self._pull, msg.Trained: self._trained, msg.Published: self._published,
            msg.LearnerFailed: self._learner_failed, msg.Heartbeat: lambda peer, message: None,
        }  # fmt: skip
        if (pool := self.journal.lengths([""]).get("")) and config.run.resume:
            self.apply(ev.PoolRestored(self.now(), pool))

    def _open_folder(self) -> tuple[int, int]:
        """Makes or resumes the run's directory: steps done, and the policy version that the learner resumes from."""
        config, self.last_row = self.config, {}
        if not (config.run.resume and (self.folder / "config.yaml").exists()):
            recorder.start(self.folder, to_yaml(config))
            return 0, -1
        step, version = recorder.checkpoint_step(self.folder)
        self.last_row = recorder.resume(self.folder, step, config.batch.groups)
        return step, version

    def now(self) -> float:
        return time.monotonic() - self.started_s

    # The loop -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Asks `serve` to end the run now, cleanly; from a signal handler or another thread."""
        self._stopping = True

    def serve(self) -> int:
        """Until the run has ended: 0 well, 1 not, 130 because it was asked to `stop`."""
        print(f"buffer: listening on {self.router.address}, run directory {self.folder}", flush=True)
        next_heartbeat = next_statistics = 0.0
        try:
            while self.phase != "done":
                if self._stopping:
                    self.error = "the buffer was stopped"
                    return 130
                for identity, message in self.router.receive(POLL_S):
                    self.receive(identity, message)
                self._draw_prompts()
                self._send_outbox()
                now = time.monotonic()
                if now >= next_heartbeat:
                    next_heartbeat = now + HEARTBEAT_S
                    self._look_after_peers(now)
                if now >= next_statistics:
                    next_statistics = now + STATISTICS_S
                    self.publisher.publish(b"snapshot", snapshot(self))
        except RunFailed as error:
            self.error = str(error)
            print(f"error: {self.error}", file=sys.stderr, flush=True)
        finally:
            self._close()
        return 1 if self.error else 0

    def receive(self, identity: bytes, message: msg.Message) -> None:
        """Handles one message. What a peer may not say ends that peer, not the run."""
        if isinstance(message, msg.ActorHello):
            return self._actor_hello(identity, message)
        if isinstance(message, msg.LearnerHello):
            return self._learner_hello(identity, message)
        peer = self.peers.heard(identity, time.monotonic())
        if peer is None:
            return  # lost, or never introduced: it hears nothing from us and says hello again
        try:
            self._handlers[type(message)](peer, message)
        except (ev.ProtocolError, ValueError) as error:
            print(f"buffer: {peer.name} broke the protocol and is dismissed: {error}", file=sys.stderr, flush=True)
            self.router.send(peer.identity, msg.Shutdown(error=f"protocol error: {error}"))
            self._lose(peer, "protocol error")

    def apply(self, event: ev.Event) -> None:
        """Logs the event, lets the core decide, logs and enacts its decisions."""
        self.log.write(event)
        for decision in self.core.handle(event):
            self.log.write(decision)
            self._enact(decision)

    def _enact(self, decision: ev.Decision) -> None:
        match decision:
            case ev.Launch():
                self.store.open(decision.rollout_id, decision.group_id, decision.continues)
                if decision.continues is not None:
                    self.store.discard(decision.continues)
                self._outbox[decision.engine_id].append(decision)
            case ev.Cancel():
                self._cancelled_s[decision.rollout_id] = time.monotonic()
                self.store.discard(decision.rollout_id)
                self._outbox[decision.engine_id].append(decision)
            case ev.Ship():
                self._shipped.append(decision.record)
                if len(self._shipped) == self.config.batch.groups:
                    self._make_shards(decision.step)
            case ev.Drop():
                self._dropped(decision)
            case ev.Evaluated():
                self._forget_group(decision.record)
                self._evaluated.append(decision.record)
                self._check_lost(decision.record)
                if not self.core.evaluating:
                    self._evaluation_ended()
            case ev.RememberLengths():
                self._learned[decision.prompt_id] = decision.lengths
            case ev.OpenGroup():
                pass

    def _draw_prompts(self) -> None:
        if self._learned:
            self.journal.remember_lengths(self._learned.items())
            self._learned.clear()
        window = self.config.batch.groups
        while self.core.num_pending < window and not self.core.run_ended and self.core.policy_version >= 0:
            payloads = self.prompts.draw(window)
            known = self.journal.lengths(p.prompt_id for p in payloads)
            self.apply(ev.PromptsDrawn(self.now(), tuple(ev.Prompt(p.prompt_id, known.get(p.prompt_id)) for p in payloads)))
        if self.store.full != self.core.admission_paused:
            self.apply(ev.AdmissionPaused(self.now(), self.store.full))

    def _send_outbox(self) -> None:
        """Each engine gets its decisions in order, launches of one group together, cancels together."""
        for engine_id, decisions in self._outbox.items():
            peer = self.peers.engine(engine_id)
            if peer is None:
                continue  # lost since; the core knows
            cancels = [d.rollout_id for d in decisions if isinstance(d, ev.Cancel)]
            launches: dict[int, list[ev.Launch]] = defaultdict(list)
            for decision in decisions:
                if isinstance(decision, ev.Launch) and decision.rollout_id in self.core.rollouts:
                    launches[decision.group_id].append(decision)
            for group_id, of_group in launches.items():
                self.router.send(peer.identity, self._launch(group_id, of_group))
            if cancels:
                self.router.send(peer.identity, msg.Cancel(rollout_ids=cancels))
        self._outbox.clear()

    def _launch(self, group_id: int, launches: list[ev.Launch]) -> msg.Launch:
        prompt_id = self.core.rollouts[launches[0].rollout_id].group.prompt.prompt_id
        payload = self.eval_payloads.get(prompt_id) or self.prompts.payload(prompt_id)
        seed = self.config.run.seed * 1_000_003
        rollouts = [
            msg.LaunchedRollout(
                rollout_id=x.rollout_id,
                seed=(seed + x.rollout_id) % 2**31,
                prefix=self.store.prefix(x.rollout_id) if x.continues is not None and x.rollout_id in self.store else b"",
            )
            for x in launches
        ]
        return msg.Launch(group_id=group_id, prompt=payload, rollouts=rollouts)

    # Actors -------------------------------------------------------------------------------------------------------

    def _actor_hello(self, identity: bytes, hello: msg.ActorHello) -> None:
        known = self.peers.by_identity.get(identity)
        if known is None or known.pid != hello.pid:
            if known is not None:
                self._lose(known, "it started anew")
            self.peers.add(Peer(identity, hello.pid, time.monotonic(), hello.engine_id))
            version = min(hello.policy_version, self.core.policy_version)
            self.apply(ev.ActorJoined(self.now(), hello.engine_id, hello.engine_type, hello.slots, version))
            print(f"buffer: engine {hello.engine_id} joined ({hello.engine_type}, {hello.slots} slots)", flush=True)
        self.router.send(identity, msg.Welcome(policy=self.policy))

    def _progress(self, peer: Peer, message: msg.Progress) -> None:
        grown: dict[int, None] = {}
        for chunk in message.chunks:
            if chunk.rollout_id in self.store:  # otherwise it is over: cancelled, as a rule
                self.store.append(chunk)
                if chunk.sampled:
                    grown[chunk.rollout_id] = None
        for rollout_id in grown:
            self.apply(ev.RolloutProgressed(self.now(), rollout_id, self.store.num_sampled(rollout_id)))

    def _finished(self, peer: Peer, message: msg.Finished) -> None:
        rollout_id = message.rollout_id
        if rollout_id in self.store:
            self._texts[rollout_id] = (message.text, message.truncated)
            num_tokens, oldest = self.store.num_sampled(rollout_id), self.store.oldest_version(rollout_id)
        else:
            num_tokens, oldest = 0, 0  # cancelled while it finished: only its slot matters
        self._note_freed(rollout_id)
        self.apply(ev.RolloutFinished(self.now(), rollout_id, num_tokens, message.truncated, message.reward, oldest))

    def _failed(self, peer: Peer, message: msg.Failed) -> None:
        if message.fatal:
            raise RunFailed(f"{peer.name}: {message.error}")
        print(f"buffer: {peer.name}: {message.error}", file=sys.stderr, flush=True)
        rollout = self.core.rollouts.get(message.rollout_id)
        if rollout is not None:
            self._errors[rollout.group.group_id] = message.error
        self.store.discard(message.rollout_id)
        self.apply(ev.RolloutFailed(self.now(), message.rollout_id))

    def _stopped(self, peer: Peer, message: msg.Stopped) -> None:
        rollout = self.core.rollouts.get(message.rollout_id)
        self._note_freed(message.rollout_id)
        self.apply(ev.RolloutStopped(self.now(), message.rollout_id, rollout.tokens if rollout else 0))

    def _note_freed(self, rollout_id: int) -> None:
        cancelled_s = self._cancelled_s.pop(rollout_id, None)
        if cancelled_s is not None:
            self.metrics.note_freed(time.monotonic() - cancelled_s)

    def _loaded(self, peer: Peer, message: msg.PolicyLoaded) -> None:
        self.metrics.note_swap(message)
        self.apply(ev.PolicyLoaded(self.now(), peer.engine_id, message.version))

    def _report(self, peer: Peer, message: msg.EngineReport) -> None:
        self.metrics.note_report(peer.engine_id, message)
        self.latest.reports[peer.engine_id] = message
        self.apply(ev.LatencyReported(self.now(), peer.engine_id, message.batch, message.ms_per_token))

    def _lose(self, peer: Peer, reason: str) -> None:
        self.peers.remove(peer)
        if not peer.engine_id:
            return
        in_flight = self.core.engines.by_id[peer.engine_id].in_flight
        for rollout_id in in_flight:
            self._cancelled_s.pop(rollout_id, None)
        print(
            f"buffer: {peer.name} is lost ({reason}); its {len(in_flight)} rollouts in flight continue elsewhere",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        self.apply(ev.ActorLost(self.now(), peer.engine_id))

    # Learner ------------------------------------------------------------------------------------------------------

    def _learner_hello(self, identity: bytes, hello: msg.LearnerHello) -> None:
        known = self.peers.by_identity.get(identity)
        if known is None or known.pid != hello.pid:
            self.peers.add(Peer(identity, hello.pid, time.monotonic(), rank=hello.rank))
            self.num_ranks = hello.num_ranks
            self._pulls.pop(hello.rank, None)
            if hello.rank == 0:
                if hello.step != self.step:
                    self._rewind(hello.step)
                self._shards.clear()
                self._shipped.clear()
                self._pulls.clear()
                self.apply(ev.LearnerJoined(self.now()))
                print(f"buffer: learner joined with {hello.num_ranks} rank(s) at step {hello.step}", flush=True)
        self.router.send(identity, msg.LearnerWelcome(policy_version=max(self.core.policy_version, self.base_version)))

    def _rewind(self, step: int) -> None:
        """A learner came back with an older checkpoint: the steps after it did not happen for this run's records."""
        if step > self.step:
            raise RunFailed(f"the learner is at step {step}, the buffer at {self.step}: start both with the same run.name and run.resume")
        self.recorder.close()
        recorder.resume(self.folder, step, self.config.batch.groups)
        self.recorder = recorder.Recorder(self.folder)
        print(f"buffer: the learner resumes at step {step}; records of steps {step}..{self.step} are withdrawn", flush=True)
        self.step = step

    def _pull(self, peer: Peer, message: msg.Pull) -> None:
        if message.step != self.step:
            raise ev.ProtocolError(f"{peer.name} pulls step {message.step}, but step {self.step} is next")
        self._pulls[peer.rank] = time.monotonic()
        if not self._shards and self.core.requested_step is None:
            self.apply(ev.ShardsRequested(self.now(), message.step))
        self._answer_pulls()

    def _make_shards(self, step: int) -> None:
        trajectories = [t for record in self._shipped for t in self._trajectories(record)]
        parts = balance([len(t.tokens) // 4 for t in trajectories], self.num_ranks)
        sampled = [t.sampled.count(1) for t in trajectories]
        trained = sum(n for n, t in zip(sampled, trajectories, strict=True) if not t.truncated)
        self._waited_s = time.monotonic() - min(self._pulls.values())
        for rank, part in enumerate(parts):
            self._shards[rank] = msg.Shard(
                step=step,
                policy_version=self.core.policy_version,
                trajectories=[trajectories[i] for i in part],
                step_sampled_tokens=sum(sampled),
                step_trained_tokens=trained,
                waited_s=self._waited_s,
            )
        for record in self._shipped[:SAMPLED_GROUPS]:
            self._write_samples(record, step)
        self._answer_pulls()

    def _trajectories(self, record: ev.GroupRecord) -> list[msg.Trajectory]:
        selected = [r for r in record.rollouts if r.end.startswith("selected")]
        rewards = [r.reward for r in selected if r.reward is not None]
        return [
            self.store.trajectory(r.rollout_id, r.reward, self._texts[r.rollout_id][1], rewards) for r in selected if r.reward is not None
        ]

    def _answer_pulls(self) -> None:
        for rank in [r for r in self._pulls if r in self._shards]:
            peer = next((p for p in self.peers.ranks() if p.rank == rank), None)
            if peer is not None:
                self.router.send(peer.identity, self._shards.pop(rank))
                del self._pulls[rank]

    def _published(self, peer: Peer, message: msg.Published) -> None:
        self.policy = message.policy
        self.apply(ev.PolicyPublished(self.now(), message.policy.version))
        for engine in self.peers.engines():
            self.router.send(engine.identity, msg.PolicyPublished(policy=message.policy))
        if self.phase == "starting":
            self.phase = "training"
            if self.step == 0:
                self._evaluate(0)

    def _trained(self, peer: Peer, message: msg.Trained) -> None:
        if message.step != self.step or len(self._shipped) != self.config.batch.groups:
            raise ev.ProtocolError(f"{peer.name} trained step {message.step}, which was not handed to it (step {self.step} is)")
        records, self._shipped = self._shipped, []
        for record in records:
            self.apply(ev.GroupTrained(self.now(), record.group_id))
            self._forget_group(record)
            self.prompts.done(record.prompt_id)
            self._record(record)
        now = time.monotonic()
        row: dict[str, Any] = {"step": message.step, "time_s": self.now(), "policy_version": records[0].shipped_version}
        row |= self.metrics.row(records) | message.metrics
        row |= {"wait/learner_s": self._waited_s, "wait/learner_frac": min(1.0, self._waited_s / max(1e-9, now - self.row_s))}
        self.row_s = now
        self.step += 1
        self.journal.save_cursor(self.step, self.prompts.cursor)
        self.log.flush()
        if self.step == self.config.run.steps:
            self._final_row = row
            self.apply(ev.RunEnded(self.now()))
            self._evaluate(self.step)
            if not self.eval_payloads:
                self._end()
            return
        self.last_row = row
        self.recorder.metrics(row)
        if self.config.eval.every and self.step % self.config.eval.every == 0:
            self._evaluate(self.step)

    def _learner_failed(self, peer: Peer, message: msg.LearnerFailed) -> None:
        raise RunFailed(f"learner rank {message.rank} failed: {message.error}")

    # Groups and evaluations ---------------------------------------------------------------------------------------

    def _dropped(self, drop: ev.Drop) -> None:
        record = drop.record
        self._forget_group(record)
        if record.rollouts and record.end != "run_ended":
            self._record(record)
        if not drop.requeued:
            self.prompts.done(record.prompt_id)
        self._check_lost(record)

    def _record(self, record: ev.GroupRecord) -> None:
        self.recorder.group(record)
        self.metrics.closed(record)
        known = self._learned.get(record.prompt_id) or self.journal.lengths([record.prompt_id]).get(record.prompt_id)
        self.latest.closed(record, spread(known) if known else 0.0)

    def _check_lost(self, record: ev.GroupRecord) -> None:
        """A group in which a rollout failed for good stops the run, unless told to skip: a failure is never a zero reward."""
        error = self._errors.pop(record.group_id, None)
        gave_up = record.end == "failed" or (record.end == "evaluated" and any(r.reward is None for r in record.rollouts) and error)
        if error and gave_up and self.config.data.on_error == "stop":
            raise RunFailed(f"{error} (prompt {record.prompt_id} failed {self.config.darts.max_attempts} times; data.on_error=skip goes on)")

    def _forget_group(self, record: ev.GroupRecord) -> None:
        for rollout in record.rollouts:
            self.store.discard(rollout.rollout_id)
            self._texts.pop(rollout.rollout_id, None)
        if record.end in ("shipped", "run_ended"):
            self._errors.pop(record.group_id, None)

    def _evaluate(self, step: int) -> None:
        """Asks for an evaluation of the newest policy; one that is still under way is waited for by the next."""
        if not self.eval_payloads or self._evaluations:
            return
        self._evaluations.append(step)
        prompts = tuple(ev.Prompt(prompt_id) for prompt_id in self.eval_payloads)
        self.apply(ev.EvaluationRequested(self.now(), prompts, self.config.eval.samples, self.core.policy_version))

    def _evaluation_ended(self) -> None:
        step = self._evaluations.pop()
        records, self._evaluated = self._evaluated, []
        result = self.metrics.evaluated(records, step)
        print(f"buffer: after {step} steps: accuracy {result['eval/accuracy']:.3f}, mean length {result['eval/length_mean']:.0f}", flush=True)
        if self._final_row is not None:
            if step == self.config.run.steps:
                self._end()
            else:
                self._evaluate(self.config.run.steps)

    def _end(self) -> None:
        assert self._final_row is not None
        self._final_row |= self.metrics.take_evaluation() | {"time_s": self.now()}
        self.recorder.metrics(self._final_row)
        self.last_row = self._final_row
        self.phase = "done"

    def _write_samples(self, record: ev.GroupRecord, step: int) -> None:
        payload = self.prompts.payload(record.prompt_id)
        prompt = payload.text or "\n".join(f"{m['role']}: {m['content']}" for m in payload.messages)
        for r in record.rollouts:
            if r.end.startswith("selected"):
                self.recorder.sample(
                    {"step": step, "prompt_id": record.prompt_id, "prompt": prompt, "response": self._texts[r.rollout_id][0],
                     "tokens": r.tokens, "reward": r.reward, "end": r.end}
                )  # fmt: skip

    # Peers and the end --------------------------------------------------------------------------------------------

    def _look_after_peers(self, now: float) -> None:
        for peer in self.peers.by_identity.values():
            self.router.send(peer.identity, msg.Heartbeat())
        for peer in self.peers.silent_since(now - self.config.buffer.peer_timeout_s):
            self._lose(peer, f"silent for {self.config.buffer.peer_timeout_s:g} s")
            if peer.rank >= 0:
                print(f"buffer: {peer.name} is lost; restart it with run.resume=true", file=sys.stderr, flush=True)
        if self.peers.engines() and self.peers.ranks():
            self.last_peer_s = now
        elif now - self.last_peer_s > self.config.buffer.rejoin_timeout_s:
            who = "an actor" if self.peers.ranks() else "a learner"
            raise RunFailed(
                f"waited {self.config.buffer.rejoin_timeout_s:g} s for {who} at {self.router.address} and none joined (buffer.rejoin_timeout_s)"
            )

    def _close(self) -> None:
        for peer in self.peers.by_identity.values():
            self.router.send(peer.identity, msg.Shutdown(error=self.error))
        self.publisher.publish(b"snapshot", snapshot(self))
        self.log.close()
        self.recorder.close()
        self.journal.close()
        self.router.close()
        self.publisher.close()
