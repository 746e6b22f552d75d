"""The buffer's side of the engines: their messages become events, launches and cancels become
messages.

    consumes       EngineHello, Progress, Finished, Failed, Stopped, PolicyLoaded, Probed,
                   EngineReport, Leaving
    waits for      nothing
    unblocked by   the core's launches and cancels, which `flush` sends once per turn of the loop

Checks a whole message before anything of it is stored, and stores it before the core hears of it.
Owns state that the core does not need: decisions and settled rollouts that wait to be sent, and
when each cancel was decided. Driven by `buffer.service`.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from buffer import rejoin
from buffer.peers import Peer
from buffer.probes import ProbeFailed
from buffer.run_state import RunFailed, RunState
from buffer.wire import messages as msg
from darts import events as ev
from darts.state.groups import Rollout


@dataclass(slots=True)
class Outbox:
    """Waits to be sent to one engine at the end of a turn of the loop."""

    launches: list[ev.Launch] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    curtailed: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)


class EngineSide:
    """`handle` takes messages, `launch`, `cancel` and `curtail` decisions; `flush` sends them."""

    def __init__(self, run: RunState) -> None:
        self.run = run
        self._handlers: dict[type, Any] = {
            msg.Progress: self._progress,
            msg.Finished: self._finished,
            msg.Failed: self._failed,
            msg.Stopped: self._stopped,
            msg.PolicyLoaded: self._loaded,
            msg.Probed: self._probed,
            msg.EngineReport: self._report,
            msg.Leaving: self._leaving,
        }
        self._cancelled_s: dict[int, float] = {}
        self._never_sent: list[int] = []  # cancelled before their launch was sent
        self._outboxes: dict[str, Outbox] = defaultdict(Outbox)

    # Peers
    # --------------------------------------------------------------------------------------------

    def hello(self, identity: bytes, hello: msg.EngineHello) -> list[ev.Event]:
        """An engine joins, or joins again over another connection, and goes on with its rollouts.

        It repeats its hello until it is answered, so the same one may come twice.
        """
        run = self.run
        run.require_own(hello.run)
        known = run.peers.engine(hello.engine_id)
        events: list[ev.Event] = []
        if known is not None and rejoin.is_same_process(known.incarnation, hello, run.core):
            if known.identity != identity:
                run.peers.remove(known)
                run.say(f"engine {hello.engine_id} has joined again")
            if hello.policy_version > run.core.engines.by_id[hello.engine_id].version:
                events.append(ev.PolicyLoaded(hello.engine_id, hello.policy_version))
            welcome, stopped = self._reconcile(hello)
            events += stopped
        else:
            if known is not None:
                if not self._gives_way(known, hello):
                    return []  # it is asked again in a second
                events += self.lose(known, "it has joined without the rollouts that it had")
            events.append(self._joined(hello))
            welcome = msg.Welcome(policy=run.policy, forget=hello.rollouts, run=run.run_id)
        run.peers.add(Peer(identity, time.monotonic(), hello.engine_id, hello.incarnation))
        run.send_to(identity, welcome)
        return events

    def _gives_way(self, known: Peer, hello: msg.EngineHello) -> bool:
        """Whether the place of `known` is free. Raises ProtocolError if another process lives."""
        if known.incarnation == hello.incarnation:
            return True
        free = self.run.gives_way(known, hello.incarnation)
        if free is False:
            raise ev.ProtocolError(
                f"another process is {known.name} already: names must be unique, see actors.name"
            )
        if free:
            error = f"process {hello.pid} has taken the place of {known.name}, which was silent"
            self.run.send(known, msg.Shutdown(error=error))
        return bool(free)

    def _joined(self, hello: msg.EngineHello) -> ev.EngineJoined:
        run = self.run
        run.say(f"engine {hello.engine_id} joined ({hello.engine_type}, {hello.slots} slots)")
        # Weights of a policy that this run does not know are not sampled from.
        known_policy = hello.policy_version <= run.core.policy_version
        version = hello.policy_version if known_policy else -1
        return ev.EngineJoined(hello.engine_id, hello.engine_type, hello.slots, version)

    def _reconcile(self, hello: msg.EngineHello) -> tuple[msg.Welcome, list[ev.Event]]:
        """Agree with an engine about its rollouts. Messages on the way to it are lost, and those
        that wait here are decided again.
        """
        run, engine_id = self.run, hello.engine_id
        in_flight = run.core.engines.by_id[engine_id].in_flight
        agreed = rejoin.reconcile({i: r.runs for i, r in in_flight.items()}, set(hello.rollouts))
        launches = [rejoin.launch_again(in_flight[i]) for i in agreed.launch]
        running = (*agreed.resend, *agreed.launch)
        curtailed = [i for i in running if in_flight[i].curtailed]
        self._outboxes[engine_id] = Outbox(launches, agreed.cancel, curtailed)
        welcome = msg.Welcome(
            policy=run.policy,
            resend={i: run.store.num_tokens(i) for i in agreed.resend},
            forget=agreed.forget,
            run=run.run_id,
        )
        for rollout_id in agreed.stopped:
            self._note_freed(rollout_id)
        return welcome, [ev.RolloutStopped(i, in_flight[i].tokens) for i in agreed.stopped]

    def lose(self, peer: Peer, reason: str, keep_tokens: bool = True) -> list[ev.Event]:
        """Its rollouts continue elsewhere; from its tokens only if those can be trusted."""
        in_flight = self._forget(peer, keep_tokens)
        self.run.warn(
            f"{peer.name} is lost ({reason}); "
            f"the {len(in_flight)} rollouts that it had in flight are launched again"
        )
        return [ev.EngineLost(peer.engine_id, keep_tokens)]

    def _leaving(self, peer: Peer, message: msg.Leaving) -> list[ev.Event]:
        in_flight = self._forget(peer)
        self.run.say(f"{peer.name} has left; other engines continue its {len(in_flight)} rollouts")
        return [ev.EngineLost(peer.engine_id, left=True)]

    def _forget(self, peer: Peer, keep_tokens: bool = True) -> list[int]:
        """Returns the rollouts that the engine had in flight."""
        in_flight = self.run.core.engines.by_id[peer.engine_id].in_flight
        for rollout_id, rollout in in_flight.items():
            self._cancelled_s.pop(rollout_id, None)
            if rollout.has_waited or not keep_tokens:
                self.run.store.discard(rollout_id)  # it begins again
        self._outboxes.pop(peer.engine_id, None)
        self.run.peers.remove(peer)
        self.run.probes.forget(peer.engine_id)
        self.run.metrics.latest.reports.pop(peer.engine_id, None)
        return list(in_flight)

    def restore(self, now_s: float) -> None:
        """After a restart of the buffer: engines in the core's table are expected to join again."""
        for engine_id in self.run.core.engines.by_id:
            self.run.peers.add(Peer(b"\0" + engine_id.encode(), now_s, engine_id))

    # Decisions
    # ----------------------------------------------------------------------------------------

    def launch(self, decision: ev.Launch) -> None:
        store = self.run.store
        store.open(decision.rollout_id, decision.group_id, decision.continues)
        if decision.continues is not None:
            store.discard(decision.continues)
        self._outboxes[decision.engine_id].launches.append(decision)

    def cancel(self, decision: ev.Cancel) -> None:
        self._cancelled_s[decision.rollout_id] = time.monotonic()
        self.run.store.discard(decision.rollout_id)
        outbox = self._outboxes[decision.engine_id]
        launched = next((d for d in outbox.launches if d.rollout_id == decision.rollout_id), None)
        if launched is None:
            outbox.cancels.append(decision.rollout_id)
        else:  # decided within one turn of the loop: its engine need never know
            outbox.launches.remove(launched)
            self._never_sent.append(decision.rollout_id)

    def curtail(self, decision: ev.Curtail) -> None:
        self._outboxes[decision.engine_id].curtailed.append(decision.rollout_id)

    def flush(self) -> list[ev.Event]:
        """Send each engine its decisions: the launches of one group together, then the cancels."""
        outboxes, self._outboxes = self._outboxes, defaultdict(Outbox)
        for engine_id, outbox in outboxes.items():
            peer = self.run.peers.engine(engine_id)
            if peer is not None:
                self._send(peer, outbox)
        never_sent, self._never_sent = self._never_sent, []
        rollouts = self.run.core.rollouts
        for rollout_id in never_sent:
            self._cancelled_s.pop(rollout_id, None)
        return [ev.RolloutStopped(i, rollouts[i].tokens) for i in never_sent if i in rollouts]

    def _send(self, peer: Peer, outbox: Outbox) -> None:
        groups: dict[int, list[ev.Launch]] = defaultdict(list)
        for decision in outbox.launches:
            groups[decision.group_id].append(decision)
        for launches in groups.values():
            self.run.send(peer, self._launch_message(launches))
        if outbox.cancels:
            self.run.send(peer, msg.Cancel(rollout_ids=outbox.cancels))
        if outbox.curtailed:
            self.run.send(peer, msg.Curtail(rollout_ids=outbox.curtailed))
        if outbox.settled:  # the events about them are logged before they are handled
            self.run.send(peer, msg.Settled(rollout_ids=outbox.settled))

    def _launch_message(self, launches: list[ev.Launch]) -> msg.Launch:
        run, first = self.run, launches[0]
        held_out = first.purpose == "eval"
        prompt = (
            run.eval_payloads[first.prompt_id] if held_out else run.prompts.payload(first.visit)
        )
        prefixes = [run.store.prefix(launch.rollout_id) for launch in launches]
        rollouts = [
            msg.LaunchedRollout(
                rollout_id=launch.rollout_id,
                seed=sampling_seed(run.config.run.seed, launch),
                prefix=prefix,
            )
            for launch, prefix in zip(launches, prefixes, strict=True)
        ]
        return msg.Launch(group_id=first.group_id, prompt=prompt, rollouts=rollouts)

    # Messages
    # -----------------------------------------------------------------------------------------

    def handle(self, peer: Peer, message: msg.Message) -> list[ev.Event]:
        """The events that a message means. Raises ProtocolError, with nothing stored."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ev.ProtocolError(f"a {type(message).__name__} is not {peer.name}'s to send")
        return handler(peer, message)

    def _running(self, peer: Peer, rollout_id: int) -> Rollout | None:
        """The rollout if it runs on the speaker; None if it is over: late news is a legal race.

        Raises ProtocolError if another engine has it.
        """
        rollout = self.run.core.rollouts.get(rollout_id)
        if rollout is None:
            return None
        if rollout.engine_id != peer.engine_id:
            raise ev.ProtocolError(
                f"rollout {rollout_id} is in flight on engine {rollout.engine_id}, "
                f"so {peer.name} has nothing to say about it"
            )
        return rollout if rollout.runs else None

    def _progress(self, peer: Peer, message: msg.Progress) -> list[ev.Event]:
        store = self.run.store
        chunks: list[msg.Chunk] = []
        num_sampled: dict[int, int] = {}
        ends: dict[int, int] = {}
        waited: list[int] = []
        waits = [i for i in message.waits if self._running(peer, i) is not None]
        for chunk in message.chunks:
            rollout_id = chunk.rollout_id
            rollout = self._running(peer, rollout_id)
            if rollout is None:
                continue  # cancelled, as a rule
            new = store.new_part(chunk, ends.get(rollout_id))
            num_new = len(new.tokens) // 4
            if not num_new:
                continue
            chunks.append(new)
            ends[rollout_id] = new.offset + num_new
            before = num_sampled.get(rollout_id)
            if before is None:
                before = store.num_sampled(rollout_id)
            if new.sampled:
                num_sampled[rollout_id] = before + num_new
                self._check_sampled(rollout, new, before + num_new)
            elif before:  # an observation: it decodes again
                if not rollout.has_waited:
                    waited.append(rollout_id)  # the news was lost with a link
                num_sampled[rollout_id] = before
        store.append(*chunks)
        progressed = [ev.RolloutProgressed(i, num) for i, num in num_sampled.items()]
        return [*map(ev.RolloutWaits, waited), *progressed, *map(ev.RolloutWaits, waits)]

    def _check_sampled(self, rollout: Rollout, chunk: msg.Chunk, num_tokens: int) -> None:
        core = self.run.core
        if not rollout.oldest_version <= chunk.version <= core.policy_version:
            raise ev.ProtocolError(
                f"rollout {rollout.rollout_id} was sampled by version {chunk.version}: it was "
                f"launched at {rollout.oldest_version}, and the newest is {core.policy_version}"
            )
        self._check_length(rollout.rollout_id, num_tokens)

    def _check_length(self, rollout_id: int, num_tokens: int) -> None:
        limit = self.run.core.config.max_tokens
        if num_tokens > limit:
            raise ev.ProtocolError(
                f"rollout {rollout_id} has {num_tokens} tokens; the limit is {limit}"
            )

    def _finished(self, peer: Peer, message: msg.Finished) -> list[ev.Event]:
        run, rollout_id = self.run, message.rollout_id
        self._check_length(rollout_id, message.num_tokens)
        oldest = 0  # if it was cancelled while it finished, only its slot and its length matter
        if self._running(peer, rollout_id) is not None:
            num_tokens = run.store.num_sampled(rollout_id)
            if num_tokens != message.num_tokens:
                raise ev.ProtocolError(
                    f"rollout {rollout_id} finished with {message.num_tokens} tokens, "
                    f"but {num_tokens} were sent"
                )
            oldest = run.store.oldest_version(rollout_id)
            run.store.finish(rollout_id, message.text)
        self._settle(peer, rollout_id)
        return [
            ev.RolloutFinished(
                rollout_id, message.num_tokens, message.truncated, message.reward, oldest
            )
        ]

    def _failed(self, peer: Peer, message: msg.Failed) -> list[ev.Event]:
        run, error = self.run, " ".join(message.error.split())
        rollout = self._running(peer, message.rollout_id)
        if rollout is not None:
            group_id = rollout.group.group_id
            if error != run.errors.get(group_id):  # said once for all its rollouts
                run.warn(f"{peer.name}: {error}")
            run.errors[group_id] = error
            if message.unusable:
                run.unusable.add(group_id)
            run.store.discard(message.rollout_id)
        self._settle(peer, message.rollout_id)
        return [ev.RolloutFailed(message.rollout_id)]

    def _stopped(self, peer: Peer, message: msg.Stopped) -> list[ev.Event]:
        self._running(peer, message.rollout_id)
        self._check_length(message.rollout_id, message.num_tokens)
        if (rollout := self.run.core.rollouts.get(message.rollout_id)) is not None:
            self.run.cancelled_texts.keep(rollout, message.text)
        self._settle(peer, message.rollout_id)
        return [ev.RolloutStopped(message.rollout_id, message.num_tokens)]

    def _settle(self, peer: Peer, rollout_id: int) -> None:
        self._outboxes[peer.engine_id].settled.append(rollout_id)
        self._note_freed(rollout_id)

    def _note_freed(self, rollout_id: int) -> None:
        cancelled_s = self._cancelled_s.pop(rollout_id, None)
        if cancelled_s is not None:
            self.run.metrics.note_freed(time.monotonic() - cancelled_s)

    def _loaded(self, peer: Peer, message: msg.PolicyLoaded) -> list[ev.Event]:
        if message.version > self.run.core.policy_version:
            raise ev.ProtocolError(
                f"{peer.name} loaded policy version {message.version}, "
                f"and the newest is {self.run.core.policy_version}"
            )
        self.run.metrics.note_swap(message)
        return [ev.PolicyLoaded(peer.engine_id, message.version)]

    def _probed(self, peer: Peer, message: msg.Probed) -> list[ev.Event]:
        run = self.run
        try:
            comparison = run.probes.probed(peer.engine_id, message)
        except ProbeFailed as error:
            raise RunFailed(str(error)) from error
        if comparison is not None and comparison.first:
            run.say(
                f"{peer.name}: {message.model_type}: engine and learner differ by "
                f"{comparison.nats:.1e} nats per token after the first swap"
            )
        return []

    def _report(self, peer: Peer, message: msg.EngineReport) -> list[ev.Event]:
        if not all(0 <= value < math.inf for value in msgspec.structs.astuple(message.verifier)):
            raise ev.ProtocolError(f"{peer.name} reports of its verifier: {message.verifier}")
        self.run.metrics.note_report(peer.engine_id, message)
        self.run.metrics.latest.reports[peer.engine_id] = message
        return [ev.LatencyReported(peer.engine_id, message.batch, message.ms_per_token)]


def sampling_seed(run_seed: int, launch: ev.Launch) -> int:
    """Of the prompt's visit, not of the rollout's number: a resumed run samples the same again."""
    place = (run_seed, launch.prompt_id, launch.visit, launch.index, launch.draw)
    return zlib.crc32(repr(place).encode()) >> 1
