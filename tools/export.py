"""`python -m tools.export runs/<name> FOLDER`: write a checkpoint as a Hugging Face model folder.

The folder includes the tokenizer. This tool changes nothing in the run. Driven by hand;
`tools.evaluate` uses its functions to read checkpoints.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, NoReturn

from buffer.records.files import atomic_folder
from configs import cli
from configs.command import run_command
from configs.model_path import check_model
from configs.schema import Config

GENERATION_FILE = "generation_config.json"


def steps_saved(run: Path) -> list[int]:
    """The steps whose checkpoints the run has kept, in ascending order."""
    return sorted(
        int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")
    )


def run_config(run: Path) -> Config:
    """The configuration of a run. Raises `ValueError` if `run` is not the directory of a run."""
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} holds no config.yaml: give the directory of a run, such as runs/demo"
        )
    return cli.load(["--config", str(run / "config.yaml")])


def load_checkpoint(config: Config, run: Path, step: int) -> Any:
    """Load the model after `step` steps, in float32 on the CPU. Raises `ValueError` on failure."""
    check_model(config.model.path)
    from learner import adapters, checkpoint, fsdp  # here, so that --help need not wait for torch

    model = fsdp.load_model(config.model, fsdp.held_dtype(config.model))
    checkpoint.load_weights(run / "checkpoints" / f"step_{step:06d}", model)
    model.float()
    adapters.merge(model)
    return model


def best_step(run: Path) -> int:
    """The step of the kept checkpoint with the best evaluation, the latest of equals.

    Raises `ValueError` if none was evaluated.
    """
    from learner.retention import evaluations

    results = evaluations(run / "checkpoints")
    if not results:
        raise ValueError(
            f"{run} has no checkpoint that was evaluated during the run (eval.every, "
            "learner.checkpoint_every); tools.evaluate evaluates those that it has"
        )
    return max(results, key=lambda step: (results[step], step))


def export(run: Path, target: Path, step: int | None = None) -> int:
    """Write the checkpoint of `step` (None: the newest) to `target`, in the run's `model.dtype`.

    Returns its step. Raises `ValueError` if there is no such checkpoint, if it does not fit the
    model, or if `target` exists.
    """
    config, saved = run_config(run), steps_saved(run)
    step = saved[-1] if saved and step is None else step
    if step not in saved:
        raise ValueError(
            f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, saved)) or 'none'}"
        )
    if target.exists():
        raise ValueError(
            f"{target} exists already; name a folder that does not exist, because an engine would "
            "load two models from one folder"
        )
    print(f"reading step {step} of {run}", flush=True)
    from learner.snapshots.publish import DTYPES  # here, so that --help need not wait for it

    model = load_checkpoint(config, run, step)
    with atomic_folder(target) as folder:
        write_model(model.to(DTYPES[config.model.dtype]), config.model.path, folder)
    return step


def write_model(model: Any, source: str, folder: Path) -> None:
    """Write the model, with the tokenizer and exactly the generation settings of `source`.

    The settings are copied as a file. transformers reads settings that contradict each other (a
    temperature with do_sample=false, as in some published models), but refuses to write them.
    """
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import cached_file

    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    settings = cached_file(source, GENERATION_FILE, _raise_exceptions_for_missing_entries=False)
    if settings is None:  # then config.json holds all settings
        (folder / GENERATION_FILE).unlink()
    else:
        shutil.copyfile(settings, folder / GENERATION_FILE)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, such as runs/demo")
    parser.add_argument("folder", type=Path, help="folder to write the model to; it must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    which.add_argument(
        "--best", action="store_true", help="take the checkpoint with the highest eval/reward_mean"
    )


def run(given: argparse.Namespace) -> None:
    step = export(given.run, given.folder, best_step(given.run) if given.best else given.step)
    print(f"{given.folder}: the model after {step} steps of {given.run}")


def main() -> NoReturn:
    run_command(
        "Write a checkpoint of a run as an ordinary Hugging Face model folder.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
