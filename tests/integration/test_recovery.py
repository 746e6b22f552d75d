"""The buffer is killed and restarted: its records show that nothing was lost or done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buffer.records.event_log import read_sessions
from buffer.records.row_segments import read_rows
from buffer.wire import messages as msg
from buffer.wire.transport import TransportError
from configs import cli
from configs.schema import Config
from darts import events as ev
from learner import AskedToStop, BufferLost, RunStopped
from learner.session import BufferSession, RunEnded
from learner.train import run_rank
from tests.fakes import FakeEngine, fake_probe
from tests.learner_cases import save_model
from tools.replay import replay

ROOT = Path(__file__).parents[2]
GROUPS, SIZE, LAG = 3, 4, 2


def make_config(folder: Path, port: int, *overrides: str) -> Config:
    return cli.load(
        [
            f"run.dir={folder}", "run.name=r", f"buffer.address=tcp://127.0.0.1:{port}",
            f"batch.groups={GROUPS}", f"darts.group_size={SIZE}", "redundancy.rule=fixed",
            "loss.kl=1",  # so that every response has a gradient

            "redundancy.upper=1.5", "sampling.max_tokens=64", "eval.every=4", "eval.num_prompts=3",
            f"staleness.max_lag={LAG}", "buffer.peer_timeout_s=3", "data.num_prompts=500",
            "run.trackers=[]", *overrides,
        ]
    )  # fmt: skip


class Buffer:
    """`python -m buffer` in its own process, which can be killed and restarted."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.file = folder / "config.yaml"
        self.file.write_text(cli.to_yaml(config))
        self.process = self._start()

    def _start(self, *overrides: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "buffer", "--config", str(self.file), *overrides]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start("run.resume=true")


class Learner(threading.Thread):
    """The learner's real exchange of messages with the buffer, without the training."""

    def __init__(self, config: Config, incarnation: str, step: int = 0, version: int = -1) -> None:
        super().__init__(daemon=True)
        self.config, self.step, self.version = config, step, version
        self.session = BufferSession(config, 0, 1, incarnation, 100, lambda: self.stopped)
        self.stopped = False
        self.trained: list[tuple[int, set[int]]] = []
        self.shards: list[msg.Shard] = []
        self.outcome = ""

    def run(self) -> None:
        with self.session:
            try:
                self.version = max(self.version, self.session.join(self.step))
                self.publish()
                while self.step < self.config.run.steps:
                    trajectories: list[msg.Trajectory] = []
                    for shard, _ in self.session.portions(self.step):
                        self.shards.append(shard)
                        trajectories += shard.trajectories
                        time.sleep(0.1)
                    groups = {t.group_id for t in trajectories}
                    num_tokens = sum(t.sampled.count(1) for t in trajectories)
                    self.step += 1
                    self.publish()
                    self.session.trained(self.step - 1, num_tokens, {"train/loss": 0.0})
                    self.trained.append((self.step - 1, groups))
                self.session.wait_for_the_end()
            except RunEnded:
                self.outcome = "ended well"
            except (RunStopped, BufferLost, TransportError) as error:
                self.outcome = str(error)

    def publish(self) -> None:
        self.version += 1
        policy = msg.SnapshotRef(
            version=self.version, digest="", num_bytes=0, address="", path="nowhere"
        )
        self.session.count(self.version)
        self.session.announce(policy, 0.0, fake_probe(self.version))


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_rows(folder / "r" / name))


def check_records(folder: Path, steps: int) -> None:
    """Each step has one row, and each group one. Each visit of a prompt is trained on at most once
    and never lost.
    """
    metrics, groups = rows(folder, "metrics.jsonl"), rows(folder, "groups.jsonl")
    assert [row["step"] for row in metrics] == list(range(steps))
    assert all(row["lag/max"] <= LAG for row in metrics)
    assert "eval/reward_mean" in metrics[-1]
    assert len({row["group_id"] for row in groups}) == len(groups)
    shipped = [row["visit"] for row in groups if row["end"] == "shipped"]
    assert len(shipped) == steps * GROUPS
    assert max(Counter(shipped).values()) == 1
    drawn: set[int] = set()
    for session in read_sessions(folder / "r" / "events"):
        for logged in session.events:
            if isinstance(logged.event, ev.PromptsDrawn):
                drawn |= {prompt.visit for prompt in logged.event.prompts}
    assert set(shipped) <= drawn and drawn == set(range(max(drawn) + 1))
    # Each prompt drawn before the last trained one is trained, dropped with a reason, or waiting.
    ended = {row["visit"] for row in groups}
    unfinished = drawn - ended
    assert len(unfinished) <= (LAG + 3) * GROUPS


