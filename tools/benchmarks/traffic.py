"""A real buffer process under load over real sockets, for `python -m tools.bench buffer`.

Owns engines that answer each launch at once, on raw sockets in one thread, and a learner that
trains nothing. Returns rates between one settled rollout and a later one, which include socket,
core and logs. The load shares this machine's cores with the buffer.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from buffer.processes.child import python_path
from buffer.wire import messages as msg
from buffer.wire.credit import Credit
from buffer.wire.transport import TransportError, decoder, encode
from configs import cli
from configs.schema import Config
from learner import BufferLost, RunStopped
from learner.session import BufferSession, RunEnded
from tools.faults.cluster import free_port
from tools.faults.sampled import VOCAB_SIZE

NUM_ENGINES, NUM_SLOTS = 32, 8  # each engine has its credit of tokens under way
NUM_TOKENS, NUM_GIVEN = 2000, 64
NUM_LENGTHS = 40  # of rollouts that do not all have the same length
ANY_ROLLOUT = 2**53 - 1  # the number of no rollout
NUM_QUEUED = 20  # messages of an engine that the buffer has not taken
POLL_MS = 20
BUSY_MS = 1  # until engines try again, once the buffer takes no more
LONGEST_S = 120.0  # until the warm-up is over, on a machine that is busy
LEAVE_S = 5.0  # for the learner


def bench_config(folder: Path, name: str, *overrides: str) -> Config:
    return cli.load(
        [
            f"run.dir={folder}", f"run.name={name}", "run.steps=1000000", "run.trackers=[]",
            f"buffer.address=tcp://127.0.0.1:{free_port()}", "eval.every=0", "batch.groups=32",
            "darts.group_size=8", "redundancy.rule=none", f"sampling.max_tokens={NUM_TOKENS}",
            "model.max_context=4096", *overrides,
        ]
    )  # fmt: skip


@contextmanager
def buffer_process(config: Config, folder: Path, *overrides: str) -> Iterator[int]:
    """Its process id. It is killed at the end, as nothing of it is needed."""
    file = folder / "bench.yaml"
    file.write_text(cli.to_yaml(config))
    command = [sys.executable, "-m", "buffer", "--config", str(file), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | python_path())
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


class Learner(threading.Thread):
    """Takes each shard, and reports it at once. `num_steps` counts them."""

    def __init__(self, config: Config) -> None:
        super().__init__(daemon=True)
        self._session = BufferSession(
            config, 0, 1, secrets.token_hex(6), VOCAB_SIZE, lambda: self.over
        )
        self.over = False
        self.num_steps = 0

    def run(self) -> None:
        version = self._publish(self._session.join(0))
        try:
            for step in range(1_000_000):
                for _ in self._session.portions(step):
                    pass
                version = self._publish(version)
                self._session.trained(step, 1, {})
                self.num_steps = step + 1
        except (RunEnded, RunStopped, BufferLost, TransportError):
            return  # the measurement is over

    def _publish(self, version: int) -> int:
        policy = msg.SnapshotRef(
            version=version + 1, digest="", num_bytes=0, address="", path="none"
        )
        self._session.count(policy.version)
        self._session.announce(policy, 0.0, b"")
        return version + 1


@dataclass(frozen=True, kw_only=True)
class Load:
    """`num_engines` engines that report `chunk` tokens at once until a rollout has `num_tokens`.

    ends: without it, rollouts stay in flight at that length.
    varied: the length of a rollout is one of `NUM_LENGTHS` fractions of `num_tokens`.
    pause_s: between two reports of a rollout.
    """

    num_engines: int
    slots: int
    chunk: int
    num_tokens: int
    ends: bool = True
    varied: bool = False
    pause_s: float = 0.0

    def length(self, rollout_id: int) -> int:
        if not self.varied:
            return self.num_tokens
        return self.num_tokens * (1 + rollout_id % NUM_LENGTHS) // NUM_LENGTHS


class Rate(NamedTuple):
    """Of one window: events per second, and per second of the buffer's CPU time.

    The second is the limit of one core, and depends less on the other load of the machine.
    load_cores: that the engines and the learner kept busy, on the machine that they share with the
    buffer.
    """

    per_s: float
    per_cpu_s: float
    load_cores: float


class _Template:
    """A message about one rollout, encoded once. `frame` is it about another one."""

    def __init__(self, message: Callable[[int], msg.Message]) -> None:
        encoded = encode(message(ANY_ROLLOUT))
        self._parts = encoded.split(_number(ANY_ROLLOUT))
        assert len(self._parts) > 1, "no rollout is named"

    def frame(self, rollout_id: int) -> bytes:
        return _number(rollout_id).join(self._parts)


def _number(value: int) -> bytes:
    """msgpack's longest form of a whole number, of which all have the same length."""
    return b"\xcf" + value.to_bytes(8, "big")


