"""Links break, buffers die and engines freeze, but rollouts go on and no token is trained twice."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from buffer.wire import messages as msg
from configs.schema import Config
from tests.fakes import FIRST_TOKEN, PROMPT, FakeEngine
from tests.integration.test_recovery import (
    ROOT,
    Buffer,
    Learner,
    check_records,
    check_replay,
    make_config,
    rows,
)

STEPS = 8


class Proxy:
    """Forwards connections to a port, and can reset all of them at once."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # the proxy was closed
            try:
                far = socket.create_connection(("127.0.0.1", self.port))
            except OSError:  # no program listens there yet
                near.close()
                continue
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            return  # the connection was reset

    def reset(self) -> None:
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                with suppress(OSError):  # it was closed from the other side
                    end.shutdown(socket.SHUT_RD)  # wakes its pump
                end.close()

    def close(self) -> None:
        self._listener.close()
        self.reset()


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


class GatedLearner(Learner):
    """Ends no step while its gate is closed, so that the run does not end either."""

    def __init__(self, config: Config, incarnation: str) -> None:
        super().__init__(config, incarnation)
        self.gate = threading.Event()
        self.gate.set()

    def publish(self) -> None:
        assert self.gate.wait(60)
        super().publish()


def wait_for_step(learner: Learner, step: int) -> None:
    deadline = time.monotonic() + 60
    while learner.step < step:
        assert time.monotonic() < deadline, learner.outcome
        time.sleep(0.01)


def check_tokens(shards: list[msg.Shard]) -> None:
    """Each trained response has its tokens in order, none missing and none repeated."""
    for trajectory in (t for shard in shards for t in shard.trajectories):
        tokens = np.frombuffer(trajectory.tokens, "<i4").tolist()
        num_sampled = len(tokens) - len(PROMPT)
        assert tokens == [*PROMPT, *range(FIRST_TOKEN, FIRST_TOKEN + num_sampled)]
        assert sum(n for _, n in trajectory.versions) == num_sampled


def lost_rollouts(folder: Path) -> list[int]:
    groups = rows(folder, "groups.jsonl")
    return [r["rollout_id"] for g in groups for r in g["rollouts"] if r["end"] == "lost"]


def check_run(folder: Path, buffer: Buffer, learner: Learner) -> None:
    assert buffer.process.wait(60) == 0
    learner.join(10)
    assert learner.outcome == "ended well"
    check_records(folder, STEPS)
    check_replay(folder)
    check_tokens(learner.shards)
    assert [step for step, _ in learner.trained] == list(range(STEPS))


@pytest.mark.slow
def test_a_reset_of_all_connections_costs_no_rollout(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    config = make_config(tmp_path, port, f"run.steps={STEPS}", "buffer.peer_timeout_s=15")
    buffer = Buffer(tmp_path, config)
    with proxy_to(port) as proxy:
        config.buffer.address = proxy.address
        engine, learner = FakeEngine(proxy.address, "e"), Learner(config, "a")
        engine.pause_s = 0.01
        engine.start()
        learner.start()
        for step in (2, 4, 6):
            wait_for_step(learner, step)
            proxy.reset()
        check_run(tmp_path, buffer, learner)
    assert engine.num_rejoined >= 3
    assert lost_rollouts(tmp_path) == []
    assert len(set(engine.launched)) == len(engine.launched)


@pytest.mark.slow
def test_a_killed_buffer_costs_no_rollout(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """The engines keep decoding, and the restarted buffer gets the tokens of that time."""
    config = make_config(tmp_path, free_port(), f"run.steps={STEPS}", "buffer.peer_timeout_s=15")
    buffer = Buffer(tmp_path, config)
    engines = [FakeEngine(config.buffer.address, f"e/{i}") for i in range(2)]
    learner = Learner(config, "a")
    for peer in (*engines, learner):
        peer.start()
    for engine in engines:
        engine.pause_s = 0.01
    for step in (2, 5):
        wait_for_step(learner, step)
        buffer.kill()
        buffer.restart()
    check_run(tmp_path, buffer, learner)
    assert lost_rollouts(tmp_path) == []
    for engine in engines:
        assert engine.num_rejoined >= 1
        assert len(set(engine.launched)) == len(engine.launched)


@pytest.mark.slow
def test_an_engine_frozen_past_the_timeout_joins_again(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Other engines continued its rollouts from the received tokens, so it must forget them."""
    config = make_config(tmp_path, free_port(), f"run.steps={STEPS}", "buffer.peer_timeout_s=1.5")
    buffer = Buffer(tmp_path, config)
    program = (
        "import sys, time; from tests.fakes import FakeEngine\n"
        "engine = FakeEngine(sys.argv[1], 'frozen')\n"
        "engine.pause_s = 0.02\n"
        "engine.start()\n"
        "while not engine.num_rejoined: time.sleep(0.02)\n"
        "print('has joined again', flush=True)\n"
        "engine.join()\n"
    )
    frozen = subprocess.Popen(
        [sys.executable, "-c", program, config.buffer.address],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    learner, other = GatedLearner(config, "a"), FakeEngine(config.buffer.address, "other")
    other.pause_s = 0.02
    for peer in (other, learner):
        peer.start()
    wait_for_step(learner, 2)
    learner.gate.clear()
    os.kill(frozen.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(frozen.pid, signal.SIGCONT)
    assert frozen.stdout is not None
    assert frozen.stdout.readline() == "has joined again\n"
    learner.gate.set()
    check_run(tmp_path, buffer, learner)
    frozen.communicate(timeout=20)


@pytest.mark.slow
def test_a_learner_frozen_past_the_timeout_trains_each_step_once(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    config = make_config(tmp_path, free_port(), f"run.steps={STEPS}", "buffer.peer_timeout_s=1.5")
    buffer = Buffer(tmp_path, config)
    program = (
        "import sys; from configs import cli; from tests.integration.test_recovery import Learner; "
        "learner = Learner(cli.load(['--config', sys.argv[1]]), 'a'); learner.start(); "
        "learner.join(); print(learner.outcome, [step for step, _ in learner.trained])"
    )
    frozen = subprocess.Popen(
        [sys.executable, "-c", program, str(buffer.file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    engine = FakeEngine(config.buffer.address, "e")
    engine.start()
    while not (metrics := tmp_path / "r" / "metrics.jsonl").exists() or not metrics.read_text():
        assert buffer.process.poll() is None
        time.sleep(0.02)
    os.kill(frozen.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(frozen.pid, signal.SIGCONT)
    out, _ = frozen.communicate(timeout=60)
    assert out.strip() == f"ended well {list(range(STEPS))}"
    assert buffer.process.wait(20) == 0
    check_records(tmp_path, STEPS)
    assert lost_rollouts(tmp_path) == []
