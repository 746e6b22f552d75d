"""`python -m learner key=value ...`: the learner of one node.

Owns the rank processes. A single rank runs in this process. Several are started as torchrun would
start them, watched, and ended together. On several nodes, this command runs on each, with the
variables GROUP_RANK, GROUP_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of torchrun; or torchrun itself
starts the ranks. Never trains.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from buffer.processes import by_hand
from buffer.processes.child import (
    ERROR,
    Child,
    forward,
    given_reason,
    may_succeed_again,
    show,
    stop,
)
from buffer.processes.private_folder import private_folder
from buffer.processes.stop_request import AGAIN, StopRequest
from buffer.records.files import make_run_folder
from buffer.wire.keys import check_key_files
from buffer.wire.transport import TransportError
from configs import cli
from configs.command import run_command
from configs.errors import ExitStatus
from configs.model_path import check_model
from configs.schema import Config
from darts.events import ProtocolError
from learner import AskedToStop, BufferLost, RunStopped
from learner.installation import check_installation

RANK = ("-m", "learner")  # of `sys.executable`
WATCH_S = 0.1
LEAVE_S = 10.0  # time for the other ranks to end once one has failed


class RankFailed(Exception):
    """A rank failed for a reason that a restart would not remove."""


def run(config: Config) -> int:
    """Run one rank, or all ranks of this node."""
    check_model(config.model.path)
    check_installation(config)
    check_key_files(config.buffer.keys, "learner")
    make_run_folder(Path(config.run.dir) / config.run.name)
    variables = os.environ
    if "RANK" in variables:
        rank, num_ranks = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        return _train(config, rank, num_ranks, int(variables.get("LOCAL_RANK", "0")))
    if config.learner.num_ranks * num_nodes() == 1:
        return _train(config, 0, 1, 0)
    with private_folder(config.run.stop_s):
        return supervise(config)


def num_nodes() -> int:
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def _train(config: Config, rank: int, num_ranks: int, local_rank: int) -> int:
    limit_s = config.run.stop_s

    def answer() -> None:
        if num_ranks == 1:  # otherwise the supervisor says it
            _say_stopping(limit_s)

    with StopRequest(answer, limit_s) as request:
        from learner.train import run_rank  # imported here, since it takes seconds

        try:
            return run_rank(config, rank, num_ranks, local_rank, lambda: request.requested)
        except RunStopped as stopped:
            if not (request.requested or isinstance(stopped, AskedToStop)):
                raise
            return ExitStatus.INTERRUPTED
        except BufferLost as error:
            print(f"{ERROR}{error}", file=sys.stderr)
            return ExitStatus.TRY_AGAIN


def supervise(config: Config) -> int:
    """Start `learner.num_ranks` processes and wait for all. The first one to fail ends the others.

    Returns an `ExitStatus`. If that rank was killed, it is named on stderr and the status is
    `TRY_AGAIN`. Raises `RankFailed` if it failed by itself.
    """
    limit_s = config.run.stop_s
    with (
        tempfile.TemporaryDirectory() as folder,
        StopRequest(lambda: _say_stopping(limit_s)) as request,
    ):
        file = Path(folder) / "config.yaml"
        file.write_text(cli.to_yaml(config))
        command = [sys.executable, *RANK, "--config", str(file)]
        ranks: list[Child] = []
        try:
            for rank in range(config.learner.num_ranks):
                environment = _rank_environment(rank, config.learner.num_ranks, folder)
                ranks.append(Child(f"rank {rank}", command, environment, signal.SIGKILL))
            culprit = _watch(ranks, request)
            if culprit is not None:
                _wait_for_the_others(ranks, culprit)
        finally:
            stop(ranks, limit_s if request.requested else 0.0, lambda: request.repeated)
    if request.requested:
        return ExitStatus.INTERRUPTED
    return 0 if culprit is None else _report(culprit)


def _rank_environment(rank: int, num_ranks: int, folder: str) -> dict[str, str]:
    """torchrun's variables of a rank of this node, which has `num_ranks`.

    On one node, a file is the rendezvous, because torch's own store listens on every interface.
    Several nodes meet at that store, which the first rank serves at MASTER_ADDR and MASTER_PORT.
    """
    before = int(os.environ.get("GROUP_RANK", "0")) * num_ranks
    variables = {
        "RANK": str(before + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_nodes() * num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    if num_nodes() > 1:
        return variables
    return variables | {
        "LEARNER_RENDEZVOUS": f"file://{folder}/rendezvous",
        # A host name that does not resolve must not matter.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def _watch(ranks: list[Child], request: StopRequest) -> Child | None:
    """The first rank that fails, or None once all have ended well or a signal has come."""
    while not request.requested:
        for rank in ranks:
            forward(rank)
        statuses = [rank.status() for rank in ranks]
        for rank, status in zip(ranks, statuses, strict=True):
            if status:
                return rank
        if all(status == 0 for status in statuses):
            return None
        time.sleep(WATCH_S)
    return None


def _wait_for_the_others(ranks: list[Child], culprit: Child) -> None:
    """Give the other ranks time to end by themselves, unless the culprit was killed.

    When a run is stopped, all ranks end, one after the other. After a kill, the others hang or fail
    as if the fault were theirs. What they say then is dropped, since the culprit says why.
    """
    deadline = time.monotonic() + (0.0 if may_succeed_again(culprit.status()) else LEAVE_S)
    others = [rank for rank in ranks if rank is not culprit]
    said: dict[Child, list[str]] = {rank: [] for rank in others}
    is_over = False
    while not is_over:
        time.sleep(WATCH_S)
        is_over = time.monotonic() >= deadline or all(r.status() is not None for r in others)
        for rank in others:  # whether they are shown or not: a full pipe would hold them up
            said[rank] += rank.lines()
    for rank in others:
        if rank.status() in (None, 0, ExitStatus.INTERRUPTED):
            show(said[rank])


def _report(culprit: Child) -> int:
    reason = given_reason(culprit.last_lines)
    error = f"learner {culprit.name} ({culprit.where}) {culprit.how_it_ended()}"
    error += f": {reason}" if reason else "; run.resume=true continues from the last checkpoint"
    status = culprit.status()
    if not (status == ExitStatus.INTERRUPTED or may_succeed_again(status)):
        raise RankFailed(error)
    print(f"{ERROR}{error}", file=sys.stderr)
    return ExitStatus.INTERRUPTED if status == ExitStatus.INTERRUPTED else ExitStatus.TRY_AGAIN


def _say_stopping(limit_s: float) -> None:
    line = f"stopping: the learner finishes and saves its step, up to {limit_s:g} s; {AGAIN}"
    print(line, file=sys.stderr, flush=True)


def main() -> NoReturn:
    by_hand.note_start()
    run_command(
        "The learner: trains on the groups that the buffer ships and publishes the weights.",
        run,
        schema=Config,
        errors=(TransportError, ProtocolError, RunStopped, RankFailed, ArithmeticError),
    )


if __name__ == "__main__":
    main()
