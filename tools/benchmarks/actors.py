"""The actors' half of `python -m tools.bench pipeline`: bare vLLM against the whole pipeline.

Both decode the same prompts with the same options, with `actors.slots` requests always in flight.
The pipeline is the real one (`actors.worker`, `actors.inference.engine`, `python -m buffer` and the
snapshot server) around the same engine. Only the learner is a stand-in: it acknowledges each shard
at once, which demands more of the actors than any real learner. Driven by
`tools.benchmarks.pipeline`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor

from actors.environments import make_environment
from actors.inference.device import engine_type
from actors.inference.engine import Engine
from actors.worker import Worker
from buffer.data.sources import make_sources
from buffer.processes.child import Child, stop
from buffer.wire import messages as msg
from buffer.wire.client import EngineLink, LearnerLink
from buffer.wire.snapshots import SnapshotServer, fetch
from configs.cli import to_yaml
from configs.schema import Config

BARE, ONE_POLICY, SWAPS = "bare vLLM", "one policy", "a swap each step"
SEEDS = "other seeding"  # bare vLLM with seeds per request, or without if the run has them
WAITED = "(waiting for a CPU)"
NEVER = 10**6  # in learner steps
POLL_S = 0.1


@dataclass
class Window:
    """The result of one measurement.

    `cpu_s` holds the CPU time of each part, and the time that the threads of the engine core
    waited for a CPU. `paused_frac` is the share of time that weight swaps paused generation.
    """

    num_tokens: int
    seconds: float
    cpu_s: dict[str, float]
    busy_frac: float = 1.0
    num_swaps: int = 0
    paused_frac: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


async def measure_actors(
    config: Config, snapshot: bytes, seconds: float, warmup_s: float, rounds: int
) -> tuple[dict[str, list[Window]], list[msg.Shard]]:
    """The windows of each kind, one per round, and all shards that the pipeline shipped."""
    engine = Engine(config)
    bare = BareEngine(config, engine)
    windows: dict[str, list[Window]] = {BARE: [], SEEDS: [], ONE_POLICY: [], SWAPS: []}
    shards: list[msg.Shard] = []
    try:
        for number, kind in itertools.product(range(rounds), windows):
            if kind in (BARE, SEEDS):
                seeded = config.sampling.seeded != (kind == SEEDS)
                window = await bare.measure(seconds, warmup_s, seeded)
            else:
                window = await _pipeline(
                    config, engine, snapshot, kind == SWAPS, shards, seconds, warmup_s
                )
            windows[kind].append(window)
            print(
                f"round {number + 1} of {rounds}: {kind:<18}{window.tokens_per_s:>8,.0f} tokens/s",
                flush=True,
            )
    finally:
        del bare  # it references the engine's vLLM, which must not outlive the engine
        engine.close()
    return windows, shards


async def _window(
    num_tokens: Callable[[], int], buffer_pid: int | None, seconds: float, warmup_s: float
) -> Window:
    while not num_tokens():
        await asyncio.sleep(POLL_S)
    await asyncio.sleep(warmup_s)
    before, cpu, started = num_tokens(), _cpu_seconds(buffer_pid), time.monotonic()
    await asyncio.sleep(seconds)
    took_s, after = time.monotonic() - started, num_tokens()
    return Window(
        after - before,
        took_s,
        {part: value - cpu[part] for part, value in _cpu_seconds(buffer_pid).items()},
    )


def _cpu_seconds(buffer_pid: int | None) -> dict[str, float]:
    """CPU time by part of the pipeline; for bare vLLM there is no buffer."""
    used = {"engine core": 0.0, WAITED: 0.0, "front end": _cpu(psutil.Process())}
    for child in psutil.Process().children(recursive=True):
        part = "buffer" if child.pid == buffer_pid else "engine core"
        used[part] = used.get(part, 0.0) + _cpu(child)
        if part != "buffer":
            used[WAITED] += _waited(child.pid)
    return used


def _waited(pid: int) -> float:
    """Seconds for which the threads of a process were ready to run but had no CPU."""
    waited_ns = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waited_ns += int(file.read_text().split()[1])
        except OSError:
            continue  # this thread has just ended
    return waited_ns / 1e9


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


# Bare vLLM ----------------------------------------------------------------------------------------


class BareEngine:
    """vLLM as its documentation uses it: `AsyncLLM.generate` in the cheapest mode.

    This mode returns no text, no log-probabilities, and one output at the end. The instance is the
    one that the pipeline uses, with vLLM's own output processor back in place, because a second
    instance would take as long to load and as much memory again.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self._config, self._tokenizer = config, engine.tokenizer
        self._llm = engine._llm
        self._num_tokens, self._seeded = 0, config.sampling.seeded
        self._requests = enumerate(self._draw())
        self._processor = OutputProcessor(self._tokenizer, log_stats=False)
        process_outputs = self._processor.process_outputs

        def counted(outputs: list[Any], *args: Any, **options: Any) -> Any:
            self._num_tokens += sum(len(output.new_token_ids) for output in outputs)
            return process_outputs(outputs, *args, **options)

        self._processor.process_outputs = counted  # type: ignore[method-assign]

    def _install(self, processor: Any) -> None:
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()
            self._llm.output_handler = None  # the next request starts a new one
        self._llm.output_processor = processor

    def _draw(self) -> Iterator[tuple[list[int], SamplingParams]]:
        """The prompts of the run, each `darts.group_size` times."""
        config, sampling = self._config, self._config.sampling
        environment, prompts = make_environment(config), make_sources(config).train
        while True:
            ids = environment.render(prompts.draw(1)[0], self._tokenizer)
            for _ in range(config.darts.group_size):
                yield (
                    ids,
                    SamplingParams(
                        temperature=sampling.temperature,
                        max_tokens=min(config.model.max_context - len(ids), sampling.max_tokens),
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    ),
                )

    async def measure(self, seconds: float, warmup_s: float, seeded: bool) -> Window:
        self._num_tokens, self._seeded, ours = 0, seeded, self._llm.output_processor
        self._install(self._processor)
        slots = [asyncio.create_task(self._keep_busy()) for _ in range(self._config.actors.slots)]
        try:
            return await _window(lambda: self._num_tokens, None, seconds, warmup_s)
        finally:
            for slot in slots:
                slot.cancel()
            await asyncio.gather(*slots, return_exceptions=True)  # each task aborts its request
            self._install(ours)

    async def _keep_busy(self) -> None:
        while True:
            number, (prompt_ids, params) = next(self._requests)
            params.seed = number if self._seeded else None
            async for _ in self._llm.generate(tokens_input(prompt_ids), params, str(number)):
                pass


