"""Links, monitors and snapshots over real sockets on loopback: nothing is lost or reordered, and
garbage harms no peer.
"""

import hashlib
import socket as sockets
import threading
import time
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

import msgpack
import pytest
import zmq

import buffer.wire.transport
from buffer.wire.client import EngineLink, LearnerLink, LinkLost, MonitorLink
from buffer.wire.keys import make_keys
from buffer.wire.messages import (
    SPEAKERS,
    Cancel,
    EngineHello,
    FetchSnapshot,
    Heartbeat,
    HelloAgain,
    LearnerHello,
    LearnerWelcome,
    LiveState,
    Minibatch,
    Progress,
    Pull,
    Shard,
    Shutdown,
    SnapshotRef,
    Stopped,
    Trajectory,
    Welcome,
)
from buffer.wire.snapshots import (
    CHUNK_BYTES,
    SnapshotGoneError,
    SnapshotServer,
    fetch,
    write_snapshot,
)
from buffer.wire.transport import Publisher, Router, TransportError, Violation, encode, next_port
from tests.fakes import chunk

LOOPBACK = "tcp://127.0.0.1:*"
HELLO = EngineHello(
    engine_id="pool/0", engine_type="fake", slots=4, policy_version=-1, pid=1, incarnation="a"
)
SOON_S = 10.0  # a deadline; no test expects to wait this long


@pytest.fixture(autouse=True)
def nothing_left_running():
    """Every test ends its threads, except pyzmq's collector of sent buffers, one per process."""
    before = set(threading.enumerate())
    yield
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in before and type(thread).__name__ != "GarbageCollectorThread"
    ]
    assert left == []


@pytest.fixture
def router():
    with Router(LOOPBACK, SPEAKERS) as router:
        yield router


class Serving:
    """A buffer that answers each hello with a welcome and keeps all other messages."""

    def __init__(self, router, heartbeat=True):
        self.router, self.heartbeat = router, heartbeat
        self.heard, self.peers, self.to_send = [], [], []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        next_beat = 0.0
        while not self._stop.is_set():
            for peer, message in self.router.receive(0.01):
                if isinstance(message, (EngineHello, LearnerHello)):
                    self.peers.append(peer)
                    self.router.send(
                        peer,
                        Welcome(policy=None)
                        if isinstance(message, EngineHello)
                        else LearnerWelcome(policy_version=3),
                    )
                elif not isinstance(message, Heartbeat):
                    self.heard.append(message)
            while self.to_send:
                self.router.send(*self.to_send.pop(0))
            if self.heartbeat and time.monotonic() >= next_beat:
                next_beat = time.monotonic() + 0.2
                for peer in self.peers:
                    self.router.send(peer, Heartbeat())

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def wait_until(condition):
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


@contextmanager
def raw_dealer(address, identity=b"raw", receive_queue=1000):
    """A peer that uses none of our code and closes everything it opened."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.rcvhwm = receive_queue
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.connect(address)
    try:
        yield socket
    finally:
        context.destroy(linger=0)


def receive_all(router, count):
    received = []
    deadline = time.monotonic() + SOON_S
    while len(received) < count and time.monotonic() < deadline:
        received += router.receive(0.05)
    return received


# ROUTER ------------------------------------------------------------------------------------------


def send_while_stalled(router, peer, count):
    """Bodies large enough that neither side's kernel buffers swallow them all."""
    return [
        router.send(peer, Shutdown(error=f"{number}:".ljust(2000, "."))) for number in range(count)
    ]


def numbers_read(router, dealer, count):
    numbers = []
    deadline = time.monotonic() + SOON_S
    while len(numbers) < count and time.monotonic() < deadline:
        router.receive(0)
        while dealer.poll(10):
            numbers.append(int(msgpack.unpackb(dealer.recv())["error"].split(":")[0]))
    return numbers


def test_a_stalled_peer_loses_nothing_and_keeps_the_order(router):
    with raw_dealer(router.address, receive_queue=10) as dealer:
        dealer.send(encode(HELLO))
        [(peer, _)] = receive_all(router, 1)
        assert all(send_while_stalled(router, peer, 6000))
        # Without an overflow of the socket's own queue this test would prove nothing.
        assert len(router._queues[peer].frames) > 1000
        assert numbers_read(router, dealer, 6000) == list(range(6000))
        assert router._queues == {} and router._num_queued_bytes == 0


