"""`python -m tools.faults.fake_engine INDEX CONFIG_FILE`: an engine's process with a fake sampler.

Everything except vLLM is real: the process, its link, its worker and its verifiers. Lengths are
lognormal and drawn from the launch's seed. Tokens come from `tools.faults.sampled`; every `TICK_S`
each request gets its next ones.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from actors import process
from actors.inference.generation import Generation, Measurement, Meter
from configs.schema import Config
from tools.faults.sampled import END, VOCAB_SIZE, Life, given, logprob, text, token

TICK_S, TOKENS_PER_TICK = 0.05, 2
MEDIAN_LOG_LENGTH, SPREAD = 3.2, 0.7
SWAP_S = 0.01


class Tokenizer:
    """Encodes the bytes of a prompt as token ids, and decodes a response to the ids themselves."""

    bos_token_id = 1
    eos_token_id = END
    chat_template = None

    def encode(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        return given(prompt)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return text(token_ids)


class FakeEngine:
    """A `Sampler` for the actors' worker. Made before the event loop runs, like the real one."""

    model_type, vocab_size, cause = "fake", VOCAB_SIZE, ""

    def __init__(self, config: Config, engine_id: str) -> None:
        self.tokenizer: Any = Tokenizer()
        self.eos_ids = frozenset({END})
        self.version = -1
        self.died = asyncio.Event()
        self._engine_id = engine_id
        self._meter = Meter(config.actors.slots, time.monotonic())
        self._running: dict[str, tuple[Generation, asyncio.Task[None]]] = {}

    def launch(
        self,
        request_id: str,
        prompt_ids: list[int],
        max_tokens: int,
        *,
        seed: int,
        num_continued: int,
    ) -> Generation:
        length = max(1, draw_length(f"{seed} {num_continued}"))
        rollout_id = int(request_id.partition(".")[0])  # the rest is the number of the turn
        life = Life(rollout_id, self._engine_id)

        def sample(place: int) -> int:
            return token(life, len(prompt_ids) + place, self.version)

        return self._start(Generation(request_id), sample, length, max_tokens)

    def _start(
        self, generation: Generation, sample: Callable[[int], int], length: int, max_tokens: int
    ) -> Generation:
        """Decode `length` tokens, of which `sample` gives those before the last, by their place."""
        task = asyncio.create_task(self._decode(generation, sample, length, max_tokens))
        self._running[generation.request_id] = (generation, task)
        self._meter.occupy(len(self._running), time.monotonic())
        return generation

    async def _decode(
        self, generation: Generation, sample: Callable[[int], int], length: int, max_tokens: int
    ) -> None:
        end = min(length, max_tokens)
        while (done := len(generation.tokens)) < end:
            await asyncio.sleep(TICK_S)
            stop = min(end, done + TOKENS_PER_TICK)
            ids = [sample(place) for place in range(done, stop)]
            if stop == length:
                ids[-1] = END
            generation.extend(self.version, ids, map(logprob, ids))
            self._meter.step(time.monotonic(), len(self._running), int(stop == end))
        self._release(generation, "stop" if end == length else "length")

    def _release(self, generation: Generation, outcome: str) -> None:
        del self._running[generation.request_id]
        self._meter.occupy(len(self._running), time.monotonic())
        generation.end(outcome)

    async def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if request_id in self._running:
                generation, task = self._running[request_id]
                task.cancel()
                self._release(generation, "abort")

    async def swap(self, path: str, version: int) -> float:
        """Load a snapshot. One from the stand-in learner contains its version, which is checked."""
        said = Path(path).read_bytes()[:32]
        assert not said.startswith(b"policy ") or said == b"policy %d" % version, said
        await asyncio.sleep(SWAP_S)
        self.version = version
        return SWAP_S

    async def score(self, token_ids: list[int]) -> array[float]:
        return array("f", map(logprob, token_ids[1:]))

    def measure(self) -> Measurement:
        return self._meter.report(time.monotonic())

    def close(self) -> None:
        """Does nothing, because no resource outside this process is held."""


def draw_length(seed: str) -> int:
    return round(random.Random(seed).lognormvariate(MEDIAN_LOG_LENGTH, SPREAD))


def main(argv: list[str], engine: type[FakeEngine] = FakeEngine) -> int:
    """Run `actors.process`, which imports `actors.inference.engine` late, with the fake engine."""
    module = ModuleType("actors.inference.engine")
    module.__dict__["Engine"] = lambda config, _seed: engine(
        config, f"{config.actors.name}/{argv[0]}"
    )
    sys.modules[module.__name__] = module
    return process.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
