"""The engine and a whole run on one CUDA GPU. The maintainers never ran these tests.

Run by `make gpu-check`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from buffer.processes.private_folder import private_folder
from configs.schema import Config
from tools.warm_start import warm_start

pytest.importorskip("vllm", reason="the engine needs vLLM: pip install 'darts-rl[gpu]'")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
MODEL = Path("models/tiny-reasoner")
DEVICES = ["actors.device=cuda", "learner.device=cuda", "actors.gpu_memory_frac=0.3"]


@pytest.fixture(scope="module", autouse=True)
def model() -> None:
    warm_start(MODEL)


def test_an_engine_keeps_to_its_share_of_memory() -> None:
    from actors.inference.engine import Engine

    config = Config()
    config.model.path, config.actors.device, config.actors.gpu_memory_frac = str(MODEL), "cuda", 0.3
    with private_folder(), asyncio.Runner() as runner:
        engine = Engine(config)
        try:

            async def sample() -> int:
                generation = engine.launch("1", [5, 6, 7], 20, seed=0)
                await generation.finished
                return len(generation.tokens)

            assert runner.run(sample()) > 0
            free, total = torch.cuda.mem_get_info()
            assert (total - free) / total < 0.45  # its share, and CUDA's own memory
        finally:
            engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_one_gpu_learns_and_agrees_with_itself(
    dtype: str, tmp_path: Path, free_port: Callable[[], int]
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
    assert accuracy[-1] > accuracy[0]
    assert all(row["lag/max"] <= 4 for row in metrics)
    # Mean difference between log-probabilities of engine and learner at equal weights.
    bound = 5e-3 if dtype == "float32" else 0.1
    assert all(row["train/logprob_diff"] < bound for row in metrics if "train/logprob_diff" in row)
