"""The buffer's only loop: a message becomes an event, the core decides, decisions become messages.

    actors  ──Progress, Finished, Failed, Stopped, EngineReport──>  ┐          ┌ ──Launch, Cancel, PolicyPublished──> actors
                                                                    │ Service  │
    learner ──Pull, Published, Trained──────────────────────────>   ┘  (Core)  └ ──Shard──> learner     ──Snapshot──> monitors

    consumes       whatever peers send; garbage is counted and refused
    waits for      the next message, at most `POLL_S`
    unblocked by   the clock: heartbeats, statistics, peers that fell silent

Decides nothing: what to launch, cancel, ship or drop is `darts.core.Core`'s. One thread, so no message is handled while
another is. `buffer.run_state` holds what a run is, `actor_side` and `learner_side` translate for the two kinds of peers.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from buffer.engine_side import ActorSide
from buffer.learner_side import LearnerSide
from buffer.peers import Peer
from buffer.records.live_state import snapshot
from buffer.run_state import Run, RunFailed
from buffer.wire import messages as msg
from configs.schema import Config
from darts import events as ev

POLL_S = 0.05
HEARTBEAT_S = 1.0
STATISTICS_S = 0.5
FAREWELL_S = 15.0  # for the learner to end its step when the buffer is asked to stop


class Service:
    """One run's buffer, from its first prompt to its last metrics row."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run = Run(config, self._enact)
        self.actors = ActorSide(self.run)
        self.learner = LearnerSide(self.run, self._policy_published, self._step_done)
        self.error = ""
        self._stopping, self._stop_by_s = False, 0.0
        self._all_there_s = time.monotonic()
        self._evaluating: int | None = None  # the step whose evaluation is under way
        self._evaluated: list[ev.GroupRecord] = []
        self._final_row: dict[str, Any] | None = None

    # The loop -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Asks `serve` to end the run, cleanly; from a signal handler or another thread. A step in the learner's hands is waited for."""
        self._stopping = True
        self._stop_by_s = time.monotonic() + FAREWELL_S

    def _stopped(self) -> bool:
        return self._stopping and (not self.learner.trains or time.monotonic() >= self._stop_by_s)

    def serve(self) -> int:
        """Until the run has ended: 0 well, 1 not, 130 because it was asked to `stop`."""
        run = self.run
        run.say(f"listening on {run.router.address}, run directory {run.folder}")
        next_heartbeat = next_statistics = 0.0
        try:
            while run.phase != "done" and not self._stopped():
                for identity, message in run.router.receive(POLL_S):
                    self._receive(identity, message)
                run.draw_prompts()
                self.actors.flush()
                now = time.monotonic()
                if now >= next_heartbeat:
                    next_heartbeat = now + HEARTBEAT_S
                    self._look_after_peers(now)
                if now >= next_statistics:
                    next_statistics = now + STATISTICS_S
                    run.publisher.publish(b"snapshot", snapshot(run))
        except RunFailed as error:
            self.error = str(error)
            print(f"error: {self.error}", file=sys.stderr, flush=True)
        finally:
            if run.phase != "done":
                self.error = self.error or "the buffer was stopped"
            run.publisher.publish(b"snapshot", snapshot(run))
            run.close(self.error)
        return 130 if self._stopping and run.phase != "done" else int(bool(self.error))

    def _receive(self, identity: bytes, message: msg.Message) -> None:
        """Handles one message. What a peer may not say ends that peer, not the run."""
        if isinstance(message, (msg.ActorHello, msg.LearnerHello)):
            return self._greet(identity, message)
        peer = self.run.peers.heard(identity, time.monotonic())
        if peer is None or isinstance(message, msg.Heartbeat):
            return  # a peer that was lost, or never said hello, finds out by our silence
        side = self.actors if peer.engine_id else self.learner
        try:
            if type(message) not in side.handlers:
                raise ev.ProtocolError(f"a {type(message).__name__} is not {peer.name}'s to send")
            side.handlers[type(message)](peer, message)
        except (ev.ProtocolError, ValueError) as error:
            self.run.warn(f"{peer.name} broke the protocol and is dismissed: {error}")
            self.run.send(peer, msg.Shutdown(error=f"protocol error: {error}"))
            self._lose(peer, "protocol error")

    def _greet(self, identity: bytes, hello: msg.ActorHello | msg.LearnerHello) -> None:
        try:
            self.actors.hello(identity, hello) if isinstance(
                hello, msg.ActorHello
            ) else self.learner.hello(identity, hello)
        except ev.ProtocolError as error:
            self.run.warn(f"{identity.decode(errors='replace')} is refused: {error}")
            self.run.router.send(identity, msg.Shutdown(error=f"refused: {error}"))

    def _lose(self, peer: Peer, reason: str) -> None:
        side = self.actors if peer.engine_id else self.learner
        side.lose(peer, reason)

    def _look_after_peers(self, now: float) -> None:
        """Heartbeats to all; whoever was silent too long is lost; without a learner or an actor for long the run fails."""
        run, limits = self.run, self.config.buffer
        for peer in run.peers.by_identity.values():
            run.send(peer, msg.Heartbeat())
        for peer in run.peers.silent_since(now - limits.peer_timeout_s):
            self._lose(peer, f"silent for {limits.peer_timeout_s:g} s")
        if run.peers.engines() and run.peers.ranks():
            self._all_there_s = now
        elif now - self._all_there_s > limits.rejoin_timeout_s:
            who = "an actor" if run.peers.ranks() else "a learner"
            waited = f"waited {limits.rejoin_timeout_s:g} s (buffer.rejoin_timeout_s)"
            raise RunFailed(f"{waited} for {who} at {run.router.address} and none came")

    # Decisions ----------------------------------------------------------------------------------------------------

    def _enact(self, decision: ev.Decision) -> None:
        match decision:
            case ev.Launch():
                self.actors.launch(decision)
            case ev.Cancel():
                self.actors.cancel(decision)
            case ev.Ship():
                self.learner.ship(decision)
            case ev.RememberLengths():
                self.run.learned[decision.prompt_id] = decision.lengths
            case ev.Drop():
                self._dropped(decision)
            case ev.Evaluated():
                self._held_out_group_ended(decision.record)
            case ev.OpenGroup():
                pass  # said in its launches

    def _dropped(self, drop: ev.Drop) -> None:
        run, record = self.run, drop.record
        run.forget(record)
        if record.end != "run_ended":
            run.record(record)
        if not drop.requeued:
            run.prompts.done(record.prompt_id)
        run.check_failures(record)

    # Evaluation and the end ---------------------------------------------------------------------------------------

    def _policy_published(self) -> None:
        if self.run.phase == "starting":
            self.run.phase = "training"
            if self.run.step == 0:
                self._evaluate()

    def _step_done(self, row: dict[str, Any]) -> None:
        """The last step's row waits for the last evaluation, all others are written at once."""
        run = self.run
        if run.step == self.config.run.steps:
            self._final_row = row
            run.phase = "evaluating"
            run.apply(ev.RunEnded(run.now()))
            self._evaluate()
            if self._evaluating is None:
                self._end()
            return
        run.last_row = row
        run.recorder.metrics(row)
        if self.config.eval.every and run.step % self.config.eval.every == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Asks for an evaluation of the newest policy, unless one is under way still."""
        run = self.run
        if run.eval_payloads and self._evaluating is None:
            self._evaluating = run.step
            prompts = tuple(ev.Prompt(prompt_id) for prompt_id in run.eval_payloads)
            run.apply(
                ev.EvaluationRequested(
                    run.now(), prompts, self.config.eval.samples_per_prompt, run.core.policy_version
                )
            )

    def _held_out_group_ended(self, record: ev.GroupRecord) -> None:
        self.run.forget(record)
        self._evaluated.append(record)
        self.run.check_failures(record)
        if len(self._evaluated) < len(self.run.eval_payloads) or self._evaluating is None:
            return
        step, self._evaluating = self._evaluating, None
        records, self._evaluated = self._evaluated, []
        result = self.run.metrics.evaluated(records, step)
        self.run.say(
            f"after {step} steps: accuracy {result['eval/accuracy']:.3f}, mean length {result['eval/length_mean']:.1f}"
        )
        if self._final_row is not None:
            self._end() if step == self.config.run.steps else self._evaluate()

    def _end(self) -> None:
        assert self._final_row is not None
        row = self._final_row | self.run.metrics.take_evaluation()
        self.run.recorder.metrics(row)
        self.run.last_row = row
        self.run.phase = "done"
