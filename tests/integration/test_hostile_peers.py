"""Strangers and peers that send bytes no correct peer sends, over real sockets: the server goes on,
an honest peer is served, and the peer at fault is dismissed by name.
"""

from __future__ import annotations

import os
import random
import resource
import socket as sockets
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from buffer.wire import connections, transport
from buffer.wire.client import EngineLink, LearnerLink, MonitorLink
from buffer.wire.keys import make_keys, secure_client
from buffer.wire.limits import PART_BYTES
from buffer.wire.messages import (
    SPEAKERS,
    EngineHello,
    Heartbeat,
    LearnerHello,
    Message,
    Minibatch,
    Pull,
    Role,
    Shard,
    Shutdown,
    Stopped,
    Trajectory,
    Welcome,
)
from buffer.wire.snapshots import SnapshotServer, fetch
from buffer.wire.transport import Publisher, Router, TransportError, Violation, encode

LOOPBACK = "tcp://127.0.0.1:*"
SOON_S = 10.0  # a deadline, never an expectation
BACKLOG_S = 60.0  # one for reading all that a flood has left
HELLO = EngineHello(
    engine_id="e", engine_type="t", slots=1, policy_version=-1, pid=1, incarnation="a"
)
LEARNER_HELLO = LearnerHello(rank=0, num_ranks=1, step=0, pid=1, vocab_size=10)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\0NULL" + bytes(16) + b"\0" + bytes(31)


def command(name: bytes, body: bytes) -> bytes:
    whole = bytes([len(name)]) + name + body
    return b"\x04" + bytes([len(whole)]) + whole


