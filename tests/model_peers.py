"""Engines and a learner that follow the protocol, one message at a time, without a socket.

Tokens are those of `tools.faults.sampled`, so that a recount finds out which engine sampled each.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from buffer.wire import messages as msg
from tools.faults import sampled
from tools.faults.record import record

PROMPT = [20, 21, 22]
MAX_TOKENS = 12
Send = Callable[[bytes, msg.Message], None]


@dataclass
class Response:
    """A rollout on an engine: its prefix, the tokens sampled here, and the answer."""

    rollout_id: int
    engine_id: str
    prefix: list[int]
    sampled: list[tuple[int, int]] = field(default_factory=list)  # (token, version)
    num_sent: int = 0  # of the row, prompt included
    curtailed: bool = False
    answer: msg.Finished | msg.Failed | msg.Stopped | None = None

    @property
    def start(self) -> int:
        return len(PROMPT) + len(self.prefix)

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + len(self.sampled)

    def decode(self, num_tokens: int, version: int) -> None:
        life = sampled.Life(self.rollout_id, self.engine_id)
        for _ in range(num_tokens):
            position = len(PROMPT) + self.num_tokens
            self.sampled.append((sampled.token(life, position, version), version))

    def unsent(self) -> list[msg.Chunk]:
        chunks: list[msg.Chunk] = []
        if self.num_sent == 0:
            chunks.append(_chunk(self.rollout_id, 0, PROMPT, None))
            self.num_sent = self.start
        rest = self.sampled[self.num_sent - self.start :]
        for version, run in groupby(rest, key=lambda one: one[1]):
            ids = [token for token, _ in run]
            chunks.append(_chunk(self.rollout_id, self.num_sent, ids, version))
            self.num_sent += len(ids)
        return chunks

    def finished(self) -> msg.Finished:
        text = sampled.text([*self.prefix, *(token for token, _ in self.sampled)])
        return msg.Finished(
            rollout_id=self.rollout_id, num_tokens=self.num_tokens,
            truncated=self.curtailed or self.num_tokens >= MAX_TOKENS,
            reward=sampled.score("", text, "", {}), text=text,
        )  # fmt: skip


def _chunk(rollout_id: int, offset: int, ids: list[int], version: int | None) -> msg.Chunk:
    logprobs = b"" if version is None else array("f", map(sampled.logprob, ids)).tobytes()
    return msg.Chunk(
        rollout_id=rollout_id, offset=offset, sampled=version is not None, version=version or 0,
        tokens=array("i", ids).tobytes(), logprobs=logprobs,
    )  # fmt: skip


class Peer:
    """A process with one connection at a time. `inbox` holds what the buffer has sent to it."""

    def __init__(self, name: str, send: Send) -> None:
        self.name, self._send_to_buffer = name, send
        self.incarnation = f"{name}-0"
        self.identity: bytes | None = None  # of its connection, if it has one
        self.inbox: list[msg.Message] = []
        self.run = ""
        self._num_connections = self._num_lives = 0

    def connect(self) -> None:
        """Say hello over a new connection. Messages on the old one are lost."""
        self._num_connections += 1
        self.identity = f"{self.name}/{self._num_connections}".encode()
        self.inbox.clear()
        self.send(self.hello())

    def hello(self) -> msg.Message:
        raise NotImplementedError

    def disconnect(self) -> None:
        self.identity = None
        self.inbox.clear()

    def restart(self) -> None:
        """Another process takes its place, and has not said hello yet."""
        self._num_lives += 1
        self.incarnation = f"{self.name}-{self._num_lives}"
        self.run = ""
        self.disconnect()

    def send(self, message: msg.Message) -> None:
        if self.identity is not None:
            self._send_to_buffer(self.identity, message)

    def read(self) -> None:
        """Handle all messages that have come."""
        while self.inbox:
            self.handle(self.inbox.pop(0))

    def handle(self, message: msg.Message) -> None:
        raise NotImplementedError


class ModelEngine(Peer):
    """An engine. `launched` is told of every rollout that it is asked to sample."""

    def __init__(
        self,
        name: str,
        slots: int,
        send: Send,
        launched: Callable[[str, msg.Launch, msg.LaunchedRollout], None],
    ) -> None:
        super().__init__(name, send)
        self.slots, self.version = slots, -1
        self.held: dict[int, Response] = {}
        self.settled: set[int] = set()
        self._launched = launched

    def hello(self) -> msg.EngineHello:
        return msg.EngineHello(
            engine_id=self.name, engine_type="t", slots=self.slots, policy_version=self.version,
            pid=1, incarnation=self.incarnation, rollouts=list(self.held), run=self.run,
        )  # fmt: skip

    def restart(self) -> None:
        super().restart()
        self.version = -1
        self.held.clear()

    def handle(self, message: msg.Message) -> None:
        match message:
            case msg.Welcome():
                self._catch_up(message)
            case msg.PolicyPublished():
                self._load(message.policy)
            case msg.Launch():
                for launched in message.rollouts:
                    self._launched(self.name, message, launched)
                    if launched.rollout_id not in self.held:
                        prefix = array("i", launched.prefix).tolist()
                        self._tell(self._start(launched.rollout_id, prefix))
            case msg.Cancel():
                for rollout_id in message.rollout_ids:
                    response = self.held.get(rollout_id)
                    if response is not None and response.answer is None:
                        response.answer = msg.Stopped(
                            rollout_id=rollout_id,
                            num_tokens=response.num_tokens,
                            text=f"cut {rollout_id}",
                        )
                        self.send(response.answer)
            case msg.Curtail():
                for rollout_id in message.rollout_ids:
                    response = self.held.get(rollout_id)
                    if response is not None and response.answer is None:
                        response.curtailed = True
                        response.answer = response.finished()
                        self._tell(response)
            case msg.Settled():
                for rollout_id in message.rollout_ids:
                    self.held.pop(rollout_id, None)
                    self.settled.add(rollout_id)
            case msg.Shutdown():
                self.restart()
            case msg.HelloAgain():
                self.connect()
            case _:
                assert isinstance(message, msg.Heartbeat), message

    @property
    def decoding(self) -> list[Response]:
        return [response for response in self.held.values() if response.answer is None]

    def decode(self, response: Response, num_tokens: int, ends: bool) -> None:
        """Sample some tokens, at most to the limit, and say so."""
        room = MAX_TOKENS - response.num_tokens
        response.decode(min(num_tokens, room), self.version)
        if response.num_tokens and (ends or num_tokens >= room):
            response.answer = response.finished()
        self._tell(response)

    def fail(self, response: Response, unusable: bool) -> None:
        response.answer = msg.Failed(
            rollout_id=response.rollout_id, error="it failed", unusable=unusable
        )
        self.send(response.answer)

    def overshoot(self, response: Response) -> None:
        """Break the protocol: sample beyond the limit."""
        response.decode(MAX_TOKENS + 1, self.version)
        self._tell(response)

    def leave(self) -> None:
        for response in self.held.values():
            if chunks := response.unsent():
                self.send(msg.Progress(chunks=chunks))
        self.send(msg.Leaving())
        self.restart()

    def _start(self, rollout_id: int, prefix: list[int]) -> Response:
        response = self.held[rollout_id] = Response(rollout_id, self.name, prefix)
        if len(prefix) >= MAX_TOKENS:  # it had ended on an engine that did not say so
            response.answer = response.finished()
        return response

    def _tell(self, response: Response) -> None:
        if chunks := response.unsent():
            self.send(msg.Progress(chunks=chunks))
        if response.answer is not None:
            self.send(response.answer)

    def _load(self, policy: msg.SnapshotRef | None) -> None:
        """Also a version that it has had: a buffer that lost its records does not know that."""
        if policy is not None:
            self.version = policy.version
            self.send(msg.PolicyLoaded(version=self.version, fetch_s=0.0, pause_s=0.0))

    def _catch_up(self, welcome: msg.Welcome) -> None:
        self.run = welcome.run
        for rollout_id in welcome.forget:
            del self.held[rollout_id]
        for rollout_id, num_tokens in welcome.resend.items():
            response = self.held[rollout_id]
            if num_tokens and num_tokens < response.start:
                response.answer = msg.Failed(rollout_id=rollout_id, error="its prefix was lost")
                response.num_sent = response.start + len(response.sampled)
            else:
                response.num_sent = num_tokens
        for response in list(self.held.values()):
            if response.rollout_id in welcome.resend:
                self._tell(response)
            elif response.answer is not None:
                self.send(response.answer)
        self._load(welcome.policy)


class ModelLearner(Peer):
    """A learner of one rank. It records each training in `trained_file` before it reports it.

    `offer` offers the snapshot of its newest policy, at any time before the next policy.
    """

    def __init__(self, steps: int, send: Send, trained_file: Path) -> None:
        super().__init__("learner", send)
        self._steps, self._trained_file = steps, trained_file
        self.step = self.version = 0
        self.portion = self.num_tokens = 0  # of its step: the next portion, and the tokens so far
        self.checkpoints = [0]
        self.resumed = False
        self.published: msg.Published | None = None
        self.offered = False  # whether that was sent
        self.shard: msg.Shard | None = None
        self.report: msg.Trained | None = None  # of its step, until that is acknowledged
        self.shards: list[msg.Shard] = []  # all that it trained, in order

    def hello(self) -> msg.LearnerHello:
        return msg.LearnerHello(
            rank=0, num_ranks=1, step=self.step, pid=1, vocab_size=sampled.VOCAB_SIZE,
            incarnation=self.incarnation, resumed=self.resumed, take_over=True, run=self.run,
        )  # fmt: skip

    def handle(self, message: msg.Message) -> None:
        match message:
            case msg.LearnerWelcome():
                self.run = message.run
                if self.published is None:
                    self.version = message.policy_version
                    self._publish()
                    return
                if message.policy_version < self.version:
                    self.send(msg.NewPolicy(version=self.version))
                if self.offered and message.offered_version < self.version:
                    self.send(self.published)
            case msg.Shard():
                wanted = self.step, self.portion
                if (message.step, message.portion) == wanted and self.report is None:
                    self.shard = message
            case msg.Acknowledged() if message.step == self.step and self.report is not None:
                self.step += 1
                self.report = None
                self.checkpoints.append(self.step)
            case msg.Shutdown():
                assert message.error.startswith("the buffer was stopped"), message.error
            case msg.HelloAgain():
                self.connect()
            case _:
                assert isinstance(message, msg.Heartbeat | msg.Acknowledged | msg.Evaluated), (
                    message
                )

    @property
    def is_done(self) -> bool:
        return self.step == self._steps

    def pull(self) -> None:
        self.send(msg.Pull(rank=0, step=self.step, portion=self.portion))

    def train(self) -> None:
        """Train on the shard. After a step's last one, publish and report.

        The last step is saved before its report.
        """
        assert self.shard is not None
        shard, self.shard = self.shard, None
        self.shards.append(shard)
        record(self._trained_file, shard)
        self.num_tokens += sum(t.sampled.count(1) for t in shard.trajectories)
        self.portion += 1
        if not shard.last:
            return
        num_tokens, self.num_tokens, self.portion = self.num_tokens, 0, 0
        self.report = msg.Trained(step=shard.step, num_tokens=num_tokens, metrics={"train/x": 1.0})
        if shard.step + 1 == self._steps:
            self.checkpoints.append(self._steps)
        self._publish()
        self.send(self.report)

    def resume(self, step: int) -> None:
        """Another learner continues from a checkpoint of `step`."""
        self.restart()
        self.resumed, self.step = True, step
        self.checkpoints = [s for s in self.checkpoints if s <= step]
        self.published = self.shard = self.report = None
        self.portion = self.num_tokens = 0
        self.offered = False

    def offer(self) -> None:
        """Offer the newest snapshot, unless that was done. Lost if there is no connection."""
        if self.published is not None and not self.offered:
            self.offered = True
            self.send(self.published)

    def _publish(self) -> None:
        self.offer()
        self.version += 1
        policy = msg.SnapshotRef(version=self.version, digest="", num_bytes=0, address="", path="x")
        self.published, self.offered = msg.Published(policy=policy, seconds=0.0), False
        self.send(msg.NewPolicy(version=self.version))
