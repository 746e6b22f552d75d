"""The lengths of `configs/simulate/qwen14b.yaml` against published figures."""

from __future__ import annotations

from statistics import fmean, pstdev, quantiles

import pytest

from configs import cli
from darts.simulate.lengths import Responses, make_prompts
from darts.simulate.schema import SimulateConfig

# Standard deviations of the lengths within a prompt, in tokens, over a window of 256 prompts.
# Source: DARTS (arXiv 2605.30859), as third parties report it.
PUBLISHED = {"p10": 70, "p50": 149, "mean": 161, "p90": 255, "max": 553}
WINDOW, GROUP_SIZE, SEEDS = 256, 8, range(8)


def window(config: SimulateConfig, seed: int) -> dict[str, float]:
    """The same figures of one simulated window."""
    spreads = []
    for prompt in make_prompts(config.lengths, config.pattern, seed)[:WINDOW]:
        moments = prompt.mean_log, prompt.spread
        drawn = Responses(prompt, moments, config.sampling.max_tokens, seed, visit=0)
        spreads.append(pstdev(drawn.next().length for _ in range(GROUP_SIZE)))
    cuts = quantiles(spreads, n=10)
    return {
        "p10": cuts[0],
        "p50": cuts[4],
        "mean": fmean(spreads),
        "p90": cuts[8],
        "max": max(spreads),
    }


def test_qwen14b_has_the_published_spreads_within_prompts() -> None:
    config = cli.load(["--config", "configs/simulate/qwen14b.yaml"], SimulateConfig)
    windows = [window(config, seed) for seed in SEEDS]
    simulated = {name: fmean(one[name] for one in windows) for name in PUBLISHED}
    assert simulated == pytest.approx(PUBLISHED, rel=0.2)
