"""The learner on one CUDA GPU, without vLLM: does it compute what it computes on a CPU?

`make gpu-check` runs these and prints their figures. GPU_CHECK_DEVICE=cpu rehearses them without a
GPU, as `make test` does, which says nothing about one.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from configs.schema import Config, LoraConfig
from learner import fsdp
from learner.snapshots.publish import gather
from learner.train import train_step
from tests.gpu.conftest import DEVICE, Note
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    make_trajectory,
    save_model,
    single_rank,
    step_gradients,
    train,
    with_advantages,
    with_and_without_restart,
)
from tools.benchmarks.learner import peak_of_loss

pytestmark = [
    pytest.mark.timeout(600),
    *([pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.slow]),
]

DEEP = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "head_dim": 128}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
# Largest difference of a gradient, relative to its own norm. bfloat16 has 8 bits of mantissa.
TOLERANCE = {"float32": 2e-3, "bfloat16": 8e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def on_a_cpu(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradient of the first step, in float32 on a CPU."""
    return first_step(make_config(model, tmp_path_factory.mktemp("runs") / "cpu"))


def on_the_device(model: Path, run: Path, **changes: Any) -> Config:
    return make_config(model, run, learner__device=DEVICE, **changes)


def first_step(config: Config) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    with single_rank(config) as state:
        metrics, gradients = step_gradients(state, make_shards(make_trajectories(seed=0))[0])
    return metrics, {name: gradient.float().cpu() for name, gradient in gradients.items()}


