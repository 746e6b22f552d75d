"""Keys of the engines: two values of each change a worker, a pool or vLLM's options."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from actors.pool import EngineFailed, Pool
from configs.schema import Config
from tests.knobs import Turn, check_turn
from tests.unit.actors.test_worker import Scene, play

# A worker with a fake engine ---------------------------------------------------------------------


def reported(config: Config, _: Path) -> object:
    """Tokens that were reported within a second after two were sampled."""

    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)
        scene.engine.sample(1, 3, 4)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await scene.until(lambda: bool(scene.sampled(1)))

    return play(script, config=config).sampled(1)


def allowed_tokens(config: Config, _: Path) -> object:
    """The longest response that is requested of the engine for a prompt of two tokens."""

    async def script(scene: Scene) -> None:
        scene.launch(1)
        await scene.running(1)

    return play(script, config=config).engine.launched["1"][1]


# A pool whose engines end at once ----------------------------------------------------------------


@pytest.fixture
def scripted_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces engines by a script that records its GPUs and exits with the status in the file
    `status`, or with 0 if it is the fifth.
    """
    script = tmp_path / "engine"
    script.write_text(
        f'#!/bin/sh\necho "gpus ${{CUDA_VISIBLE_DEVICES-none}}" >> {tmp_path}/started\n'
        f"test $(wc -l < {tmp_path}/started) -gt 4 && exit 0; exit $(cat {tmp_path}/status)\n"
    )
    script.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # The scripts run wherever the installed vLLM does.
    monkeypatch.setattr("actors.pool.check_device", lambda config: None)


def pool(config: Config, own: Path, status: int) -> tuple[list[str], str]:
    """The GPUs that each engine process recorded, and the reason why the pool failed."""
    (own.parent / "status").write_text(str(status))
    (own.parent / "started").write_text("")
    error = ""
    try:
        Pool(config).run()
    except EngineFailed as failed:
        error = str(failed)
    return sorted((own.parent / "started").read_text().splitlines()), error


def ended_pool(config: Config, own: Path) -> object:
    return pool(config, own, status=0)


def dying_pool(config: Config, own: Path) -> object:
    return pool(config, own, status=1)


# vLLM's options ----------------------------------------------------------------------------------


def engine_options(config: Config, _: Path) -> object:
    from actors.inference.engine import engine_args  # loads vLLM: ten seconds

    args = engine_args(config)
    return {name: getattr(args, name) for name in ("kv_cache_memory_bytes", "max_num_seqs")}


def engine_options_for_a_gpu(config: Config, _: Path) -> object:
    from actors.inference import engine

    with patch.object(engine, "current_platform", SimpleNamespace(device_type="cuda")):
        return engine.engine_args(config).gpu_memory_utilization


def request_options(config: Config, _: Path) -> object:
    from actors.inference.engine import sampling_params

    return sampling_params(config.sampling, max_tokens=8, seed=3).seed


def scheduler_options(config: Config, _: Path) -> object:
    from actors.inference.engine import engine_args

    args = engine_args(config)
    return args.additional_config, args.block_size


MODEL, CUDA = "model.path={folder}", "actors.device=cuda"
TURNS = {
    "actors.stream_interval": Turn("2", "3", reported, ("actors.flush_s=0.001",)),
    "actors.flush_s": Turn("0.001", "60", reported, ("actors.stream_interval=1",)),
    "model.max_context": Turn("600", "100", allowed_tokens, ("sampling.max_tokens=99",)),
    "actors.num_engines": Turn("1", "2", ended_pool, (MODEL,)),
    "actors.device": Turn("cpu", "cuda", ended_pool, (MODEL,)),
    "actors.tensor_parallel": Turn("1", "2", ended_pool, (MODEL, CUDA)),
    "actors.max_restarts": Turn("0", "1", dying_pool, (MODEL,)),
    "actors.restart_window_s": Turn("600", "0.001", dying_pool, (MODEL, "actors.max_restarts=1")),
    "actors.name": Turn("a", "b", dying_pool, (MODEL, "actors.max_restarts=0")),
}
VLLM_TURNS = {
    "actors.vllm": Turn("{{block_size: 64}}", "{{block_size: 16}}", scheduler_options),
    "actors.min_step_ms": Turn("[]", "[[1,12]]", scheduler_options),
    "sampling.seeded": Turn("false", "true", request_options),
    "actors.slots": Turn("16", "32", engine_options),
    "actors.kv_cache_gib": Turn("0.5", "1", engine_options),
    "actors.gpu_memory_frac": Turn("0.5", "0.6", engine_options_for_a_gpu, (CUDA,)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("scripted_engines")
@pytest.mark.parametrize("path", TURNS)
def test_a_key_changes_a_worker_or_a_pool(path: str, tmp_path: Path) -> None:
    check_turn(path, TURNS[path], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", VLLM_TURNS)
def test_a_key_changes_the_options_of_vllm(path: str, tmp_path: Path) -> None:
    check_turn(path, VLLM_TURNS[path], tmp_path)
