"""Objectives by name: one choice from each column of a table.

Owns what `loss.kind` stands for. `buffer.advantages` reads the columns of the baseline, and
`learner.packs.loss` the others. Never computes anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import LossConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The values of the keys `loss.*` with the same names, none of them auto or 0."""

    ratio: str = "token"
    correction: str = "clip"
    aggregation: str = "token_mean"
    baseline: str = "group"
    scale: str = "std"
    clip_low: float = 0.2
    clip_high: float = 0.2


# Every ratio is that of the learner to the policy that sampled the token, which may be older than
# the policy at the start of the step. Its weight is bounded by `loss.tis_cap` for the corrections
# clip, truncated and decoupled, by `loss.clip_high` for cispo, and by `loss.mask_high` for mask.
PRESETS = {
    # DAPO (arXiv 2503.14476). Its dynamic sampling is darts.uniform=drop.
    "dapo": Objective(clip_high=0.28),
    # DeepSeekMath (arXiv 2402.03300). Its KL penalty is loss.kl=0.04.
    "grpo": Objective(aggregation="sequence_mean"),
    # Dr. GRPO (arXiv 2503.20783).
    "dr_grpo": Objective(aggregation="constant", scale="none"),
    # RLOO (arXiv 2402.14740). Differs: the sum over a response is divided by sampling.max_tokens.
    "rloo": Objective(
        correction="truncated", aggregation="constant", baseline="leave_one_out", scale="none"
    ),
    # GSPO (arXiv 2507.18071), section 5.1.
    "gspo": Objective(ratio="sequence", aggregation="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    # CISPO, in MiniMax-M1 (arXiv 2506.13585), with the bound of ScaleRL (arXiv 2510.13786).
    "cispo": Objective(correction="cispo", clip_high=4.0),
    # Decoupled PPO (arXiv 2110.00641), as in AReaL (arXiv 2505.24298).
    "decoupled_ppo": Objective(correction="decoupled"),
}


def objective(loss: LossConfig) -> Objective:
    """The objective of `loss.kind`, except for the keys that say something else."""
    preset = PRESETS[loss.kind]
    return Objective(
        ratio=_chosen(loss.ratio, preset.ratio),
        correction=_chosen(loss.correction, preset.correction),
        aggregation=_chosen(loss.aggregation, preset.aggregation),
        baseline=_chosen(loss.baseline, preset.baseline),
        scale=_chosen(loss.scale, preset.scale),
        clip_low=loss.clip_low or preset.clip_low,
        clip_high=loss.clip_high or preset.clip_high,
    )


def _chosen(value: str, preset: str) -> str:
    return preset if value == "auto" else value
