"""`actors.worker.Worker` with a fake engine, link and environment, and the accounting in
`actors.inference.generation`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from actors.environments import EnvironmentFailure
from actors.inference.generation import EngineDied, Generation, Measurement, Meter
from actors.verifier_load import Step
from actors.worker import PolicyUnavailable, Worker, next_flush_s
from buffer.wire.client import LinkLost
from buffer.wire.messages import (
    Cancel,
    Chunk,
    Curtail,
    EngineHello,
    EngineReport,
    Failed,
    Finished,
    Launch,
    LaunchedRollout,
    Leaving,
    PolicyLoaded,
    PolicyPublished,
    Probed,
    Progress,
    PromptPayload,
    Settled,
    Shutdown,
    SnapshotRef,
    Stopped,
    VerifierReport,
    Welcome,
)
from buffer.wire.probe import NUM_SEQUENCES, NUM_TOKENS
from buffer.wire.snapshots import SnapshotGoneError
from buffer.wire.transport import TransportError
from configs.schema import Config

EOS = 9
PROMPT = PromptPayload(
    prompt_id="p1", text="ab", messages=[], answer="", metadata="", source="rows.jsonl, row 3"
)
HELLO = EngineHello(
    engine_id="e/0", engine_type="fake", slots=4, policy_version=-1, pid=1, incarnation="a"
)


class FakeTokenizer:
    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(
            str(token) for token in tokens if not (skip_special_tokens and token == EOS)
        )


class FakeEngine:
    """Samples the tokens that the test gives it, when the test gives them."""

    def __init__(self) -> None:
        self.tokenizer, self.eos_ids, self.version = FakeTokenizer(), frozenset([EOS]), -1
        self.died, self.cause = asyncio.Event(), ""
        self.model_type, self.vocab_size = "fake", 64
        self.launched: dict[str, tuple[list[int], int, int, int]] = {}
        self.generations: dict[str, Generation] = {}
        self.swapped: list[tuple[int, bytes]] = []
        self.aborted: list[str] = []

    def launch(
        self, request_id: str, prompt_ids: list[int], max_tokens: int, **numbers: int
    ) -> Generation:
        seed, num_continued = numbers["seed"], numbers["num_continued"]
        self.launched[request_id] = (prompt_ids, max_tokens, seed, num_continued)
        self.generations[request_id] = Generation(request_id)
        return self.generations[request_id]

    def sample(self, request_id: int, *tokens: int, end: str | Exception | None = None) -> None:
        generation = self.generations[str(request_id)]
        generation.extend(self.version, tokens, [-0.5] * len(tokens))
        if end is not None:
            generation.end(end)

    async def abort(self, request_ids: list[str]) -> None:
        # A real engine takes time to confirm, and other requests may end meanwhile.
        await asyncio.sleep(0.01)
        self.aborted += request_ids
        for request_id in request_ids:
            self.generations[request_id].end("abort")

    async def swap(self, path: str, version: int) -> float:
        with open(path, "rb") as file:
            self.swapped.append((version, file.read()))
        self.version = version
        return 0.25

    async def score(self, token_ids: list[int]) -> array[float]:
        return array("f", [float(self.version)] * (len(token_ids) - 1))

    def measure(self) -> Measurement:
        return Measurement(1.0, 2.0, 3.0, 0.5)


REPORT = VerifierReport(num_workers=2, num_waiting=3, num_verified=1, time_s=0.5)


class FakeEnvironment:
    keep_special_tokens = False
    has_turns = False

    def __init__(self) -> None:
        self.prompt_ids = [1, 2]
        self.observations: list[list[int]] = []  # one per turn but the last
        self.scored: list[str] = []
        self.finished: list[str] = []  # the states of rollouts that a limit has ended
        self.abandoned: list[str] = []  # and of those that ended otherwise between two steps
        self.reward: float | Exception = 1.0
        self.release = asyncio.Event()
        self.release.set()

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        return self.prompt_ids

    def render_observation(self, observation: str, last_token: int, tokenizer: Any) -> list[int]:
        return [int(token) for token in observation.split()]

    async def step(self, prompt: PromptPayload, response_text: str, state: str = "") -> Step:
        self.scored.append(response_text)
        await self.release.wait()
        if isinstance(self.reward, Exception):
            raise self.reward
        turn = len(state)
        if turn < len(self.observations):
            observed = " ".join(map(str, self.observations[turn]))
            return Step(self.reward, observed, state + "x")
        return Step(self.reward)

    def abandon(self, state: str) -> None:
        self.abandoned.append(state)

    async def finish(self, prompt: PromptPayload, state: str) -> float:
        self.finished.append(state)
        return 0.5

    async def score(self, prompt: PromptPayload, response_text: str) -> float:
        return (await self.step(prompt, response_text)).reward

    def measure(self) -> VerifierReport:
        return REPORT

    def close(self) -> None: ...


class FakeLink:
    """Receives messages from the test and keeps those that the worker sends."""

    def __init__(self) -> None:
        self.incoming: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.sent: list[Any] = []
        self.hellos: list[EngineHello] = []
        self.welcomes: queue.SimpleQueue[Welcome | Exception] = queue.SimpleQueue()
        self.broken = False

    def connect(self, hello: EngineHello, timeout_s: float) -> Welcome:
        self.hellos.append(hello)
        welcome = self.welcomes.get()
        if isinstance(welcome, Exception):
            raise welcome
        self.broken = False
        return welcome

    def send(self, message: Any) -> None:
        if self.broken:
            raise LinkLost("the link broke")
        self.sent.append(message)

    def break_off(self) -> None:
        self.broken = True
        self.incoming.put(LinkLost("the link broke"))

    def receive(self, timeout_s: float) -> Any:
        try:
            message = self.incoming.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(message, Exception):
            raise message
        return message


@dataclass
class Scene:
    config: Config
    engine: FakeEngine
    link: FakeLink
    environment: FakeEnvironment
    fetched: list[int] = field(default_factory=list)
    fetch_error: Exception | None = None
    may_fetch: threading.Event = field(default_factory=threading.Event)
    worker: Worker = field(init=False)

    def __post_init__(self) -> None:
        self.may_fetch.set()

    def fetch(self, policy: SnapshotRef) -> bytes:
        self.fetched.append(policy.version)
        assert self.may_fetch.wait(5)
        if self.fetch_error is not None:
            raise self.fetch_error
        return b"weights of %d" % policy.version

    def launch(self, *rollout_ids: int, prefix: tuple[int, ...] = ()) -> None:
        rollouts = [
            LaunchedRollout(rollout_id=i, seed=100 + i, prefix=array("i", prefix).tobytes())
            for i in rollout_ids
        ]
        self.link.incoming.put(Launch(group_id=1, prompt=PROMPT, rollouts=rollouts))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)

    async def running(self, *rollout_ids: int) -> None:
        await self.until(lambda: all(str(i) in self.engine.generations for i in rollout_ids))

    def answers(self) -> list[Any]:
        return [
            message
            for message in self.link.sent
            if isinstance(message, (Finished, Failed, Stopped))
        ]

    async def answered(self, count: int) -> list[Any]:
        await self.until(lambda: len(self.answers()) >= count)
        return self.answers()

    def waits(self) -> set[int]:
        return {i for m in self.link.sent if isinstance(m, Progress) for i in m.waits}

    def chunks(self, rollout_id: int) -> list[Chunk]:
        sent = [
            chunk
            for message in self.link.sent
            if isinstance(message, Progress)
            for chunk in message.chunks
        ]
        return [chunk for chunk in sent if chunk.rollout_id == rollout_id]

    def sampled(self, rollout_id: int) -> list[tuple[int, list[int]]]:
        """The version and tokens of each sampled chunk of a rollout."""
        return [
            (chunk.version, array("i", chunk.tokens).tolist())
            for chunk in self.chunks(rollout_id)
            if chunk.sampled
        ]


def quick_config() -> Config:
    config = Config()
    config.actors.flush_s, config.actors.stream_interval = 0.001, 2
    config.model.max_context, config.sampling.max_tokens = 40, 20
    return config


def play(
    script: Callable[[Scene], Awaitable[None]],
    error: str = "",
    policy: SnapshotRef | None = None,
    config: Config | None = None,
) -> Scene:
    """Runs a worker beside `script`, then ends the run. Passes on the worker's exceptions."""
    config = config or quick_config()

    async def run() -> Scene:
        scene = Scene(config, FakeEngine(), FakeLink(), FakeEnvironment())
        scene.worker = Worker(
            config, scene.engine, scene.link, scene.environment, scene.fetch, hello=HELLO
        )
        worker = asyncio.create_task(scene.worker.run(Welcome(policy=policy)))
        scripted = asyncio.ensure_future(script(scene))
        await asyncio.wait({worker, scripted}, return_when=asyncio.FIRST_COMPLETED)
        if scripted.done():
            scripted.result()
            scene.link.incoming.put(Shutdown(error=error))
        else:
            scripted.cancel()
            scene.link.incoming.put(Shutdown(error=""))  # so that the reading thread ends
        assert (await worker).error == error
        return scene

    return asyncio.run(run())