def check_replay(folder: Path) -> None:
    for session in read_sessions(folder / "r" / "events"):
        assert replay(session.config, session.state, session.events).difference is None


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "stream"), [(0, "batch"), (1, "batch"), (2, "group")])
def test_a_buffer_killed_at_any_moment_continues_after_a_restart(
    tmp_path: Path, free_port: Callable[[], int], seed: int, stream: str
) -> None:
    rng, steps = random.Random(seed), 12
    small = "buffer.segment_bytes=20000"  # several segments, so that checkpoints are used
    config = make_config(
        tmp_path, free_port(), f"run.steps={steps}", small, f"batch.stream={stream}"
    )
    buffer = Buffer(tmp_path, config)
    engines = [FakeEngine(config.buffer.address, f"e/{i}") for i in range(2)]
    learner = Learner(config, "a")
    for peer in (*engines, learner):
        peer.start()
    for _ in range(3):
        reached = learner.step
        deadline = time.monotonic() + 60
        while learner.step < min(reached + 2, steps - 1):
            assert buffer.process.poll() is None and time.monotonic() < deadline, learner.outcome
            time.sleep(rng.uniform(0.01, 0.2))
        buffer.kill()
        time.sleep(rng.uniform(0, 0.5))
        buffer.restart()
    assert buffer.process.wait(120) == 0
    learner.join(10)
    assert learner.outcome == "ended well"
    check_records(tmp_path, steps)
    check_replay(tmp_path)
    by_group = {
        row["group_id"] for row in rows(tmp_path, "groups.jsonl") if row["end"] == "shipped"
    }
    assert set().union(*(groups for _, groups in learner.trained)) == by_group
    assert [step for step, _ in learner.trained] == list(range(steps))


@pytest.mark.slow
def test_a_stopped_learner_comes_back_to_the_same_step(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """After a buffer was frozen for longer than its peers wait, both sides reconnect."""
    config = make_config(tmp_path, free_port(), "run.steps=6", "buffer.peer_timeout_s=1.5")
    buffer = Buffer(tmp_path, config)
    engine, learner = FakeEngine(config.buffer.address, "e"), Learner(config, "a")
    engine.start()
    learner.start()
    while learner.step < 2:
        time.sleep(0.02)
    os.kill(buffer.process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(buffer.process.pid, signal.SIGCONT)
    assert buffer.process.wait(60) == 0
    learner.join(10)
    assert learner.outcome == "ended well"
    check_records(tmp_path, 6)


@pytest.mark.slow
def test_a_learner_restarted_alone_gets_back_the_prompts_of_withdrawn_steps(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    config = make_config(tmp_path, free_port(), "run.steps=16")
    buffer = Buffer(tmp_path, config)
    engine, first = FakeEngine(config.buffer.address, "e"), Learner(config, "a")
    engine.start()
    first.start()
    while len(first.trained) < 5:
        time.sleep(0.02)
    first.stopped = True
    first.join(10)
    before = {row["visit"] for row in rows(tmp_path, "groups.jsonl") if row["end"] == "shipped"}
    config.run.resume = True
    second = Learner(config, "b", step=2, version=first.version)
    second.start()
    assert buffer.process.wait(60) == 0
    second.join(10)
    assert second.outcome == "ended well"
    check_records(tmp_path, 16)
    after = {row["visit"] for row in rows(tmp_path, "groups.jsonl") if row["end"] == "shipped"}
    assert before <= after


@pytest.mark.slow
def test_resuming_a_finished_run_ends_at_once(tmp_path: Path, free_port: Callable[[], int]) -> None:
    config = make_config(tmp_path, free_port(), "run.steps=2")
    buffer = Buffer(tmp_path, config)
    engine, learner = FakeEngine(config.buffer.address, "e"), Learner(config, "a")
    engine.start()
    learner.start()
    assert buffer.process.wait(60) == 0
    before = rows(tmp_path, "metrics.jsonl")
    buffer.restart()
    assert buffer.process.wait(60) == 0
    assert rows(tmp_path, "metrics.jsonl") == before


@pytest.mark.slow
def test_a_second_learner_is_refused_while_the_first_is_alive(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    config = make_config(tmp_path, free_port(), "run.steps=4")
    buffer = Buffer(tmp_path, config)
    first = Learner(config, "a")
    first.start()
    while first.version < 0:
        time.sleep(0.02)
    config.run.resume = True
    second = Learner(config, "b")
    second.start()
    second.join(20)
    assert "is training this run already" in second.outcome
    FakeEngine(config.buffer.address, "e").start()
    assert buffer.process.wait(60) == 0
    first.join(10)
    assert first.outcome == "ended well"


def test_a_learner_that_waits_for_its_first_buffer_heeds_a_request_to_stop(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """The launcher would wait `run.stop_s` for it, and kill it, if a buffer fails at its start."""
    config = make_config(tmp_path, free_port(), "buffer.connect_timeout_s=3600")
    with (
        BufferSession(config, 0, 1, "a", 100, lambda: True) as session,
        pytest.raises(AskedToStop),
    ):
        session.join(0)
    config.buffer.connect_timeout_s = 0.1
    with (
        BufferSession(config, 0, 1, "a", 100) as session,
        pytest.raises(TransportError, match=r"no buffer answered at .* within 0.1 s"),
    ):
        session.join(0)


@pytest.mark.slow
def test_a_learner_that_was_asked_to_stop_frees_its_place_at_once(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat would hold it for `buffer.peer_timeout_s`, and refuse its successor."""
    monkeypatch.setattr("buffer.wire.client.GIVE_UP_S", 60.0)  # until then it is not asked
    model = save_model(tmp_path / "model")
    options = f"model.path={model}", "buffer.peer_timeout_s=60", "learner.device=cpu"
    config = make_config(tmp_path, free_port(), "run.steps=4", *options)
    buffer = Buffer(tmp_path, config)
    joined = threading.Event()

    def stop_requested() -> bool:
        joined.set()
        return True  # asked first once it has joined and waits for a shard

    with pytest.raises(RunStopped, match="was asked to stop"):
        run_rank(config, stop_requested=stop_requested)
    assert joined.is_set()
    config.run.resume = True
    with BufferSession(config, 0, 1, "b", 100) as successor:
        assert successor.join(0) == 0  # `Refused` otherwise
    buffer.kill()