def property_of(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def ready(identity: bytes) -> bytes:
    kind = property_of(b"Socket-Type", b"DEALER")
    return command(b"READY", kind + property_of(b"Identity", identity))


def framed(message: Message) -> bytes:
    body = encode(message)
    return b"\0" + bytes([len(body)]) + body


PING = command(b"PING", b"\0\0abc")


class RawPeer:
    """A connection whose bytes the test chooses."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        self.socket = sockets.create_connection((host, int(port)), SOON_S)

    def join(self, identity: bytes) -> None:
        self.socket.sendall(GREETING + ready(identity))
        heard = b""
        while b"READY" not in heard:
            heard += self.socket.recv(4096)

    def reset(self) -> None:
        self.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def is_closed(self) -> bool:
        """Whether the server has closed it, after reading all that it sent."""
        try:
            while self.socket.recv(1 << 16):
                continue
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def router() -> Iterator[Router]:
    with Router(LOOPBACK, SPEAKERS) as router:
        yield router


def receive_until(router: Router, done: Callable[[list[Any]], bool]) -> list[Any]:
    received: list[Any] = []
    deadline = time.monotonic() + SOON_S
    while not done(received):
        assert time.monotonic() < deadline, received[-5:]
        received += router.receive(0.02)
    return received


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def check_serves(router: Router) -> None:
    """An honest engine joins, is heard and is answered."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.IDENTITY, b"honest")
        socket.connect(router.address)
        socket.send(encode(HELLO))
        deadline = time.monotonic() + BACKLOG_S
        while (b"honest", HELLO) not in router.receive(0.02):  # other peers' messages come first
            assert time.monotonic() < deadline
        assert router.send(b"honest", Welcome(policy=None))
        assert socket.poll(SOON_S * 1000)


# Crafted bytes ------------------------------------------------------------------------------------

SLOW_READER = """
import sys, time
from buffer.wire.messages import SPEAKERS
from buffer.wire.transport import Router, Violation
router = Router("tcp://127.0.0.1:*", SPEAKERS)
print(router.address, flush=True)
sys.stdin.readline()
num = 0
while received := router.receive(1.0):
    num += len(received)
print(num, flush=True)
"""


@pytest.mark.parametrize("num_messages", [100, 1500, 5000])
def test_a_ping_behind_a_full_queue_and_a_reset_end_no_server(num_messages: int) -> None:
    """With a limit on libzmq's queue, 4.5 kB of these end its process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    with process:
        peer = RawPeer(process.stdout.readline().strip())
        peer.join(b"evil")
        beat = framed(Heartbeat())
        peer.socket.sendall(beat * num_messages + PING + beat * 20)
        time.sleep(0.3)
        peer.reset()
        process.stdin.write("read\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == str(num_messages + 20)
    assert process.returncode == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_harm_no_honest_peer(router: Router, seed: int) -> None:
    rng = random.Random(seed)
    valid = GREETING + ready(b"r") + framed(HELLO) + framed(Stopped(rollout_id=1, num_tokens=1))
    with ExitStack() as stack:
        for _ in range(10):
            peer = stack.enter_context(RawPeer(router.address))
            mutated = bytearray(valid)
            for _ in range(rng.randrange(1, 8)):
                mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            noise = rng.choice([rng.randbytes(300), bytes(mutated), GREETING + rng.randbytes(300)])
            peer.socket.sendall(noise)
            router.receive(0)
            if rng.random() < 0.5:
                peer.reset()
        check_serves(router)


def test_huge_frames_are_refused_unread_and_memory_stays(router: Router) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(router.address)) for _ in range(30)]
        for number, peer in enumerate(peers):
            peer.join(b"big%d" % number)
            peer.socket.sendall(b"\x02" + struct.pack(">Q", 60 << 20))
        for peer in peers:
            assert peer.is_closed()
        check_serves(router)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


# Peers that do not read ---------------------------------------------------------------------------


def test_a_peer_that_does_not_read_is_dismissed_by_name(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TOTAL_QUEUED_BYTES", 1 << 20)
    with RawPeer(router.address) as deaf:
        deaf.join(b"deaf")
        deaf.socket.sendall(framed(HELLO))
        receive_until(router, lambda all: (b"deaf", HELLO) in all)
        deadline = time.monotonic() + SOON_S
        while router.send(b"deaf", Shutdown(error="x" * 4000)):
            assert time.monotonic() < deadline
        [(peer, violation)] = receive_until(router, lambda all: bool(all))
        assert peer == b"deaf" and "does not read" in violation.error
        router.dismiss(b"deaf")
        check_serves(router)


# Connections --------------------------------------------------------------------------------------


def test_strangers_push_out_strangers_and_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 50)
    with Router(LOOPBACK, SPEAKERS) as router, ExitStack() as stack:
        peer = stack.enter_context(RawPeer(router.address))
        peer.join(b"peer")
        peer.socket.sendall(framed(HELLO))
        receive_until(router, lambda all: (b"peer", HELLO) in all)
        for _ in range(300):
            stack.enter_context(RawPeer(router.address))
        assert router._connections is not None
        wait_until(lambda: len(router._connections or []) <= 50)
        check_serves(router)
        peer.socket.sendall(framed(Stopped(rollout_id=1, num_tokens=1)))
        receive_until(router, lambda all: any(name == b"peer" for name, _ in all))


def test_a_connection_that_says_no_hello_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "OPENING_S", 0.3)
    with Router(LOOPBACK, SPEAKERS) as router:
        with RawPeer(router.address) as silent, RawPeer(router.address) as joined:
            silent.join(b"silent")
            joined.join(b"joined")
            joined.socket.sendall(framed(HELLO))
            receive_until(router, lambda all: (b"joined", HELLO) in all)
            assert silent.is_closed()
            joined.socket.settimeout(0.5)
            assert not joined.is_closed()


def test_a_dismissed_peer_may_read_why_and_is_then_disconnected(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "FAREWELL_S", 0.2)
    with RawPeer(router.address) as peer:
        peer.join(b"peer")
        peer.socket.sendall(framed(HELLO))
        receive_until(router, lambda all: (b"peer", HELLO) in all)
        router.send(b"peer", Shutdown(error="dismissed"))
        router.dismiss(b"peer")
        heard = b""
        while part := peer.socket.recv(4096):
            heard += part
        assert b"dismissed" in heard


STRANGERS = """
import os, sys, resource
from buffer.wire.messages import SPEAKERS
resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000))
from buffer.wire.transport import Router
router = Router("tcp://127.0.0.1:*", SPEAKERS)
print(router.address, flush=True)
most = 0
while True:
    if router.receive(0.01):
        break
    most = max(most, len(os.listdir("/proc/self/fd")))
