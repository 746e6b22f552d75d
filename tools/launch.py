"""`python -m tools.launch [key=value ...]`: start every process of a run, here or on a Ray cluster.

    launcher ──starts──> buffer, actors (one or more pools), learner
             <──output, exit status── each          <──LiveState── buffer

    waits for      live states, output and exits of processes, at most `supervision.POLL_S`
    unblocked by   the buffer's end (the run is over), a process that failed for good, a signal

Owns the order of a run: checks before the start, one view while it runs, and the report at its end.
`tools.launching.supervision` owns the processes. Does not import torch, vLLM or Ray itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
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
from tools.launching.progress import clock, make_view
from tools.launching.run_plan import commands_of, has_ended, prepare, share_gpus, visible_gpus
from tools.launching.summary import print_summary, resume_hint
from tools.launching.supervision import Host, Run


def run_all(config: Config) -> int:
    """Start all processes, watch them, end them and report the outcome. Returns the exit status."""
    if has_ended(config):
        print_summary(Path(config.run.dir) / config.run.name, "had ended already", {})
        return ExitStatus.OK
    config = prepare(config)
    commands = commands_of(config)
    if config.launch.launcher == "local":
        check_data(config)
    host: AbstractContextManager[Host]
    if config.launch.launcher == "ray":
        import_extra("ray", "launch.launcher=ray", "ray")
        from tools.launching.ray_cluster import RayCluster  # here, because it takes seconds

        host = RayCluster(config, commands)
    else:
        host = LocalHost(cli.to_yaml(config), config.run.stop_s)
        commands = share_gpus(commands, visible_gpus())
    return conduct(config, host, commands)


def conduct(config: Config, host: AbstractContextManager[Host], commands: Sequence[Command]) -> int:
    """Run `commands` from start to report. Returns the exit status."""
    started_s = time.monotonic()
    run_dir = Path(config.run.dir) / config.run.name
    view = make_view(config.launch.progress)
    names = ", ".join(command.name for command in commands)
    with MonitorLink(next_port(config.buffer.address), config.buffer.keys) as link:
        run = Run(config, view, link)
        try:
            view.say(f"starting {names}; the run's directory will be {run_dir}")
            with run.request, host as entered:
                try:
                    run.start(entered, commands)
                    run.watch()
                finally:
                    run.stop()
        finally:
            view.close()
    if run.request.requested and not run.over:
        print(f"interrupted: all processes have ended. {resume_hint(run_dir)}")
        return ExitStatus.INTERRUPTED
    if run.error:
        print(
            f"error: {run.error}\n"
            f"The run stopped; all processes have ended. {resume_hint(run_dir)}",
            file=sys.stderr,
        )
        return 1
    took = clock(time.monotonic() - started_s)
    print_summary(run_dir, f"ended well, {took} after this start", run.peaks())
    return 0


def main() -> NoReturn:
    run_command(
        "Start a whole run (buffer, actors and learner), show its progress, end it cleanly and "
        "write its report.",
        run_all,
        schema=Config,
        errors=(TransportError,),
    )


if __name__ == "__main__":
    main()
