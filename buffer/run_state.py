"""Everything that the parts of the buffer share about one run.

Owns the core and its event log, the records on disk, the trajectories held, the prompts drawn and
the peers connected; opens and closes all of them. `handle` is the only way to the core, and logs
each event before the core gets it. After a restart, `buffer.recovery` restores all of it from the
logs. Decides nothing. Driven by `buffer.service`.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from buffer.data.outstanding_prompts import OutstandingPrompts
from buffer.data.skipped_prompts import SkippedPrompts
from buffer.data.sources import make_sources
from buffer.peers import Peer, Peers
from buffer.probes import Probes
from buffer.records import run_files, settings
from buffer.records.cancelled_texts import CancelledTexts
from buffer.records.event_log import BufferState, Checkpoint, EventLog, Learner, Rewound
from buffer.records.files import RunLock
from buffer.records.held_out import evaluation_of
from buffer.records.journal import Journal
from buffer.records.metrics import Metrics
from buffer.records.trajectories import TrajectoryStore
from buffer.wire import messages as msg
from buffer.wire.transport import Publisher, Router, next_port
from configs.cli import Change
from configs.schema import Config
from darts import events as ev
from darts.checkpoint import restore, save
from darts.config import core_config
from darts.core import Core
from darts.sizing.lengths import LengthStats, spread
from darts.sizing.rewards import RewardStats

MAX_LINE = 1000  # characters
SHOWN_WARNINGS = 8  # in a monitor, the newest ones


def printable(line: str) -> str:
    """A line that holds text from peers, cut to `MAX_LINE` and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in line[:MAX_LINE])


class RunFailed(Exception):
    """The run cannot continue. The message is one line for the user that says why."""


