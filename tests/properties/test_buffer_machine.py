"""A state machine over the buffer's state and disk: whatever happens, and whenever the buffer
crashes, every prompt is trained exactly once or dropped with a reason.

Engines and a learner send messages in any order, links break, time passes, and the buffer is killed
or loses power between any two of its writes. After each rule the invariants hold, and every run is
then brought to its end and recounted from its logs.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from buffer.records.row_segments import read_rows
from buffer.run_state import RunFailed
from buffer.wire import messages as msg
from configs import cli
from darts import waiting
from darts.invariants import validate_state
from tests.crashes import CrashingBuffer, KilledError, crashing
from tests.model_peers import MAX_TOKENS, ModelEngine, ModelLearner, Response
from tools.faults.recount import read_history, recount

STEPS, GROUPS, SIZE, MAX_LAG = 6, 2, 2, 1
MOST_ENGINES = 3
CONFIG = cli.load(
    [
    f"run.steps={STEPS}", "run.trackers=[]", "eval.every=2", "eval.num_prompts=1",
    f"batch.groups={GROUPS}", f"darts.group_size={SIZE}", "redundancy.rule=fixed",
    "redundancy.upper=1.5", f"sampling.max_tokens={MAX_TOKENS}", "data.num_prompts=50",
    f"staleness.max_lag={MAX_LAG}", "buffer.segment_bytes=4000", "buffer.fsync_s=0.05",
    "buffer.rejoin_timeout_s=1e9", "buffer.step_timeout_s=1e9", "data.on_error=skip",
    "data.max_skipped_frac=1", "darts.relative_limit=1.2",
    ]
)  # fmt: skip

P = ParamSpec("P")
picks = st.integers(0, 7)


def survives(
    body: Callable[Concatenate[BufferMachine, P], None],
) -> Callable[Concatenate[BufferMachine, P], None]:
    """Start the buffer again if it crashes within this rule."""

    @wraps(body)
    def rule_body(self: BufferMachine, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            body(self, *args, **kwargs)
        except KilledError:
            self.start_again()
        except RunFailed as error:
            self.stop_run(str(error))

    return rule_body


class BufferMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="buffer-machine-"))
        self.trained_file = self.folder / "trained.jsonl"
        self.buffer = CrashingBuffer(self.folder, CONFIG)
        self.buffer.deliver = self.deliver
        self.patches = crashing(self.buffer)
        self.patches.__enter__()
        self.engines: list[ModelEngine] = []
        self.learner = ModelLearner(STEPS, self.send, self.trained_file)
        self.launches: dict[int, tuple[Any, ...]] = {}
        self.sent: dict[int, int] = {}  # tokens of each rollout that the buffer has taken
        self.turn: list[tuple[bytes, msg.Message]] | None = None  # of messages taken together
        self.long_turns = False
        self.arrives = False  # whether messages on their way survive the next crash
        self.ended: dict[int, str] = {}

    @initialize(stream=st.sampled_from(["batch", "group"]), long_turns=st.booleans())
    def begin(self, stream: Literal["batch", "group"], long_turns: bool) -> None:
        self.long_turns = long_turns
        self.buffer.config = replace(CONFIG, batch=replace(CONFIG.batch, stream=stream))
        self.buffer.start(resume=False)

    # Messages -------------------------------------------------------------------------------------

    @property
    def peers(self) -> list[ModelEngine | ModelLearner]:
        return [*self.engines, self.learner]

    @property
    def is_over(self) -> bool:
        return self.buffer.run.phase == "done"

    def send(self, identity: bytes, message: msg.Message) -> None:
        if self.turn is not None:
            self.turn.append((identity, message))
        elif self.buffer.service is not None and not self.is_over:
            self.buffer.feed((identity, message))

    @contextmanager
    def one_turn(self) -> Iterator[None]:
        """The buffer takes all messages of this block in one turn, if turns are long."""
        self.turn = [] if self.long_turns else None
        try:
            yield
        finally:
            received, self.turn = self.turn, None
        if received and self.buffer.service is not None and not self.is_over:
            self.buffer.feed(*received)

    def deliver(self, identity: bytes, message: msg.Message) -> bool:
        for peer in self.peers:
            if peer.identity == identity:
                if isinstance(message, msg.Shard):
                    self.check_shard(message)
                peer.inbox.append(message)
                return True
        return False

    def launched(self, engine: str, launch: msg.Launch, rollout: msg.LaunchedRollout) -> None:
        """A rollout's number is never given out twice; the same launch may be repeated."""
        identity = (engine, launch.group_id, launch.prompt, rollout.seed)
        assert self.launches.setdefault(rollout.rollout_id, identity) == identity

    def check_shard(self, shard: msg.Shard) -> None:
        assert shard.step == self.learner.step
        for trajectory in shard.trajectories:
            oldest = min(version for version, _ in trajectory.versions)
            assert oldest <= shard.policy_version <= self.learner.version
            assert self.learner.version - oldest <= MAX_LAG

    # Crashes --------------------------------------------------------------------------------------

    def start_again(self) -> None:
        for peer in self.peers:
            if self.arrives:
                identity, peer.identity = peer.identity, None
                peer.inbox = [m for m in peer.inbox if not isinstance(m, msg.HelloAgain)]
                peer.read()
                assert identity is None or peer.identity is None
            peer.disconnect()
        while True:
            try:
                self.buffer.start(resume=True)
            except KilledError:
                continue
            break
        self.check_recovered()

    def stop_run(self, error: str) -> None:
        """The run ends before its last step, and the user resumes it."""
        try:
            self.buffer.run.close(error)
            self.buffer.crash()
        except KilledError:
            pass
        for engine in self.engines:
            engine.restart()
        self.learner.resume(self.learner.checkpoints[-1])
        self.start_again()

    def check_recovered(self) -> None:
        run = self.buffer.run
        assert run.step >= self.learner.step, "an acknowledged step is gone"
        assert read_history(run.folder / "events").differences == []
        self.check_partition()

    def check_partition(self) -> None:
        """Every visit is outstanding, put back, or ended, and only one of these."""
        run = self.buffer.run
        cursor, rows = run.prompts.cursor, self.rows("groups.jsonl")
        trained = [row["visit"] for row in rows if row["end"] == "shipped"]
        assert len(trained) == len(set(trained))
        open_visits = [*cursor.outstanding, *cursor.again]
        assert len(open_visits) == len(set(open_visits)) and not set(open_visits) & set(trained)
        ended = {row["visit"] for row in rows}
        if not run.core.run_ended:
            assert set(range(cursor.position)) == set(open_visits) | ended

    @precondition(lambda self: not self.buffer.fuses and not self.is_over)
    @rule(
        writes=st.integers(0, 30),
        again=st.lists(st.integers(0, 12), max_size=1),
        power=st.booleans(),
        seed=st.integers(0, 1000),
        arrives=st.booleans(),
    )
    def crash_soon(
        self, writes: int, again: list[int], power: bool, seed: int, arrives: bool
    ) -> None:
        self.buffer.fate = "power cut" if power else "kill"
        self.buffer.rng = random.Random(seed)
        self.buffer.fuses = [writes, *again]
        self.arrives = arrives

    # Engines --------------------------------------------------------------------------------------

    def engine(self, pick: int) -> ModelEngine:
        return self.engines[pick % len(self.engines)]

    def response(self, pick: int, which: int) -> tuple[ModelEngine, Response] | None:
        engine = self.engine(pick)
        decoding = engine.decoding if engine.version >= 0 else []
        return (engine, decoding[which % len(decoding)]) if decoding else None

    @precondition(lambda self: len(self.engines) < MOST_ENGINES)
    @rule(slots=st.integers(1, 6))
    @survives
    def engine_joins(self, slots: int) -> None:
        engine = ModelEngine(f"e{len(self.engines)}", slots, self.send, self.launched)
        self.engines.append(engine)
        engine.connect()

    @precondition(lambda self: self.engines)
    @rule(pick=picks)
    @survives
    def engine_reads(self, pick: int) -> None:
        self.engine(pick).read()

    @precondition(lambda self: self.engines)
    @rule(pick=picks, which=picks, num=st.integers(1, 6), ends=st.booleans())
    @survives
    def engine_decodes(self, pick: int, which: int, num: int, ends: bool) -> None:
        if found := self.response(pick, which):
            engine, response = found
            engine.decode(response, num, ends)

    @precondition(lambda self: self.engines)
    @rule(
        kind=st.sampled_from(["fails", "overshoots", "leaves", "is killed", "loses its link"]),
        pick=picks,
        which=picks,
        unusable=st.booleans(),
    )
    @survives
    def engine_trouble(self, kind: str, pick: int, which: int, unusable: bool) -> None:
        engine, found = self.engine(pick), self.response(pick, which)
        match kind:
            case "leaves":
                engine.leave()
            case "is killed":
                engine.restart()
            case "loses its link":
                engine.disconnect()
            case "fails" if found:
                engine.fail(found[1], unusable)
            case "overshoots" if found:
                engine.overshoot(found[1])

    @rule(pick=picks)
    @survives
    def peer_joins_again(self, pick: int) -> None:
        self.peers[pick % len(self.peers)].connect()

    # Learner --------------------------------------------------------------------------------------

    @rule()
    @survives
    def learner_reads(self) -> None:
        self.learner.read()

    @precondition(lambda self: self.learner.published and not self.learner.is_done)
    @rule()
    @survives
    def learner_works(self) -> None:
        """Pull, or train on the shard, or report again."""
        self.learner.read()
        if self.learner.shard is not None:
            self.learner.train()
        elif self.learner.report is not None:
            self.learner.send(self.learner.report)
        else:
            self.learner.pull()

    @rule()
    @survives
    def learner_offers(self) -> None:
        self.learner.offer()

    @precondition(lambda self: self.learner.step > 0)
    @rule()
    @survives
    def learner_reports_an_earlier_step(self) -> None:
        """Its acknowledgement was lost, as far as the buffer knows."""
        if self.learner.identity is not None:
            earlier = msg.Trained(step=self.learner.step - 1, num_tokens=0, metrics={})
            self.learner.send(earlier)

    @precondition(lambda self: not self.learner.is_done)
    @rule(
        kind=st.sampled_from(["restarts", "leaves", "is ahead", "loses its link"]),
        back=st.integers(0, 2),
    )
    @survives
    def learner_trouble(self, kind: str, back: int) -> None:
        learner = self.learner
        if kind == "loses its link":
            return learner.disconnect()
        if kind == "leaves":
            learner.send(msg.Leaving())
        step = learner.checkpoints[max(0, len(learner.checkpoints) - 1 - back)]
        if learner.checkpoints[-1] == STEPS:
            step = STEPS
        elif kind == "is ahead" and learner.report is not None:
            step = learner.step + 1  # it saved its checkpoint, and its report was lost
        learner.resume(step)
        learner.connect()

    # Time and disk --------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 2.0, 20.0, 700.0]), silent=st.integers(0, 15))
    @survives
    def time_passes(self, seconds: float, silent: int) -> None:
        """Peers that are not silent send heartbeats."""
        self.buffer.clock.now_s += seconds
        received: list[tuple[bytes, msg.Message]] = [
            (peer.identity, msg.Heartbeat())
            for index, peer in enumerate(self.peers)
            if peer.identity is not None and not silent >> index & 1
        ]
        if not self.is_over:
            self.buffer.feed(*received)

    @precondition(lambda self: not self.is_over and self.buffer.run.step > 0)
    @rule(skip=st.integers(0, 3))
    @survives
    def user_stops_and_resumes(self, skip: int) -> None:
        if skip == 0:  # a run that is stopped too often would never get far
            self.stop_run("the buffer was stopped")

    @rule(num=st.integers(1, 6))
    @survives
    def all_work(self, num: int) -> None:
        self.rounds(num)

    @rule(num=st.integers(6, 16))
    @survives
    def all_work_on(self, num: int) -> None:
        self.rounds(num)

    def rounds(self, num: int) -> None:
        """Rounds in which every peer does its best; a step takes about five."""
        if not self.engines:
            self.engine_joins(4)
        rng = random.Random(len(self.launches))
        for _ in range(num):
            if not self.is_over:
                self.round(rng)

    def round(self, rng: random.Random) -> None:
        for engine in self.engines:
            if engine.identity is None:
                engine.connect()
            engine.read()
        with self.one_turn():
            for engine in self.engines:
                for response in engine.decoding if engine.version >= 0 else []:
                    engine.decode(response, rng.randint(1, 6), rng.random() < 0.3)
        learner = self.learner
        if learner.identity is None:
            learner.connect()
        learner.read()
        if rng.random() < 0.5:
            learner.offer()
        if learner.published is not None and not learner.is_done:
            if learner.shard is not None:
                learner.train()
            elif learner.report is not None:
                learner.send(learner.report)
            else:
                learner.pull()
            learner.read()

    # Invariants -----------------------------------------------------------------------------------

    @invariant()
    def state_is_valid(self) -> None:
        if self.buffer.service is None:
            return
        run = self.buffer.run
        validate_state(run.core)
        groups = [g for g in run.core.groups.values() if g.purpose == "train"]
        if not run.core.run_ended:
            known = [g.prompt.visit for g in groups]
            known += [queued.prompt.visit for queued in run.core.prompts.training]
            assert sorted(known) == run.prompts.cursor.outstanding

    def teardown(self) -> None:
        try:
            if self.buffer.service is not None:
                self.finish()
        finally:
            self.buffer.fuses = []
            if self.buffer.service is not None:
                self.buffer.crash()
            self.patches.__exit__(None, None, None)
            shutil.rmtree(self.folder)

    def finish(self) -> None:
        """Nothing goes wrong any more: the run ends, and its records are true."""
        self.buffer.fuses = []
        if not self.engines:
            self.engine_joins(4)
        rng = random.Random(0)
        for _ in range(400):
            if self.is_over:
                break
            try:
                self.buffer.clock.now_s += 1.0
                for peer in self.peers:
                    peer.send(msg.Heartbeat())
                self.round(rng)
            except RunFailed as error:
                self.stop_run(str(error))
        run = self.buffer.run
        assert run.phase == "done", waiting.describe(run.core)
        run.files.flush()
        assert recount(run.folder, run.config, self.trained_file) == []
        self.check_samples()
        self.resume_once_more()

    def check_samples(self) -> None:
        """The selected rollouts of every step, as all of its groups are sampled. A power cut may
        lose the text of a response, which is for readers only, though not its tokens.
        """
        shipped = [row for row in self.rows("groups.jsonl") if row["end"] == "shipped"]
        expected = [
            (row["step"], row["prompt_id"], rollout["tokens"], rollout["reward"])
            for row in shipped
            for rollout in row["rollouts"]
            if rollout["end"].startswith("selected")
        ]
        samples = self.rows("samples.jsonl")
        selected = [row for row in samples if row["end"] != "cancelled"]
        found = [(row["step"], row["prompt_id"], row["tokens"], row["reward"]) for row in selected]
        assert sorted(found) == sorted(expected)
        for row in selected:
            lengths = (row["tokens"], 0) if self.buffer.has_lost_power else (row["tokens"],)
            assert len(row["response"].split()) in lengths
        assert {
            (row["step"], row["prompt_id"], row["response"])
            for row in samples
            if row["end"] == "cancelled"
        } <= {
            (row["step"], row["prompt_id"], f"cut {rollout['rollout_id']}")
            for row in shipped
            for rollout in row["rollouts"]
            if rollout["end"] == "cancelled"
        }

    def rows(self, name: str) -> list[dict[str, Any]]:
        with self.buffer.unharmed():
            self.buffer.run.files.flush()
        return list(read_rows(self.buffer.run.folder / name))

    def resume_once_more(self) -> None:
        """A finished run has nothing left to do."""
        folder = self.buffer.run.folder
        rows = list(read_rows(folder / "metrics.jsonl"))
        self.buffer.fate = "kill"
        self.buffer.crash()
        self.buffer.start(resume=True)
        assert self.is_over
        self.buffer.run.files.flush()
        assert list(read_rows(self.buffer.run.folder / "metrics.jsonl")) == rows


@pytest.mark.slow
def test_whatever_happens_the_records_are_true() -> None:
    """The same runs every time, unless MACHINE_EXAMPLES sets their number: then they are random.
    Some hundreds take minutes.
    """
    run_state_machine_as_test(
        BufferMachine,
        settings=settings(
            max_examples=int(os.environ.get("MACHINE_EXAMPLES", "80")),
            stateful_step_count=50,
            derandomize="MACHINE_EXAMPLES" not in os.environ,
            suppress_health_check=[HealthCheck.too_slow],
            print_blob=True,
        ),
    )