# The pipeline -------------------------------------------------------------------------------------


class _MeteredLink:
    """The worker's link to the buffer, which also counts the reported tokens and swaps."""

    def __init__(self, link: EngineLink) -> None:
        self.connect, self.receive = link.connect, link.receive
        self._send = link.send
        self.num_tokens = 0
        self.reports: list[msg.EngineReport] = []
        self.swaps: list[msg.PolicyLoaded] = []

    def send(self, message: msg.EngineMessage) -> None:
        if isinstance(message, msg.Progress):
            self.num_tokens += sum(
                len(chunk.tokens) // 4 for chunk in message.chunks if chunk.sampled
            )
        elif isinstance(message, msg.EngineReport):
            self.reports.append(message)
        elif isinstance(message, msg.PolicyLoaded):
            self.swaps.append(message)
        self._send(message)


async def _pipeline(
    config: Config,
    engine: Engine,
    snapshot: bytes,
    swaps: bool,
    shards: list[msg.Shard],
    seconds: float,
    warmup_s: float,
) -> Window:
    """One measurement, with its own buffer process."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config = replace(
            config,
            run=replace(config.run, dir=folder, steps=NEVER),
            buffer=replace(config.buffer, address=_free_address()),
            weights=replace(config.weights, publish_every=1 if swaps else NEVER),
        )
        stop = threading.Event()
        with (
            _buffer(config) as buffer_pid,
            EngineLink(config.buffer.address, "bench/0", config.buffer.keys) as link,
        ):
            learner = asyncio.create_task(
                asyncio.to_thread(_acknowledge, config, snapshot, shards, stop)
            )
            hello = msg.EngineHello(
                engine_id="bench/0",
                engine_type=engine_type(config),
                slots=config.actors.slots,
                policy_version=-1,
                pid=os.getpid(),
                incarnation="bench",
            )
            welcome = await asyncio.to_thread(link.connect, hello, config.buffer.connect_timeout_s)
            metered, environment = _MeteredLink(link), make_environment(config)
            worker = asyncio.create_task(
                Worker(
                    config,
                    engine,
                    metered,
                    environment,
                    partial(fetch, keys=config.buffer.keys),
                    hello=hello,
                ).run(welcome)
            )
            measuring = asyncio.create_task(_measure_worker(metered, buffer_pid, seconds, warmup_s))
            try:
                await asyncio.wait(
                    {measuring, worker, learner}, return_when=asyncio.FIRST_COMPLETED
                )
                if not measuring.done():  # the task that ended raises its own error here
                    raise RuntimeError(
                        "the pipeline ended early: "
                        f"{(learner if learner.done() else worker).result()}"
                    )
                return measuring.result()
            finally:
                stop.set()
                measuring.cancel()
                worker.cancel()
                await asyncio.gather(worker, learner, return_exceptions=True)
                environment.close()


async def _measure_worker(
    link: _MeteredLink, buffer_pid: int, seconds: float, warmup_s: float
) -> Window:
    window = await _window(lambda: link.num_tokens, buffer_pid, seconds, warmup_s)
    reports = link.reports[-max(1, int(seconds)) :]  # one per second
    window.busy_frac = sum(report.busy_frac for report in reports) / max(1, len(reports))
    lasted_s = seconds + warmup_s
    window.num_swaps, window.paused_frac = (
        len(link.swaps),
        sum(swap.pause_s for swap in link.swaps) / lasted_s,
    )
    return window


def _acknowledge(
    config: Config, snapshot: bytes, shards: list[msg.Shard], stop: threading.Event
) -> None:
    """The learner's side of the protocol, without any training."""
    with SnapshotServer(config.weights.address, config.buffer.keys) as server:
        with LearnerLink(config.buffer.address, "learner/0", config.buffer.keys) as link:
            link.connect(
                msg.LearnerHello(rank=0, num_ranks=1, step=0, pid=os.getpid(), vocab_size=2**31),
                config.buffer.connect_timeout_s,
            )
            link.send(msg.Published(policy=server.publish(0, snapshot), seconds=0.0))
            for step in itertools.count():
                last, portion = False, 0
                while not last:
                    link.send(msg.Pull(rank=0, step=step, portion=portion))
                    message = None
                    while not isinstance(message, msg.Shard):
                        message = link.receive(POLL_S)
                        if stop.is_set() or isinstance(message, msg.Shutdown):
                            return
                    shards.append(message)
                    last, portion = message.last, portion + 1
                if (step + 1) % config.weights.publish_every == 0:
                    version = (step + 1) // config.weights.publish_every
                    link.send(msg.Published(policy=server.publish(version, snapshot), seconds=0.0))
                link.send(msg.Trained(step=step, num_tokens=0, metrics={}))


@contextmanager
def _buffer(config: Config) -> Iterator[int]:
    """Run the buffer's process and yield its pid."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(to_yaml(config))
        file.flush()
        process = Child("buffer", [sys.executable, "-m", "buffer", "--config", file.name])
        try:
            yield process.pid
        finally:
            stop([process], config.run.stop_s)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{min(probe.getsockname()[1], 65534)}"