def test_a_stalled_peer_holds_up_no_other(router):
    with (
        raw_dealer(router.address, b"stalled", receive_queue=10) as stalled,
        raw_dealer(router.address, b"good") as good,
    ):
        stalled.send(encode(HELLO))
        good.send(encode(HELLO))
        receive_all(router, 2)
        send_while_stalled(router, b"stalled", 6000)
        assert router._queues.keys() == {b"stalled"}
        assert router.send(b"good", Heartbeat())
        assert good.poll(SOON_S * 1000)


def test_a_peer_too_far_behind_is_lost_until_it_says_hello_again(router, monkeypatch):
    monkeypatch.setattr(buffer.wire.transport, "QUEUED_BYTES", 200_000)
    with raw_dealer(router.address, receive_queue=10) as dealer:
        dealer.send(encode(HELLO))
        [(peer, _)] = receive_all(router, 1)
        sent = send_while_stalled(router, peer, 6000)
        num_sent = sent.index(False)
        assert not any(sent[num_sent:])
        [(named, violation)] = receive_all(router, 1)
        assert named == peer and "does not read: 20" in violation.error
        dealer.send(encode(HELLO))
        receive_all(router, 1)
        while dealer.poll(100):
            dealer.recv()
        assert router.send(peer, Shutdown(error="0: anew"))
        assert numbers_read(router, dealer, 1) == [0]


def test_sending_to_an_unknown_peer_returns_false(router):
    assert router.send(b"nobody", Heartbeat()) is False


def test_a_peer_that_left_is_gone(router):
    with raw_dealer(router.address) as dealer:
        dealer.send(encode(HELLO))
        receive_all(router, 1)
        assert router.send(b"raw", Heartbeat())
    wait_until(lambda: not router.send(b"raw", Heartbeat()))


def test_garbage_is_counted_and_harms_no_peer(router):
    good = encode(Stopped(rollout_id=1, num_tokens=3))
    garbage = [
        [b""],
        [b"\xc1"],
        [b"not msgpack at all"],
        [b"\x91" * 900],
        [msgpack.packb({"type": "Stopped", "rollout_id": 1, "seconds": 0.5, "unknown": 1})],
        [msgpack.packb({"type": "Stopped", "rollout_id": "1", "seconds": 0.5})],
        [msgpack.packb({"type": "Welcome", "policy": None})],
        [b"", good],
        [good, good],
        [b"\x81\xa4type\xa7Stopp\xff\xff"],
    ]
    with raw_dealer(router.address, b"bad") as bad, raw_dealer(router.address, b"good") as peer:
        for frames in garbage:
            bad.send_multipart(frames)
        bad.send(good)
        peer.send(good)
        received = receive_all(router, 3)
    assert sorted((i for i in received if not isinstance(i[1], Violation)), key=itemgetter(0)) == [
        (name, Stopped(rollout_id=1, num_tokens=3)) for name in (b"bad", b"good")
    ]
    refused = [peer for peer, message in received if isinstance(message, Violation)]
    assert refused == [b"bad"]  # once
    assert router.num_rejected == len(garbage)


def test_nothing_is_read_of_a_joined_peer_after_its_first_violation(router):
    with raw_dealer(router.address) as dealer:
        for frame in (encode(HELLO), b"garbage", encode(HELLO), b"garbage"):
            dealer.send(frame)
        received = receive_all(router, 2) + router.receive(0.2)
    assert received[0] == (b"raw", HELLO)
    [(peer, violation)] = received[1:]
    assert peer == b"raw" and isinstance(violation, Violation)


def test_a_port_scan_harms_no_peer(router):
    port = int(router.address.rpartition(":")[2])
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" + b"\0" * 8 + b"\x7f",
        b"\xff\0\0\0\0\0\0\0\x01\x7f" + b"\xff" * 500,
    ):
        with sockets.create_connection(("127.0.0.1", port)) as scanner:
            scanner.sendall(noise)
    with raw_dealer(router.address) as dealer:
        dealer.send(encode(HELLO))
        assert receive_all(router, 1) == [(b"raw", HELLO)]


