"""`python -m tools.bench buffer`, second half: a real buffer process under load over real sockets.

Owns engines that answer each launch at once, on raw sockets in one thread, and a learner that
trains nothing. Prints rates between one settled rollout and a later one, which include socket, core
and logs. Judges nothing. The load shares this machine's cores with the buffer.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq

from buffer.processes.child import python_path
from buffer.wire import messages as msg
from buffer.wire.transport import TransportError, decoder, encode
from configs import cli
from configs.schema import Config
from learner import BufferLost, RunStopped
from learner.session import BufferSession, RunEnded

PORT = 5591
NUM_TOKENS, NUM_GIVEN, VOCAB_SIZE = 2000, 64, 100
NUM_REPORTS, REPORT_TOKENS = 20, 8  # of a short rollout, to measure reports
NUM_QUEUED = 20  # messages of an engine that the buffer has not taken
WARM_UP_S, MEASURED_S = 3.0, 8.0
NO_FSYNC_S = 1e6
POLL_MS = 20
LEAVE_S = 5.0  # for the learner


def bench_config(folder: Path, name: str, *overrides: str) -> Config:
    return cli.load(
        [
            f"run.dir={folder}", f"run.name={name}", "run.steps=1000000", "run.trackers=[]",
            f"buffer.address=tcp://127.0.0.1:{PORT}", "eval.every=0", "batch.groups=32",
            "darts.group_size=8", "redundancy.rule=none", f"sampling.max_tokens={NUM_TOKENS}",
            "model.max_context=4096", *overrides,
        ]
    )  # fmt: skip


@contextmanager
def buffer_process(config: Config, folder: Path, *overrides: str) -> Iterator[None]:
    """Killed at the end, as nothing of it is needed."""
    file = folder / "bench.yaml"
    file.write_text(cli.to_yaml(config))
    command = [sys.executable, "-m", "buffer", "--config", str(file), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | python_path())
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


class Learner(threading.Thread):
    """Takes each shard, and reports it at once."""

    def __init__(self, config: Config) -> None:
        super().__init__(daemon=True)
        self._session = BufferSession(
            config, 0, 1, secrets.token_hex(6), VOCAB_SIZE, lambda: self.over
        )
        self.over = False

    def run(self) -> None:
        version = self._publish(self._session.join(0))
        try:
            for step in range(1_000_000):
                self._session.pull(step)
                version = self._publish(version)
                self._session.trained(step, 1, {})
        except (RunEnded, RunStopped, BufferLost, TransportError):
            return  # the measurement is over

    def _publish(self, version: int) -> int:
        policy = msg.SnapshotRef(
            version=version + 1, digest="", num_bytes=0, address="", path="none"
        )
        self._session.announce(policy, 0.0, b"")
        return version + 1


class Engines:
    """`num_engines` engines that report `chunk` tokens at once until a rollout has `num_tokens`."""

    def __init__(self, num_engines: int, slots: int, chunk: int, num_tokens: int) -> None:
        self.num_settled = 0
        self._chunk, self._num_tokens, self._version = chunk, num_tokens, -1
        self._sampled = bytes(4 * chunk)
        self._context: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._held: dict[zmq.Socket[bytes], dict[int, int]] = {}  # rollout -> tokens reported
        for index in range(num_engines):
            socket = self._context.socket(zmq.DEALER)
            socket.sndhwm = NUM_QUEUED
            socket.connect(f"tcp://127.0.0.1:{PORT}")
            socket.send(encode(hello(f"bench/{index}", slots)))
            self._poller.register(socket, zmq.POLLIN)
            self._held[socket] = {}

    def close(self) -> None:
        self._context.destroy(linger=0)

    def turn(self) -> None:
        """Answer all messages, and report once for each rollout unless the buffer is busy."""
        for socket, _ in self._poller.poll(POLL_MS if not any(self._held.values()) else 0):
            while socket.poll(0):
                self._obey(socket, decoder(msg.EngineCommand).decode(socket.recv()))
        for socket, held in self._held.items():
            try:
                for rollout_id, done in list(held.items()):
                    self._decode(socket, rollout_id, done)
            except zmq.Again:
                continue

    def _obey(self, socket: zmq.Socket[bytes], command: msg.Message) -> None:
        match command:
            case msg.Welcome(policy) | msg.PolicyPublished(policy) if policy is not None:
                loaded = msg.PolicyLoaded(version=policy.version, fetch_s=0.0, pause_s=0.0)
                self._version = policy.version
                socket.send(encode(loaded))
            case msg.Launch():
                self._held[socket] |= {rollout.rollout_id: 0 for rollout in command.rollouts}
            case msg.Cancel():
                for rollout_id in command.rollout_ids:
                    done = self._held[socket].pop(rollout_id, 0)
                    socket.send(encode(msg.Stopped(rollout_id=rollout_id, num_tokens=done)))
            case msg.Settled():
                self.num_settled += len(command.rollout_ids)
            case msg.Heartbeat():
                socket.send(encode(msg.Heartbeat()))

    def _decode(self, socket: zmq.Socket[bytes], rollout_id: int, done: int) -> None:
        """Its next report, or its end. Raises `zmq.Again`, with nothing sent."""
        held = self._held[socket]
        if done == self._num_tokens:
            finished = msg.Finished(
                rollout_id=rollout_id, num_tokens=done, truncated=False,
                reward=float(rollout_id % 2), text="",
            )  # fmt: skip
            socket.send(encode(finished), zmq.NOBLOCK)
            del held[rollout_id]
            return
        given = msg.Chunk(
            rollout_id=rollout_id, offset=0, sampled=False, version=0,
            tokens=bytes(4 * NUM_GIVEN), logprobs=b"",
        )  # fmt: skip
        sampled = msg.Chunk(
            rollout_id=rollout_id, offset=NUM_GIVEN + done, sampled=True,
            version=self._version, tokens=self._sampled, logprobs=self._sampled,
        )  # fmt: skip
        chunks = [sampled] if done else [given, sampled]
        socket.send(encode(msg.Progress(chunks=chunks)), zmq.NOBLOCK)
        held[rollout_id] = done + self._chunk


def hello(engine_id: str, slots: int) -> msg.EngineHello:
    return msg.EngineHello(
        engine_id=engine_id, engine_type="bench", slots=slots, policy_version=-1, pid=1,
        incarnation="bench",
    )  # fmt: skip


def ends_per_s(config: Config, folder: Path, num_engines: int, slots: int, chunk: int) -> float:
    """Settled trajectories per second."""
    with buffer_process(config, folder):
        learner = Learner(config)
        learner.start()
        engines = Engines(num_engines, slots, chunk, config.sampling.max_tokens)
        try:
            _run(engines, WARM_UP_S)
            before = engines.num_settled
            seconds = _run(engines, MEASURED_S)
            return (engines.num_settled - before) / seconds
        finally:
            engines.close()
            learner.over = True
            learner.join(LEAVE_S)


def _run(engines: Engines, seconds: float) -> float:
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        engines.turn()
    return elapsed


def seconds_to_restart(config: Config, folder: Path) -> float:
    """From the start of the process of a killed buffer to its first answer."""
    began = time.perf_counter()
    with (
        buffer_process(config, folder, "run.resume=true"),
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        socket.linger = 0
        socket.connect(f"tcp://127.0.0.1:{PORT}")
        socket.send(encode(hello("late", 1)))
        socket.recv()
        return time.perf_counter() - began


def main(folder: Path) -> None:
    durable, free = (
        bench_config(folder, f"fsync-{fsync_s:g}", f"buffer.fsync_s={fsync_s}")
        for fsync_s in (0.05, NO_FSYNC_S)
    )
    rate, free_rate = (ends_per_s(config, folder, 4, 64, NUM_TOKENS) for config in (durable, free))
    print(
        f"trajectories of {NUM_TOKENS:,} tokens through socket, core and logs: {rate:,.0f}/s, "
        f"{free_rate:,.0f}/s without fsync ({rate / free_rate:.2f} of it)"
    )
    events = Path(durable.run.dir) / durable.run.name / "events"
    newest = max(events.glob("*.log")).stat().st_size
    print(
        f"restart: {seconds_to_restart(durable, folder):.1f} s to the first answer, "
        f"with {newest / 1e6:.0f} MB of events to replay"
    )
    short = bench_config(folder, "short", f"sampling.max_tokens={NUM_REPORTS * REPORT_TOKENS}")
    reports = NUM_REPORTS * ends_per_s(short, folder, 1000, 2, REPORT_TOKENS)
    print(f"progress of 1,000 engines: {reports:,.0f} reports of {REPORT_TOKENS} tokens/s")
