"""Our code inside vLLM's own processes: loads snapshots, and ends with the frontend.

vLLM imports this module, by name, in every process that holds a part of the model. Owns nothing
there but one thread, which watches the frontend. Driven by `actors.inference.engine`, from the
frontend, through `AsyncLLM.collective_rpc`.
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
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from actors.inference import vllm_errors

vllm_errors.install(vllm_errors.IN_CORE)
FRONTEND_PID = "DARTS_FRONTEND_PID"
HEAD = "lm_head.weight"


class SnapshotLoader:
    """Mixed into vLLM's worker class (`worker_extension_cls`), whose attributes it uses."""

    model_runner: Any

    def load_snapshot(self, path: str) -> str:
        """Replace the model's weights by those of the safetensors file `path`.

        The file has a checkpoint's names. Returns "" or, in one line, why the weights are now a
        mixture of two policies. (vLLM would print the traceback of an exception before passing it
        on.) Reloads layer by layer, because engines keep weights in a layout of their own, which is
        pre-packed on a CPU.
        """
        model, model_config = self.model_runner.model, self.model_runner.model_config
        tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        expected = {name for name, _ in model.named_parameters()}
        try:
            with safe_open(path, framework="pt") as snapshot:
                forget_packed_experts(model)
                initialize_layerwise_reload(model)
                loaded = model.load_weights(_tensors(snapshot, model, tied))
                finalize_layerwise_reload(model, model_config)
        except Exception as error:  # a model's own loader may raise anything
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        missing = sorted(expected - loaded) if loaded is not None else []
        lacks = f"the snapshot lacks {len(missing)} of the model's parameters, such as "
        return lacks + missing[0] if missing else ""

    def check_adapter(self, adapter_id: int) -> str:
        """Whether every matrix of an adapter that was loaded has a layer to which it belongs.

        Returns "" or, in one line, what has none. vLLM would not say so.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        unused = sorted(set(manager.get_adapter(adapter_id).loras) - set(manager.modules))
        lacks = f"vLLM's model lacks {len(unused)} of the layers that have an adapter, such as "
        return lacks + unused[0] if unused else ""


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Make the next reload pack the experts of a CPU engine as the first load did.

    vLLM packs them only when it builds the kernel, and later loads would copy unpacked experts into
    packed memory. On a GPU nothing is packed, and CUDA graphs refer to the kernel.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # type: ignore[union-attr]


def _tensors(
    snapshot: Any, model: torch.nn.Module, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor. If embeddings are tied, the head is included only if this engine has one.

    An engine with a head would otherwise silently keep the old one, and an engine without a head
    refuses it.
    """
    # Duplicates stay, since the head may be the embeddings themselves.
    modules = model.named_modules(remove_duplicate=False)
    has_head = any(name.rpartition(".")[2] == "lm_head" for name, _ in modules)
    names = list(snapshot.keys())
    for name in names:
        if name != HEAD or has_head or not tied:
            yield name, snapshot.get_tensor(name)
    if tied and has_head and HEAD not in names:
        yield HEAD, snapshot.get_tensor(_embeddings(model, names))


def _embeddings(model: torch.nn.Module, names: list[str]) -> str:
    """The snapshot's name of the input embeddings, which ends like this engine's own."""
    for own, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            ending = f"{own.rpartition('.')[2]}.weight"
            if named := [name for name in names if name.endswith(ending)]:
                return named[0]
    raise ValueError("the output head is tied to the embeddings, which the snapshot lacks")


def _die_with(frontend_pid: int) -> None:
    """Kill this process, and vLLM's EngineCore above it, as soon as the frontend is gone.

    EngineCore itself does not notice when the frontend is SIGKILLed, and would keep its cores and
    memory forever.
    """
    pids = [os.getpid()] if os.getppid() == frontend_pid else [os.getppid(), os.getpid()]
    try:
        frontend = os.pidfd_open(frontend_pid)
    except ProcessLookupError:
        frontend = None
    if frontend is not None:
        poll = select.poll()
        poll.register(frontend, select.POLLIN)
        poll.poll()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


if FRONTEND_PID in os.environ and int(os.environ[FRONTEND_PID]) != os.getpid():
    threading.Thread(
        target=_die_with, args=(int(os.environ[FRONTEND_PID]),), daemon=True, name="frontend-watch"
    ).start()
