"""The engine and a whole run on one CUDA GPU, with figures of an engine of 0.6 billion parameters.

Run by `make gpu-check`. GPU_CHECK_DEVICE=cpu rehearses the figures on a small model, as `make test`
does, which says nothing about a GPU.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from actors.inference.generation import Generation, Measurement
from buffer.processes.private_folder import private_folder
from configs.schema import Config
from tests.gpu.conftest import DEVICE, Note

if TYPE_CHECKING:
    from actors.inference.engine import Engine

pytest.importorskip("vllm", reason="the engine needs vLLM: pip install 'darts-rl[gpu]'")

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("tiny_reasoner"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.slow]),
]
MODEL = Path("models/tiny-reasoner")
DEVICES = [f"actors.device={DEVICE}", f"learner.device={DEVICE}", "actors.gpu_memory_frac=0.3"]
# The shape of Qwen3-0.6B. Its weights are random.
BIG: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 50_000,  # so that <eos> is hardly ever sampled
}
SHAPE, BATCHES, WINDOW_S, CONTEXT, DTYPE = (
    (BIG, (1, 16, 64, 256), 2.0, 16_384, "bfloat16")
    if DEVICE == "cuda"
    else (SMALL, (1, 4), 0.2, 2048, "float32")
)
PROMPT = [5 + i % 50 for i in range(128)]


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A model of random weights, which hardly ever ends a response."""
    config = Qwen3Config(**SHAPE, tie_word_embeddings=True, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        AutoModelForCausalLM.from_config(config, dtype=DTYPE).save_pretrained(tmp_path)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def engine_config(model: Path, dtype: Any, slots: int) -> Config:
    config = Config()
    config.model.path, config.model.dtype = str(model), dtype
    config.model.max_context = CONTEXT if model != MODEL else config.model.max_context
    config.actors.device, config.actors.gpu_memory_frac, config.actors.slots = DEVICE, 0.3, slots
    config.actors.kv_cache_gib = 1.0
    return config


@pytest.mark.gpu
def test_an_engine_keeps_to_its_share_of_memory(note: Note) -> None:
    from actors.inference.engine import Engine

    with private_folder(), asyncio.Runner() as runner:
        engine = Engine(engine_config(MODEL, "bfloat16", 16))
        try:

            async def sample() -> int:
                generation = engine.launch("1", [5, 6, 7], 20, seed=0)
                await generation.finished
                return len(generation.tokens)

            assert runner.run(sample()) > 0
            free, total = torch.cuda.mem_get_info()
            note("asked for 0.3 of the GPU, used", f"{(total - free) / total:.3f}")
            assert (total - free) / total < 0.45  # its share, and CUDA's own memory
        finally:
            engine.close()


def test_figures_of_an_engine(big: Path, note: Note) -> None:
    """Latency by batch, cancels and swaps, and log-probabilities against those of transformers."""
    from actors.inference.engine import Engine

    started = time.monotonic()
    with private_folder(), asyncio.Runner() as runner:
        engine = Engine(engine_config(big, DTYPE, BATCHES[-1]))
        note("start", f"{time.monotonic() - started:.0f} s")
        try:
            for batch in BATCHES:
                measured, cancel_s = runner.run(decode(engine, batch))
                note(
                    f"batch {batch}",
                    f"{measured.ms_per_token:.2f} ms per token, {measured.tokens_per_s:,.0f} "
                    f"tokens/s, {1000 * cancel_s:.1f} ms from cancel to freed slot",
                )
            swaps, tokens, logprobs = runner.run(swap_and_score(engine, big / "model.safetensors"))
            note("a swap with requests in flight", f"{1000 * median(swaps):.0f} ms")
        finally:
            engine.close()
    difference = [abs(a - b) for a, b in zip(logprobs, by_transformers(big, tokens), strict=True)]
    note("mean difference of a log-probability", f"{mean(difference):.1e} nats")
    assert mean(difference) < 0.05


async def decode(engine: Engine, batch: int) -> tuple[Measurement, float]:
    """What the engine measures of `batch` requests, and the median seconds that an abort takes."""
    generations = {
        f"{batch}-{i}": engine.launch(f"{batch}-{i}", PROMPT, CONTEXT - len(PROMPT), seed=i)
        for i in range(batch)
    }
    for generation in generations.values():
        await reach(generation, 20)
    engine.measure()
    await asyncio.sleep(WINDOW_S)
    measured = engine.measure()
    assert measured.batch == pytest.approx(batch, rel=0.05)
    cancels = []
    for request_id in list(generations)[:20]:
        began = time.monotonic()
        await engine.abort([request_id])
        cancels.append(time.monotonic() - began)
        assert await generations.pop(request_id).finished == "abort"
    await engine.abort(list(generations))
    return measured, median(cancels)


async def reach(generation: Generation, num_tokens: int) -> None:
    """Wait for so many tokens, or raise the error that ended the request before."""
    while len(generation.tokens) < num_tokens:
        if generation.finished.done():
            raise AssertionError(f"ended by {generation.finished.result()}")
        await asyncio.sleep(0.001)


async def swap_and_score(engine: Any, snapshot: Path) -> tuple[list[float], list[int], list[float]]:
    """Seconds of each swap, and a sequence with its log-probabilities.

    Half of the sequence was sampled before the swaps, which load the weights that were there.
    """
    generation = engine.launch("swapped", PROMPT, 400, seed=0)
    swaps = []
    for version in range(3):
        await reach(generation, 50 * (version + 1))
        swaps.append(await engine.swap(str(snapshot), version))
    assert await generation.finished == "length"
    runs = generation.take()
    assert [run.version for run in runs] == [-1, 0, 1, 2]
    sampled = [logprob for run in runs for logprob in run.logprobs]
    tokens = [*PROMPT, *generation.tokens]
    scored = list(await engine.score(tokens))[len(PROMPT) - 1 :]
    assert mean(abs(a - b) for a, b in zip(sampled, scored, strict=True)) < 0.05
    return swaps, tokens, sampled


def by_transformers(model: Path, tokens: list[int]) -> Iterator[float]:
    """The log-probability of each token after the prompt."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE)
    whole.to(DEVICE)
    ids = torch.tensor([tokens], device=DEVICE)
    with torch.no_grad():
        logprobs = torch.log_softmax(whole(ids).logits[0, :-1].float(), -1)
    chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    yield from chosen[len(PROMPT) - 1 :].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_one_gpu_learns_and_agrees_with_itself(
    dtype: str, tmp_path: Path, free_port: Callable[[], int], note: Note
) -> None:
    command = [
        sys.executable,
        "-m",
        "tools.launch",
        "--config",
        "configs/demo.yaml",
        f"run.dir={tmp_path}",
        "run.name=r",
        *DEVICES,
    ]
    command += [
        f"model.dtype={dtype}",
        "run.steps=12",
        "eval.every=12",
        f"buffer.address=tcp://127.0.0.1:{free_port()}",
    ]
    subprocess.run([*command, "launch.progress=none"], check=True)
    metrics = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    accuracy = [row["eval/accuracy"] for row in metrics if "eval/accuracy" in row]
    differences = [row["train/logprob_diff"] for row in metrics if "train/logprob_diff" in row]
    note("accuracy", f"{accuracy[0]:.1%} to {accuracy[-1]:.1%}")
    note("mean difference of a log-probability", f"{max(differences):.1e} nats at most")
    assert accuracy[-1] > accuracy[0]
    assert all(row["lag/max"] <= 4 for row in metrics)
    # Between engine and learner at equal weights.
    assert max(differences) < (5e-3 if dtype == "float32" else 0.1)
