"""Everything that the parts of the buffer share about one run.

Owns the core and its event log, the records on disk, the trajectories held, the prompts drawn and the
peers connected; opens and closes all of them. `handle` is the only way to the core, and logs each event
before the core sees it. Decides nothing. Driven by `buffer.service`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from buffer.data.outstanding_prompts import OutstandingPrompts
from buffer.data.sources import make_sources
from buffer.peers import Peer, Peers
from buffer.records import run_files
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
    """The run cannot go on. The message is one line for the user that says why."""


class RunState:
    """A run, fresh or resumed. Raises ValueError or TransportError, in one line, if it cannot open."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.run.dir) / config.run.name
        sources = make_sources(config)
        self._trackers = run_files.load_trackers(config.run.trackers)
        self.router = Router(config.buffer.address, msg.Inbound, config.buffer.keys)
        self.publisher = Publisher(next_port(self.router.address), config.buffer.keys)
        self.last_row: dict[str, Any] = {}
        self.step, self.base_version = self._open_folder()
        self.journal = Journal(self.folder / "journal.sqlite")
        self.run_id = self.journal.run_id()
        cursor = self.journal.cursor(self.step) if self.step else None
        self.prompts = OutstandingPrompts(sources.train, cursor)
        self.eval_payloads = {p.prompt_id: p for p in sources.eval_prompts}
        self.store = TrajectoryStore(config.buffer.max_bytes)
        self.files = run_files.RunFiles(self.folder, self._trackers)
        self.metrics = Metrics()
        self.metrics.restore(self.last_row)
        self.core = Core(core_config(config))
        self.log = EventLog(self.folder / "events.msgpack", self.core.config)
        self.peers = Peers()
        self.policy: msg.SnapshotRef | None = None
        self.phase = "starting"
        self.texts: dict[int, str] = {}  # responses of finished rollouts
        self.errors: dict[int, str] = {}  # group -> its most recent failure
        self.learned: dict[str, LengthStats] = {}  # not yet in the journal
        self._started_s = time.monotonic() - self.last_row.get("time_s", 0.0)

    def _open_folder(self) -> tuple[int, int]:
        """The steps done, and the policy version from which the learner resumes."""
        if not (self.config.run.resume and (self.folder / "config.yaml").exists()):
            run_files.start(self.folder, to_yaml(self.config))
            return 0, -1
        step, version = run_files.checkpoint_step(self.folder)
        self.last_row = run_files.resume(self.folder, step, self.config.batch.groups)
        return step, version

    # The core ---------------------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> Sequence[ev.Decision]:
        """Log `event` and let the core decide. Raises `ProtocolError`, with the core unchanged."""
        self.log.event(event, self.now())
        decisions = self.core.handle(event)
        for decision in decisions:
            self.log.decision(decision)
        return decisions

    def due_events(self) -> list[ev.Event]:
        """Events that this side owes the core: a window of prompts, a pause while the store is full."""
        due: list[ev.Event] = []
        num_pending = self.core.num_pending
        while (
            num_pending < self.config.batch.groups
            and not self.core.run_ended
            and self.core.policy_version >= 0
        ):
            payloads = self.prompts.draw(self.config.batch.groups)
            known = self.journal.lengths(p.prompt_id for p in payloads)
            due.append(
                ev.PromptsDrawn(
                    tuple(ev.Prompt(p.prompt_id, known.get(p.prompt_id)) for p in payloads)
                )
            )
            num_pending += len(payloads)
        if self.store.full != self.core.admission_paused:
            due.append(ev.AdmissionPaused(self.store.full))
        return due

    def first_events(self) -> list[ev.Event]:
        """Events that tell a fresh core about the earlier life of a resumed run."""
        pool = self.journal.lengths([""]).get("") if self.step else None
        return [] if pool is None else [ev.PoolRestored(pool)]

    # Groups that end ----------------------------------------------------------------------------------

    def record(self, record: ev.GroupRecord) -> None:
        """A training group has ended for good: put it into the ledger and the sums."""
        self.files.group(record)
        self.metrics.closed(record)
        known = self.learned.get(record.prompt_id) or self.journal.lengths([record.prompt_id]).get(
            record.prompt_id
        )
        self.metrics.latest.closed(record, spread(known) if known else 0.0)

    def forget(self, record: ev.GroupRecord) -> None:
        """Free all that is held of a closed group's rollouts."""
        for rollout in record.rollouts:
            self.store.discard(rollout.rollout_id)
            self.texts.pop(rollout.rollout_id, None)

    def drop(self, drop: ev.Drop) -> None:
        record = drop.record
        self.forget(record)
        if record.end != "run_ended":
            self.record(record)
        if not drop.requeued:
            self.prompts.done(record.prompt_id)
        self.check_failures(record)

    def check_failures(self, record: ev.GroupRecord) -> None:
        """A rollout that failed for good stops the run unless it may be skipped; it is never scored 0."""
        error = self.errors.pop(record.group_id, None)
        gave_up = record.end == "failed" or (
            record.end == "evaluated" and any(r.reward is None for r in record.rollouts)
        )
        if error and gave_up and self.config.data.on_error == "stop":
            raise RunFailed(
                f"{error} (prompt {record.prompt_id} failed {self.config.darts.max_attempts} "
                "times in a row; data.on_error=skip goes on without it)"
            )

    def save_learned(self) -> None:
        """Write new length statistics to the journal."""
        if self.learned:
            self.journal.remember_lengths(self.learned.items())
            self.learned.clear()

    def rewind(self, step: int) -> None:
        """A learner came back with an older checkpoint: withdraw the records of later steps."""
        if step > self.step:
            raise RunFailed(
                f"the learner is at step {step}, the buffer at {self.step}: "
                "start both with the same run.name and run.resume"
            )
        self.files.close()
        self.last_row = run_files.resume(self.folder, step, self.config.batch.groups)
        self.files = run_files.RunFiles(self.folder, self._trackers)
        self.say(
            f"the learner resumes at step {step}; "
            f"records of steps {step}..{self.step - 1} are withdrawn"
        )
        self.step = step

    # Peers and the terminal ---------------------------------------------------------------------------

    def require_own(self, run_id: str) -> None:
        """Refuse a peer left over from another run, which may have another model and other steps."""
        if run_id not in ("", self.run_id):
            raise ev.ProtocolError(
                f"it belongs to another run than {self.folder}: it outlived the buffer of that run"
            )

    def send(self, peer: Peer, message: msg.Message) -> None:
        """Nothing is sent to a peer that is gone; its silence will end it."""
        self.router.send(peer.identity, message)

    def now(self) -> float:
        """Seconds that this run has lasted, including those before a resume."""
        return time.monotonic() - self._started_s

    def say(self, line: str) -> None:
        print(f"buffer: {line}", flush=True)

    def warn(self, line: str) -> None:
        print(f"buffer: {line}", file=sys.stderr, flush=True)

    def close(self, error: str) -> None:
        """Tell every peer that the run is over, and how it ended."""
        for peer in self.peers.by_identity.values():
            self.send(peer, msg.Shutdown(error=error))
        self.save_learned()
        self.log.close()
        self.files.close()
        self.journal.close()
        self.router.close()
        self.publisher.close()