class _Peer:
    """An engine's socket, and the rollouts that it holds."""

    def __init__(self, context: zmq.Context[Any], name: str, slots: int, address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.sndhwm = NUM_QUEUED
        self.socket.connect(address)
        self.socket.send(encode(hello(name, slots)))
        self.credit = Credit()
        self.held: dict[int, int] = {}  # rollout -> tokens reported

    def send(self, message: msg.Message) -> None:
        self._send(encode(message), 0)

    def offer(self, frame: bytes) -> bool:
        """False, with nothing sent, if the buffer is busy."""
        if not self.credit.admits(frame):
            return False
        try:
            self._send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _send(self, frame: bytes, flags: int) -> None:
        self.socket.send(frame, flags)
        self.credit.spend(frame)


class Engines:
    """The engines of a load. `num_settled` counts their rollouts that are recorded."""

    def __init__(self, load: Load, address: str, buffer_pid: int) -> None:
        self.buffer_pid = buffer_pid
        self.num_settled = self.num_sampled = 0
        self._load, self._version, self._has_sent = load, -1, False
        # Encoded once, so that the load takes little of the cores that it shares with the buffer.
        self._reports: dict[int, _Template] = {}  # of the newest version, by tokens reported
        self._ends: dict[tuple[int, int], _Template] = {}  # by tokens and reward
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._peers: dict[zmq.Socket[bytes], _Peer] = {}
        for index in range(load.num_engines):
            peer = _Peer(self._context, f"bench/{index}", load.slots, address)
            self._poller.register(peer.socket, zmq.POLLIN)
            self._peers[peer.socket] = peer

    def close(self) -> None:
        self._context.destroy(linger=0)

    def turn(self) -> None:
        """Answer all messages, and report once for each rollout unless the buffer is busy."""
        time.sleep(self._load.pause_s)
        held = any(peer.held for peer in self._peers.values())
        wait_ms = 0 if self._has_sent else BUSY_MS if held else POLL_MS
        self._has_sent = False
        for socket, _ in self._poller.poll(wait_ms):
            while socket.poll(0):
                self._obey(self._peers[socket], decoder(msg.Outbound).decode(socket.recv()))
        for peer in self._peers.values():
            for rollout_id, done in list(peer.held.items()):
                if not self._decode(peer, rollout_id, done):
                    break

    def _obey(self, peer: _Peer, command: msg.Message) -> None:
        match command:
            case msg.Welcome(policy) | msg.PolicyPublished(policy) if policy is not None:
                if self._version != policy.version:
                    self._version = policy.version
                    self._reports.clear()
                peer.send(msg.PolicyLoaded(version=policy.version, fetch_s=0.0, pause_s=0.0))
            case msg.Launch():
                peer.held |= {rollout.rollout_id: 0 for rollout in command.rollouts}
            case msg.Cancel():
                for rollout_id in command.rollout_ids:
                    done = peer.held.pop(rollout_id, 0)
                    peer.send(msg.Stopped(rollout_id=rollout_id, num_tokens=done))
            case msg.Settled():
                self.num_settled += len(command.rollout_ids)
            case msg.Heartbeat():
                peer.send(msg.Heartbeat())
            case msg.Received(num_bytes):
                peer.credit.read(num_bytes)

    def _decode(self, peer: _Peer, rollout_id: int, done: int) -> bool:
        """Its next report, or its end. False, with nothing sent, if the buffer is busy."""
        if done >= self._load.length(rollout_id):
            if self._load.ends and not peer.offer(self._end(rollout_id, done)):
                return False
            if self._load.ends:
                self._has_sent = True
                del peer.held[rollout_id]
            return True
        if not peer.offer(self._report(rollout_id, done)):
            return False
        self._has_sent = True
        peer.held[rollout_id] = done + self._load.chunk
        self.num_sampled += self._load.chunk
        return True

    def _end(self, rollout_id: int, done: int) -> bytes:
        reward = rollout_id % 2
        template = self._ends.get((done, reward))
        if template is None:
            template = self._ends[done, reward] = _Template(
                lambda any_id: msg.Finished(
                    rollout_id=any_id, num_tokens=done, truncated=False, reward=float(reward),
                    text="",
                )
            )  # fmt: skip
        return template.frame(rollout_id)

    def _report(self, rollout_id: int, done: int) -> bytes:
        template = self._reports.get(done)
        if template is None:
            template = self._reports[done] = _Template(lambda any_id: self._progress(any_id, done))
        return template.frame(rollout_id)

    def _progress(self, rollout_id: int, done: int) -> msg.Progress:
        given = msg.Chunk(
            rollout_id=rollout_id, offset=0, sampled=False, version=0,
            tokens=bytes(4 * NUM_GIVEN), logprobs=b"",
        )  # fmt: skip
        values = bytes(4 * self._load.chunk)
        sampled = msg.Chunk(
            rollout_id=rollout_id, offset=NUM_GIVEN + done, sampled=True, version=self._version,
            tokens=values, logprobs=values,
        )  # fmt: skip
        return msg.Progress(chunks=[sampled] if done else [given, sampled])


def hello(engine_id: str, slots: int) -> msg.EngineHello:
    return msg.EngineHello(
        engine_id=engine_id, engine_type="bench", slots=slots, policy_version=-1, pid=1,
        incarnation="bench",
    )  # fmt: skip


@contextmanager
def running(config: Config, folder: Path, load: Load) -> Iterator[Engines]:
    """A buffer with its learner and engines. `run_for` drives the engines."""
    with buffer_process(config, folder) as pid:
        learner = Learner(config)
        learner.start()
        engines = Engines(load, config.buffer.address, pid)
        try:
            yield engines
        finally:
            engines.close()
            learner.over = True
            learner.join(LEAVE_S)


def run_for(engines: Engines, seconds: float) -> float:
    """Drive the engines. Returns the seconds that it took."""
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        engines.turn()
    return elapsed


def ends_per_s(config: Config, folder: Path, load: Load, warm_up: int, measured_s: float) -> Rate:
    """Settled trajectories, after the first `warm_up` of them."""
    with running(config, folder, load) as engines:
        run_until_settled(engines, warm_up)
        before, before_s = engines.num_settled, cpu_s(engines.buffer_pid)
        load_before_s = time.process_time()
        seconds = run_for(engines, measured_s) + run_until_settled(engines, before + 1)
        num, used_s = engines.num_settled - before, cpu_s(engines.buffer_pid) - before_s
        load_s = time.process_time() - load_before_s
        return Rate(num / seconds, num / used_s, load_s / seconds)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far. Linux has a clock for each (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def run_until_settled(engines: Engines, num: int) -> float:
    """Drive the engines until so many rollouts are recorded. Returns the seconds that it took."""
    seconds = 0.0
    while engines.num_settled < num:
        if seconds > LONGEST_S:
            raise TimeoutError(f"{engines.num_settled} of {num} rollouts ended in {LONGEST_S:g} s")
        seconds += run_for(engines, 0.05)
    return seconds


def seconds_to_restart(config: Config, folder: Path) -> float:
    """From the start of the process of a killed buffer to its first answer."""
    began = time.perf_counter()
    with (
        buffer_process(config, folder, "run.resume=true"),
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        socket.linger = 0
        socket.connect(config.buffer.address)
        socket.send(encode(hello("late", 1)))
        socket.recv()
        return time.perf_counter() - began