def snapshot(version: int) -> SnapshotRef:
    return SnapshotRef(version=version, digest="", num_bytes=0, address="tcp://x", path="")


# A rollout's life --------------------------------------------------------------------------------


def test_a_rollout_is_launched_streamed_scored_and_finished() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(7)
        await scene.running(7)
        scene.engine.sample(7, 3, 4, 5, EOS, end="stop")
        await scene.answered(1)

    scene = play(script)
    assert scene.engine.launched["7"] == ([1, 2], 20, 107, 0)
    given = scene.chunks(7)[0]
    assert (given.sampled, array("i", given.tokens).tolist(), given.logprobs) == (
        False,
        [1, 2],
        b"",
    )
    assert scene.sampled(7) == [(-1, [3, 4, 5, EOS])]
    assert array("f", scene.chunks(7)[1].logprobs).tolist() == [-0.5] * 4
    assert scene.answers() == [
        Finished(rollout_id=7, num_tokens=4, truncated=False, reward=1.0, text="3 4 5")
    ]
    assert scene.link.sent.index(scene.answers()[0]) > max(
        i for i, m in enumerate(scene.link.sent) if isinstance(m, Progress)
    )


def test_special_tokens_are_kept_if_the_environment_needs_them() -> None:
    async def script(scene: Scene) -> None:
        scene.environment.keep_special_tokens = True
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3, EOS, end="stop")
        await scene.answered(1)

    assert play(script).environment.scored == [f"3 {EOS}"]


