"""Peers that send more than a server reads: its memory stays flat, honest peers are served, and the
peer at fault is reset. Honest peers never send more than their credit.
"""

from __future__ import annotations

import os
import socket as sockets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from buffer.wire.client import EngineLink
from buffer.wire.connections import Connection
from buffer.wire.credit import LARGEST_FRAME
from buffer.wire.descriptors import remote_end
from buffer.wire.keys import make_keys
from buffer.wire.limits import MESSAGE_BYTES, STRANGERS_BYTES, UNREAD_BYTES, split
from buffer.wire.messages import (
    LINE_CHARS,
    MAX_ROLLOUTS,
    SPEAKERS,
    TEXT_CHARS,
    Chunk,
    EngineHello,
    Failed,
    Finished,
    Heartbeat,
    Inbound,
    LearnerFailed,
    Message,
    Progress,
    Published,
    SnapshotRef,
    Stopped,
    Trained,
    Welcome,
)
from buffer.wire.transport import Publisher, Router, Violation, decoder, encode
from tests.fakes import chunk
from tests.integration.test_hostile_peers import (
    HELLO,
    LOOPBACK,
    SOON_S,
    RawPeer,
    check_serves,
    framed,
    receive_until,
    wait_until,
)

HANDSHAKE_BYTES = 2000  # of a connection, beside its messages
MEMORY_BYTES = 50 << 20


@pytest.fixture
def router() -> Iterator[Router]:
    with Router(LOOPBACK, SPEAKERS) as router:
        yield router


def connection_of(router: Router, name: bytes) -> Connection:
    assert router._connections is not None
    [found] = [c for c in router._connections._open.values() if c.identity.startswith(name)]
    return found


class Joined:
    """A link whose hello the router answers in this thread."""

    def __init__(self, router: Router, name: str, keys: str = "") -> None:
        self.link = EngineLink(router.address, name, keys)
        thread = threading.Thread(target=lambda: self.link.connect(HELLO, SOON_S))
        thread.start()
        [(self.peer, _)] = receive_until(router, lambda all: bool(all))
        router.send(self.peer, Welcome(policy=None))
        thread.join()

    def __enter__(self) -> Joined:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()


# Honest peers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True])
def test_bytes_of_a_connection_are_counted_as_the_kernel_does(
    tmp_path: Path, encrypted: bool
) -> None:
    keys = str(tmp_path / "keys") if encrypted else ""
    if encrypted:
        make_keys(Path(keys))
    sizes = [0, 40, 50, 60, 300, 3000] * 500
    with Router(LOOPBACK, SPEAKERS, keys) as router, Joined(router, "e", keys) as joined:
        for size in sizes:
            joined.link.send(Progress(chunks=[chunk(1, 0, [5] * size, 0)]))
        received = 0
        while received < len(sizes):
            received += sum(isinstance(m, Progress) for _, m in router.receive(1.0))
        connection = connection_of(router, b"e")
        wait_until(lambda: connection.num_received > connection.num_read > 500 * 3000 * 8)
        assert connection.num_received - connection.num_read < HANDSHAKE_BYTES


def test_an_honest_peer_sends_no_more_than_its_credit_and_all_arrives_in_order(
    router: Router,
) -> None:
    with Joined(router, "e") as joined:
        messages = [Progress(chunks=[chunk(1, i, [i % 50] * 900, 0)]) for i in range(1000)]
        for message in messages:
            joined.link.send(message)
        time.sleep(0.5)  # the server is busy
        connection = connection_of(router, b"e")
        assert UNREAD_BYTES / 2 < connection.num_unread < UNREAD_BYTES
        received = receive_until(router, lambda all: len(all) >= len(messages))
        assert [m for _, m in received if not isinstance(m, Heartbeat)] == messages


