"""Peers that send as fast as they can: strangers, and engines and learner ranks that have joined.

All repeat one frame for a while, then the next of a few, from small to large, honest or not. A
connection that the buffer has reset, or does not read, is replaced by a new one.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import zmq

from buffer.wire import messages as msg
from buffer.wire.keys import secure_client
from buffer.wire.transport import encode

PEERS_PER_ROLE = 8
FRAMES_AT_ONCE = 20
PATIENCE_S = 0.3  # with a connection that takes nothing
ROLES: tuple[msg.Role | None, ...] = ("engine", "learner", None)  # None: a stranger
UNKNOWN = 2**40  # no rollout has this number
CHUNK = msg.Chunk(
    rollout_id=UNKNOWN, offset=0, sampled=False, version=0, tokens=bytes(30_000), logprobs=b""
)
FRAMES = (
    b"\xc1",
    b"\xc1" * 40,
    b"\xc1" * 1000,
    bytes(150_000),
    encode(msg.Heartbeat()),
    encode(msg.Failed(rollout_id=UNKNOWN, error="x" * 1000)),
    encode(msg.EngineReport(batch=1.0, ms_per_token=1.0, tokens_per_s=1.0, busy_frac=1.0)),
    encode(msg.Pull(rank=1, step=0)),
    encode(msg.Progress(chunks=[CHUNK])),
)


@dataclass
class Peer:
    socket: zmq.Socket[bytes]
    sent_s: float


class Flood(threading.Thread):
    """Floods the buffer at `address` for `seconds`. `keys`: the run's, or "" if it has none."""

    def __init__(self, address: str, keys: str, seconds: float) -> None:
        super().__init__(daemon=True, name="flood")
        self.address, self.keys, self.seconds = address, keys, seconds
        self.num_bytes = 0
        self.over = threading.Event()  # set it to end early
        self._session = 0

    def run(self) -> None:
        began_s = time.monotonic()
        with zmq.Context() as context, ExitStack() as stack:
            places: list[tuple[msg.Role | None, int]] = [
                (role, index) for role in ROLES for index in range(PEERS_PER_ROLE)
            ]
            peers = {place: self._join(context, *place) for place in places}
            stack.callback(lambda: [peer.socket.close() for peer in peers.values()])
            while (spent := time.monotonic() - began_s) < self.seconds and not self.over.is_set():
                frame = FRAMES[int(spent / self.seconds * len(FRAMES))]
                took = [self._send(peer, frame) for peer in peers.values()]
                time.sleep(0 if any(took) else 0.001)
                for place, peer in peers.items():
                    if time.monotonic() > peer.sent_s + PATIENCE_S:
                        peer.socket.close()
                        peers[place] = self._join(context, *place)

    def _join(self, context: zmq.Context[Any], role: msg.Role | None, index: int) -> Peer:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        secure_client(socket, self.keys if role else "", role or "engine", "buffer")
        socket.connect(self.address)
        peer = Peer(socket, time.monotonic())
        self._session += 1
        if role == "engine":
            hello: msg.Message = msg.EngineHello(
                engine_id=f"flood/{index}", engine_type="flood", slots=1, policy_version=-1, pid=1,
                incarnation=str(self._session),
            )  # fmt: skip
            socket.send(encode(hello))
        elif role == "learner":
            hello = msg.LearnerHello(
                rank=1 + index, num_ranks=100, step=0, pid=1, vocab_size=10, incarnation="flood"
            )
            socket.send(encode(hello))
        return peer

    def _send(self, peer: Peer, frame: bytes) -> bool:
        """Whether the connection has taken anything."""
        for number in range(FRAMES_AT_ONCE):
            try:
                peer.socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                return number > 0
            self.num_bytes += len(frame)
            peer.sent_s = time.monotonic()
        return True