def test_closing_delivers_what_was_sent():
    router = Router(LOOPBACK, SPEAKERS)
    with raw_dealer(router.address, receive_queue=10) as dealer:
        dealer.send(encode(HELLO))
        [(peer, _)] = receive_all(router, 1)
        send_while_stalled(router, peer, 4000)
        assert router._queues
        closing = threading.Thread(target=router.close)
        closing.start()
        numbers = []
        while len(numbers) < 4000 and dealer.poll(SOON_S * 1000):
            numbers.append(int(msgpack.unpackb(dealer.recv())["error"].split(":")[0]))
        closing.join()
    assert numbers == list(range(4000))
    router.close()


# Links -------------------------------------------------------------------------------------------


def test_messages_go_both_ways_in_order(router):
    with Serving(router) as serving, EngineLink(router.address, "pool/0") as link:
        assert link.connect(HELLO, SOON_S) == Welcome(policy=None)
        for number in range(3000):
            link.send(Stopped(rollout_id=number, num_tokens=3))
            serving.to_send.append((serving.peers[0], Cancel(rollout_ids=[number])))
        assert [link.receive(SOON_S) for _ in range(3000)] == [
            Cancel(rollout_ids=[number]) for number in range(3000)
        ]
        wait_until(lambda: len(serving.heard) == 3000)
        assert [message.rollout_id for message in serving.heard] == list(range(3000))


def test_a_learner_gets_its_shard(router):
    trajectory = Trajectory(
        rollout_id=1, group_id=2, tokens=b"\1\0\0\0" * 500_000, sampled=b"\1" * 500_000,
        actor_logprobs=b"\0" * 2_000_000, versions=[(3, 500_000)], reward=1.0, truncated=False,
        advantage=1.0,
    )  # fmt: skip
    shard = Shard(
        step=0,
        policy_version=3,
        trajectories=[trajectory] * 4,
        minibatches=[Minibatch(num_trajectories=4, loss_tokens=1, loss_responses=1)],
    )
    with Serving(router) as serving, LearnerLink(router.address, "learner/0") as link:
        assert link.connect(
            LearnerHello(rank=0, num_ranks=1, step=0, pid=1, vocab_size=100), SOON_S
        ) == LearnerWelcome(policy_version=3)
        link.send(Pull(rank=0, step=0))
        wait_until(lambda: serving.heard == [Pull(rank=0, step=0)])
        serving.to_send.append((serving.peers[0], shard))
        assert link.receive(SOON_S) == shard


def test_any_thread_may_send(router):
    with Serving(router) as serving, EngineLink(router.address, "pool/0") as link:
        link.connect(HELLO, SOON_S)

        def send(thread):
            for number in range(500):
                link.send(Stopped(rollout_id=thread * 1000 + number, num_tokens=3))

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: len(serving.heard) == 2000)
        ids = [message.rollout_id for message in serving.heard]
        for thread in range(4):  # the messages of each thread keep their order
            assert [id for id in ids if id // 1000 == thread] == [
                thread * 1000 + number for number in range(500)
            ]


@pytest.mark.parametrize("link_queue", [1, 1000], ids=["kept by the link", "kept by zmq"])
def test_closing_a_link_delivers_what_was_sent(monkeypatch, link_queue):
    # A buffer whose sockets accept nothing while it does not read.
    monkeypatch.setattr(buffer.wire.transport, "QUEUE_MESSAGES", 1)
    with Router(LOOPBACK, SPEAKERS) as router:
        monkeypatch.setattr(buffer.wire.transport, "QUEUE_MESSAGES", link_queue)
        link = EngineLink(router.address, "pool/0")
        with Serving(router):
            link.connect(HELLO, SOON_S)
        for number in range(40):
            link.send(Progress(chunks=[chunk(number, 0, [5] * 1500, 0)]))  # more than its credit
        closing = threading.Thread(target=link.close)
        closing.start()
        time.sleep(0.2)
        finished = []
        deadline = time.monotonic() + SOON_S
        while len(finished) < 40 and time.monotonic() < deadline:
            finished += [
                message.chunks[0].rollout_id
                for _, message in router.receive(0.05)
                if isinstance(message, Progress)
            ]
        closing.join()
    assert finished == list(range(40))


