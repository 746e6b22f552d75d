"""`python -m learner key=value ...`: the learner of one node.

Owns the rank processes: one rank runs right here; several are started as torchrun would start them (and torchrun may, over several nodes),
watched, and ended together. Never trains.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from buffer.wire.transport import TransportError
from configs import cli
from configs.command import run_command
from configs.schema import Config
from darts.events import ProtocolError
from learner import RunStopped

WATCH_S = 0.1
STOP_TIMEOUT_S = 10.0
PARENT_VARIABLE = "LEARNER_PARENT_PID"
PR_SET_PDEATHSIG = 1


class RankDied(Exception):
    """A rank process ended before its time."""


def run(config: Config) -> int:
    """One rank, or all of this node's."""
    if "RANK" in os.environ:
        # SIGTERM keeps its default here: a collective never returns to Python to see a signal, and nothing is ever half-written.
        _die_with_parent()
        return _train(
            config,
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", "0")),
        )
    signal.signal(signal.SIGTERM, _terminated)
    if config.learner.num_ranks == 1:
        return _train(config, 0, 1, 0)
    return supervise(config)


def _train(config: Config, rank: int, num_ranks: int, local_rank: int) -> int:
    from learner.train import run_rank  # here: --help need not wait for torch

    return run_rank(config, rank, num_ranks, local_rank)


def supervise(config: Config) -> int:
    """Start `learner.num_ranks` processes and wait for all; the first to fail ends the others. Raises `RankDied`, which names it."""
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="learner-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(cli.to_yaml(config))
        command = [sys.executable, "-m", "learner", "--config", str(file)]
        try:
            for rank in range(config.learner.num_ranks):
                environment = os.environ | _rank_environment(
                    rank, config.learner.num_ranks, Path(folder) / "rendezvous"
                )
                processes.append(subprocess.Popen(command, env=environment))
            _watch(processes)
        finally:
            _stop(processes)
    return 0


def _rank_environment(rank: int, num_ranks: int, rendezvous: Path) -> dict[str, str]:
    """What torchrun would set, but for the rendezvous: a file, because torch's own store listens on every interface."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "LEARNER_RENDEZVOUS": f"file://{rendezvous}",
        "GLOO_SOCKET_IFNAME": os.environ.get(
            "GLOO_SOCKET_IFNAME", "lo"
        ),  # a host name that does not resolve cannot hurt
        PARENT_VARIABLE: str(os.getpid()),
    }


def _watch(processes: list[subprocess.Popen[bytes]]) -> None:
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                how = (
                    f"was killed by {signal.Signals(-code).name}"
                    if code < 0
                    else f"failed with status {code}, its error is above"
                )
                raise RankDied(
                    f"learner rank {rank} (pid {processes[rank].pid}) {how}; run.resume=true continues from the last checkpoint"
                )
        if all(code == 0 for code in codes):
            return
        time.sleep(WATCH_S)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: politely, then for certain."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    """A rank whose supervisor is killed must not live on as an orphan that holds a GPU."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before we asked
        sys.exit(1)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)


def main() -> NoReturn:
    run_command(
        "The learner: trains on the groups that the buffer ships and publishes the weights.",
        run,
        schema=Config,
        errors=(TransportError, ProtocolError, RunStopped, RankDied, ArithmeticError),
    )


if __name__ == "__main__":
    main()
