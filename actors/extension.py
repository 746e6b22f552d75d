"""Our code inside vLLM's own processes: loads a snapshot into the running model, and dies with the frontend.

vLLM imports this module, by name, in every process that holds a part of the model. Owns nothing there but one watching thread.
Driven by `actors.engine`, from the frontend, through `AsyncLLM.collective_rpc`.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

FRONTEND_PID = "DARTS_FRONTEND_PID"


class SnapshotLoader:
    """Mixed into vLLM's worker class (`worker_extension_cls`), whose attributes it uses."""

    model_runner: Any

    def load_snapshot(self, path: str) -> None:
        """Replace the model's weights by those of the safetensors file `path`, named as Hugging Face names them.

        Layerwise reload, because engines keep weights in a layout of their own (pre-packed on CPU). It keeps whatever it is not
        given, so a snapshot that lacks a parameter raises `ValueError` instead of leaving a mixture of two policies.
        """
        model, model_config = self.model_runner.model, self.model_runner.model_config
        expected = {name for name, _ in model.named_parameters()}
        with safe_open(path, framework="pt") as snapshot:
            initialize_layerwise_reload(model)
            loaded = model.load_weights(
                _tensors(
                    snapshot,
                    bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False)),
                )
            )
            finalize_layerwise_reload(model, model_config)
        if loaded is not None and (missing := sorted(expected - loaded)):
            raise ValueError(
                f"the snapshot lacks {len(missing)} of the model's parameters, {missing[0]} among them"
            )


def _tensors(snapshot: Any, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, and with tied embeddings the head by its own name: without it a reload silently keeps the old head."""
    names = list(snapshot.keys())
    for name in names:
        yield name, snapshot.get_tensor(name)
    if tied and "lm_head.weight" not in names:
        embeddings = next(name for name in names if name.endswith("embed_tokens.weight"))
        yield "lm_head.weight", snapshot.get_tensor(embeddings)


def _die_with(frontend_pid: int) -> None:
    """Kill this process, and vLLM's EngineCore above it, as soon as the frontend is gone: it may have been SIGKILLed.

    EngineCore itself never notices, and would keep its cores and memory for ever.
    """
    victims = [os.getpid()] if os.getppid() == frontend_pid else [os.getppid(), os.getpid()]
    try:
        frontend = os.pidfd_open(frontend_pid)
    except ProcessLookupError:
        frontend = None
    if frontend is not None:
        poll = select.poll()
        poll.register(frontend, select.POLLIN)
        poll.poll()
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


if FRONTEND_PID in os.environ and int(os.environ[FRONTEND_PID]) != os.getpid():
    threading.Thread(
        target=_die_with, args=(int(os.environ[FRONTEND_PID]),), daemon=True, name="frontend-watch"
    ).start()
