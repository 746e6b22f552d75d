"""`python -m tools.faults.standin_learner RECORD key=value ...`: a learner without a model.

Its messages to the buffer, its snapshot server and the order of a step are those of the learner. A
policy is the name of its version, a step is a short sleep, and a checkpoint is one file. It does
not import torch, so that it starts at once.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np

from buffer.processes.child import ERROR
from buffer.records.files import atomic_write
from buffer.wire.probe import probe_sequences
from buffer.wire.snapshots import SnapshotServer
from buffer.wire.transport import TransportError
from configs.command import run_command
from configs.errors import ExitStatus
from configs.schema import Config
from learner import BufferLost, RunStopped
from learner.background import Background
from learner.session import BufferSession, RunEnded
from tools.faults.record import record
from tools.faults.sampled import VOCAB_SIZE, logprob

STEP_S = 0.2
OFFER_S = 0.1  # until a policy's snapshot is there
HOLD = "hold"  # while this file is there, the last step is not taken
PROBE = np.array(
    [logprob(token) for sequence in probe_sequences(VOCAB_SIZE) for token in sequence[1:]], "<f4"
).tobytes()


class StandIn:
    """The learner's state. `train` takes all remaining steps."""

    def __init__(self, config: Config, path: Path) -> None:
        self._config, self._record = config, path
        self._checkpoint = Path(config.run.dir) / config.run.name / "checkpoint.json"
        self._hold = path.with_name(HOLD)
        self._step, self._version = 0, -1
        self._offers = Background("publication")
        if config.run.resume and self._checkpoint.exists():
            self._step = json.loads(self._checkpoint.read_text())["step"]

    def train(self, session: BufferSession, server: SnapshotServer) -> NoReturn:
        """Take all remaining steps. Like `learner.train`, it always ends with an exception."""
        config = self._config
        session.watch(self._offers.check)
        self._version = session.join(self._step)
        self._publish(session, server)
        while self._step < config.run.steps:
            num_tokens = 0
            for shard, _ in session.portions(self._step):
                record(self._record, shard)
                num_tokens += sum(t.sampled.count(1) for t in shard.trajectories)
            time.sleep(STEP_S)
            self._step += 1
            last = self._step == config.run.steps
            while last and self._hold.exists():
                time.sleep(STEP_S)
            if last or self._step % config.weights.publish_every == 0:
                self._publish(session, server)
            if last:
                self._offers.wait()
                self._save()
            session.trained(self._step - 1, num_tokens, {"train/loss": 0.0})
            if not last and self._step % config.learner.checkpoint_every == 0:
                self._save()
        session.wait_for_the_end()
        raise AssertionError("the end is an exception")

    def _publish(self, session: BufferSession, server: SnapshotServer) -> None:
        self._offers.wait()
        self._version += 1
        version = self._version
        session.count(version)
        self._offers.start(lambda: self._offer(session, server, version))

    def _offer(self, session: BufferSession, server: SnapshotServer, version: int) -> None:
        time.sleep(OFFER_S)
        session.announce(server.publish(version, b"policy %d" % version), 0.0, PROBE)

    def _save(self) -> None:
        atomic_write(self._checkpoint, json.dumps({"step": self._step}))


def main() -> NoReturn:
    path = Path(sys.argv.pop(1))

    def run(config: Config) -> int:
        with (
            BufferSession(config, 0, 1, secrets.token_hex(6), VOCAB_SIZE) as session,
            SnapshotServer(config.weights.address, config.buffer.keys) as server,
        ):
            try:
                StandIn(config, path).train(session, server)
            except RunEnded:
                return ExitStatus.OK
            except BufferLost as error:
                print(f"{ERROR}{error}", file=sys.stderr)
                return ExitStatus.TRY_AGAIN

    run_command(
        "Run a learner without a model that records every shard it receives.",
        run,
        schema=Config,
        errors=(TransportError, RunStopped),
    )


if __name__ == "__main__":
    main()
