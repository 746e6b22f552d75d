"""`python -m tools.bench checkpoints`: how long training waits for a checkpoint.

Owns the measurement: a random model of 58 million parameters (0.7 GB with its optimizer's state) is
saved by torch's `save`, for which training waits, and by `learner.saving` beside optimizer steps on
random gradients. Both take turns, on the disk of the temporary folder. Prints seconds; nothing
passes or fails.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from configs.schema import Config
from learner import fsdp
from learner.checkpoint import tensors_of
from learner.train import LearnerState, build_state, start_save, update

ROUNDS = 5
SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
PARTS = {
    "blocking": "a save by torch, which training awaits",
    "copy": "a save beside training: it awaits the copy",
    "beside": "  and the checkpoint is complete after",
    "step": "an optimizer step alone",
    "step_beside": "an optimizer step beside a save",
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        config = Config()
        config.model.path, config.run.dir = _save_model(Path(folder) / "model"), folder
        config.model.dtype = "float32"
        with fsdp.process_group(config) as device:
            state = build_state(config, device)
            num_bytes = sum(
                tensor.nbytes for tensor in tensors_of(state.model, state.optimizer).values()
            )
            for _ in range(1 + ROUNDS):
                for name, value in _measure(state, Path(folder)):
                    seconds[name].append(value)
    print(f"{num_bytes / 1e9:.2f} GB on {device}, medians of {ROUNDS} saves after a first one")
    for name, what in PARTS.items():
        values = seconds[name][1:]
        print(f"{what:44} {median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})")


def _measure(state: LearnerState, folder: Path) -> Iterator[tuple[str, float]]:
    writer = HuggingFaceStorageWriter(str(folder / "blocking"), save_distributed=True)
    tensors = tensors_of(state.model, state.optimizer)
    yield "blocking", _seconds(lambda: dcp.save(tensors, storage_writer=writer))
    yield "step", _seconds(lambda: _step(state))
    state.step += 1
    started = time.perf_counter()
    start_save(state)
    yield "copy", time.perf_counter() - started
    beside = []
    while not beside or state.saver.under_way is not None:
        beside.append(_seconds(lambda: _step(state)))
    state.saver.wait()
    yield "beside", state.saver.take_metrics()["checkpoint/seconds"]
    yield "step_beside", median(beside)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _step(state: LearnerState) -> None:
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    update(state)


def _save_model(folder: Path) -> str:
    disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return str(folder)