def test_a_rollout_that_reaches_the_length_limit_is_truncated() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3, end="length")
        await scene.answered(1)

    (answer,) = play(script).answers()
    assert answer.truncated


def test_progress_waits_for_stream_interval_tokens_and_repeats_none() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3)
        await asyncio.sleep(0.02)
        assert scene.sampled(1) == []
        scene.engine.sample(1, 4)
        await scene.until(lambda: scene.sampled(1) == [(-1, [3, 4])])
        scene.engine.sample(1, 5, end="stop")
        await scene.answered(1)

    assert play(script).sampled(1) == [(-1, [3, 4]), (-1, [5])]


def test_progress_is_sent_every_flush_s() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        for _ in range(20):
            scene.engine.sample(1, 3, 4)
            await asyncio.sleep(0.01)

    config = quick_config()
    config.actors.flush_s = 0.05
    assert 2 <= len(play(script, config=config).sampled(1)) <= 7
    assert len(play(script).sampled(1)) >= 15


def test_an_engine_reports_how_busy_its_verifier_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(scene: Scene) -> None:
        await scene.until(lambda: any(isinstance(m, EngineReport) for m in scene.link.sent))

    monkeypatch.setattr("actors.worker.REPORT_S", 0.01)
    sent = play(script).link.sent
    (report,) = [m for m in sent if isinstance(m, EngineReport)][:1]
    assert report.verifier == REPORT