def test_a_link_may_wait_for_a_buffer_that_starts_later():
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    answers = []
    with EngineLink(address, "pool/0") as link:
        connecting = threading.Thread(target=lambda: answers.append(link.connect(HELLO, SOON_S)))
        connecting.start()
        time.sleep(1.2)
        with Router(address, SPEAKERS) as router, Serving(router) as serving:
            connecting.join()
            assert answers == [Welcome(policy=None)]
            # The hellos sent before the buffer started did not pile up.
            assert len(serving.peers) == 1


def test_hello_is_repeated_until_answered_and_only_one_answer_counts(router):
    with EngineLink(router.address, "pool/0") as link:
        answers = []
        connecting = threading.Thread(target=lambda: answers.append(link.connect(HELLO, SOON_S)))
        connecting.start()
        (peer, first), again = receive_all(router, 2)
        assert first == HELLO and again == (peer, HELLO) and peer.startswith(b"pool/0~")
        for message in (
            Welcome(policy=None),
            Welcome(policy=None),
            Heartbeat(),
            Cancel(rollout_ids=[1]),
        ):
            router.send(peer, message)
        connecting.join()
        assert answers == [Welcome(policy=None)]
        assert link.receive(SOON_S) == Cancel(rollout_ids=[1])


def test_an_absent_buffer_is_named_with_the_remedy():
    with EngineLink("tcp://127.0.0.1:9", "pool/0") as link, pytest.raises(TransportError) as raised:
        link.connect(HELLO, 0.2)
    for part in ("tcp://127.0.0.1:9", "0.2 s", "python -m buffer", "buffer.address"):
        assert part in str(raised.value)


def test_a_refusal_reaches_the_connecting_peer(router):
    with EngineLink(router.address, "pool/0") as link:
        failures = []

        def connect():
            with pytest.raises(TransportError) as raised:
                link.connect(HELLO, SOON_S)
            failures.append(str(raised.value))

        connecting = threading.Thread(target=connect)
        connecting.start()
        ((peer, _),) = receive_all(router, 1)
        router.send(peer, Shutdown(error="protocol 2 is needed"))
        connecting.join()
    assert "protocol 2 is needed" in failures[0]


def test_a_silent_buffer_is_reported_as_lost_by_each_call(router):
    with EngineLink(router.address, "pool/0", peer_timeout_s=1.0) as link:
        with Serving(router, heartbeat=False):
            link.connect(HELLO, SOON_S)
        for _ in range(2):
            with pytest.raises(TransportError) as raised:
                link.receive(SOON_S)
            assert router.address in str(raised.value)
        with pytest.raises(TransportError):
            link.send(Stopped(rollout_id=1, num_tokens=3))


def test_heartbeats_keep_an_idle_link_alive(router):
    with Serving(router), EngineLink(router.address, "pool/0", peer_timeout_s=2.0) as link:
        link.connect(HELLO, SOON_S)
        assert link.receive(3.0) is None


def test_a_link_sends_heartbeats_by_itself(router):
    with EngineLink(router.address, "pool/0") as link:
        with Serving(router):
            link.connect(HELLO, SOON_S)
        assert receive_all(router, 1)[-1][1] == Heartbeat()


@pytest.mark.parametrize("role", ["engine", "learner"])
def test_a_buffer_makes_an_unknown_link_join_again(router, role):
    hello = (
        HELLO
        if role == "engine"
        else LearnerHello(rank=0, num_ranks=1, step=0, pid=1, vocab_size=100)
    )
    link = (EngineLink if role == "engine" else LearnerLink)(router.address, role)
    with Serving(router) as serving, link:
        link.connect(hello, SOON_S)
        serving.to_send.append((serving.peers[0], HelloAgain()))
        for _ in range(2):
            with pytest.raises(LinkLost, match="does not know this connection"):
                link.receive(SOON_S)
        with pytest.raises(LinkLost):
            link.send(Stopped(rollout_id=0, num_tokens=0))
        link.connect(hello, SOON_S)
        assert len(set(serving.peers)) == 2


