"""The measurements of a training step: sums over tokens, and their names in `metrics.jsonl`.

Never touches a model. Driven by `learner.train`.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from learner.packs.batch import Pack
from learner.packs.loss import Surrogate


@dataclass
class TokenSums:
    """Sums over the tokens of a rank, or of all ranks.

    All but `inputs` and `saved` are over the trained tokens only.
    """

    inputs: float = 0.0  # tokens that went through the model, prompts included
    saved: float = 0.0  # those of prompts that went through it already, with another response
    trained: float = 0.0
    loss: float = 0.0  # weighted, and divided by the update's denominator
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    capped: float = 0.0
    ratio: float = 0.0
    logprob_diff: float = 0.0
    current: float = 0.0  # tokens sampled by the weights that are trained
    current_logprob_diff: float = 0.0
    fresh: float = 0.0  # those in responses that only these weights sampled
    fresh_logprob_diff: float = 0.0

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(*map(sum, zip(self.as_list(), other.as_list(), strict=True)))

    def as_list(self) -> list[float]:
        return list(vars(self).values())

    def add(
        self,
        pack: Pack,
        logprobs_S: torch.Tensor,
        entropy_S: torch.Tensor,
        surrogate: Surrogate,
        kl_S: torch.Tensor,
        denominator: float,
    ) -> None:
        """Add a pack. `logprobs_S` are those of the weights at the start of the step."""
        if not len(pack.targets_S):
            return
        diff_S = (logprobs_S - pack.actor_logprobs_S).abs()
        ratio_S = surrogate.ratio_S
        per_token = [
            surrogate.loss_S.detach() * pack.weights_S / denominator,
            kl_S.detach(),
            entropy_S,
            surrogate.clipped_S,
            surrogate.capped_S,
            ratio_S,
            diff_S,
            pack.current_S,
            diff_S * pack.current_S,
            pack.fresh_S,
            diff_S * pack.fresh_S,
        ]
        # A single transfer from the device.
        sums = torch.stack(per_token).sum(1, dtype=torch.float64).tolist()
        counts = [len(pack.input_ids_T), pack.num_saved, len(pack.targets_S)]
        for name, value in zip(vars(self), [*counts, *sums], strict=True):
            setattr(self, name, getattr(self, name) + value)

    def current_difference(self) -> tuple[float | None, bool]:
        """Mean |learner - actor| at equal weights, and whether a swap interrupted responses.

        Interrupted responses keep a key-value cache of older weights, and count only if there are
        no others. The mean is None if no token was sampled by the current weights.
        """
        if self.fresh:
            return self.fresh_logprob_diff / self.fresh, False
        return (self.current_logprob_diff / self.current if self.current else None), True

    def metrics(self, num_updates: int, seconds: float) -> dict[str, float]:
        """Metrics by name of a step. Those not measured are missing."""
        metrics = {
            "train/loss": self.loss / num_updates,
            "train/tokens": self.trained,
            "train/skipped": float(not self.trained),
            "train/tokens_per_s": self.inputs / seconds,
            "train/shared_tokens_frac": self.saved / max(1.0, self.inputs + self.saved),
            "train/step_s": seconds,
        }
        if self.trained:
            metrics |= {
                "train/entropy": self.entropy / self.trained,
                "train/kl": self.kl / self.trained,
                "train/clip_frac": self.clipped / self.trained,
                "train/tis_clip_frac": self.capped / self.trained,
                "train/ratio_mean": self.ratio / self.trained,
                "train/logprob_diff_all": self.logprob_diff / self.trained,
            }
        difference, _ = self.current_difference()
        if difference is not None:
            metrics["train/logprob_diff"] = difference
        return metrics


def peak_bytes(device: torch.device) -> float:
    """Peak memory of this rank, in bytes: on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