def test_tokens_carry_the_version_that_sampled_them() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.version = 4
        scene.engine.sample(1, 3)
        scene.engine.version = 5
        scene.engine.sample(1, 6, EOS, end="stop")
        await scene.answered(1)

    assert play(script).sampled(1) == [(4, [3]), (5, [6, EOS])]


def test_a_failed_verifier_fails_the_rollout_without_a_reward() -> None:
    async def script(scene: Scene) -> None:
        scene.environment.reward = EnvironmentFailure("verifier x raised on prompt p1")
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3, EOS, end="stop")
        await scene.answered(1)

    assert play(script).answers() == [Failed(rollout_id=1, error="verifier x raised on prompt p1")]


def test_a_refused_request_fails_only_its_own_rollout() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1, 2)
        await scene.running(1, 2)
        scene.engine.sample(1, end=ValueError("no such token"))
        await scene.answered(1)
        scene.engine.sample(2, EOS, end="stop")
        await scene.answered(2)

    failed, finished = play(script).answers()
    assert (failed.rollout_id, failed.unusable) == (1, False)
    assert (type(finished), finished.rollout_id) == (Finished, 2)


def test_a_prompt_too_long_for_the_context_is_named_and_not_retried() -> None:
    async def script(scene: Scene) -> None:
        scene.environment.prompt_ids = [1] * 25
        scene.launch(1)
        await scene.answered(1)

    scene = play(script)
    (failed,) = scene.answers()
    assert failed.unusable
    named = ("prompt p1 (rows.jsonl, row 3)", "25", "model.max_context=40")
    assert all(part in failed.error for part in named)
    assert scene.engine.launched == {}


def test_a_long_prompt_shortens_the_response() -> None:
    async def script(scene: Scene) -> None:
        scene.environment.prompt_ids = [1] * 24
        scene.launch(1)
        await scene.running(1)

    assert play(script).engine.launched["1"][1] == 16


# Continuing a rollout of another engine ----------------------------------------------------------


def test_a_prefix_is_continued_and_scored_but_not_sent_again() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1, prefix=(3, 4))
        await scene.running(1)
        scene.engine.sample(1, 5, EOS, end="stop")
        await scene.answered(1)

    scene = play(script)
    assert scene.engine.launched["1"] == ([1, 2, 3, 4], 18, 101, 2)
    assert scene.sampled(1) == [(-1, [5, EOS])]
    assert scene.environment.scored == ["3 4 5"]


@pytest.mark.parametrize(("prefix", "truncated"), [((3, EOS), False), ((3,) * 20, True)])
def test_a_prefix_that_is_complete_is_only_scored(prefix: tuple[int, ...], truncated: bool) -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1, prefix=prefix)
        await scene.answered(1)

    scene = play(script)
    assert scene.engine.launched == {}
    (answer,) = scene.answers()
    assert (type(answer), answer.truncated) == (Finished, truncated)


# Cancels: exactly one answer, always -------------------------------------------------------------


def test_a_cancelled_rollout_is_stopped_after_its_last_tokens() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3)
        scene.link.incoming.put(Cancel(rollout_ids=[1]))
        await scene.answered(1)

    scene = play(script)
    (answer,) = scene.answers()
    assert answer == Stopped(rollout_id=1, num_tokens=1, text="3")
    assert scene.sampled(1) == [(-1, [3])]


def test_a_cancel_during_scoring_is_answered_at_once() -> None:
    async def script(scene: Scene) -> None:
        scene.environment.release.clear()
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, EOS, end="stop")
        await scene.until(lambda: bool(scene.environment.scored))
        scene.link.incoming.put(Cancel(rollout_ids=[1]))
        await scene.answered(1)
        scene.environment.release.set()
        await asyncio.sleep(0.02)

    scene = play(script)
    assert scene.answers() == [Stopped(rollout_id=1, num_tokens=1)]
    assert scene.sampled(1) == [(-1, [EOS])]


