"""Keys of the buffer: two values of each change a service with fake peers."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from buffer.deadlines import Deadlines
from buffer.records.event_log import read_sessions
from buffer.run_state import RunState
from buffer.service import Service
from buffer.wire.keys import make_keys
from buffer.wire.transport import TransportError
from configs.schema import Config
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core
from tests.fakes import FakeEngine, FakeLearner
from tests.knobs import Turn, check_turn


class Running:
    """A service on its own thread, with an engine and a learner."""

    def __init__(self, config: Config, learner: bool = True, error: str = "") -> None:
        self.config = config
        self.service = Service(config)
        address = self.service.run.router.address
        self.engine = FakeEngine(address, "e", slots=16, max_tokens=config.sampling.max_tokens)
        self.engine.fail_rollouts = error
        self.status: int | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        self.engine.start()
        self.learner = FakeLearner(address, config.run.steps)
        if learner:
            self.learner.start()

    def _serve(self) -> None:
        self.status = self.service.serve()

    def wait(self, timeout_s: float = 60.0) -> int | None:
        """Its exit status, or None if it still runs."""
        self.thread.join(timeout_s)
        return self.status

    def end(self) -> None:
        self.service.stop()
        self.engine.kill()
        self.thread.join(30)


def metrics(config: Config) -> list[dict]:
    file = Path(config.run.dir) / config.run.name / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def in_folder(config: Config, own: Path) -> Config:
    config.run.dir = str(own / config.run.dir)
    return config


def steps_and_responses(config: Config, own: Path) -> object:
    """The number of steps, and the responses per evaluation."""
    running = Running(in_folder(config, own))
    assert running.wait() == 0
    rows = metrics(config)
    return len(rows), [row["eval/responses"] for row in rows if "eval/step" in row]


def tokens_trained(config: Config, own: Path) -> object:
    """Tokens that were trained on in one step of truncated responses."""
    assert Running(in_folder(config, own)).wait() == 0
    return metrics(config)[-1]["tokens/trained"]


def updates(config: Config, own: Path) -> object:
    """The number of updates, and the responses of each, in one step."""
    running = Running(in_folder(config, own))
    assert running.wait() == 0
    return [part.loss_responses for part in running.learner.shards[0].minibatches]


def penalties(config: Config, own: Path) -> object:
    """The mean overlong penalty of each step."""
    assert Running(in_folder(config, own)).wait() == 0
    return [row["reward/overlong_mean"] for row in metrics(config)]


@contextmanager
def opened(config: Config) -> Iterator[None]:
    """A service that has claimed its folder and its ports but does not serve yet."""
    service = Service(config)
    try:
        yield
    finally:
        service.run.close("")


@contextmanager
def recovered(config: Config, own: Path) -> Iterator[RunState]:
    """The state of a service that has restored its logs but does not serve yet."""
    service = Service(in_folder(config, own))
    service._recover()
    try:
        yield service.run
    finally:
        service.run.close("")


def durable_at_once(config: Config, own: Path) -> object:
    """Whether an event is durable as soon as it is logged."""
    with recovered(config, own) as run:
        run.handle(ev.BufferRestarted())
        return run.log.log.synced_seq == run.log.log.next_seq - 1


def segments(config: Config, own: Path) -> object:
    """Segments of the event log that remain after the ends of five steps."""
    with recovered(config, own) as run:
        for _ in range(5):
            run.rotate_log()
        return len(list((run.folder / "events").glob("*.log")))


def first_steps(config: Config, own: Path) -> object:
    """The first step of each file of rows after a hundred steps."""
    with recovered(config, own) as run:
        logs = (run.files.metrics, run.files.groups, run.files.samples)
        for run.step in range(1, 101):
            for log in logs:
                log.append({"step": run.step - 1})
            run.rotate_rows()
        return [log.first_step for log in logs]


def folder_made(config: Config, own: Path) -> object:
    with opened(in_folder(config, own)):
        return sorted(str(path.relative_to(own).parent) for path in own.rglob("config.yaml"))


def begins_again(config: Config, own: Path) -> object:
    """Whether a second service takes over the folder of a first one."""
    again = in_folder(config, own)
    with opened(dataclasses.replace(again, run=dataclasses.replace(again.run, resume=False))):
        pass
    try:
        with opened(again):
            return "resumed"
    except (ValueError, OSError) as error:
        return type(error)


def listens(config: Config, own: Path) -> object:
    """Whether a service answers at the first of two ports."""
    port = int((own.parent / "port").read_text())
    with opened(in_folder(config, own)):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return False
        return True


def serves_the_network(config: Config, own: Path) -> object:
    """Whether the service starts on an address outside the loopback interface."""
    try:
        with opened(in_folder(config, own)):
            return "listens"
    except (ValueError, TransportError):
        return "refused"


def outcome_of_failures(config: Config, own: Path) -> object:
    """Whether a run whose rollouts all fail stops or continues with the next prompts."""
    running = Running(in_folder(config, own), error="the verifier raised")
    while running.status is None and running.engine.num_launched < 120:
        time.sleep(0.01)
    stopped = running.wait(0.2)
    running.end()
    return stopped


def outcome_of_ten_skips(config: Config, own: Path) -> object:
    """The status of a run whose first twenty rollouts, of ten prompts, fail."""
    running = Running(in_folder(config, own))
    running.engine.num_to_fail = 20
    status = running.wait()
    running.end()
    return status


def pauses(config: Config, own: Path) -> object:
    """Whether engines waited for memory in a store smaller than a configuration may ask for."""
    config.buffer.max_bytes //= 1000
    assert Running(in_folder(config, own)).wait() == 0
    log = Path(config.run.dir) / config.run.name / "events"
    events = [logged.event for session in read_sessions(log) for logged in session.events]
    return any(isinstance(event, ev.AdmissionPaused) and event.paused for event in events)


def patience_without_learner(config: Config, own: Path) -> object:
    running = Running(in_folder(config, own), learner=False)
    status = running.wait(4)
    running.end()
    return status


def patience_with_a_silent_engine(config: Config, own: Path) -> object:
    """Engines that the service still has four seconds after its only one fell silent."""
    running = Running(in_folder(config, own), learner=False)
    while not running.service.run.peers.engines():
        time.sleep(0.01)
    running.engine.kill()
    time.sleep(4)
    known = len(running.service.run.peers.engines())
    running.end()
    return known


def overdue_after_a_minute(config: Config, own: Path) -> object:
    """The deadlines of an engine and a learner without progress, the engine one version behind."""
    core = Core(CoreConfig(groups_per_step=1, group_size=2, redundancy="none"))
    for event in (
        ev.PolicyPublished(0),
        ev.EngineJoined("a", "cpu", 4, 0),
        ev.PromptsDrawn((ev.Prompt("p"), ev.Prompt("q"))),
        ev.PolicyPublished(1),
        ev.ShardsRequested(0),
        ev.RolloutFinished(0, 5, False, 1.0, 0),
        ev.RolloutFinished(1, 5, False, 1.0, 0),
    ):
        core.handle(event)
    deadlines = Deadlines(config.buffer)
    return [
        deadlines.look(core, second, learner_is_there=True, offered_version=core.policy_version)
        for second in range(60)
    ][-1]


TINY = (
    "buffer.address=tcp://127.0.0.1:{port}",
    "run.steps=1",
    "batch.groups=1",
    "darts.group_size=2",
    "redundancy.rule=none",
    "sampling.max_tokens=40",
    "eval.every=0",
    "data.num_prompts=200",
)
SKIP = ("data.on_error=skip", "darts.max_attempts=1", "darts.max_reopens=0")
FULL = (*TINY, "run.steps=2", "batch.groups=4")
EVALUATED = (*TINY, "eval.every=1", "eval.num_prompts=2")
NETWORK = (*TINY, "buffer.address=tcp://0.0.0.0:{port}", "weights.address=tcp://0.0.0.0:*")
TRUNCATED = (*TINY, "sampling.max_tokens=2")
TURNS = {
    "loss.train_truncated": Turn("false", "true", tokens_trained, TRUNCATED),
    "batch.updates": Turn("1", "2", updates, (*FULL, "loss.train_truncated=true")),
    "loss.overlong_buffer": Turn("0", "1", penalties, TRUNCATED),
    "loss.overlong_factor": Turn("1", "2", penalties, (*TRUNCATED, "loss.overlong_buffer=1")),
    "run.steps": Turn("1", "2", steps_and_responses, TINY),
    "eval.samples_per_prompt": Turn("1", "3", steps_and_responses, EVALUATED),
    "run.name": Turn("a", "b", folder_made, TINY),
    "run.dir": Turn("x", "y/z", folder_made, TINY),
    "run.resume": Turn("false", "true", begins_again, TINY),
    "data.on_error": Turn("stop", "skip", outcome_of_failures, (*TINY, "data.max_skipped_frac=1")),
    "data.max_skipped_frac": Turn("0", "1", outcome_of_ten_skips, (*TINY, *SKIP)),
    "buffer.fsync_s": Turn("0", "300", durable_at_once, TINY),
    "buffer.segment_bytes": Turn("1", "64000000", segments, TINY),
    "buffer.keep_event_bytes": Turn("0", "1000000", segments, (*TINY, "buffer.segment_bytes=1")),
    "buffer.keep_row_bytes": Turn("200", "10000", first_steps, (*TINY, "buffer.segment_bytes=50")),
    "buffer.rollout_timeout_s": Turn("5", "600", overdue_after_a_minute, TINY),
    "buffer.load_timeout_s": Turn("5", "600", overdue_after_a_minute, TINY),
    "buffer.step_timeout_s": Turn("5", "1800", overdue_after_a_minute, TINY),
    "buffer.max_bytes": Turn("1000000", "2000000000", pauses, FULL),
    "buffer.address": Turn("tcp://127.0.0.1:{port}", "tcp://127.0.0.1:{port2}", listens, TINY),
    "buffer.keys": Turn('""', "{folder}/keys", serves_the_network, NETWORK),
}
SLOW_TURNS = {
    "buffer.rejoin_timeout_s": Turn("1.1", "300", patience_without_learner, TINY),
    "buffer.peer_timeout_s": Turn("1.1", "15", patience_with_a_silent_engine, TINY),
}


@pytest.fixture
def ports(free_port: Callable[[], int], tmp_path: Path) -> tuple[int, int]:
    first, second = free_port(), free_port()
    while abs(first - second) < 2:  # each service also takes the next port
        second = free_port()
    (tmp_path / "port").write_text(str(first))
    return first, second


@pytest.mark.parametrize("path", TURNS)
def test_a_key_changes_a_service(path: str, tmp_path: Path, ports: tuple[int, int]) -> None:
    make_keys(tmp_path / "keys")
    check_turn(path, TURNS[path], tmp_path, ports)


@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW_TURNS)
def test_a_key_changes_how_long_a_service_waits(
    path: str, tmp_path: Path, ports: tuple[int, int]
) -> None:
    check_turn(path, SLOW_TURNS[path], tmp_path, ports)
