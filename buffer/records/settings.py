"""The settings of a run, `config.yaml` in its folder, of which a resume may change some, and the
digests of its data, `sources.json`, which may not change.

The keys that may not change are marked in `configs.schema`. With another model, other data or
another group size, the groups in flight and the records so far would belong to a different run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec

from buffer.records.files import atomic_write
from configs import cli
from configs.errors import one_line
from configs.schema import Config

NAME, DATA = "config.yaml", "sources.json"
# Keys that locate the run or belong to one command, and are no settings of the run.
OF_THE_COMMAND = {"run.dir", "run.name", "run.resume", "learner.take_over"}


def write(folder: Path, config: Config, digests: Mapping[str, str]) -> None:
    """Record the settings of a fresh run, and the digests of its data by the key of each source."""
    atomic_write(folder / DATA, json.dumps(digests) + "\n")
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


def check_data(folder: Path, config: Config, digests: Mapping[str, str]) -> None:
    """Raises `ValueError` if the data of a run is no longer that with which it began."""
    try:
        before = msgspec.json.decode((folder / DATA).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(
            f"{folder / DATA}: cannot be read ({one_line(error)}); it tells whether the data of "
            "the run has changed, so restore it from a copy, or start a run under another run.name"
        ) from error
    for key, digest in digests.items():
        if before.get(key, digest) != digest:
            source = config.data.train if key == "data.train" else config.data.eval
            raise ValueError(
                f"{key}={source}: its rows have changed since {folder} began, and a run keeps its "
                "data: prompts would be scored as other ones, or evaluated although they were "
                "trained on; restore them, or start a run under another run.name"
            )


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