def test_a_rollout_that_ends_while_it_is_aborted_is_answered_once() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.link.incoming.put(Cancel(rollout_ids=[1]))
        await asyncio.sleep(0.005)
        scene.engine.sample(1, EOS, end="stop")
        await scene.answered(1)
        await asyncio.sleep(0.02)

    assert len(play(script).answers()) == 1


def test_a_cancel_of_an_answered_rollout_is_not_answered_again() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, EOS, end="stop")
        await scene.answered(1)
        scene.link.incoming.put(Cancel(rollout_ids=[1]))
        await asyncio.sleep(0.02)

    assert len(play(script).answers()) == 1


# Relative limits: an early end with a reward ----------------------------------------------------


def test_a_curtailed_rollout_ends_where_it_is_and_is_scored() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3)
        scene.link.incoming.put(Curtail(rollout_ids=[1, 99]))
        await scene.answered(1)

    scene = play(script)
    (answer,) = scene.answers()
    assert isinstance(answer, Finished)
    assert (answer.num_tokens, answer.truncated) == (1, True)
    assert scene.environment.scored == ["3"] and scene.sampled(1) == [(-1, [3])]


def test_a_rollout_that_ends_while_it_is_curtailed_is_complete() -> None:
    async def script(scene: Scene) -> None:
        scene.environment.release.clear()
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, EOS, end="stop")
        await scene.until(lambda: bool(scene.environment.scored))
        rollout = scene.worker._rollouts[1]
        scene.link.incoming.put(Curtail(rollout_ids=[1]))
        await scene.until(lambda: rollout.curtailed)
        scene.environment.release.set()
        await scene.answered(1)

    (answer,) = play(script).answers()
    assert isinstance(answer, Finished) and not answer.truncated


def test_a_cancel_overrides_a_curtailment() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3)
        rollout = scene.worker._rollouts[1]
        rollout.curtailed = True
        scene.link.incoming.put(Cancel(rollout_ids=[1]))
        await scene.answered(1)

    (answer,) = play(script).answers()
    assert isinstance(answer, Stopped)


# Policies ----------------------------------------------------------------------------------------


def test_the_policy_in_the_welcome_is_loaded_and_reported() -> None:
    async def script(scene: Scene) -> None:
        await scene.until(
            lambda: any(isinstance(message, PolicyLoaded) for message in scene.link.sent)
        )

    scene = play(script, policy=snapshot(3))
    (loaded,) = [message for message in scene.link.sent if isinstance(message, PolicyLoaded)]
    assert (loaded.version, loaded.pause_s) == (3, 0.25)
    assert scene.engine.swapped == [(3, b"weights of 3")]


def test_the_probe_is_scored_before_and_after_the_first_policy_and_after_each_later_one() -> None:
    async def script(scene: Scene) -> None:
        scene.link.incoming.put(PolicyPublished(policy=snapshot(0)))
        await scene.until(lambda: probed(0) in scene.link.sent)
        scene.link.incoming.put(PolicyPublished(policy=snapshot(1)))
        await scene.until(lambda: probed(1) in scene.link.sent)

    def probed(version: int) -> Probed:
        logprobs = array("f", [version] * NUM_SEQUENCES * (NUM_TOKENS - 1)).tobytes()
        return Probed(version=version, model_type="fake", logprobs=logprobs)

    def loaded(version: int) -> PolicyLoaded:
        return PolicyLoaded(version=version, fetch_s=0.0, pause_s=0.25)

    sent = [
        msgspec.structs.replace(message, fetch_s=0.0)
        if isinstance(message, PolicyLoaded)
        else message
        for message in play(script).link.sent
        if isinstance(message, PolicyLoaded | Probed)
    ]
    assert sent == [probed(-1), loaded(0), probed(0), loaded(1), probed(1)]


def test_an_engine_that_cannot_run_the_model_is_not_started_again() -> None:
    async def script(scene: Scene) -> None:
        scene.engine.cause = "AssertionError: no such kernel"
        scene.engine.died.set()
        await asyncio.sleep(10)

    with pytest.raises(PolicyUnavailable, match="fake models here: AssertionError: no such kernel"):
        play(script)