def test_a_link_rejoins_a_restarted_buffer():
    with EngineLink("tcp://127.0.0.1:1", "pool/0") as link, Router(LOOPBACK, SPEAKERS) as router:
        link.address = address = router.address
        with Serving(router) as serving:
            link.connect(HELLO, SOON_S)
            serving.to_send.append((serving.peers[0], Cancel(rollout_ids=[1])))
            wait_until(lambda: not serving.to_send)
        router.close()
        # Messages that arrived before the end still count.
        assert link.receive(SOON_S) == Cancel(rollout_ids=[1])
        with pytest.raises(TransportError, match="closed the connection"):
            link.receive(SOON_S)
        with Router(address, SPEAKERS) as successor, Serving(successor) as serving:
            assert link.connect(HELLO, SOON_S) == Welcome(policy=None)
            link.send(Stopped(rollout_id=1, num_tokens=3))
            wait_until(lambda: serving.heard == [Stopped(rollout_id=1, num_tokens=3)])


def test_links_with_the_same_name_are_separate_peers(router):
    with (
        Serving(router) as serving,
        EngineLink(router.address, "pool/0") as first,
        EngineLink(router.address, "pool/0") as second,
    ):
        first.connect(HELLO, SOON_S)
        second.connect(HELLO, SOON_S)
        assert len(set(serving.peers)) == 2
        for peer, number in zip(serving.peers, (1, 2), strict=True):
            serving.to_send.append((peer, Cancel(rollout_ids=[number])))
        assert (first.receive(SOON_S), second.receive(SOON_S)) == (
            Cancel(rollout_ids=[1]),
            Cancel(rollout_ids=[2]),
        )


def test_a_link_tells_which_run_it_has_served(router):
    hellos = []
    with EngineLink(router.address, "pool/0") as link:
        for run in ("first", "second"):
            connecting = threading.Thread(target=lambda: link.connect(HELLO, SOON_S))
            connecting.start()
            ((peer, hello),) = receive_all(router, 1)
            router.send(peer, Welcome(policy=None, run=run))
            connecting.join()
            hellos.append(hello.run)
    assert hellos == ["", "first"]


def test_a_link_that_is_not_connected_says_so():
    with EngineLink("tcp://127.0.0.1:9", "pool/0") as link:
        for use in (lambda: link.send(Progress(chunks=[])), lambda: link.receive(0)):
            with pytest.raises(TransportError, match="call connect first"):
                use()


# Keys --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    return str(folder)


def test_matching_keys_allow_everything(keys):
    with (
        Router(LOOPBACK, SPEAKERS, keys) as router,
        Serving(router) as serving,
        EngineLink(router.address, "pool/0", keys) as link,
    ):
        assert link.connect(HELLO, SOON_S) == Welcome(policy=None)
        link.send(Stopped(rollout_id=1, num_tokens=3))
        wait_until(lambda: serving.heard == [Stopped(rollout_id=1, num_tokens=3)])
    with SnapshotServer(LOOPBACK, keys) as server:
        assert fetch(server.publish(0, b"weights"), keys, SOON_S) == b"weights"


@pytest.mark.parametrize("client", ["no keys", "another client", "another server"])
def test_wrong_keys_allow_nothing(keys, client, tmp_path):
    make_keys(tmp_path)
    if client == "another client":  # it knows the server's key, but its own key is not accepted
        (tmp_path / "buffer.key").write_bytes(Path(keys, "buffer.key").read_bytes())
    wrong = "" if client == "no keys" else str(tmp_path)
    with Router(LOOPBACK, SPEAKERS, keys) as router, Serving(router) as serving:
        with (
            EngineLink(router.address, "pool/0", wrong) as link,
            pytest.raises(TransportError) as raised,
        ):
            link.connect(HELLO, 2.0)
        assert router.address in str(raised.value)
        assert "buffer.keys" in str(raised.value)
        assert serving.peers == []


