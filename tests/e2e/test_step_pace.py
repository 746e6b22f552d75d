"""Real vLLM with the decode latency of another machine, and without seeds per request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.inference.engine import Engine
from actors.inference.generation import Generation
from buffer.processes.private_folder import private_folder
from configs.schema import Config
from tests.e2e.test_engine import PROMPT, make_model, save_model, until

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.filterwarnings("ignore")]

FAST_MS, SLOW_MS, VERY_SLOW_MS = 20, 60, 400  # of a step with 1, 3 and 4 requests
TOKENS = 15


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, runner: asyncio.Runner) -> Iterator[Engine]:
    folder: Path = tmp_path_factory.mktemp("paced")
    model = make_model(tied=True, seed=0)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.1)  # flat, so that two samples are hardly ever the same
    save_model(model, folder / "model")
    config = Config()
    config.model.path = str(folder / "model")
    config.actors.slots, config.actors.kv_cache_gib = 4, 0.25
    config.actors.min_step_ms = [[1, FAST_MS], [3, SLOW_MS], [4, VERY_SLOW_MS]]
    with private_folder():
        engine = Engine(config, seed=1)
        yield engine
        engine.close()


async def sample(engine: Engine, batch: int, num_tokens: int) -> tuple[float, list[Generation]]:
    """Milliseconds per step of `batch` requests, from their second token on."""
    running = [
        engine.launch(f"{time.monotonic()} {i}", PROMPT, num_tokens, seed=7) for i in range(batch)
    ]
    await until(lambda: all(len(generation.tokens) > 1 for generation in running))
    sampled, started = len(running[-1].tokens), time.monotonic()
    await asyncio.gather(*(generation.finished for generation in running))
    return 1000 * (time.monotonic() - started) / (num_tokens - sampled), running


def test_a_step_lasts_as_long_as_on_the_emulated_machine(
    engine: Engine, runner: asyncio.Runner
) -> None:
    async def fastest(batch: int) -> float:
        return min([(await sample(engine, batch, TOKENS))[0] for _ in range(4)])

    alone, interpolated, three = (runner.run(fastest(batch)) for batch in (1, 2, 3))
    # A step is measured where its tokens arrive, so the first interval can be short by that delay.
    assert 0.9 * FAST_MS <= alone < (FAST_MS + SLOW_MS) / 2
    assert 0.9 * (FAST_MS + SLOW_MS) / 2 <= interpolated < SLOW_MS
    assert 0.9 * SLOW_MS <= three < 2 * SLOW_MS


def test_an_abort_waits_for_the_end_of_the_step(engine: Engine, runner: asyncio.Runner) -> None:
    async def abort() -> float:
        running = [engine.launch(f"abort {i}", PROMPT, 800, seed=7) for i in range(4)]
        await until(lambda: all(generation.tokens for generation in running))
        sampled = len(running[0].tokens)
        await until(lambda: len(running[0].tokens) > sampled)  # so that a step has just begun
        decided = time.monotonic()
        await engine.abort([running[0].request_id])
        took_ms = 1000 * (time.monotonic() - decided)
        await engine.abort([generation.request_id for generation in running])
        return took_ms

    assert runner.run(abort()) >= 0.7 * VERY_SLOW_MS


def test_without_seeds_per_request_the_same_prompt_and_seed_sample_other_responses(
    engine: Engine, runner: asyncio.Runner
) -> None:
    _, sampled = runner.run(sample(engine, 2, TOKENS))
    assert sampled[0].tokens != sampled[1].tokens