def test_a_policy_that_is_gone_is_skipped_for_the_next_one() -> None:
    async def script(scene: Scene) -> None:
        scene.fetch_error = SnapshotGoneError(1, 2, "tcp://x")
        scene.link.incoming.put(PolicyPublished(policy=snapshot(1)))
        await scene.until(lambda: scene.fetched == [1])
        scene.fetch_error = None
        scene.link.incoming.put(PolicyPublished(policy=snapshot(2)))
        await scene.until(lambda: bool(scene.engine.swapped))

    assert play(script).engine.swapped == [(2, b"weights of 2")]


def test_an_unavailable_first_policy_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.worker.FETCH_RETRY_S", 0.001)
    config = quick_config()
    config.buffer.rejoin_timeout_s = 0.1

    async def script(scene: Scene) -> None:
        scene.fetch_error = TransportError("no answer from tcp://x")
        await asyncio.sleep(10)

    with pytest.raises(PolicyUnavailable, match="no answer from tcp://x"):
        play(script, policy=snapshot(0), config=config)


def test_an_engine_waits_for_the_first_policy_of_a_learner_that_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.worker.FETCH_RETRY_S", 0.001)

    async def script(scene: Scene) -> None:
        scene.fetch_error = TransportError("no answer from tcp://x")  # the former learner's address
        await scene.until(lambda: len(scene.fetched) > 5)
        scene.fetch_error = None
        scene.link.incoming.put(PolicyPublished(policy=snapshot(1)))
        await scene.until(lambda: scene.engine.version == 1)

    assert play(script, policy=snapshot(0)).engine.swapped[-1] == (1, b"weights of 1")


def test_an_unavailable_later_policy_leaves_the_engine_running() -> None:
    async def script(scene: Scene) -> None:
        scene.engine.version, scene.fetch_error = 4, TransportError("no answer")
        scene.link.incoming.put(PolicyPublished(policy=snapshot(5)))
        await scene.until(lambda: scene.fetched == [5])
        scene.launch(1)
        await scene.running(1)

    assert play(script).engine.swapped == []


# Ends --------------------------------------------------------------------------------------------


def test_the_reason_for_a_shutdown_is_returned() -> None:
    async def script(scene: Scene) -> None: ...

    play(script, error="the learner failed")  # asserts on the return value of run()


def test_a_dead_engine_ends_the_worker() -> None:
    async def script(scene: Scene) -> None:
        scene.engine.died.set()
        await asyncio.sleep(10)

    with pytest.raises(EngineDied):
        play(script)


def test_a_lost_buffer_ends_the_worker_and_empties_the_engine() -> None:
    scenes = []

    async def script(scene: Scene) -> None:
        scenes.append(scene)
        scene.launch(1)
        await scene.running(1)
        scene.link.incoming.put(TransportError("the buffer is gone"))
        await asyncio.sleep(10)

    with pytest.raises(TransportError, match="the buffer is gone"):
        play(script)
    assert scenes[0].engine.aborted == ["1"]


# A link that breaks ------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.worker.RECONNECT_S", 0.001)


def tokens_of(chunks: list[Chunk]) -> list[tuple[int, list[int]]]:
    return [(chunk.offset, array("i", chunk.tokens).tolist()) for chunk in chunks]


def test_tokens_sampled_while_the_link_is_down_are_sent_from_the_requested_one(
    at_once: None,
) -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1, 2)
        await scene.running(1, 2)
        scene.engine.version = 4
        scene.engine.sample(1, 3, 4)
        await scene.until(lambda: scene.sampled(1) == [(4, [3, 4])])
        scene.link.break_off()
        scene.engine.sample(1, 5, 6)
        await scene.until(lambda: bool(scene.link.hellos))
        scene.engine.version = 5
        scene.engine.sample(1, 7, EOS, end="stop")
        await asyncio.sleep(0.02)
        scene.link.sent.clear()
        scene.link.welcomes.put(Welcome(policy=None, resend={1: 3, 2: 0}))
        await scene.answered(1)

    scene = play(script)
    (hello,) = scene.link.hellos
    assert (hello.rollouts, hello.policy_version, hello.incarnation) == ([1, 2], 4, "a")
    assert tokens_of(scene.chunks(1)) == [(3, [4, 5, 6]), (6, [7, EOS])]
    assert scene.sampled(1) == [(4, [4, 5, 6]), (5, [7, EOS])]
    assert tokens_of(scene.chunks(2)) == [(0, [1, 2])]
    assert [answer.num_tokens for answer in scene.answers()] == [6]
    assert scene.engine.aborted == ["2"]  # at the end of the run


