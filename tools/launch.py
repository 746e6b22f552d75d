"""`python -m tools.launch [key=value ...]`: start every process of a run, here or on a Ray cluster.

    launcher ──starts──> buffer, actors (one or more pools), learner
             <──output, exit status── each          <──LiveState── buffer

    waits for      live states, output and exits of processes, at most `supervision.POLL_S`
    unblocked by   the buffer's end (the run is over), a process that failed for good, a signal

Owns the order of a run: checks before the start, one view while it runs, and the report at its end.
`run(config)` is the same for a script or a notebook, see docs/from-python.md.
`tools.launching.supervision` owns the processes. Does not import torch, vLLM or Ray itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from buffer.wire.client import MonitorLink
from buffer.wire.transport import TransportError, next_port
from configs import cli
from configs.command import run_command
from configs.errors import ExitStatus
from configs.extras import import_extra
from configs.schema import Config
from tools.launching.data_check import check_data
from tools.launching.processes import Command, LocalHost
from tools.launching.progress import make_view
from tools.launching.run_plan import (
    commands_of,
    has_ended,
    prepare,
    share_gpus,
    visible_gpus,
    with_own_keys,
)
from tools.launching.scripts import SCRIPTS, script
from tools.launching.summary import print_summary, resume_hint
from tools.launching.supervision import Host, Run
from tools.reporting.run_directory import RunDirectory


class RunFailed(RuntimeError):
    """A run that could not continue. The message names the culprit, and says how to resume."""


class RunStopped(RunFailed):
    """A run that was asked to stop, by Ctrl-C or by a signal. The message says how to resume."""


def run(config: Config) -> RunDirectory:
    """Train as `config` says, and return what the run recorded. Shows progress as the command does.

    Call it in the main thread, of a script or of a notebook. Ctrl-C, or a notebook's stop button,
    ends all processes and raises `RunStopped`. Raises `ValueError` for a configuration that is
    refused, `TransportError` for an address in use, and `RunFailed` for a run that failed.
    """
    if config.launch.launcher in SCRIPTS:
        raise ValueError(
            f"launch.launcher={config.launch.launcher}: prints and starts nothing; use local or "
            "ray, or the command tools.launch"
        )
    run_dir = Path(config.run.dir) / config.run.name
    if has_ended(config):
        print_summary(run_dir, "had ended already", {})
        return RunDirectory.read(run_dir)
    config = prepare(config)
    commands = commands_of(config)
    if config.launch.launcher == "local":
        check_data(config)
    config = with_own_keys(config)
    host: AbstractContextManager[Host]
    if config.launch.launcher == "ray":
        import_extra("ray", "launch.launcher=ray", "ray")
        from tools.launching.ray_cluster import RayCluster  # here, because it takes seconds

        host = RayCluster(config, commands)
    else:
        host = LocalHost(cli.to_yaml(config), config.run.stop_s)
        commands = share_gpus(commands, visible_gpus())
    return conduct(config, host, commands)


def conduct(
    config: Config, host: AbstractContextManager[Host], commands: Sequence[Command]
) -> RunDirectory:
    """Run `commands` from start to report. Raises `RunFailed` and `RunStopped`."""
    run_dir = Path(config.run.dir) / config.run.name
    view = make_view(config.launch.progress)
    names = ", ".join(command.name for command in commands)
    with MonitorLink(next_port(config.buffer.address), config.buffer.keys) as link:
        supervised = Run(config, view, link)
        try:
            view.say(f"starting {names}; the run's directory will be {run_dir}")
            with supervised.request, host as entered:
                try:
                    supervised.start(entered, commands)
                    supervised.watch()
                finally:
                    supervised.stop()
        finally:
            view.close()
    if supervised.request.requested and not supervised.over:
        raise RunStopped(f"all processes have ended. {resume_hint(run_dir)}")
    if supervised.error:
        raise RunFailed(
            f"{supervised.error}\nThe run stopped; all processes have ended. {resume_hint(run_dir)}"
        )
    print_summary(run_dir, "ended well", supervised.peaks())
    return RunDirectory.read(run_dir)


def exit_status(train: Callable[[], object]) -> int:
    """Call `train`, print how it ended unless it ended well, and return the exit status."""
    try:
        train()
    except RunStopped as stopped:
        print(f"interrupted: {stopped}")
        return ExitStatus.INTERRUPTED
    except RunFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return ExitStatus.FAILED
    return ExitStatus.OK


def start(config: Config) -> int:
    """Run, or print how the processes are started elsewhere. Returns the exit status."""
    if config.launch.launcher in SCRIPTS:
        print(script(config), end="")
        return ExitStatus.OK
    return exit_status(lambda: run(config))


def main() -> NoReturn:
    run_command(
        "Start a whole run (buffer, actors and learner), show its progress, end it cleanly and "
        "write its report. --print-commands starts nothing: it is short for "
        "launch.launcher=commands.",
        start,
        schema=Config,
        errors=(TransportError,),
        argv=[
            "launch.launcher=commands" if word == "--print-commands" else word
            for word in sys.argv[1:]
        ],
    )


if __name__ == "__main__":
    main()