def test_messages_of_one_rollout_are_split_as_a_server_takes_them() -> None:
    given = Chunk(
        rollout_id=1, offset=0, sampled=False, version=0, tokens=os.urandom(4 * 9000), logprobs=b""
    )
    sampled = [chunk(number, 0, [5] * (500 * number), 0) for number in range(50)]
    parts = list(split(Progress(chunks=[given, *sampled])))
    assert max(len(encode(part)) for part in parts) <= LARGEST_FRAME
    tokens: dict[int, bytes] = {}
    logprobs: dict[int, bytes] = {}
    for piece in [piece for part in parts for piece in part.chunks]:
        i = piece.rollout_id
        if (i, piece.sampled) != (1, True):  # rollout 1's own chunk, beside the one given
            assert piece.offset == len(tokens.get(i, b"")) // 4
            tokens[i] = tokens.get(i, b"") + piece.tokens
            logprobs[i] = logprobs.get(i, b"") + piece.logprobs
    assert tokens.pop(1) == given.tokens
    assert tokens == {c.rollout_id: c.tokens for c in sampled if c.rollout_id != 1}
    assert {i: part for i, part in logprobs.items() if i != 1} == {
        c.rollout_id: c.logprobs for c in sampled if c.rollout_id != 1
    }
    assert list(split(Progress(chunks=[]))) == [Progress(chunks=[])]


@pytest.mark.parametrize("num_waits", [0, 1, 1000, 2500])
def test_a_split_message_loses_no_field(num_waits: int) -> None:
    """The waits come last: a rollout's tokens say that it decodes."""
    sent = Progress(
        chunks=[chunk(number, 0, [5] * 2000, 0) for number in range(20)],
        waits=list(range(num_waits)),
    )
    parts = list(split(sent))
    assert [decoder(Inbound).decode(encode(part)) for part in parts] == parts
    assert max(len(encode(part)) for part in parts) <= LARGEST_FRAME
    for name in Progress.__struct_fields__:
        assert [one for part in parts for one in getattr(part, name)] == getattr(sent, name)
    assert not any(part.waits for part in parts if part is not parts[-1] and num_waits <= 1000)


ROOM = SnapshotRef(
    version=2**40, digest="0" * 64, num_bytes=2**42, address="a" * 4096, path="a" * 4096
)
WIDE = "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    "message",
    [
        Finished(
            rollout_id=2**53, num_tokens=2**53, truncated=True, reward=1.0, text=WIDE * TEXT_CHARS
        ),
        Failed(rollout_id=2**53, error=WIDE * LINE_CHARS),
        LearnerFailed(rank=0, error=WIDE * LINE_CHARS),
        Trained(step=1, num_tokens=1, metrics={f"a/{i:098}": 1.0 for i in range(300)}),
        Published(policy=ROOM, seconds=1.0, probe=bytes(1 << 14)),
    ],
)
def test_the_largest_messages_fit_into_a_peer_s_credit(message: Message) -> None:
    assert len(encode(message)) <= LARGEST_FRAME


def test_the_hello_of_the_largest_engine_is_taken() -> None:
    hello = EngineHello(
        engine_id="e" * 200, engine_type="e" * 200, slots=1, policy_version=1, pid=1,
        incarnation="e" * 200, rollouts=[2**53] * MAX_ROLLOUTS,
    )  # fmt: skip
    assert len(encode(hello)) <= MESSAGE_BYTES


# Floods -------------------------------------------------------------------------------------------


def test_a_joined_peer_that_floods_is_reset_and_named(router: Router) -> None:
    with RawPeer(router.address) as flooder:
        flooder.join(b"flooder")
        flooder.socket.sendall(framed(HELLO))
        receive_until(router, lambda all: (b"flooder", HELLO) in all)
        with pytest.raises(OSError):
            for _ in range(10_000):
                flooder.socket.sendall(framed(Stopped(rollout_id=1, num_tokens=1)) * 1000)
        [violation] = [
            message
            for _, message in receive_until(router, lambda all: any(map(_is_violation, all)))
            if isinstance(message, Violation)
        ]
        assert "wait to be read" in violation.error
        check_serves(router)


def test_hellos_of_a_joined_peer_are_no_excuse_for_a_flood(router: Router) -> None:
    with RawPeer(router.address) as flooder, pytest.raises(OSError):
        flooder.join(b"flooder")
        for _ in range(10_000):
            flooder.socket.sendall(framed(HELLO) * 1000)
            router.receive(0)


def test_a_stranger_that_floods_is_reset(router: Router) -> None:
    with RawPeer(router.address) as flooder, pytest.raises(OSError):
        flooder.join(b"flooder")
        for _ in range(10_000):
            flooder.socket.sendall(framed(Heartbeat()) * 1000)
    check_serves(router)