def test_an_answer_is_repeated_until_it_is_settled(at_once: None) -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1, 2)
        await scene.running(1, 2)
        scene.engine.sample(1, EOS, end="stop")
        scene.engine.sample(2, EOS, end="stop")
        await scene.answered(2)
        scene.link.incoming.put(Settled(rollout_ids=[1]))
        scene.link.break_off()
        await scene.until(lambda: bool(scene.link.hellos))
        scene.link.sent.clear()
        scene.link.welcomes.put(Welcome(policy=None, resend={2: 3}))
        await scene.answered(1)

    scene = play(script)
    assert scene.link.hellos[0].rollouts == [2]
    assert [answer.rollout_id for answer in scene.answers()] == [2]
    assert scene.chunks(2) == []  # the buffer holds all of them


def test_forgotten_rollouts_are_aborted_and_not_mentioned_again(at_once: None) -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.link.break_off()
        scene.link.welcomes.put(Welcome(policy=None, forget=[1]))
        await scene.until(lambda: scene.engine.aborted == ["1"])
        scene.link.sent.clear()
        await asyncio.sleep(0.02)

    scene = play(script)
    assert scene.answers() == [] and scene.chunks(1) == []


def test_a_rollout_launched_twice_continues_unchanged() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.launch(1)
        scene.launch(2)
        await scene.running(2)
        scene.engine.sample(1, EOS, end="stop")
        await scene.answered(1)

    scene = play(script)
    assert len(scene.answers()) == 1 and len(scene.chunks(1)) == 2


@pytest.mark.parametrize("held", [0, 3])
def test_a_rollout_whose_prefix_the_buffer_lost_fails_and_is_freed(
    at_once: None, held: int
) -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1, prefix=(3, 4))
        await scene.running(1)
        scene.link.break_off()
        await scene.until(lambda: bool(scene.link.hellos))
        scene.link.sent.clear()
        scene.link.welcomes.put(Welcome(policy=None, resend={1: held}))
        await scene.answered(1)
        await scene.until(lambda: scene.engine.aborted == ["1"])

    scene = play(script)
    (failed,) = scene.answers()
    assert isinstance(failed, Failed) and not failed.unusable
    assert scene.chunks(1) == []


def test_a_rollout_that_was_stopped_by_a_forgotten_cancel_fails(at_once: None) -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.link.incoming.put(Cancel(rollout_ids=[1]))
        await scene.answered(1)
        scene.link.break_off()
        await scene.until(lambda: bool(scene.link.hellos))
        scene.link.sent.clear()
        scene.link.welcomes.put(Welcome(policy=None, resend={1: 2}))
        await scene.answered(1)

    (failed,) = play(script).answers()
    assert isinstance(failed, Failed) and not failed.unusable


def test_a_policy_loaded_while_the_link_is_down_is_reported(at_once: None) -> None:
    async def script(scene: Scene) -> None:
        scene.may_fetch.clear()
        scene.link.incoming.put(PolicyPublished(policy=snapshot(3)))
        await scene.until(lambda: scene.fetched == [3])
        scene.link.break_off()
        await scene.until(lambda: bool(scene.link.hellos))
        scene.may_fetch.set()
        await scene.until(lambda: scene.engine.swapped == [(3, b"weights of 3")])
        await asyncio.sleep(0.02)
        scene.link.sent.clear()
        scene.link.welcomes.put(Welcome(policy=None))
        await scene.until(lambda: len(reports(scene)) == 2)

    def reports(scene: Scene) -> list[Any]:
        return [m for m in scene.link.sent if isinstance(m, PolicyLoaded | Probed)]

    scene = play(script)
    loaded, probed = reports(scene)
    assert loaded.version == probed.version == 3 and scene.link.hellos[0].policy_version == -1


