"""The buffer's only loop: messages become events, the core decides, decisions become messages.

    engines ──Progress, Finished, Failed, ──> ┐         ┌ ──Launch, Cancel, ────> engines
              Stopped, EngineReport           │         │   PolicyPublished
                                              │ Service │
    learner ──Pull, Published, Trained──────> ┘ (Core)  ├ ──Shard─────────────> learner
                                                        └ ──LiveState─────────> monitors

    consumes       messages of all peers; garbage is counted and refused
    waits for      the next message, at most `POLL_S`
    unblocked by   the clock: heartbeats, the live state, silent peers

Decides nothing: `darts.core.Core` does. One thread handles one event at a time, and nothing
re-enters: a side turns a message into events, each event is applied, and only then are its
decisions performed. `buffer.run_state` holds the run; `engine_side` and `learner_side` translate
for the two kinds of peers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from buffer.deadlines import Deadlines
from buffer.engine_side import EngineSide
from buffer.evaluation import Evaluation
from buffer.learner_side import LearnerSide
from buffer.peers import Peer
from buffer.records.live_state import live_state
from buffer.recovery import replay, restore_tokens
from buffer.run_state import RunFailed, RunState
from buffer.wire import messages as msg
from buffer.wire.limits import ENGINE_TYPES, PEERS
from buffer.wire.transport import Violation
from configs.errors import one_line, writing_to
from configs.schema import Config
from darts import events as ev

POLL_S = 0.05
HEARTBEAT_S = 1.0
LIVE_STATE_S = 0.5


class Service:
    """The buffer of one run, from its first prompt to its last row of metrics."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run = RunState(config)
        self.engines = EngineSide(self.run)
        self.learner = LearnerSide(self.run)
        self.evaluation = Evaluation(self.run)
        self.deadlines = Deadlines(config.buffer)
        self.error = ""
        self._stopping, self._stop_by_s = False, 0.0
        self._all_there_s = time.monotonic()
        self._next_heartbeat_s = self._next_live_state_s = 0.0
        self._final_row: dict[str, Any] | None = None

    # The loop
    # ----------------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Run until the end. Returns 0 if the run ended well, 1 if not, 130 if `stop` ended it."""
        run = self.run
        run.say(f"listening on {run.router.address}, run directory {run.folder}")
        try:
            with writing_to(run.folder):
                self._recover()
                while run.phase != "done" and not self._stopped():
                    self._turn()
        except RunFailed as error:
            self.error = str(error)
            print(f"error: {self.error}", file=sys.stderr, flush=True)
        except Exception as error:  # a full disk, or a mistake of ours: the peers learn of it
            self.error = f"the buffer failed: {one_line(error, with_type=True)}"
            raise
        finally:
            if run.phase != "done":
                self.error = self.error or "the buffer was stopped"
            self._publish_state()
            run.close(self.error)
        return 130 if self._stopping and run.phase != "done" else int(bool(self.error))

    def _turn(self) -> None:
        run = self.run
        for identity, message in run.router.receive(POLL_S):
            self._receive(identity, message)
        self._apply(self._begin_training())
        self._apply(run.due_events())
        self._apply(self.engines.flush())
        run.write_logs()
        run.poll_disk()
        self._tick(time.monotonic())

    def stop(self) -> str:
        """Make `serve` end the run. May be called from any thread.

        Returns a text for the user about the wait that remains.
        """
        limit_s = self.config.run.stop_s
        self._stop_by_s = time.monotonic() + limit_s
        self._stopping = True
        if not self.learner.trains:
            return "the learner has no step to finish"
        return f"the learner finishes step {self.run.step + 1}, up to {limit_s:g} s"

    def _stopped(self) -> bool:
        return self._stopping and (not self.learner.trains or time.monotonic() >= self._stop_by_s)

    def _apply(self, events: Iterable[ev.Event]) -> None:
        """Apply events one at a time, and then those that follow from their decisions."""
        queue = list(events)
        for event in queue:  # those that follow join its end
            for decision in self.run.handle(event):
                queue += self._perform(decision)
            self.learner.answer()

    def _begin_training(self) -> list[ev.Event]:
        """Start once the first policy is published. A fresh run is evaluated before it trains."""
        if self.run.phase != "starting" or self.run.core.policy_version < 0:
            return []
        self.run.phase = "training"
        return self.evaluation.request() if self.run.step == 0 else []

    def _tick(self, now_s: float) -> None:
        if now_s >= self._next_heartbeat_s:
            self._next_heartbeat_s = now_s + HEARTBEAT_S
            self._watch_peers(now_s)
            self._watch_progress(now_s)
        if now_s >= self._next_live_state_s:
            self._next_live_state_s = now_s + LIVE_STATE_S
            self.run.save_learned()
            self._publish_state()

    def _publish_state(self) -> None:
        waits = [msg.WaitView(**wait._asdict()) for wait in self.deadlines.longest()]
        state = live_state(self.run, waits, self.evaluation.progress)
        self.run.publisher.publish(b"state", state)

    # Recovery
    # ----------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Continue from the state that an earlier process left. A fresh run has none."""
        run = self.run
        replay(run, self._replayed, self._record_again, self.learner.note_trained)
        lost = restore_tokens(run)
        changed = run.change_settings()
        if run.recovered.is_new:
            return
        self._apply([ev.BufferRestarted(), *lost, *changed])
        self.engines.restore(time.monotonic())
        if run.step == self.config.run.steps:
            self._apply(self._finish_again())
        elif run.core.policy_version >= 0:
            run.phase = "training"
            if self.evaluation.due_after(run.step):
                self._apply(self.evaluation.request_again())
            self._apply(self.learner.restore())
        run.say(
            f"continues at step {run.step} with {len(run.core.groups)} groups outstanding; "
            f"{len(run.core.engines.by_id)} engines have {self.config.buffer.peer_timeout_s:g} s "
            "to join again"
        )

    def _replayed(self, event: ev.Event) -> None:
        if isinstance(event, ev.EvaluationRequested):
            self.evaluation.requested(self.run.step)
        elif isinstance(event, ev.LearnerJoined):
            self.learner.forget_step()
        elif isinstance(event, ev.TokensLost):
            self.learner.forget_taken_back()

    def _record_again(self, decision: ev.Decision) -> None:
        """Make the records of an earlier process's decision again, and do nothing else."""
        if isinstance(
            decision,
            (
                ev.Ship,
                ev.Close,
                ev.Drop,
                ev.CountOvershoot,
                ev.RememberLengths,
                ev.RememberRewards,
            ),
        ):
            self._perform(decision)
        elif isinstance(decision, ev.Evaluated):
            self.evaluation.group_ended(decision.record)

    def _finish_again(self) -> list[ev.Event]:
        """The last step is done: the run ends once its evaluation is complete."""
        run = self.run
        if run.num_rows == self.config.run.steps:
            run.phase = "done"
            return []
        run.phase = "evaluating"
        events: list[ev.Event] = [] if run.core.run_ended else [ev.RunEnded()]
        events += self.evaluation.request_again()
        if self.evaluation.step is None:
            self._end()
        return events

    # Messages
    # ----------------------------------------------------------------------------------------------

    def _receive(self, identity: bytes, message: msg.Message | Violation) -> None:
        """Handle one message. A message that breaks the protocol ends its peer, not the run."""
        if isinstance(message, Violation):
            return self._violated(identity, message)
        if isinstance(message, (msg.EngineHello, msg.LearnerHello)):
            return self._greet(identity, message)
        peer = self.run.peers.heard(identity, time.monotonic())
        if isinstance(message, msg.Heartbeat):
            if peer is None:  # it was lost; there is one heartbeat, and so one answer, a second
                self.run.send_to(identity, msg.HelloAgain())
            return
        if peer is None:
            return
        side = self.engines if peer.engine_id else self.learner
        try:
            self._apply(side.handle(peer, message))
        except ev.ProtocolError as error:
            self._dismiss(peer, str(error))

    def _dismiss(self, peer: Peer, error: str) -> None:
        self.run.warn(f"{peer.name} broke the protocol and is dismissed: {error}")
        self.run.send(peer, msg.Shutdown(error=f"protocol error: {error}"))
        self.run.router.dismiss(peer.identity)
        side = self.engines if peer.engine_id else self.learner
        self._apply(side.lose(peer, "protocol error", keep_tokens=False))

    def _violated(self, identity: bytes, violation: Violation) -> None:
        """Unknown peers get an answer, too: they may be of another version, or misconfigured."""
        peer = self.run.peers.by_identity.get(identity)
        if peer is not None:
            self._dismiss(peer, violation.error)
        else:
            self._refuse(identity, violation.error)

    def _refuse(self, identity: bytes, error: str) -> None:
        self.run.router.reply(identity, msg.Shutdown(error=f"refused: {error}"))
        self.run.router.dismiss(identity)

    def _greet(self, identity: bytes, hello: msg.EngineHello | msg.LearnerHello) -> None:
        try:
            self._check_identity(identity, hello)
            self._check_room(identity, hello)
            if isinstance(hello, msg.EngineHello):
                self._apply(self.engines.hello(identity, hello))
            else:
                self._apply(self.learner.hello(identity, hello))
        except ev.ProtocolError as error:
            self.run.warn(f"{identity.decode(errors='replace')} is refused: {error}")
            self._refuse(identity, str(error))

    def _check_identity(self, identity: bytes, hello: msg.EngineHello | msg.LearnerHello) -> None:
        """A connection has one identity. A hello under another name ends the first peer."""
        known = self.run.peers.by_identity.get(identity)
        if known is None:
            return
        is_engine = isinstance(hello, msg.EngineHello)
        if known.engine_id != (hello.engine_id if is_engine else "") or (
            not is_engine and known.rank != hello.rank
        ):
            side = self.engines if known.engine_id else self.learner
            self._apply(side.lose(known, "it said hello under a second name", keep_tokens=False))
            raise ev.ProtocolError(f"this connection is {known.name} already")

    def _check_room(self, identity: bytes, hello: msg.EngineHello | msg.LearnerHello) -> None:
        """Every table that a peer can enlarge has a bound."""
        peers, types = self.run.peers.by_identity, self.run.core.engines.curves
        if identity not in peers and len(peers) >= PEERS:
            raise ev.ProtocolError(f"{PEERS} peers have joined, and no more are admitted")
        is_new_type = isinstance(hello, msg.EngineHello) and hello.engine_type not in types
        if is_new_type and len(types) >= ENGINE_TYPES:
            raise ev.ProtocolError(f"engines are of {ENGINE_TYPES} types, and no other is admitted")

    def _watch_peers(self, now_s: float) -> None:
        """Send heartbeats and drop silent peers.

        Raises `RunFailed` if the run has had no engine or no learner for too long.
        """
        run, limits = self.run, self.config.buffer
        for peer in run.peers.by_identity.values():
            run.send(peer, msg.Heartbeat())
        for peer in run.peers.silent_since(now_s - limits.peer_timeout_s):
            side = self.engines if peer.engine_id else self.learner
            self._apply(side.lose(peer, f"silent for {limits.peer_timeout_s:g} s"))
        if run.peers.engines() and run.peers.ranks():
            self._all_there_s = now_s
        elif now_s - self._all_there_s > limits.rejoin_timeout_s:
            missing = "an actor" if run.peers.ranks() else "a learner"
            raise RunFailed(
                f"waited {limits.rejoin_timeout_s:g} s (buffer.rejoin_timeout_s) for {missing} "
                f"at {run.router.address} and none came"
            )

    def _watch_progress(self, now_s: float) -> None:
        """Restart an engine that makes no progress, and fail the run if the learner makes none."""
        run = self.run
        for overdue in self.deadlines.look(
            run.core, now_s, bool(run.peers.ranks()), run.offered_version
        ):
            if not overdue.engine_id:
                raise RunFailed(f"the learner {overdue.problem}")
            peer = run.peers.engine(overdue.engine_id)
            if peer is not None:
                run.send(peer, msg.Shutdown(error=f"it {overdue.problem}", restart=True))
                self._apply(self.engines.lose(peer, f"it {overdue.problem}"))

    # Decisions
    # ----------------------------------------------------------------------------------------------

    def _perform(self, decision: ev.Decision) -> list[ev.Event]:
        """Act on one decision. Returns the events that follow from it."""
        match decision:
            case ev.Launch():
                self.engines.launch(decision)
            case ev.Cancel():
                self.engines.cancel(decision)
            case ev.Curtail():
                self.engines.curtail(decision)
            case ev.Ship():
                self.learner.ship(decision)
            case ev.Close():
                row = self.learner.group_trained(decision.record)
                return [] if row is None else self._step_done(row)
            case ev.Drop():
                self.run.drop(decision)
            case ev.Evaluated():
                return self._held_out_group_ended(decision.record)
            case ev.CountOvershoot():
                self.run.metrics.count_overshoot(decision)
            case ev.RememberLengths():
                self.run.remember_lengths(decision.prompt_id, decision.lengths)
            case ev.RememberRewards():
                self.run.learned_rewards[decision.prompt_id] = decision.rewards
            case ev.OpenGroup():
                pass  # its launches carry everything that an engine needs
        return []

    def _step_done(self, row: dict[str, Any]) -> list[ev.Event]:
        """Write a step's row of metrics; the last one waits for the last evaluation."""
        run = self.run
        self.learner.acknowledge(row["step"])
        if run.step == self.config.run.steps:
            self._final_row = row
            run.phase = "evaluating"
            if run.replaying:
                return []
            evaluation = self.evaluation.request()
            if not evaluation and self.evaluation.step is None:
                self._end()
            return [ev.RunEnded(), *evaluation]
        run.write_row(row)
        if run.replaying:
            return []
        run.rotate_rows()
        if self.evaluation.step is None:
            run.rotate_log()
        return self.evaluation.request() if self.evaluation.due_after(run.step) else []

    def _held_out_group_ended(self, record: ev.GroupRecord) -> list[ev.Event]:
        step = self.evaluation.group_ended(record)
        if step is not None:
            self.learner.tell_evaluated()
        if step is None or self._final_row is None:
            return []
        if step < self.config.run.steps:  # it was under way when the last step ended
            return self.evaluation.request()
        self._end()
        return []

    def _end(self) -> None:
        assert self._final_row is not None
        row = self._final_row | self.run.metrics.take_evaluation()
        self.run.write_row(row)
        self.run.phase = "done"
