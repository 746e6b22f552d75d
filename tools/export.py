"""`python -m tools.export runs/<name> FOLDER`: a checkpoint as an ordinary Hugging Face model folder, tokenizer included.

Owns the folder that it writes, and nothing of the run. Driven by hand; `tools.evaluate` shares its reading of checkpoints.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, NoReturn

from buffer.records.files import atomic_folder
from configs import cli
from configs.command import run_command
from configs.schema import Config

GENERATION_FILE = "generation_config.json"


def steps_saved(run: Path) -> list[int]:
    """Steps whose checkpoints the run has kept, ascending."""
    return sorted(
        int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")
    )


def run_config(run: Path) -> Config:
    """The configuration of a run's directory. ValueError where it is none."""
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} holds no config.yaml: give the directory of a run, such as runs/demo"
        )
    return cli.load(["--config", str(run / "config.yaml")])


def load_checkpoint(config: Config, run: Path, step: int) -> Any:
    """The model as it was after `step` steps, in float32 on the CPU. ValueError where it cannot be had."""
    from learner import checkpoint, fsdp  # here: --help need not wait for torch

    model = fsdp.load_model(config.model)
    checkpoint.load_weights(run / "checkpoints" / f"step_{step:06d}", model)
    return model


def export(run: Path, target: Path, step: int | None = None) -> int:
    """Writes the checkpoint of `step` (None: the newest) to `target`, in the run's `model.dtype`. Returns its step.

    Raises `ValueError` where there is no such checkpoint, it does not fit the model, or `target` exists.
    """
    config, saved = run_config(run), steps_saved(run)
    step = saved[-1] if saved and step is None else step
    if step not in saved:
        raise ValueError(
            f"{run}: no checkpoint of step {step}; it has {', '.join(map(str, saved)) or 'none'}"
        )
    if target.exists():
        raise ValueError(
            f"{target} exists already: name a folder that does not, or an engine would load two models from one"
        )
    from learner.publish import DTYPES  # here: --help need not wait for it

    model = load_checkpoint(config, run, step)
    with atomic_folder(target) as folder:
        write_model(model.to(DTYPES[config.model.dtype]), config.model.path, folder)
    return step


def write_model(model: Any, source: str, folder: Path) -> None:
    """Write the model, with the tokenizer and exactly the generation settings of `source`.

    transformers reads settings that contradict each other (a temperature beside do_sample=false,
    as some published models have), and refuses to write them.
    """
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import cached_file

    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    settings = cached_file(source, GENERATION_FILE, _raise_exceptions_for_missing_entries=False)
    if settings is None:  # then config.json says it all
        (folder / GENERATION_FILE).unlink()
    else:
        shutil.copyfile(settings, folder / GENERATION_FILE)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, such as runs/demo")
    parser.add_argument("folder", type=Path, help="where to write the model; it must not exist")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")


def run(given: argparse.Namespace) -> None:
    step = export(given.run, given.folder, given.step)
    print(f"{given.folder}: the model after {step} steps of {given.run}")


def main() -> NoReturn:
    run_command(
        "Write a checkpoint of a run as an ordinary Hugging Face model folder.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