def test_a_client_with_keys_does_not_talk_to_a_server_without(keys):
    with Router(LOOPBACK, SPEAKERS) as router, Serving(router) as serving:
        with (
            EngineLink(router.address, "pool/0", keys) as link,
            pytest.raises(TransportError, match=r"buffer\.keys"),
        ):
            link.connect(HELLO, 2.0)
        assert serving.peers == []


# Monitors ----------------------------------------------------------------------------------------


def state(step):
    return LiveState(
        time_s=0.0, run_name="run", phase="training", step=step, steps=10, policy_version=0,
        max_lag=4, waiting="", groups_open=0, groups_ready=0, bytes_held=0, refused_frames=0,
        histogram_edges=[], histogram={}, lags=[], metrics={}, groups=[], engines=[], prompts=[],
    )  # fmt: skip


def publish_until_heard(publisher, monitor, step):
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        publisher.publish(b"state", state(step))
        heard = monitor.receive(0.05)
        if heard is not None and heard.step == step:
            return heard
    raise AssertionError("the monitor heard nothing")


@pytest.mark.parametrize("secured", [False, True])
def test_a_monitor_may_join_late_and_outlive_the_buffer(keys, secured):
    keys = keys if secured else ""
    with Publisher(LOOPBACK, keys) as publisher:
        publisher.publish(b"state", state(0))
        with MonitorLink(publisher.address, keys) as monitor:
            assert publish_until_heard(publisher, monitor, 1) == state(1)
            publisher.close()
            assert monitor.receive(0.05) is None
            with Publisher(publisher.address, keys) as successor:
                assert publish_until_heard(successor, monitor, 2) == state(2)


def test_a_monitor_without_keys_hears_nothing(keys):
    with Publisher(LOOPBACK, keys) as publisher, MonitorLink(publisher.address) as monitor:
        for step in range(20):
            publisher.publish(b"state", state(step))
            assert monitor.receive(0.02) is None


def test_a_stalled_monitor_slows_no_peer_and_then_sees_the_newest():
    with Publisher(LOOPBACK) as publisher, MonitorLink(publisher.address) as stalled:
        publish_until_heard(publisher, stalled, 0)
        for step in range(1, 20_000):
            publisher.publish(b"state", state(step))
        first = stalled.receive(SOON_S)
        assert publish_until_heard(publisher, stalled, 20_000).step == 20_000
        assert first.step > 0


def test_router_and_publisher_share_a_process():
    with Router(LOOPBACK, SPEAKERS) as router:
        # The next port may be taken by another program; a real buffer would take another pair.
        for _ in range(20):
            try:
                publisher = Publisher(next_port(router.address))
                break
            except TransportError:
                router.close()
                router = Router(LOOPBACK, SPEAKERS)
        with publisher, router:
            assert publisher.address == next_port(router.address)


# Snapshots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 9 * CHUNK_BYTES + 17])
def test_a_snapshot_arrives_as_published(size):
    data = hashlib.shake_128(b"weights").digest(size)
    with SnapshotServer(LOOPBACK) as server:
        ref = server.publish(4, data)
        assert (ref.version, ref.num_bytes, ref.digest, ref.path) == (
            4,
            size,
            hashlib.sha256(data).hexdigest(),
            "",
        )
        assert fetch(ref, timeout_s=SOON_S) == data


def test_the_newest_two_snapshots_are_served():
    with SnapshotServer(LOOPBACK) as server:
        refs = [server.publish(version, bytes([version]) * 10) for version in range(4)]
        with pytest.raises(SnapshotGoneError) as raised:
            fetch(refs[1], timeout_s=SOON_S)
        assert (raised.value.version, raised.value.newest) == (1, 3)
        assert [fetch(ref, timeout_s=SOON_S) for ref in refs[2:]] == [b"\2" * 10, b"\3" * 10]


def test_a_snapshot_never_published_is_gone_too():
    with SnapshotServer(LOOPBACK) as server, pytest.raises(SnapshotGoneError) as raised:
        fetch(
            SnapshotRef(version=7, digest="", num_bytes=10, address=server.address, path=""),
            timeout_s=SOON_S,
        )
    assert raised.value.newest == -1


