"""`python -m tools.bench learner`: peak memory of the loss, by length and with either head.

Owns the measurement: the head's forward and backward pass over random hidden states, at the
vocabulary of Qwen2.5, each in a process of its own. Prints the peak above the inputs, and nothing
passes or fails.

Shapes: S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import multiprocessing as mp
import resource
import time

import torch

from learner.packs.logprobs import Head, token_logprobs

VOCABULARY, HIDDEN = 151_936, 128
LENGTHS = (2048, 4096, 16384)
WHOLE_UP_TO = 4096  # whole logits of more tokens need more memory than a small machine has
GIB = 2**30


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"\npeak memory of log-probabilities, entropies and their gradients on {device}, float32, "
        f"V = {VOCABULARY:,}, H = {HIDDEN}, above weight and hidden states; the weight's gradient "
        f"is {VOCABULARY * HIDDEN * 4 / GIB:.2f} GiB of each",
        flush=True,
    )
    for num_tokens in LENGTHS:
        for fused in (True, False) if num_tokens <= WHOLE_UP_TO else (True,):
            peak_bytes, seconds = _in_own_process(num_tokens, fused)
            print(
                f"{num_tokens:>6,} tokens, {'in chunks' if fused else 'whole    '}: "
                f"{peak_bytes / GIB:5.2f} GiB, {seconds:5.1f} s",
                flush=True,
            )


def _in_own_process(num_tokens: int, fused: bool) -> tuple[int, float]:
    """A process's resident peak never falls, so that each measurement needs a new one."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_of_loss, (num_tokens, fused))


def peak_of_loss(num_tokens: int, fused: bool) -> tuple[int, float]:
    """Bytes above the inputs at the peak, and seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight_VH = torch.randn(VOCABULARY, HIDDEN, device=device, requires_grad=True)
    hidden_SH = torch.randn(num_tokens, HIDDEN, device=device, requires_grad=True)
    targets_S = torch.randint(VOCABULARY, (num_tokens,), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = _peak_bytes(device), time.perf_counter()
    if fused:
        logprobs_S, _ = token_logprobs(hidden_SH, targets_S, 1.0, Head(weight_VH))
    else:
        logits_SV = torch.nn.functional.linear(hidden_SH, weight_VH)
        logprobs_S, _ = token_logprobs(logits_SV, targets_S, 1.0)
    logprobs_S.sum().backward()
    after = _peak_bytes(device)
    return after - before, time.perf_counter() - started


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
