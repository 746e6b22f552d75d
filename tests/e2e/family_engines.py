"""`python -m tests.e2e.family_engines FOLDER FAMILY ...`: `tools.check` on tiny models, one engine
after another in one process.

The engine starts from an export of the model that the learner loads, so both must be equal. Prints
one JSON object per family. vLLM's process is forked instead of spawned, so that it need not import
torch and vLLM again, which takes a third of the time. Forking is safe as long as no thread has
computed anything, so this is a separate process with one thread.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import actors.inference.engine  # noqa: F401  before any other part of vLLM
from buffer.processes.private_folder import private_folder
from buffer.wire.probe import largest, probe_sequences
from buffer.wire.snapshots import fetch
from configs.schema import Config, LoraConfig
from learner.fsdp import load_model
from tests.families import VOCABULARY, save_family
from tools.checking.gate import LearnerSide, Refused, ask_engine, ask_learner, local_publisher
from tools.export import write_model

PR_SET_PDEATHSIG = 1
UNWRITABLE = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}


@dataclass
class Outcome:
    """The result for one family. `differences`: by check, the largest of any token, in nats."""

    family: str
    differences: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    seconds: float = 0.0


def judge(family: str, folder: Path) -> Outcome:
    outcome, started = Outcome(family), time.monotonic()
    config = Config()
    model_type, _, variant = family.partition(":")
    changes = {"tie_word_embeddings": True} if variant == "tied" else {}
    if variant == "adapters":
        targets = ["q_proj", "o_proj"] if "moe" in model_type else ["all-linear"]
        config.model.lora = LoraConfig(rank=3, alpha=6, targets=targets)
    config.model.path = str(save_family(folder / family, model_type, **changes))
    config.model.max_context, config.actors.slots, config.actors.kv_cache_gib = 256, 4, 0.1
    config.learner.device = config.actors.device = "cpu"
    exported = folder / f"{family} exported"
    (folder / family / "generation_config.json").write_text(json.dumps(UNWRITABLE))
    whole = load_model(replace(config.model, lora=LoraConfig()))
    write_model(whole, config.model.path, exported)
    of_engine = replace(config, model=replace(config.model, path=str(exported)))
    try:
        with local_publisher(config) as publisher:
            learner = ask_learner(config, publisher)
            if variant != "adapters":
                difference = plain_difference(folder / family, learner)
                outcome.differences["learner equals transformers"] = difference
            for verdict in [learner.packing, *ask_engine(of_engine, learner)]:
                outcome.differences[verdict.check] = verdict.difference
    except Refused as error:
        outcome.refused = str(error)
    outcome.seconds = time.monotonic() - started
    return outcome


def plain_difference(folder: Path, learner: LearnerSide) -> float:
    """The largest difference between the learner's probe of version 1 and a probe that transformers
    computes from nothing but the published file.
    """
    (folder / "model.safetensors").rename(folder / "version 0")
    try:
        (folder / "model.safetensors").write_bytes(fetch(learner.snapshots[1]))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        (folder / "version 0").rename(folder / "model.safetensors")
    parts = []
    for sequence in probe_sequences(VOCABULARY):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logprobs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        parts.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])
    return largest(torch.cat(parts).numpy().tobytes(), learner.probes[1])


def main(folder: str, *families: str) -> None:
    torch.set_num_threads(1)
    # A forked engine does not import `actors.inference.extension`, which would end it with us.
    os.register_at_fork(
        after_in_child=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    )
    import vllm.v1.engine.utils as engine_utils

    fork: Any = multiprocessing.get_context("fork")
    engine_utils.get_mp_context = lambda: fork
    with private_folder():
        for family in families:
            print(json.dumps(vars(judge(family, Path(folder)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
