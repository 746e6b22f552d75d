"""Records when each rollout decodes, when it waits for its environment, and when a cancel ends it.

Wraps the engine, the link and the environment of one worker. All times are of one monotonic clock,
in seconds. Driven by `tools.benchmarks.turns`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.environments import Environment
from actors.inference.generation import Generation
from actors.verifier_load import Step
from buffer.wire import messages as msg
from buffer.wire.client import EngineLink
from configs.schema import Config
from tools.faults.fake_engine import FakeEngine

SAMPLE_S = 0.02
ENGINE = "bench/0"
SHORTER = 4  # than the responses of other runs with fake engines


@dataclass(slots=True)
class Span:
    """A part of a rollout's life. It lasts until now if `end_s` is None."""

    start_s: float
    end_s: float | None = None

    def within(self, start_s: float, end_s: float) -> float:
        """Seconds of it between two times."""
        return max(0.0, min(self.end_s or end_s, end_s) - max(self.start_s, start_s))


@dataclass(slots=True)
class Life:
    """A rollout of the engine, which decodes it or holds it in its queue (`is_in_engine`).

    waited: its cancel found it in its environment.
    """

    decoding: list[Span] = field(default_factory=list[Span])
    waiting: list[Span] = field(default_factory=list[Span])
    cancelled_s: float | None = None
    stopped_s: float | None = None
    waited: bool = False
    is_in_engine: bool = False

    @property
    def waits(self) -> bool:
        return bool(self.waiting) and self.waiting[-1].end_s is None

    def end_wait(self) -> None:
        if self.waits:
            self.waiting[-1].end_s = time.monotonic()


class Times:
    """The lives of all rollouts, and the processes that are busy with steps of cancelled ones."""

    def __init__(self) -> None:
        self.lives: dict[int, Life] = {}
        self.num_in_environment = 0
        self.most_at_once = 0
        self.lingering_s = 0.0

    def of(self, rollout_id: int) -> Life:
        return self.lives.setdefault(rollout_id, Life())

    def note_load(self) -> None:
        """How many rollouts are under way, in the engine and in the environment together."""
        num = sum(life.waits or life.is_in_engine for life in self.lives.values())
        self.most_at_once = max(self.most_at_once, num)

    def overlap_s(self) -> float:
        """Slot-seconds of rollouts that waited for their environment at the same time."""
        now = time.monotonic()
        return sum(
            slot.within(wait.start_s, wait.end_s or now)
            for life in self.lives.values()
            for slot in life.decoding
            for wait in life.waiting
        )

    def seconds(self, kind: str, start_s: float, end_s: float) -> float:
        """Of all rollouts together; `kind` is `decoding` or `waiting`."""
        spans: Iterable[Sequence[Span]] = (getattr(life, kind) for life in self.lives.values())
        return sum(span.within(start_s, end_s) for of_one in spans for span in of_one)

    def cancel_delays(self) -> list[float]:
        """From the cancel of each rollout that was in its environment to its confirmation."""
        return [
            life.stopped_s - life.cancelled_s
            for life in self.lives.values()
            if life.waited and life.stopped_s is not None and life.cancelled_s is not None
        ]


class TimedEngine(FakeEngine):
    """A fake engine with short responses and with slots, whose occupation it records.

    Like a real one, it decodes no more requests than it has slots; others wait for one.
    """

    def __init__(self, config: Config, times: Times) -> None:
        super().__init__(config, ENGINE)
        self._times, self._slots = times, asyncio.Semaphore(config.actors.slots)

    def launch(self, request_id: str, *args: Any, **options: Any) -> Generation:
        life = self._times.of(_rollout(request_id))
        life.end_wait()
        life.is_in_engine = True
        self._times.note_load()
        return super().launch(request_id, *args, **options)

    async def _decode(
        self, generation: Generation, sample: Callable[[int], int], length: int, max_tokens: int
    ) -> None:
        async with self._slots:
            self._times.of(_rollout(generation.request_id)).decoding.append(Span(time.monotonic()))
            await super()._decode(generation, sample, max(1, length // SHORTER), max_tokens)

    def _release(self, generation: Generation, outcome: str) -> None:
        life = self._times.of(_rollout(generation.request_id))
        life.is_in_engine = False
        if life.decoding and life.decoding[-1].end_s is None:
            life.decoding[-1].end_s = time.monotonic()
        super()._release(generation, outcome)


class TimedLink:
    """A worker's link that notes waits and ends of rollouts, and cancels."""

    def __init__(self, link: EngineLink, times: Times) -> None:
        self.connect = link.connect
        self._link, self._times = link, times

    def receive(self, timeout_s: float) -> msg.Message | None:
        message = self._link.receive(timeout_s)
        for rollout_id in message.rollout_ids if isinstance(message, msg.Cancel) else ():
            life = self._times.of(rollout_id)
            life.cancelled_s, life.waited = time.monotonic(), life.waits
        return message

    def send(self, message: msg.EngineMessage) -> None:
        if isinstance(message, msg.Progress):
            for rollout_id in message.waits:
                life = self._times.of(rollout_id)
                life.end_wait()
                life.waiting.append(Span(time.monotonic()))
        elif isinstance(message, msg.Finished | msg.Failed | msg.Stopped):
            life = self._times.of(message.rollout_id)
            life.end_wait()
            if isinstance(message, msg.Stopped):
                life.stopped_s = time.monotonic()
        self._link.send(message)


class TimedEnvironment:
    """An environment that counts the steps that a rollout waits for."""

    def __init__(self, environment: Environment, times: Times) -> None:
        self._environment, self._times = environment, times
        self.keep_special_tokens = environment.keep_special_tokens
        self.has_turns = environment.has_turns
        self.render, self.render_observation = environment.render, environment.render_observation
        self.score, self.finish, self.abandon = (
            environment.score,
            environment.finish,
            environment.abandon,
        )
        self.measure, self.close = environment.measure, environment.close

    async def step(self, prompt: msg.PromptPayload, response_text: str, state: str = "") -> Step:
        self._times.num_in_environment += 1
        try:
            return await self._environment.step(prompt, response_text, state)
        finally:
            self._times.num_in_environment -= 1

    async def sample(self) -> None:
        """Adds up the time for which processes go on with steps that were cancelled."""
        before_s = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            now = time.monotonic()
            load = self._environment.measure()
            lingering = load.num_busy + load.num_waiting - self._times.num_in_environment
            self._times.lingering_s += max(0, lingering) * (now - before_s)
            before_s = now


def _rollout(request_id: str) -> int:
    return int(request_id.partition(".")[0])