class RunState:
    """A run, fresh or resumed.

    Raises a `ValueError` or `TransportError` of one line if it cannot be opened.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.run.dir) / config.run.name
        sources = make_sources(config)
        self._changed: list[Change] = []  # settings that this resume changes
        keys = config.buffer.keys
        with ExitStack() as opened:
            self.router = opened.enter_context(Router(config.buffer.address, msg.SPEAKERS, keys))
            self.publisher = opened.enter_context(Publisher(next_port(self.router.address), keys))
            self._disk_thread = ThreadPoolExecutor(1, "fsync")
            self.lock = self._open_folder(sources.digests)
            self.journal = Journal(self.folder / "journal.sqlite")
            self.run_id = self.journal.run_id()
            self.log, self.recovered = EventLog.open(
                self.folder / "events",
                core_config(config),
                config.buffer.fsync_s,
                self._disk_thread,
            )
            opened.pop_all()  # from here on, `close` closes them
        state = self.recovered.checkpoint.buffer
        self.step = state.step if state else 0
        self.reported_step = -1  # the newest step whose report by the learner is logged
        self.policy: msg.SnapshotRef | None = state.policy if state else None
        self.learner: Learner | None = None
        self.warnings: deque[tuple[float, str]] = deque(maxlen=SHOWN_WARNINGS)
        self.prompts = OutstandingPrompts(sources.train, state.cursor if state else None)
        self.skipped = SkippedPrompts(
            config.data.max_skipped_frac, state.num_skipped if state else 0
        )
        self.eval_payloads = {p.prompt_id: p for p in sources.eval_prompts}
        self.store = TrajectoryStore(config.buffer.max_bytes, config.model.max_context)
        self.cancelled_texts = CancelledTexts()
        if state and state.learner:
            self.set_learner(state.learner)
        self.files = run_files.RunFiles(self.folder)
        self.files.groups.cut(self.step)  # a replay of the event log writes the rest
        self.evaluated: msg.Evaluated | None = None  # the newest evaluation
        self.metrics = Metrics()
        self.metrics.tokens.update(state.tokens if state else {})
        checkpoint = self.recovered.checkpoint
        self.core = (
            restore(checkpoint.config, checkpoint.core)
            if checkpoint.core
            else Core(checkpoint.config)
        )
        self.peers = Peers()
        self.probes = Probes(config)
        self.phase = "starting"
        self.replaying = False  # during recovery: record, and send nothing
        self._rows_again: dict[int, dict[str, Any]] = {}  # rows of metrics made during recovery
        self.last_row = self.files.metrics.last_row()
        self.last_evaluation = evaluation_of(self.last_row)  # of an earlier row, mostly
        self.errors: dict[int, str] = {}  # group -> its most recent failure
        self.unusable: set[int] = set()  # groups whose prompt does not fit the context
        # Not yet in the journal.
        self.learned: dict[str, LengthStats] = {}
        self.learned_rewards: dict[str, RewardStats] = {}
        self._lengths: dict[str, LengthStats] = {}  # of prompts whose groups are not recorded yet
        # (number of the record of its end, rollout)
        self._released: deque[tuple[int, int]] = deque()
        last_s = self.recovered.entries[-1].time_s if self.recovered.entries else 0.0
        self.started_s = time.monotonic() - max(last_s, self.last_row.get("time_s", 0.0))

    def _open_folder(self, digests: dict[str, str]) -> RunLock:
        """Create the run's folder, or continue in it. One buffer at a time may use it."""
        exists = (self.folder / "config.yaml").exists()
        if self.config.run.resume and not exists:
            raise ValueError(run_files.no_such_run(self.folder))
        if exists and not self.config.run.resume:
            raise ValueError(
                f"run directory {self.folder} holds a run already: "
                "set run.resume=true to continue it, or choose another run.name"
            )
        if exists:
            self._changed = settings.changes(self.folder, self.config)
            settings.check_data(self.folder, self.config, digests)
        lock = RunLock(self.folder)
        if not exists:
            settings.write(self.folder, self.config, digests)
        return lock

    def change_settings(self) -> list[ev.Event]:
        """Record the settings that this resume changes.

        Returns the event for the core, if its own configuration changes.
        """
        if self._changed:
            for line in settings.record(self.folder, self.config, self._changed, self.step):
                self.say(line)
            self._changed = []
        config = core_config(self.config)
        return [ev.SettingsChanged(config)] if config != self.core.config else []

    def set_learner(self, learner: Learner) -> None:
        """Note the learner, whose vocabulary bounds the token ids of every engine."""
        self.learner = learner
        self.store.vocab_size = learner.vocab_size

    # The core
    # ----------------------------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> Sequence[ev.Decision]:
        """Log `event` and let the core decide. Raises `ProtocolError`, with the core unchanged."""
        now_s = self.now()
        self.log.event(event, now_s)
        decisions = self.core.handle(event)
        self.log.decisions(decisions, now_s)
        return decisions

    def write_logs(self) -> None:
        """Put all records of both logs into their files, so that they survive a kill.

        It precedes each message to a peer, so that no peer knows of anything that a kill can take
        back. Tokens come first, since events tell of them.
        """
        if self.store.log is not None:
            self.store.log.write()
        self.log.write()

    def poll_disk(self) -> None:
        """Make older records durable, and release the tokens of rollouts whose end is durable."""
        ended, self.store.ended = self.store.ended, []
        self._released.extend((self.log.log.next_seq - 1, rollout_id) for rollout_id in ended)
        assert self.store.log is not None
        self.store.log.log.poll()
        synced_seq = self.log.log.poll()
        while self._released and self._released[0][0] <= synced_seq:
            self.store.log.discard(self._released.popleft()[1])

    def make_durable(self) -> None:
        """Make everything so far durable. Call it before a shard or an acknowledgement is sent."""
        assert self.store.log is not None
        self.store.log.sync()
        self.log.log.sync()

    def rotate_log(self) -> None:
        """Begin a new segment of the log if the present one is large. For the end of a step."""
        if self.log.log.segment_bytes < self.config.buffer.segment_bytes:
            return
        self.save_learned()
        self.files.sync()  # a restart from the checkpoint does not write their rows again
        state = BufferState(
            step=self.step,
            cursor=self.prompts.cursor,
            tokens=dict(self.metrics.tokens),
            num_skipped=self.skipped.num_skipped,
            policy=self.policy,
            learner=self.learner,
        )
        checkpoint = Checkpoint(config=self.core.config, core=save(self.core), buffer=state)
        self.log.rotate(checkpoint, self.now(), self.config.buffer.keep_event_bytes)

    def rotate_rows(self) -> None:
        """Begin new files of rows if the present ones are large. For the end of a step."""
        learner, buffer = self.config.learner, self.config.buffer
        # Its newest checkpoint may not be complete, and it may come back to any that is kept.
        newest = max(0, self.step - 1) // learner.checkpoint_every
        oldest = max(0, newest - learner.keep_checkpoints) * learner.checkpoint_every
        self.files.rotate(buffer.segment_bytes, buffer.keep_row_bytes, oldest)

    def due_events(self) -> list[ev.Event]:
        """Events that are due by themselves: windows of prompts, pauses while the store is full."""
        due: list[ev.Event] = []
        num_pending, window = self.core.num_pending, self.config.batch.groups
        if not self.core.run_ended and self.core.policy_version >= 0:
            while drawn := self.prompts.draw_again(window):
                due.append(self._prompts_drawn(drawn))
                num_pending += len(drawn)
            while num_pending < window:
                due.append(self._prompts_drawn(self.prompts.draw(window)))
                num_pending += window
        if self.store.full != self.core.admission_paused:
            due.append(ev.AdmissionPaused(self.store.full))
        return due

    def _prompts_drawn(self, drawn: Sequence[tuple[int, msg.PromptPayload]]) -> ev.PromptsDrawn:
        return ev.PromptsDrawn(tuple(self._with_statistics(drawn)))

    def _with_statistics(
        self, drawn: Sequence[tuple[int, msg.PromptPayload]]
    ) -> Iterator[ev.Prompt]:
        ids = [payload.prompt_id for _, payload in drawn]
        lengths = self.journal.lengths(ids) | self.learned
        rewards = self.journal.rewards(ids) | self.learned_rewards
        for (visit, _), prompt_id in zip(drawn, ids, strict=True):
            yield ev.Prompt(prompt_id, lengths.get(prompt_id), visit, rewards.get(prompt_id))

    # Groups that end
    # ----------------------------------------------------------------------------------------------

    def record(self, record: ev.GroupRecord) -> None:
        """Add a training group that has ended for good to the ledger and the sums."""
        self.files.group(record, self.step)
        self.metrics.closed(record)
        prompt_id = record.prompt_id
        known = self._lengths.pop(prompt_id, None) or self.learned.get(prompt_id)
        if known is None:
            known = self.journal.lengths([prompt_id]).get(prompt_id)
        text = self.prompts.payload(record.visit).beginning
        self.metrics.latest.closed(record, spread(known) if known else 0.0, text)

    def forget(self, record: ev.GroupRecord) -> None:
        """Free everything that is held for a closed group's rollouts."""
        for rollout in record.rollouts:
            self.store.discard(rollout.rollout_id)
        self.cancelled_texts.forget(record)

    def drop(self, drop: ev.Drop) -> None:
        record = drop.record
        self.forget(record)
        if record.end != "run_ended":
            self.record(record)
        reason = self.failure(record)
        if drop.requeued:
            return
        if reason and not self.replaying:
            self.skip(self.prompts.payload(record.visit), reason)
        elif reason:  # the run continued, so there were not too many
            self.skipped.num_skipped += 1
        self.prompts.done(record.visit)

    def failure(self, record: ev.GroupRecord) -> str:
        """Why a rollout of this group failed for good, "" if none did. It is never scored 0.

        Raises `RunFailed` if the run may not continue without its prompt.
        """
        error = self.errors.pop(record.group_id, "")
        unusable = record.group_id in self.unusable
        self.unusable.discard(record.group_id)
        num_scored = sum(r.reward is not None for r in record.rollouts)
        if record.end != "failed" and (record.end != "evaluated" or num_scored >= record.budget):
            return ""
        if error and not unusable and self.config.data.on_error == "stop" and not self.replaying:
            raise RunFailed(
                f"{error} (prompt {record.prompt_id} failed {self.config.darts.max_attempts} "
                "times in a row; data.on_error=skip continues without it)"
            )
        return error or "a rollout was lost with every engine that had it"

    def skip(self, prompt: msg.PromptPayload, reason: str) -> None:
        """Skip this prompt of the training stream. Raises `RunFailed` if too many are skipped."""
        self.skipped.add(prompt, reason)
        if self.skipped.too_many(self.prompts.num_drawn):
            raise RunFailed(self.skipped.refusal(self.prompts.num_drawn))

    def remember_lengths(self, prompt_id: str, lengths: LengthStats) -> None:
        """Keep the statistics of a prompt whose group is decided, or of the pool ("")."""
        self.learned[prompt_id] = lengths
        if prompt_id:
            self._lengths[prompt_id] = lengths

    def save_learned(self) -> None:
        """Write new statistics of prompts to the journal.

        After a kill, a replay of the event log makes those again that were not written yet.
        """
        self.journal.remember_lengths(self.learned.items())
        self.journal.remember_rewards(self.learned_rewards.items())
        self.learned.clear()
        self.learned_rewards.clear()

    def rewind(self, step: int) -> None:
        """A learner came back with an older checkpoint: withdraw the records of later steps.

        Their prompts are drawn again before anything new.
        """
        sums = Metrics()
        row = next(self.files.metrics.rows_from(step - 1)) if step else {}
        sums.restore(row)
        visits = self.files.visits_from(step)
        note = Rewound(
            step=step,
            tokens=dict(sums.tokens),
            visits=visits,
            num_skipped=int(row.get("data/skipped_prompts", 0)),
        )
        self.log.note(note, self.now())
        self.make_durable()  # only the note records the cuts below
        self.say(
            f"the learner resumes at step {step}; records of steps {step}..{self.step - 1} are "
            f"withdrawn, and {len(visits)} prompts return to the stream"
        )
        self.withdraw(note)
        self.cut_rows()

    def withdraw(self, note: Rewound) -> None:
        """Take the ledger, the sums and the prompts back to the step of `note`."""
        self.files.groups.cut(note.step)
        self.metrics.tokens.clear()
        self.metrics.tokens.update(note.tokens)
        self.skipped.num_skipped = note.num_skipped
        self.prompts.put_back(note.visits)
        self.step, self.reported_step = note.step, -1

    def cut_rows(self) -> None:
        """Cut metrics back to the steps done, and samples to the steps reported."""
        self.files.metrics.cut(self.step)
        self.files.samples.cut(max(self.step, self.reported_step + 1))
        self.last_row = self.files.metrics.last_row()
        if self.last_evaluation.get("eval/step", 0) > self.step:
            self.last_evaluation = {}

    @property
    def offered_version(self) -> int:
        """The newest policy that engines can fetch, -1 before the first."""
        return self.policy.version if self.policy else -1

    @property
    def num_rows(self) -> int:
        """Number of steps whose row of metrics was written, even if it was removed since."""
        return self.last_row["step"] + 1 if self.last_row else 0

    def write_row(self, row: dict[str, Any]) -> None:
        """Write a row, or keep it during recovery, as the file may have it or lose it again."""
        if self.replaying:
            self._rows_again[row["step"]] = row
        else:
            self.files.metrics.append(row)
            self.files.flush()
            self.last_row = row
            self.last_evaluation = evaluation_of(row) or self.last_evaluation

    def end_replay(self) -> None:
        """Write the rows that were lost in a kill."""
        self.replaying = False
        self.cut_rows()
        for step in range(self.num_rows, self.step):
            if step in self._rows_again:  # the last one waits for the last evaluation
                self.write_row(self._rows_again[step])
        self._rows_again.clear()

    # Peers and the terminal
    # ----------------------------------------------------------------------------------------------

    def require_own(self, run_id: str) -> None:
        """Refuse a peer of another run, which may have another model and other steps."""
        if run_id not in ("", self.run_id):
            raise ev.ProtocolError(
                f"it belongs to another run than {self.folder}: it outlived the buffer of that run"
            )

    def gives_way(self, known: Peer, incarnation: str) -> bool | None:
        """Whether another process may take the place of `known`: not while that lives. None until
        it is known, in which case the other one repeats its hello.
        """
        if not self.send(known, msg.Heartbeat()):
            return True  # its connection is closed
        lives = known.outlives(incarnation, time.monotonic())
        return None if lives is None else not lives

    def send(self, peer: Peer, message: msg.Message) -> bool:
        """Send a message. False if the peer is gone, in which case its silence will end it."""
        return self.send_to(peer.identity, message)

    def send_to(self, identity: bytes, message: msg.Message) -> bool:
        self.write_logs()
        return self.router.send(identity, message)

    def now(self) -> float:
        """Seconds that this run has lasted, including those before a resume."""
        return time.monotonic() - self.started_s

    def say(self, line: str) -> None:
        if self.replaying:
            return
        print(f"buffer: {printable(line)}", flush=True)

    def warn(self, line: str) -> None:
        self.warnings.append((self.now(), printable(line)))
        print(f"buffer: {printable(line)}", file=sys.stderr, flush=True)

    def close(self, error: str) -> None:
        """Tell every peer that the run is over, and how it ended."""
        if self.skipped.num_skipped:
            self.say(self.skipped.summary(self.prompts.num_drawn))
        for peer in self.peers.by_identity.values():
            self.send(peer, msg.Shutdown(error=error))
        with ExitStack() as closing:  # in reverse, and each of them although another one fails
            closing.callback(self.lock.release)
            closing.callback(self._disk_thread.shutdown)
            closing.callback(self.publisher.close)
            closing.callback(self.router.close)
            closing.callback(self.journal.close)
            closing.callback(self.files.close)
            if self.store.log is not None:
                closing.callback(self.store.log.close)
            closing.callback(self.log.close)
            self.save_learned()