def largest_difference(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> float:
    """Of all parameters, relative to the norm of each one's gradient."""
    assert gradients.keys() == expected.keys()
    return max(
        float((gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_has_the_gradient_that_it_has_on_a_cpu(
    dtype: str,
    attention: str,
    model: Path,
    on_a_cpu: tuple[dict[str, float], dict[str, torch.Tensor]],
    tmp_path: Path,
    note: Note,
) -> None:
    if attention == "flash_attention_2":
        if dtype == "float32" or DEVICE == "cpu":
            pytest.skip("these kernels compute in bfloat16, on a GPU")
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("flash-attn is not installed: pip install 'darts-rl[flash-attn]'")
    config = on_the_device(model, tmp_path / "run", model__dtype=dtype, model__attention=attention)
    metrics, gradients = first_step(config)
    difference = largest_difference(gradients, on_a_cpu[1])
    note("largest difference of a gradient", f"{difference:.1e}")
    assert difference < TOLERANCE[dtype]
    assert metrics["train/tokens"] == on_a_cpu[0]["train/tokens"]
    assert metrics["train/entropy"] == pytest.approx(on_a_cpu[0]["train/entropy"], rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_weights_have_the_gradient_of_those_on_the_device(
    dtype: str, model: Path, tmp_path: Path, note: Note
) -> None:
    shard = make_shards(make_trajectories(seed=0))[0]
    found: list[tuple[dict[str, float], dict[str, torch.Tensor]]] = []
    for offload in (False, True):
        run = tmp_path / f"offload-{offload}"
        config = on_the_device(model, run, model__dtype=dtype, learner__offload=offload)
        with single_rank(config) as state:
            before = gather(state.model, torch.float32, keep=True)
            found.append(step_gradients(state, shard))
            after = gather(state.model, torch.float32, keep=True)
            assert not all(torch.equal(after[name], before[name]) for name in before)
            held = "cpu" if offload else DEVICE
            for parameter in state.model.parameters():
                moments = [state.optimizer.state[parameter][n] for n in ("exp_avg", "exp_avg_sq")]
                assert parameter.grad is None
                assert {tensor.device.type for tensor in (parameter, *moments)} == {held}
    gradients = [{n: g.float().cpu() for n, g in gradients.items()} for _, gradients in found]
    difference = largest_difference(gradients[1], gradients[0])
    note("largest difference of a gradient", f"{difference:.1e}")
    peaks = [metrics["memory/learner_peak_bytes"] / 2**20 for metrics, _ in found]
    note("MiB at the peak", f"{peaks[1]:.1f} instead of {peaks[0]:.1f}")
    assert difference < TOLERANCE[dtype]
    assert found[1][0]["train/loss"] == pytest.approx(found[0][0]["train/loss"], rel=0.02)


@pytest.mark.parametrize("offload", [False, True])
def test_moments_in_bfloat16_move_the_weights_alike(
    offload: bool, model: Path, tmp_path: Path, note: Note
) -> None:
    ended: list[dict[str, torch.Tensor]] = []
    for moments in ("float32", "bfloat16"):
        config = on_the_device(
            model, tmp_path / moments, optimizer__moments=moments, learner__offload=offload
        )
        with single_rank(config) as state:
            begun = gather(state.model, torch.float32, keep=True)
            train(state, 4)
            ended.append(gather(state.model, torch.float32, keep=True))
    begun_all, exact, rounded = (
        torch.cat([weights[name].flatten() for name in begun]) for weights in (begun, *ended)
    )
    difference = float((rounded - exact).norm() / (exact - begun_all).norm())
    note("difference, relative to all movement", f"{difference:.1e}")
    assert 0 < difference < 0.05


@pytest.mark.parametrize(("rank", "offload"), [(0, False), (4, False), (0, True), (4, True)])
def test_a_checkpoint_continues_the_curve(
    rank: int, offload: bool, model: Path, tmp_path: Path
) -> None:
    config = on_the_device(model, tmp_path / "run", learner__offload=offload)
    config.model = replace(config.model, lora=LoraConfig(rank=rank))
    resumed, undisturbed = with_and_without_restart(config)
    # Sums over many threads of a GPU have no fixed order.
    for name, tensor in undisturbed.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6)


def test_adapters_alone_are_trained(model: Path, tmp_path: Path) -> None:
    config = on_the_device(model, tmp_path / "run", optimizer__weight_decay=0.1)
    config.model = replace(config.model, lora=LoraConfig(rank=4))
    with single_rank(config) as state:
        before = {n: fsdp.whole(p.detach()).clone() for n, p in state.model.named_parameters()}
        train(state, 2)
        for name, parameter in state.model.named_parameters():
            changed = not torch.equal(fsdp.whole(parameter.detach()), before[name])
            assert changed == (".lora_" in name), name


def test_the_loss_needs_the_same_memory_for_longer_packs(note: Note) -> None:
    """Apart from the hidden states and their gradients, which grow with the length."""
    lengths = (2048, 16_384) if DEVICE == "cuda" else (128, 512)
    peaks = [peak_of_loss(length, fused=True)[0] / 2**30 for length in lengths]
    note("GiB at the peak", " and ".join(f"{peak:.2f}" for peak in peaks))
    assert peaks[1] < peaks[0] + 0.5


@pytest.mark.parametrize("length", [32, 1024])
def test_tokens_per_second(length: int, tmp_path: Path, note: Note) -> None:
    """No bound: a figure for the table, of a model of 0.2 billion parameters in bfloat16.

    `length` is that of all responses, to prompts of a quarter of it.
    """
    sizes: dict[str, Any] = dict(DEEP if DEVICE == "cuda" else SMALL)
    path = tmp_path / "model"
    shape = {**sizes, "vocab_size": 32_768, "num_attention_heads": 8, "num_key_value_heads": 4}
    AutoModelForCausalLM.from_config(Qwen3Config(**shape)).save_pretrained(path)
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    config = on_the_device(path, tmp_path / "run", model__dtype=dtype, batch__max_tokens=8192)
    num_tokens = 262_144 if DEVICE == "cuda" else 2 * (length + length // 4)
    rng = np.random.default_rng(0)
    trajectories = [
        make_trajectory(rng, length // 4, length, float(number % 2), number // 8)
        for number in range(num_tokens // (length + length // 4))
    ]
    shard = make_shards(with_advantages(trajectories))[0]
    with single_rank(config) as state:
        train_step(state, shard)
        started = time.perf_counter()
        trained = train_step(state, shard)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    note("tokens/s", f"{num_tokens / seconds:,.0f}")
    assert trained["train/tokens"] > 0
