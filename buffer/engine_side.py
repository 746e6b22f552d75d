"""The buffer's side of the engines: their messages become events, the core's launches and cancels become messages.

Driven by the service. Holds what the core need not know: when a cancel was decided, what waits to be sent.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from buffer.peers import Peer
from buffer.run_state import Run, RunFailed
from buffer.wire import messages as msg
from darts import events as ev


class ActorSide:
    """Handlers by message type in `handlers`; `enact` takes the core's decisions, `flush` sends them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.handlers: dict[type, Any] = {
            msg.Progress: self._progress, msg.Finished: self._finished, msg.Failed: self._failed,
            msg.Stopped: self._stopped, msg.PolicyLoaded: self._loaded, msg.EngineReport: self._report,
        }  # fmt: skip
        self._cancelled_s: dict[int, float] = {}
        self._never_sent: list[int] = []  # cancelled before their launch was sent
        self._outbox: dict[str, list[ev.Launch | ev.Cancel]] = defaultdict(list)

    def hello(self, identity: bytes, hello: msg.ActorHello) -> None:
        """A hello is repeated until it is answered; one over another connection takes the engine's name over."""
        run = self.run
        run.require_own(hello.run)
        known = run.peers.engine(hello.engine_id)
        if known is None or known.identity != identity:
            if known is not None:
                run.send(
                    known,
                    msg.Shutdown(
                        error=f"process {hello.pid} has joined as engine {hello.engine_id}: names must be unique"
                    ),
                )
                self.lose(known, "it started anew")
            version = min(hello.policy_version, run.core.policy_version)
            run.apply(
                ev.ActorJoined(run.now(), hello.engine_id, hello.engine_type, hello.slots, version)
            )
            run.peers.add(Peer(identity, time.monotonic(), hello.engine_id))
            run.say(f"engine {hello.engine_id} joined ({hello.engine_type}, {hello.slots} slots)")
        run.router.send(identity, msg.Welcome(policy=run.policy, run=run.run_id))

    def lose(self, peer: Peer, reason: str) -> None:
        in_flight = self.run.core.engines.by_id[peer.engine_id].in_flight
        for rollout_id in in_flight:
            self._cancelled_s.pop(rollout_id, None)
        self.run.peers.remove(peer)
        self.run.warn(
            f"{peer.name} is lost ({reason}); the {len(in_flight)} rollouts it had in flight are launched again"
        )
        self.run.apply(ev.ActorLost(self.run.now(), peer.engine_id))

    # Decisions ----------------------------------------------------------------------------------------------------

    def launch(self, decision: ev.Launch) -> None:
        store = self.run.store
        store.open(decision.rollout_id, decision.group_id, decision.continues)
        if decision.continues is not None:
            store.discard(decision.continues)
        self._outbox[decision.engine_id].append(decision)

    def cancel(self, decision: ev.Cancel) -> None:
        self._cancelled_s[decision.rollout_id] = time.monotonic()
        self.run.store.discard(decision.rollout_id)
        unsent = self._outbox[decision.engine_id]
        launched = next(
            (d for d in unsent if isinstance(d, ev.Launch) and d.rollout_id == decision.rollout_id),
            None,
        )
        if launched is None:
            unsent.append(decision)
        else:  # decided within one turn of the loop: its engine need never know
            unsent.remove(launched)
            self._never_sent.append(decision.rollout_id)

    def flush(self) -> None:
        """Sends each engine its decisions: launches of one group together, then the cancels."""
        while self._never_sent:
            rollout_id = self._never_sent.pop()
            self._cancelled_s.pop(rollout_id, None)
            self.run.apply(ev.RolloutStopped(self.run.now(), rollout_id, 0))
        rollouts = self.run.core.rollouts
        for engine_id, decisions in self._outbox.items():
            peer = self.run.peers.engine(engine_id)
            if peer is None:
                continue  # lost since; the core knows
            groups: dict[int, list[ev.Launch]] = defaultdict(list)
            for decision in decisions:
                if isinstance(decision, ev.Launch) and decision.rollout_id in rollouts:
                    groups[decision.group_id].append(decision)
            for launches in groups.values():
                self.run.send(peer, self._launch_message(launches))
            cancels = [d.rollout_id for d in decisions if isinstance(d, ev.Cancel)]
            if cancels:
                self.run.send(peer, msg.Cancel(rollout_ids=cancels))
        self._outbox.clear()

    def _launch_message(self, launches: list[ev.Launch]) -> msg.Launch:
        run = self.run
        prompt_id = run.core.rollouts[launches[0].rollout_id].group.prompt.prompt_id
        payload = run.eval_payloads.get(prompt_id) or run.prompts.payload(prompt_id)
        rollouts = [
            msg.LaunchedRollout(
                rollout_id=launch.rollout_id,
                seed=(run.config.run.seed * 1_000_003 + launch.rollout_id) % 2**31,
                prefix=run.store.prefix(launch.rollout_id)
                if launch.rollout_id in run.store
                else b"",
            )
            for launch in launches
        ]
        return msg.Launch(group_id=launches[0].group_id, prompt=payload, rollouts=rollouts)

    # Messages -----------------------------------------------------------------------------------------------------

    def _progress(self, peer: Peer, message: msg.Progress) -> None:
        store, grown = self.run.store, dict[int, None]()
        for chunk in message.chunks:
            if chunk.rollout_id in store:  # otherwise it is over: cancelled, as a rule
                store.append(chunk)
                if chunk.sampled:
                    grown[chunk.rollout_id] = None
        for rollout_id in grown:
            if (
                rollout_id in store
            ):  # an earlier one of this very message may have decided the group
                self.run.apply(
                    ev.RolloutProgressed(self.run.now(), rollout_id, store.num_sampled(rollout_id))
                )

    def _finished(self, peer: Peer, message: msg.Finished) -> None:
        run, rollout_id = self.run, message.rollout_id
        num_tokens = oldest = 0  # cancelled while it finished: only its slot matters
        if rollout_id in run.store:
            run.texts[rollout_id] = (message.text, message.truncated)
            num_tokens, oldest = (
                run.store.num_sampled(rollout_id),
                run.store.oldest_version(rollout_id),
            )
        self._note_freed(rollout_id)
        run.apply(
            ev.RolloutFinished(
                run.now(), rollout_id, num_tokens, message.truncated, message.reward, oldest
            )
        )

    def _failed(self, peer: Peer, message: msg.Failed) -> None:
        run = self.run
        if message.fatal:
            raise RunFailed(f"{peer.name}: {message.error}")
        run.warn(f"{peer.name}: {message.error}")
        rollout = run.core.rollouts.get(message.rollout_id)
        if rollout is not None:
            run.errors[rollout.group.group_id] = message.error
        self._note_freed(message.rollout_id)
        run.store.discard(message.rollout_id)
        run.apply(ev.RolloutFailed(run.now(), message.rollout_id))

    def _stopped(self, peer: Peer, message: msg.Stopped) -> None:
        rollout = self.run.core.rollouts.get(message.rollout_id)
        self._note_freed(message.rollout_id)
        self.run.apply(
            ev.RolloutStopped(self.run.now(), message.rollout_id, rollout.tokens if rollout else 0)
        )

    def _note_freed(self, rollout_id: int) -> None:
        cancelled_s = self._cancelled_s.pop(rollout_id, None)
        if cancelled_s is not None:
            self.run.metrics.note_freed(time.monotonic() - cancelled_s)

    def _loaded(self, peer: Peer, message: msg.PolicyLoaded) -> None:
        self.run.metrics.note_swap(message)
        self.run.apply(ev.PolicyLoaded(self.run.now(), peer.engine_id, message.version))

    def _report(self, peer: Peer, message: msg.EngineReport) -> None:
        self.run.metrics.note_report(peer.engine_id, message)
        self.run.metrics.latest.reports[peer.engine_id] = message
        self.run.apply(
            ev.LatencyReported(self.run.now(), peer.engine_id, message.batch, message.ms_per_token)
        )