def test_several_actors_fetch_at_once():
    data = hashlib.shake_128(b"weights").digest(5 * CHUNK_BYTES + 1)
    with SnapshotServer(LOOPBACK) as server:
        ref = server.publish(0, data)
        fetched = []
        threads = [
            threading.Thread(target=lambda: fetched.append(fetch(ref, timeout_s=SOON_S)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert fetched == [data] * 4


@pytest.mark.parametrize("transport", ["zmq", "file"])
def test_damaged_bytes_are_refused(transport, tmp_path):
    with SnapshotServer(LOOPBACK) as server:
        good = (
            server.publish(3, b"weights")
            if transport == "zmq"
            else write_snapshot(tmp_path, 3, b"weights")
        )
        if transport == "zmq":
            server.publish(3, b"wEights")
        else:
            (tmp_path / good.path).write_bytes(b"wEights")
        with pytest.raises(ValueError, match="snapshot 3") as raised:
            fetch(good, timeout_s=SOON_S)
    for data in (b"weights", b"wEights"):
        assert hashlib.sha256(data).hexdigest() in str(raised.value)


def test_a_chunk_that_arrives_late_is_requested_again(monkeypatch):
    monkeypatch.setattr("buffer.wire.snapshots.ASK_AGAIN_S", 0.1)
    data = hashlib.shake_128(b"weights").digest(3 * CHUNK_BYTES)
    with SnapshotServer(LOOPBACK) as server:
        answer, forgotten = server._answer, set()

        def forgetful(request):  # the first answer to each request is for another version
            message = answer(request)
            if request.offset in forgotten:
                return message
            forgotten.add(request.offset)
            return type(message)(version=9, offset=message.offset, data=b"")

        monkeypatch.setattr(server, "_answer", forgetful)
        assert fetch(server.publish(0, data), timeout_s=SOON_S) == data
        assert len(forgotten) == 3


def test_a_server_that_is_gone_is_named():
    with SnapshotServer(LOOPBACK) as server:
        ref = server.publish(0, b"weights")
    with pytest.raises(TransportError) as raised:
        fetch(ref, timeout_s=0.3)
    assert ref.address in str(raised.value)


def test_absurd_requests_harm_no_server():
    with SnapshotServer(LOOPBACK) as server, raw_dealer(server.address) as dealer:
        ref = server.publish(0, b"weights")
        for offset, num_bytes in ((-1, 3), (0, -1), (2**62, 2**62), (0, 2**63 - 1)):
            with raw_dealer(server.address, b"absurd %d %d" % (offset, num_bytes)) as absurd:
                request = FetchSnapshot(version=0, offset=offset, num_bytes=num_bytes)
                absurd.send(encode(request))
                assert not absurd.poll(100)
        for offset, num_bytes in ((2**42, 2**42), (0, 2**42)):
            dealer.send(encode(FetchSnapshot(version=0, offset=offset, num_bytes=num_bytes)))
            assert dealer.poll(SOON_S * 1000)
            assert len(msgpack.unpackb(dealer.recv())["data"]) <= 7
        dealer.send(b"garbage")
        assert fetch(ref, timeout_s=SOON_S) == b"weights"


def test_a_folder_keeps_the_newest_two(tmp_path):
    refs = [
        write_snapshot(tmp_path / "weights", version, bytes([version])) for version in (8, 9, 10)
    ]
    assert len(list((tmp_path / "weights").iterdir())) == 2
    assert [fetch(ref) for ref in refs[1:]] == [b"\x09", b"\x0a"]
    with pytest.raises(SnapshotGoneError) as raised:
        fetch(refs[0])
    assert raised.value.version == 8
    assert refs[2].address == ""


def test_a_resumed_run_replaces_the_later_snapshots_of_the_old_one(tmp_path):
    for version in (8, 9):
        write_snapshot(tmp_path, version, b"before")
    resumed = write_snapshot(tmp_path, 6, b"after")
    assert fetch(resumed) == b"after"
    assert len(list(tmp_path.iterdir())) == 1
