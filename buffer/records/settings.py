"""The settings of a run, `config.yaml` in its folder, of which a resume may change some.

The keys that may not change are marked in `configs.schema`. With another model, other data or
another group size, the groups in flight and the records so far would belong to a different run.
"""

from __future__ import annotations

from pathlib import Path

from buffer.records.files import atomic_write
from configs import cli
from configs.schema import Config

NAME = "config.yaml"
# Keys that locate the run or belong to one command, and are no settings of the run.
OF_THE_COMMAND = {"run.dir", "run.name", "run.resume", "learner.take_over"}


def write(folder: Path, config: Config) -> None:
    """Record the settings of a fresh run."""
    atomic_write(folder / NAME, cli.to_yaml(config))


def changes(folder: Path, config: Config) -> list[cli.Change]:
    """The settings that a resume with `config` changes.

    Raises a `ValueError` that names the fixed ones among them, if there are any.
    """
    before = cli.load(["--config", str(folder / NAME)])
    found = [c for c in cli.changes(before, config) if c.path not in OF_THE_COMMAND]
    fixed = [f"{c.path}={c.after} (it has {c.before})" for c in found if c.fixed]
    if fixed:
        raise ValueError(
            f"run.resume=true: {folder} cannot continue with {', '.join(fixed)}; these settings "
            "are fixed for a run, so resume without them, or start a run under another run.name"
        )
    return found


def record(folder: Path, config: Config, changed: list[cli.Change], step: int) -> list[str]:
    """Write the changed settings to `config.yaml`, after one comment per change.

    `step` is the number of steps trained before. Returns the lines of the comments.
    """
    lines = [f"from step {step}: {c.path}={c.after} (before: {c.before})" for c in changed]
    path = folder / NAME
    earlier = [line for line in path.read_text().splitlines() if line.startswith("#")]
    comments = [*earlier, *(f"# {line}" for line in lines)]
    atomic_write(path, "".join(f"{line}\n" for line in comments) + cli.to_yaml(config))
    return lines
