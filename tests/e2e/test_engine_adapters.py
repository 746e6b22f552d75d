"""`Engine` with real vLLM, if a swap replaces adapters and leaves the model's own weights."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.inference.engine import Engine, engine_args
from actors.inference.generation import Generation, TokenRun
from actors.inference.weights import SwapFailed
from buffer.processes.private_folder import private_folder
from configs.schema import Config
from tests.e2e.test_engine import (
    BOUND,
    PROMPT,
    SLOTS,
    error,
    make_model,
    save_model,
    score_beside_others,
    scores_of,
    until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

RANK, ALPHA = 3, 12
Adapters = dict[str, torch.Tensor]


def make_adapters(seed: int) -> Adapters:
    """Random matrices for every linear layer but the head, by the names that peft gives them."""
    generator, tensors = torch.Generator().manual_seed(seed), Adapters()
    for name, layer in make_model(True, seed=0).named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            down = torch.randn(RANK, layer.in_features, generator=generator) * 0.1
            up = torch.randn(layer.out_features, RANK, generator=generator) * 0.1
            if name.endswith(("o_proj", "down_proj")):
                up[0] = 0  # feature 0 sets the logit of <eos>
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    return tensors


def merged(adapters: Adapters) -> Any:
    """The base model with `adapters` added to its weights."""
    model = make_model(True, seed=0)
    for name in adapters:
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
            weight = model.get_parameter(f"{layer}.weight")
            weight.data += delta * (ALPHA / RANK)
    return model


@dataclass
class Served:
    engine: Engine
    folder: Path
    runner: asyncio.Runner
    numbers: Iterator[int] = field(default_factory=count)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(coroutine)

    def launch(self, max_tokens: int, seed: int = 0) -> Generation:
        return self.engine.launch(str(next(self.numbers)), PROMPT, max_tokens, seed=seed)

    async def swap(self, adapters: Adapters) -> int:
        path = self.folder / f"snapshot {next(self.numbers)}"
        save_file(adapters, path)
        version = self.engine.version + 1
        await self.engine.swap(str(path), version)
        return version


def make_config(model: Path) -> Config:
    config = Config()
    config.model.path, config.actors.slots, config.actors.kv_cache_gib = str(model), SLOTS, 0.25
    config.model.lora.rank, config.model.lora.alpha = RANK, ALPHA
    return config


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    save_model(make_model(True, seed=0), folder / "model")
    with private_folder(), asyncio.Runner() as runner:
        engine = Engine(make_config(folder / "model"))
        yield Served(engine, folder, runner)
        engine.close()


def test_a_request_of_the_base_weights_is_never_in_flight_when_the_first_adapters_come(
    served: Served,
) -> None:
    """It would go on without them, under their version."""

    async def generate() -> None:
        early = served.launch(800)
        await until(lambda: len(early.tokens) > 0)
        with pytest.raises(SwapFailed, match="requests in flight use no adapter"):
            await served.swap(make_adapters(1))
        await served.engine.abort([early.request_id])
        await served.engine._llm.resume_generation()  # since it must not be used again otherwise

    served.run(generate())


def test_requests_in_flight_go_on_with_new_adapters_and_every_token_knows_its_version(
    served: Served,
) -> None:
    first, second = make_adapters(1), make_adapters(2)

    async def generate() -> tuple[int, list[Generation]]:
        await served.swap(first)
        generations = [served.launch(400, seed) for seed in range(SLOTS)]
        await until(lambda: all(len(generation.tokens) > 20 for generation in generations))
        version = await served.swap(second)
        assert [await generation.finished for generation in generations] == ["length"] * SLOTS
        return version, generations

    version, generations = served.run(generate())
    for generation in generations:
        before, after = generation.take()
        assert (before.version, after.version) == (version - 1, version)
        assert error(merged(first), before) < BOUND  # up to the last token before the pause
        later = TokenRun(version, after.tokens[:1], after.logprobs[:1])
        assert error(merged(first), later, list(before.tokens)) > 1e-3  # and from the first after


def test_a_prompt_that_other_adapters_prefilled_is_computed_anew(served: Served) -> None:
    new = make_adapters(3)

    async def generate() -> TokenRun:
        await served.launch(5).finished
        await served.swap(new)
        generation = served.launch(60)
        await generation.finished
        (run,) = generation.take()
        return run

    run = served.run(generate())
    assert error(merged(new), run) < BOUND
    assert error(merged(make_adapters(2)), run) > 0.1


def test_a_sequence_is_scored_while_others_decode(served: Served) -> None:
    """vLLM cannot do so if its head has an adapter."""

    async def generate() -> torch.Tensor:
        running = [served.launch(800) for _ in range(SLOTS)]
        return await score_beside_others(served.engine, running)

    scores, expected = served.run(generate()), scores_of(merged(make_adapters(3)))
    torch.testing.assert_close(scores, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("renamed", "reason"),
    [
        ("layers.7.mlp.up_proj", "lacks 1 of the layers that have an adapter"),
        ("layers.0.mlp.sideways_proj", "expected target modules"),
    ],
)
def test_an_adapter_without_its_layer_is_refused(served: Served, renamed: str, reason: str) -> None:
    """vLLM itself would ignore it. These are the last tests of this engine."""
    tensors = {
        name.replace("layers.0.mlp.up_proj", renamed): tensor
        for name, tensor in make_adapters(1).items()
    }
    with pytest.raises(SwapFailed, match=reason):
        served.run(served.swap(tensors))


def test_vllm_reserves_enough_for_the_rank(tmp_path: Path) -> None:
    save_model(make_model(True, seed=0), tmp_path)
    config = make_config(tmp_path)
    assert engine_args(config).max_lora_rank == 8
    config.model.lora.rank = 1000
    with pytest.raises(ValueError, match=r"model.lora.rank=1000: .*model.lora.merge=true"):
        engine_args(config)
    config.model.lora.merge = True
    assert not engine_args(config).enable_lora