def test_a_listener_that_subscribes_without_end_is_reset() -> None:
    with (
        Publisher(LOOPBACK) as publisher,
        zmq.Context() as context,
        context.socket(zmq.SUB) as listener,
    ):
        listener.linger = 0
        listener.connect(publisher.address)
        for number in range(200):
            listener.subscribe(b"%0900d" % number)
        assert publisher._connections is not None
        resets = publisher._connections
        wait_until(lambda: resets._num_left_bytes > 0)


def _is_violation(heard: tuple[bytes, object]) -> bool:
    return isinstance(heard[1], Violation)


def test_much_that_waits_lets_no_one_in_until_it_is_read(router: Router) -> None:
    connections = router._connections
    assert connections is not None
    connections._num_left_bytes = STRANGERS_BYTES + 1
    wait_until(lambda: not connections._takes_more)
    host, port = router.address.removeprefix("tcp://").rsplit(":", 1)
    with pytest.raises(TimeoutError):
        sockets.create_connection((host, int(port)), 0.3)
    router.receive(0)
    with sockets.create_connection((host, int(port)), SOON_S):
        check_serves(router)


def test_looking_at_a_descriptor_that_is_no_connection_leaks_none() -> None:
    with open(os.devnull) as file:
        before = len(os.listdir("/proc/self/fd"))
        assert [remote_end(file.fileno()) for _ in range(20)] == [None] * 20
        assert len(os.listdir("/proc/self/fd")) == before


BUSY_SERVER = """
import sys, time
from buffer.wire.messages import EngineHello, Heartbeat, SPEAKERS, Stopped, Welcome
from buffer.wire.transport import Router, Violation

def memory(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) << 10

router = Router("tcp://127.0.0.1:*", SPEAKERS)
before = memory("VmRSS")
print(router.address, flush=True)
while True:
    for peer, message in router.receive(0.05):
        if isinstance(message, EngineHello):
            router.send(peer, Welcome(policy=None))
        elif isinstance(message, Violation):
            router.dismiss(peer)
        elif isinstance(message, Stopped) and message.rollout_id == 2**53:
            print(message.num_tokens, memory("VmHWM") - before, flush=True)
            sys.exit()
    time.sleep(0.1)
"""
TINY = b"\0\1x" * 20_000
BEATS = framed(Heartbeat()) * 2000
KILOBYTES = (b"\2" + (1000).to_bytes(8, "big") + bytes(1000)) * 60
LARGE = b"\2" + (150_000).to_bytes(8, "big") + bytes(150_000)


def flood(address: str, name: bytes, content: bytes, joins: bool, over: threading.Event) -> None:
    """Send `content` again and again, over a new connection whenever one is reset."""
    number = 0
    while not over.is_set():
        number += 1
        try:
            with RawPeer(address) as peer:
                peer.socket.settimeout(0.5)
                peer.join(b"%s %d" % (name, number))
                peer.socket.sendall(framed(HELLO) if joins else b"")
                while not over.is_set():
                    peer.socket.sendall(content)
        except OSError:
            continue  # it was reset, or is not let in


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("content", [TINY, BEATS, KILOBYTES, LARGE], ids=len)
def test_memory_stays_flat_under_floods_and_an_honest_peer_is_heard(
    content: bytes, joins: bool
) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", BUSY_SERVER], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert server.stdout
    address, over = server.stdout.readline().strip(), threading.Event()
    with server, ExitStack() as stack, EngineLink(address, "honest", peer_timeout_s=60) as link:
        link.connect(HELLO, SOON_S)
        for number in range(10):
            flooder = threading.Thread(
                target=flood, args=(address, b"flood %d" % number, content, joins, over)
            )
            flooder.start()
            stack.callback(flooder.join)
        stack.callback(over.set)
        for number in range(150):
            link.send(Stopped(rollout_id=number, num_tokens=1))
            time.sleep(0.01)
        link.send(Stopped(rollout_id=2**53, num_tokens=7))
        heard, growth = map(int, server.stdout.readline().split())
    assert heard == 7
    assert growth < MEMORY_BYTES
