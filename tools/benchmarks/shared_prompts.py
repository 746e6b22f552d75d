"""`python -m tools.bench learner`: training steps with shared and with repeated prompts.

Owns the measurement: the same groups of responses of 128 tokens to prompts of 512, through the
learner's own training step on a small random model. Each run has a process of its own, since a
process's resident peak never falls, and both kinds take turns. On a CPU it counts seconds of the
processor, because other processes distort those of the clock. Prints the median seconds per step,
their ratio and the peak memory; nothing passes or fails.
"""

from __future__ import annotations

import multiprocessing as mp
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from buffer.wire.messages import Minibatch, Shard, Trajectory
from configs.schema import Config
from learner import fsdp
from learner.metrics import peak_bytes
from learner.train import build_state, train_step

PROMPT, RESPONSE, GROUPS, GROUP_SIZE = 512, 128, 2, 8
VOCABULARY = 4096
ROUNDS, STEPS = 2, 2
GIB = 2**30


def main() -> None:
    num_tokens = GROUPS * GROUP_SIZE * (PROMPT + RESPONSE)
    print(
        f"a training step on {GROUPS} groups of {GROUP_SIZE} responses of {RESPONSE} tokens to "
        f"prompts of {PROMPT}: {num_tokens:,} tokens if prompts are repeated; seconds of the "
        f"{'clock' if torch.cuda.is_available() else 'processor'}",
        flush=True,
    )
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for _ in range(ROUNDS):
            for shared in seconds:
                with mp.get_context("spawn").Pool(1) as pool:
                    times, saved, peak = pool.apply(steps, (folder, shared))
                seconds[shared] += times
                print(
                    f"{'shared' if shared else 'repeated':>9} prompts: {median(times):6.2f} s, "
                    f"{num_tokens / median(times):6,.0f} tokens/s, {saved:.1%} of the tokens "
                    f"saved, {peak / GIB:.2f} GiB above the start",
                    flush=True,
                )
    ratio = median(seconds[False]) / median(seconds[True])
    print(f"ratio of the medians of {ROUNDS * STEPS} steps: {ratio:.2f}")


def save_model(folder: str) -> None:
    disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    ).save_pretrained(folder)


def steps(folder: str, shared: bool) -> tuple[list[float], float, float]:
    """Seconds of each step after the first, share of saved tokens, and bytes above the start."""
    config = Config()
    config.model.path, config.batch.share_prompts = folder, shared
    config.learner.max_logprob_diff = float("inf")  # the actors' log-probabilities are made up
    if not torch.cuda.is_available():
        config.model.dtype = "float32"
    times, saved = [], 0.0
    with fsdp.process_group(config) as device:
        state = build_state(config, device)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        before = _resident_bytes(device)
        for step in range(1 + STEPS):
            started = clock()
            saved = train_step(state, make_shard(step))["train/shared_tokens_frac"]
            times.append(clock() - started)
        return times[1:], saved, peak_bytes(device) - before


def _resident_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def make_shard(step: int) -> Shard:
    """The groups of one step, with their prompts in each response."""
    rng = np.random.default_rng(step)
    trajectories = []
    for group_id in range(GROUPS):
        prompt = rng.integers(0, VOCABULARY, PROMPT)
        for number in range(GROUP_SIZE):
            tokens = np.concatenate((prompt, rng.integers(0, VOCABULARY, RESPONSE)))
            trajectories.append(_trajectory(tokens, group_id, 1.0 if number % 2 else -1.0))
    return Shard(
        step=step,
        policy_version=0,
        trajectories=trajectories,
        minibatches=[
            Minibatch(
                num_trajectories=len(trajectories),
                loss_tokens=RESPONSE * len(trajectories),
                loss_responses=len(trajectories),
            )
        ],
    )


def _trajectory(tokens: np.ndarray, group_id: int, advantage: float) -> Trajectory:
    logprobs = np.where(np.arange(len(tokens)) < PROMPT, 0.0, -np.log(VOCABULARY))
    return Trajectory(
        rollout_id=0,
        group_id=group_id,
        tokens=tokens.astype("<i4").tobytes(),
        sampled=bytes(PROMPT) + b"\1" * RESPONSE,
        actor_logprobs=logprobs.astype("<f4").tobytes(),
        versions=[(0, RESPONSE)],
        reward=0.0,
        truncated=False,
        advantage=advantage,
    )
