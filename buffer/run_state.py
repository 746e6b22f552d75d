"""What the parts of the buffer share: one run's core, its records on disk, the trajectories it holds, the peers it talks to.

Owns opening and closing of all of them. `apply` is the only way to the core: logged before it is handled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from buffer.data.outstanding_prompts import PromptsOut
from buffer.data.sources import make_sources
from buffer.peers import Peer, Peers
from buffer.records import run_files as recorder
from buffer.records.event_log import EventLog
from buffer.records.metrics import Metrics
from buffer.records.trajectories import Journal, TrajectoryStore
from buffer.wire import messages as msg
from buffer.wire.transport import Publisher, Router, next_port
from configs.cli import to_yaml
from configs.schema import Config
from darts import events as ev
from darts.config import core_config
from darts.core import Core
from darts.lengths import LengthStats, spread


class RunFailed(Exception):
    """The run cannot go on; one line says why."""


class Run:
    """Opened from a configuration, fresh or resumed. Raises ValueError or TransportError, in one line, if it cannot be."""

    def __init__(self, config: Config, enact: Callable[[ev.Decision], None]) -> None:
        self.config = config
        self._enact = enact
        self.folder = Path(config.run.dir) / config.run.name
        sources = make_sources(config)
        self.router = Router(config.buffer.address, msg.Inbound, config.buffer.keys)
        self.publisher = Publisher(next_port(self.router.address), config.buffer.keys)
        self.last_row: dict[str, Any] = {}
        self.step, self.base_version = self._open_folder()
        self.journal = Journal(self.folder / "journal.sqlite")
        self.run_id = self.journal.run_id()
        self.prompts = PromptsOut(
            sources.train, self.journal.cursor(self.step) if self.step else None
        )
        self.eval_payloads = {p.prompt_id: p for p in sources.eval_prompts}
        self.store = TrajectoryStore(config.buffer.max_bytes)
        self.recorder = recorder.Recorder(self.folder)
        self.metrics = Metrics()
        self.metrics.restore(self.last_row)
        self.core = Core(core_config(config))
        self.log = EventLog(self.folder / "events.msgpack", self.core.config)
        self.peers = Peers()
        self.policy: msg.SnapshotRef | None = None
        self.phase = "starting"
        self.texts: dict[
            int, tuple[str, bool]
        ] = {}  # finished rollout -> its text, and whether it was truncated
        self.errors: dict[int, str] = {}  # group -> what went wrong with it last
        self.learned: dict[str, LengthStats] = {}  # length statistics to be journalled
        self._started_s = time.monotonic() - self.last_row.get("time_s", 0.0)
        pool = self.journal.lengths([""]).get("")
        if pool is not None and self.step:
            self.apply(ev.PoolRestored(self.now(), pool))

    def _open_folder(self) -> tuple[int, int]:
        """Makes or resumes the run's directory: steps done, and the policy version that the learner resumes from."""
        if not (self.config.run.resume and (self.folder / "config.yaml").exists()):
            recorder.start(self.folder, to_yaml(self.config))
            return 0, -1
        step, version = recorder.checkpoint_step(self.folder)
        self.last_row = recorder.resume(self.folder, step, self.config.batch.groups)
        return step, version

    def now(self) -> float:
        """Seconds that this run has lasted, those before a resume included."""
        return time.monotonic() - self._started_s

    def apply(self, event: ev.Event) -> None:
        """Logs the event, lets the core decide, logs and enacts its decisions. Raises ProtocolError, nothing changed."""
        self.log.write(event)
        for decision in self.core.handle(event):
            self.log.write(decision)
            self._enact(decision)

    def require_own(self, run_id: str) -> None:
        """Refuses a peer left over from another run: it may have another model, and other steps behind it."""
        if run_id not in ("", self.run_id):
            raise ev.ProtocolError(
                f"it belongs to another run than {self.folder}: it outlived that run's buffer, and may go now"
            )

    def send(self, peer: Peer, message: msg.Message) -> None:
        """To a peer that is gone nothing is sent: its silence ends it soon."""
        self.router.send(peer.identity, message)

    def draw_prompts(self) -> None:
        """Keeps a window of prompts at hand for the core, and tells it when the trajectory store is full."""
        if self.learned:
            self.journal.remember_lengths(self.learned.items())
            self.learned.clear()
        while (
            self.core.num_pending < self.config.batch.groups
            and not self.core.run_ended
            and self.core.policy_version >= 0
        ):
            payloads = self.prompts.draw(self.config.batch.groups)
            known = self.journal.lengths(p.prompt_id for p in payloads)
            self.apply(
                ev.PromptsDrawn(
                    self.now(),
                    tuple(ev.Prompt(p.prompt_id, known.get(p.prompt_id)) for p in payloads),
                )
            )
        if self.store.full != self.core.admission_paused:
            self.apply(ev.AdmissionPaused(self.now(), self.store.full))

    def record(self, record: ev.GroupRecord) -> None:
        """A training group has ended for good: into the ledger and the sums."""
        self.recorder.group(record)
        self.metrics.closed(record)
        known = self.learned.get(record.prompt_id) or self.journal.lengths([record.prompt_id]).get(
            record.prompt_id
        )
        self.metrics.latest.closed(record, spread(known) if known else 0.0)

    def forget(self, record: ev.GroupRecord) -> None:
        """Frees what is held of a closed group's rollouts."""
        for rollout in record.rollouts:
            self.store.discard(rollout.rollout_id)
            self.texts.pop(rollout.rollout_id, None)

    def check_failures(self, record: ev.GroupRecord) -> None:
        """A group in which a rollout failed for good stops the run, unless told to skip: a failure is never a zero reward."""
        error = self.errors.pop(record.group_id, None)
        gave_up = record.end == "failed" or (
            record.end == "evaluated" and any(r.reward is None for r in record.rollouts)
        )
        if error and gave_up and self.config.data.on_error == "stop":
            attempts = self.config.darts.max_attempts
            raise RunFailed(
                f"{error} (prompt {record.prompt_id} failed {attempts} times in a row; data.on_error=skip goes on without it)"
            )

    def rewind(self, step: int) -> None:
        """A learner came back with an older checkpoint: what was recorded after it is withdrawn."""
        if step > self.step:
            raise RunFailed(
                f"the learner is at step {step}, the buffer at {self.step}: start both with the same run.name and run.resume"
            )
        self.recorder.close()
        self.last_row = recorder.resume(self.folder, step, self.config.batch.groups)
        self.recorder = recorder.Recorder(self.folder)
        self.say(
            f"the learner resumes at step {step}; records of steps {step}..{self.step - 1} are withdrawn"
        )
        self.step = step

    def say(self, line: str) -> None:
        print(f"buffer: {line}", flush=True)

    def warn(self, line: str) -> None:
        print(f"buffer: {line}", file=sys.stderr, flush=True)

    def close(self, error: str) -> None:
        """Tells every peer that the run is over, and how it ended."""
        for peer in self.peers.by_identity.values():
            self.send(peer, msg.Shutdown(error=error))
        self.log.close()
        self.recorder.close()
        self.journal.close()
        self.router.close()
        self.publisher.close()