def test_a_buffer_that_stays_away_ends_the_worker(at_once: None) -> None:
    async def script(scene: Scene) -> None:
        scene.link.break_off()
        scene.link.welcomes.put(TransportError("no buffer answered"))
        await asyncio.sleep(10)

    with pytest.raises(TransportError, match="no buffer answered"):
        play(script)


# Leaving -----------------------------------------------------------------------------------------


def test_a_worker_sends_every_token_before_it_hands_over_and_nothing_after() -> None:
    async def script(scene: Scene) -> None:
        scene.launch(1, 2)
        await scene.running(1, 2)
        scene.engine.sample(1, 3)
        scene.engine.sample(2, 4)
        scene.worker.hand_over()
        scene.engine.sample(1, EOS, end="stop")
        await asyncio.sleep(0.02)

    scene = play(script)
    assert isinstance(scene.link.sent[-1], Leaving)
    assert (scene.sampled(1), scene.sampled(2)) == ([(-1, [3])], [(-1, [4])])
    assert scene.answers() == []


# Ledgers -----------------------------------------------------------------------------------------


def test_flushes_become_rarer_when_late_or_large_and_recover() -> None:
    assert next_flush_s(0.05, 0.05, late_s=0.0, num_bytes=100) == 0.05
    assert next_flush_s(0.05, 0.05, late_s=0.04, num_bytes=100) == pytest.approx(0.075)
    assert next_flush_s(0.05, 0.05, late_s=0.0, num_bytes=1 << 20) == pytest.approx(0.075)
    assert next_flush_s(0.5, 0.05, late_s=9.0, num_bytes=100) == 0.5
    assert next_flush_s(0.075, 0.05, late_s=0.0, num_bytes=100) == pytest.approx(0.06)


def test_the_meter_reports_latency_while_requests_continue() -> None:
    meter = Meter(slots=4, time_s=0.0)
    meter.occupy(2, 0.0)
    for time_s in (1.0, 1.010, 1.020):
        meter.step(time_s, num_tokens=2, num_ended=0)
    meter.step(1.050, num_tokens=2, num_ended=2)
    meter.occupy(0, 1.050)
    measured = meter.report(2.0)
    assert measured.ms_per_token == pytest.approx(50 / 3)
    assert measured.batch == pytest.approx(2)
    assert measured.tokens_per_s == pytest.approx(4)
    assert measured.busy_frac == pytest.approx(2 * 1.05 / (2 * 4))


def test_the_meter_leaves_out_swaps_and_idle_time() -> None:
    meter = Meter(slots=4, time_s=0.0)
    meter.step(0.0, num_tokens=1, num_ended=0)
    meter.step(0.01, num_tokens=1, num_ended=0)
    meter.interrupt()
    meter.step(5.0, num_tokens=1, num_ended=1)
    meter.step(9.0, num_tokens=1, num_ended=0)  # idle before: no request waited for this token
    assert meter.report(10.0).ms_per_token == pytest.approx(10)
    assert meter.report(11.0) == Measurement(0.0, 0.0, 0.0, 0.0)


def test_the_meter_weights_the_batch_by_time() -> None:
    meter = Meter(slots=8, time_s=0.0)
    meter.step(0.0, num_tokens=4, num_ended=0)
    meter.step(0.3, num_tokens=4, num_ended=3)
    meter.step(0.4, num_tokens=1, num_ended=0)
    assert meter.report(1.0).batch == pytest.approx((4 * 0.3 + 1 * 0.1) / 0.4)


def test_an_engine_that_answers_nothing_does_not_keep_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.worker.ABORT_S", 0.05)

    async def script(scene: Scene) -> None:
        scene.launch(7)
        await scene.running(7)
        scene.engine.abort = lambda _: asyncio.Event().wait()  # type: ignore[method-assign]

    assert play(script, error="it has had no news").engine.aborted == []
