"""Which of vLLM's own options a run may set through `actors.vllm`, without importing vLLM.

Names are read from the source of the installed vLLM, which takes a fraction of a second. Options
that another key sets, or with which engine and learner would not compute the same
log-probabilities, are refused with the reason. Driven by `actors.pool`, `actors.inference.engine`
and `tools.launch`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from configs.schema import Config

SOURCE = Path("engine") / "arg_utils.py"
CLASSES = ("EngineArgs", "AsyncEngineArgs")

KEYS = {  # options that a key of ours sets
    "model": "model.path",
    "model_weights": "model.path",
    "served_model_name": "model.path",
    "dtype": "model.dtype",
    "max_model_len": "model.max_context",
    "max_num_seqs": "actors.slots",
    "tensor_parallel_size": "actors.tensor_parallel",
    "device_ids": "actors.device",
    "gpu_memory_utilization": "actors.gpu_memory_frac",
    "kv_cache_memory_bytes": "actors.kv_cache_gib on a CPU, and actors.gpu_memory_frac on a GPU",
    "num_gpu_blocks_override": "actors.gpu_memory_frac",
    "stream_interval": "actors.stream_interval",
    "seed": "run.seed",
}
OURS = "it connects vLLM with this software, which sets it itself"
OTHER_NUMBERS = (
    "engines would sample from another distribution than the learner computes, so that the ratio "
    "of learner to actor is wrong"
)
OTHER_MODEL = "engine and learner would load different models or tokenizers; use model.path"
SWAPS = "new weights are loaded into the running engine, which was never tested with it"
STEPS = (
    "a step would not yield exactly one token per request, labelled with the policy version that "
    "sampled it, as staleness, log-probabilities and cancelling assume"
)
PLACEMENT = "an engine is one process group on actors.tensor_parallel GPUs; use actors.num_engines"
REASONS = {
    OURS: (
        "additional_config", "disable_log_stats", "distributed_executor_backend", "log_level",
        "logging_config", "log_config_file", "max_logprobs", "scheduler_cls", "shutdown_timeout",
        "skip_tokenizer_init", "tokens_only", "use_tqdm_on_load", "weight_transfer_config",
        "worker_cls", "worker_extension_cls",
    ),
    OTHER_NUMBERS: (
        "diffusion_config", "disable_sliding_window", "generation_config",
        "kv_cache_dtype", "kv_sharing_fast_prefill", "logits_processors", "logprobs_mode",
        "override_generation_config", "pooler_config", "quantization", "quantization_config",
        "reasoning_config", "return_sampling_mask", "structured_outputs_config", "watermark_config",
    ),
    OTHER_MODEL: (
        "code_revision", "config_format", "convert", "hf_config_path", "hf_overrides",
        "model_class_overrides", "revision", "runner", "tokenizer", "tokenizer_mode",
        "tokenizer_revision", "trust_remote_code",
    ),
    SWAPS: (
        "allow_deprecated_quantization", "cpu_offload_gb", "cpu_offload_params", "enable_eplb",
        "enable_lora", "enable_sleep_mode", "load_format", "model_loader_extra_config",
        "offload_backend", "offload_params", "default_mm_loras",
    ),
    STEPS: (
        "async_scheduling", "aux_output_config", "kv_events_config", "kv_transfer_config",
        "speculative_config", "spec_method", "spec_model", "spec_tokens",
    ),
    PLACEMENT: (
        "data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size",
        "decode_context_parallel_size", "nnodes", "node_rank", "master_addr", "master_port",
        "enable_elastic_ep",
    ),
}  # fmt: skip
FORBIDDEN = {name: reason for reason, names in REASONS.items() for name in names}
PREFIXES = {"data_parallel_": PLACEMENT, "ec_": STEPS, "offload_": SWAPS, "_": OURS}


# The values of the types that a YAML value is checked against; vLLM itself checks all others, but
# only when an engine starts.
PLAIN: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
}


def check_options(config: Config) -> dict[str, Any]:
    """The options of `actors.vllm`. Raises `ValueError` for the first that cannot be set."""
    options = config.actors.vllm
    known = option_types() if options else {}
    for name, value in options.items():
        shown = f"actors.vllm.{name}={value}"
        if name in KEYS:
            raise ValueError(f"{shown}: is set by {KEYS[name]}; use that key")
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.0)
            raise ValueError(
                f"{shown}: the installed vLLM has no such option; did you mean "
                f"{', '.join(nearest)}? docs/operations.md says which of its options can be set"
            )
        if reason := FORBIDDEN.get(name) or _by_prefix(name):
            raise ValueError(f"{shown}: cannot be set: {reason}")
        kinds = known[name].split(" | ")
        if PLAIN.keys() >= set(kinds) and not any(type(value) in PLAIN[kind] for kind in kinds):
            raise ValueError(f"{shown}: must be of the type {known[name]}, as in vLLM")
    return dict(options)


def _by_prefix(name: str) -> str | None:
    return next((why for prefix, why in PREFIXES.items() if name.startswith(prefix)), None)


@cache
def option_types() -> dict[str, str]:
    """vLLM's own engine arguments, with their types as written in its source.

    Raises `ValueError` if vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ValueError("actors.vllm: vLLM is not installed here; install the extra cpu or gpu")
    tree = ast.parse((Path(spec.origin).parent / SOURCE).read_text())
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in CLASSES]
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for one in classes
        for statement in one.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
