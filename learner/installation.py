"""Whether the installed PyTorch can train on `learner.device`.

Checked without importing it, which takes seconds.
"""

from __future__ import annotations

from importlib import metadata

from configs.schema import Config


def check_installation(config: Config) -> None:
    """Raises `ValueError` if the learner is to train on GPUs with a PyTorch for CPUs.

    Such a build says so in its version, as in 2.13.0+cpu.
    """
    if config.learner.device == "cuda" and (version := metadata.version("torch")).endswith("+cpu"):
        raise ValueError(
            f"learner.device=cuda: the installed PyTorch, {version}, runs on cpu only; install the "
            "extra gpu, or use learner.device=cpu"
        )