files = [open("/dev/null") for _ in range(100)]
print(most, flush=True)
router.close()
"""


def test_thousands_of_strangers_leave_descriptors_for_the_run() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 6000:
        pytest.skip(f"needs 6000 descriptors; the hard limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process = subprocess.Popen(
        [sys.executable, "-c", STRANGERS], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout
    try:
        with process, ExitStack() as stack:
            address = process.stdout.readline().strip()
            for _ in range(5000):
                stack.enter_context(RawPeer(address))
            peer = stack.enter_context(RawPeer(address))
            peer.join(b"honest")
            peer.socket.sendall(framed(HELLO))
            assert int(process.stdout.readline()) < 2900
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert process.returncode == 0


# Parts --------------------------------------------------------------------------------------------


def test_a_large_message_travels_in_parts_and_arrives_whole(router: Router) -> None:
    tokens = os.urandom(4 * PART_BYTES)
    trajectory = Trajectory(
        rollout_id=1, group_id=1, tokens=tokens, sampled=b"", actor_logprobs=b"", versions=[],
        reward=0.0, truncated=False, advantage=0.0,
    )  # fmt: skip
    shard = Shard(
        step=0,
        policy_version=0,
        trajectories=[trajectory],
        minibatches=[Minibatch(num_trajectories=1, loss_tokens=1, loss_responses=1)],
    )
    parts = list(transport._parts(encode(shard)))
    assert len(parts) == 5 and max(map(len, parts)) < PART_BYTES + 100
    with RawPeer(router.address) as peer:
        peer.join(b"peer")
        peer.socket.sendall(framed(HELLO))
        receive_until(router, lambda all: (b"peer", HELLO) in all)
        assert router.send(b"peer", shard)
        heard = 0
        while heard < len(tokens):
            router.receive(0)
            heard += len(peer.socket.recv(1 << 20))


# Roles --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_keys(folder)
    return str(folder)


def heard_from(router: Router, keys: str, role: Role, message: Message) -> list[Any]:
    """What the router hears if a holder of the role's key sends `message`."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        secure_client(socket, keys, role, "buffer")
        socket.setsockopt(zmq.IDENTITY, role.encode())
        socket.connect(router.address)
        socket.send(encode(message))
        received: list[Any] = []
        deadline = time.monotonic() + 1.5
        while not received and time.monotonic() < deadline:
            received = router.receive(0.05)
        return [message for _, message in received]
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    ("role", "message", "taken"),
    [
        ("engine", HELLO, True),
        ("learner", LEARNER_HELLO, True),
        ("engine", LEARNER_HELLO, False),
        ("engine", Pull(rank=0, step=0), False),
        ("learner", HELLO, False),
        ("learner", Stopped(rollout_id=1, num_tokens=1), False),
    ],
)
def test_a_key_speaks_for_its_role_alone(
    keys: str, role: Role, message: Message, taken: bool
) -> None:
    with Router(LOOPBACK, SPEAKERS, keys) as router:
        (heard,) = heard_from(router, keys, role, message)
        assert heard == message if taken else isinstance(heard, Violation)


@pytest.mark.parametrize("role", ["monitor", "buffer"])
def test_a_key_of_a_role_that_is_not_served_opens_nothing(keys: str, role: Role) -> None:
    with Router(LOOPBACK, SPEAKERS, keys) as router:
        assert heard_from(router, keys, role, HELLO) == []


def test_an_engine_s_key_fetches_weights_and_a_monitor_s_does_not(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SnapshotServer(LOOPBACK, keys) as server:
        policy = server.publish(0, b"weights")
        assert fetch(policy, keys, SOON_S) == b"weights"
        monkeypatch.setattr(
            "buffer.wire.snapshots.secure_client",
            lambda socket, keys, role, served: secure_client(socket, keys, "monitor", served),
        )
        with pytest.raises(TransportError, match="no answer"):
            fetch(policy, keys, 0.5)


def test_an_engine_s_key_hears_no_statistics(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Publisher(LOOPBACK, keys) as publisher:
        monkeypatch.setattr(
            "buffer.wire.client.secure_client",
            lambda socket, keys, role, served: secure_client(socket, keys, "engine", served),
        )
        with MonitorLink(publisher.address, keys) as monitor:
            for _ in range(10):
                publisher.publish(b"state", Shutdown(error=""))
                assert monitor.receive(0.05) is None


def test_links_speak_in_their_own_roles() -> None:
    assert (EngineLink._role, LearnerLink._role) == ("engine", "learner")
