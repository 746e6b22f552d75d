"""Which checkpoints a run keeps: the newest ones, and those with the best evaluations.

Owns `evaluation.json` in a checkpoint's folder, which has the result of the evaluation after its
step, and the removal of checkpoints. A checkpoint whose evaluation is still awaited is kept. Never
writes a checkpoint. Driven by rank 0 of `learner.train` and, beside it, by `learner.saving`: `LOCK`
is held by the one that changes the folder. `tools.export` reads it.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

from buffer.records.files import UNFINISHED, atomic_write
from configs.schema import Config

EVALUATION = "evaluation.json"
LOCK = threading.RLock()


def evaluations(folder: Path) -> dict[int, float]:
    """The mean reward of each checkpoint in `folder` that was evaluated, by its step."""
    return {
        _step(path.parent): json.loads(path.read_text())["eval/reward_mean"]
        for path in folder.glob(f"step_*/{EVALUATION}")
    }


def note_evaluation(folder: Path, config: Config, step: int, reward_mean: float) -> None:
    """Write the result to the checkpoint of `step`, if there is one, and remove surplus ones."""
    checkpoint = folder / f"step_{step:06d}"
    with LOCK:
        if checkpoint.is_dir():
            result = {"eval/step": step, "eval/reward_mean": reward_mean}
            atomic_write(checkpoint / EVALUATION, json.dumps(result) + "\n")
            remove_surplus(folder, config)


def remove_surplus(folder: Path, config: Config) -> None:
    """Remove the checkpoints that the run need not keep, each of them at once or not at all."""
    with LOCK:
        saved = {_step(path): path for path in folder.glob("step_*")}
        keep = kept(sorted(saved), evaluations(folder), config)
        for step in saved.keys() - keep:
            doomed = folder / f".{saved[step].name}.removed{UNFINISHED}"
            saved[step].rename(doomed)
            shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill has left of checkpoints that were being written or removed.

    No save may be under way.
    """
    with LOCK:
        for leftover in folder.glob(f".step_*{UNFINISHED}"):
            shutil.rmtree(leftover)


def kept(steps: list[int], results: dict[int, float], config: Config) -> set[int]:
    """The steps, of the ascending `steps`, whose checkpoints are kept.

    `results` has the mean rewards of those that were evaluated. Of equal ones, the later is better.
    """
    learner, every = config.learner, config.eval.every
    newest = steps[-learner.keep_checkpoints :]
    if not learner.keep_best:
        return set(newest)
    best = sorted(results, key=lambda step: (results[step], step))[-learner.keep_best :]
    evaluated = max(results, default=-1)
    awaited = [step for step in steps if every and step % every == 0 and step > evaluated]
    return {*newest, *best, *awaited}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
