"""If the buffer crashes between any two writes, a restarted one ends the run with true records.

A script plays one engine and the learner against a buffer in this process. The run's folder is
copied before each record of the event log, as a kill at that moment would leave it. Each copy is
then continued to the end of the run, with the same learner or with one that resumes from its
checkpoint.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from buffer.records import settings as recorded
from buffer.records.event_log import read_sessions
from buffer.records.row_segments import begins_at, read_rows
from buffer.records.segments import SegmentLog
from buffer.service import Service
from buffer.wire import messages as msg
from configs import cli
from darts.waiting import describe
from tools.faults.recount import read_history

GROUPS, SIZE, STEPS, KEEP_EVERY = 2, 2, 5, 2
ENGINE = b"engine"


@dataclass
class Learner:
    """`kept` is the step of its newest checkpoint. `trained` has the rollouts of each step's last
    training.
    """

    incarnation: str
    step: int = 0
    kept: int = 0
    version: int = -1
    reported: bool = False  # whether the current step, not yet acknowledged, was reported
    portion: int = 0  # of the current step, that it takes next
    trained: dict[int, set[int]] = field(default_factory=dict)

    @property
    def identity(self) -> bytes:
        """The identity of its connection."""
        return self.incarnation.encode()

    def reborn(self, incarnation: str, step: int) -> Learner:
        return Learner(incarnation, step, step, trained=self.trained)


class Script:
    """Buffer, engine and learner, one message at a time."""

    def __init__(self, folder: Path, port: int, learner: Learner, resume: bool, *more: str) -> None:
        config = cli.load(
            [
                f"run.dir={folder}", "run.name=r", f"run.steps={STEPS}", "run.trackers=[]",
                f"run.resume={resume}", f"buffer.address=tcp://127.0.0.1:{port}", "eval.every=2",
                "eval.num_prompts=1", f"batch.groups={GROUPS}", f"darts.group_size={SIZE}",
                "redundancy.rule=fixed",
                "redundancy.upper=1.5", "sampling.max_tokens=40", "data.num_prompts=50",
                "loss.kl=1",  # so that every response has a gradient
                "staleness.max_lag=2", "buffer.segment_bytes=9000", "buffer.fsync_s=1000",
                f"learner.checkpoint_every={KEEP_EVERY}", "learner.keep_checkpoints=1", *more,
            ]
        )  # fmt: skip
        self.learner, self.launched = learner, list[msg.LaunchedRollout]()
        self.cancelled: set[int] = set()
        self.shard: msg.Shard | None = None
        self.portions: list[int] = []  # the number of each shard in its step
        self.known_version = self.offered_version = self.loaded = -1
        self.to_load: msg.SnapshotRef | None = None
        self.service = Service(config)
        self.service.run.router.send = self.service.run.router.reply = self._sent
        self.service._recover()

    def _sent(self, identity: bytes, message: msg.Message) -> bool:
        if identity not in (ENGINE, self.learner.identity):
            return False  # an engine that the core knows and that has not rejoined
        match message:
            case msg.Launch():
                self.launched += message.rollouts
            case msg.Cancel():
                self.cancelled |= set(message.rollout_ids)
            case msg.Shard():
                self.shard = message
            case msg.Welcome():
                self.to_load = message.policy
            case msg.LearnerWelcome():
                self.known_version = message.policy_version
                self.offered_version = message.offered_version
            case msg.Acknowledged() if message.step == self.learner.step:
                self.learner.step += 1
                self.learner.reported = False
                if self.learner.step % KEEP_EVERY == 0 and self.learner.kept < STEPS:
                    self.learner.kept = self.learner.step
            case msg.Shutdown():
                assert not message.error, message.error
        return True

    def join(self) -> None:
        """Join as the engine that the core knows, without its rollouts."""
        known = self.service.run.core.engines.by_id.get("e")
        version = known.version if known else -1
        engine = msg.EngineHello(
            engine_id="e", engine_type="t", slots=6, policy_version=version, pid=1, incarnation="i",
        )  # fmt: skip
        self.service._receive(ENGINE, engine)
        if self.to_load is not None:
            self.load(self.to_load.version)
        learner = self.learner
        hello = msg.LearnerHello(
            rank=0, num_ranks=1, step=learner.step, pid=1, vocab_size=100,
            incarnation=learner.incarnation,
            resumed=learner.incarnation != "a", take_over=True,
        )  # fmt: skip
        self.service._receive(self.learner.identity, hello)
        if learner.version < 0:
            learner.version = self.known_version + 1
        if learner.version > self.known_version:
            self.count()
        if learner.version > self.offered_version:
            self.announce()

    def publish(self) -> None:
        self.learner.version += 1
        self.count()
        self.announce()

    def count(self) -> None:
        message = msg.NewPolicy(version=self.learner.version)
        self.service._receive(self.learner.identity, message)

    def announce(self) -> None:
        version = self.learner.version
        policy = msg.SnapshotRef(version=version, digest="", num_bytes=0, address="", path="x")
        self.service._receive(self.learner.identity, msg.Published(policy=policy, seconds=0.0))
        self.load(version)

    def load(self, version: int) -> None:
        self.loaded = version
        loaded = msg.PolicyLoaded(version=version, fetch_s=0.0, pause_s=0.0)
        self.service._receive(ENGINE, loaded)

    def turn(self) -> None:
        service = self.service
        service._apply(service._begin_training())
        service._apply(service.run.due_events())
        service._apply(service.engines.flush())
        service.run.poll_disk()
        launched, self.launched = self.launched, []
        for rollout in launched:
            self.decode(rollout)
            if service.config.batch.stream == "group":
                self.train()  # while the others decode
        self.stop_cancelled()
        self.train()

    def stop_cancelled(self) -> None:
        cancelled, self.cancelled = self.cancelled, set()
        for rollout_id in cancelled:
            text = f"cancelled {rollout_id}"
            stopped = msg.Stopped(rollout_id=rollout_id, num_tokens=40, text=text)
            self.service._receive(ENGINE, stopped)

    def decode(self, rollout: msg.LaunchedRollout) -> None:
        """The length depends only on the rollout. Some rollouts report progress first."""
        rollout_id, done = rollout.rollout_id, len(rollout.prefix) // 4
        length = max(done, 3 + rollout.seed % 20)
        self.chunk(rollout_id, 0, sampled=False, count=2)
        if length > done:
            self.chunk(rollout_id, 2 + done, sampled=True, count=length - done)
        finished = msg.Finished(
            rollout_id=rollout_id, num_tokens=length, truncated=False,
            reward=float(rollout_id % 2), text=f"response of {length} tokens",
        )  # fmt: skip
        self.cancelled.discard(rollout_id)
        self.service._receive(ENGINE, finished)

    def chunk(self, rollout_id: int, offset: int, sampled: bool, count: int) -> None:
        tokens = array("i", [7] * count).tobytes()
        logprobs = array("f", [-0.5] * count).tobytes() if sampled else b""
        version = self.loaded if sampled else 0
        chunk = msg.Chunk(
            rollout_id=rollout_id, offset=offset, sampled=sampled, version=version, tokens=tokens,
            logprobs=logprobs,
        )  # fmt: skip
        self.service._receive(ENGINE, msg.Progress(chunks=[chunk]))

    def train(self) -> None:
        """Take one portion, unless the run has ended: pull, or train, publish and report."""
        learner = self.learner
        if learner.step == STEPS:
            return
        if self.shard is None and not learner.reported:
            pull = msg.Pull(rank=0, step=learner.step, portion=learner.portion)
            self.service._receive(self.learner.identity, pull)
        if self.shard is not None and not learner.reported:
            shard, self.shard = self.shard, None
            assert (shard.step, shard.portion) == (learner.step, learner.portion)
            earlier = learner.trained[learner.step] if shard.portion else set[int]()
            trained = {t.rollout_id for t in shard.trajectories}
            learner.trained[learner.step] = earlier | trained
            learner.portion = 0 if shard.last else learner.portion + 1
            self.portions.append(shard.portion)
            if not shard.last:
                return
            learner.reported = True
            self.publish()
            if learner.step == STEPS - 1:
                learner.kept = STEPS
        if learner.reported:
            report = msg.Trained(step=learner.step, num_tokens=1, metrics={"train/loss": 1.0})
            self.service._receive(self.learner.identity, report)

    def to_the_end(self) -> None:
        self.join()
        for _ in range(200):
            if self.service.run.phase == "done":
                self.service.run.close("")
                return
            self.turn()
        raise AssertionError(f"no end: {describe(self.service.run.core)}")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_rows(folder / "r" / name))


def check(folder: Path, trained: dict[int, set[int]]) -> None:
    """Each file of rows has every step from its first one on."""
    metrics, groups = rows(folder, "metrics.jsonl"), rows(folder, "groups.jsonl")
    first = begins_at(groups)
    assert [row["step"] for row in metrics] == list(range(begins_at(metrics), STEPS))
    assert max(Counter(row["group_id"] for row in groups).values()) == 1
    shipped = [row for row in groups if row["end"] == "shipped"]
    assert max(Counter(row["visit"] for row in shipped).values()) == 1
    assert [row["step"] for row in shipped] == [
        step for step in range(first, STEPS) for _ in range(GROUPS)
    ]
    for step in range(first, STEPS):
        selected = {
            rollout["rollout_id"]
            for row in shipped
            if row["step"] == step
            for rollout in row["rollouts"]
            if rollout["end"].startswith("selected")
        }
        assert selected == trained[step], step
    check_samples(shipped, rows(folder, "samples.jsonl"))
    history = read_history(folder / "r" / "events")
    assert history.differences == []
    ended = {row["visit"] for row in shipped} | history.given_up
    if not first and not next(read_sessions(folder / "r" / "events")).step:
        assert history.drawn <= ended | history.outstanding
    generated = [row["tokens/generated"] for row in metrics]
    assert generated == sorted(generated) and generated[0] > 0


def check_samples(shipped: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
    """The selected rollouts of all groups, as two groups per step are sampled."""
    expected = [
        (row["step"], row["prompt_id"], rollout["tokens"], rollout["reward"])
        for row in shipped
        for rollout in row["rollouts"]
        if rollout["end"].startswith("selected") and row["step"] >= begins_at(samples)
    ]
    found = [
        (row["step"], row["prompt_id"], row["tokens"], row["reward"])
        for row in samples
        if row["step"] >= begins_at(shipped) and row["end"] != "cancelled"
    ]
    assert sorted(found) == sorted(expected)
    finished = [row for row in samples if row["end"] != "cancelled"]
    assert all(row["response"] == f"response of {row['tokens']} tokens" for row in finished)


@dataclass
class Crash:
    """The folder of a run and its learner at one moment."""

    folder: Path
    learner: Learner


def run_and_copy(
    folder: Path,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    resumes: dict[int, int],
    settings: Sequence[str],
) -> list[Crash]:
    """Play a whole run, and return its state before each record. `resumes` maps a step to the
    earlier step from which a new learner then resumes.
    """
    script = Script(folder / "whole", port, Learner("a"), False, *settings)
    crashes: list[Crash] = []
    add = SegmentLog.add

    def copied(log: SegmentLog, time_s: float, *payload: bytes) -> int:
        target = folder / f"copy-{len(crashes)}"
        shutil.copytree(folder / "whole", target)
        crashes.append(Crash(target, deepcopy(script.learner)))
        seq = add(log, time_s, *payload)
        log.write()  # a power cut may leave any beginning of the records that are written together
        return seq

    with monkeypatch.context() as patched:
        patched.setattr(SegmentLog, "add", copied)
        script.join()
        while script.service.run.phase != "done":
            script.turn()
            if (back := resumes.pop(script.learner.step, None)) is not None:
                script.shard = None
                script.learner = script.learner.reborn(f"from {back} {len(crashes)}", back)
                script.join()
        script.service.run.close("")
    check(folder / "whole", script.learner.trained)
    assert any(script.portions) == ("batch.stream=group" in settings)
    return crashes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resumes", "settings"),
    [
        ({}, ()),
        ({4: 2}, ("buffer.segment_bytes=2000",)),
        ({3: 2, 4: 1}, ("learner.keep_checkpoints=5",)),
        ({4: 2}, ("buffer.segment_bytes=2000", "buffer.keep_row_bytes=0")),
        ({4: 2}, ("batch.stream=group", "buffer.segment_bytes=2000")),
    ],
)
def test_a_crash_between_any_two_records(
    tmp_path: Path,
    free_port: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    resumes: dict[int, int],
    settings: tuple[str, ...],
) -> None:
    """In every second copy the learner dies as well and resumes from its checkpoint. The first case
    tries all copies, and the others, which share most of its records, every third one.

    Files of rows become segments while they are small, and old segments are removed in the last
    case: not those of steps to which the learner may come back.
    """
    for name in ("fsync", "fdatasync"):  # after a kill of the process no sync is needed
        monkeypatch.setattr(os, name, lambda handle: None)
    # They never change here, and to read them takes longer than all else.
    monkeypatch.setattr(recorded, "changes", lambda folder, config: [])
    port = free_port()
    crashes = run_and_copy(tmp_path, port, monkeypatch, dict(resumes), settings)
    begun = [crash for crash in crashes if (crash.folder / "r" / "config.yaml").exists()]
    assert len(begun) > 100
    for index, crash in enumerate(begun[:: 3 if settings else 1]):
        learner = crash.learner
        if index % 2:
            learner = learner.reborn("reborn", learner.kept)
        script = Script(crash.folder, port, learner, True, *settings)
        try:
            script.to_the_end()
            check(crash.folder, learner.trained)
        except BaseException:
            print(f"crash at {crash.folder.name}")
            raise
        shutil.rmtree(crash.folder)


def test_a_learner_of_an_earlier_step_is_refused_once_all_steps_are_done(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Otherwise the records of an ended run would be withdrawn and never written again."""
    script = Script(tmp_path, free_port(), Learner("a"), resume=False)
    script.join()
    while not script.service.run.core.run_ended:
        script.turn()
    script.learner = script.learner.reborn("b", 2)
    with pytest.raises(AssertionError, match=f"all {STEPS} steps of .* are done"):
        script.join()
    script.service.run.close("")
    assert script.service.run.step == STEPS


def test_a_learner_may_not_come_back_to_a_step_whose_records_were_removed(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """The prompts of the steps after it would be lost."""
    bounds = (
        "buffer.segment_bytes=1", "buffer.keep_row_bytes=0", "learner.checkpoint_every=1",
    )  # fmt: skip
    script = Script(tmp_path, free_port(), Learner("a"), False, *bounds)
    script.join()
    while script.learner.step < STEPS - 1:
        script.turn()
    run = script.service.run
    first = run.files.first_rewind(run.step)
    assert 0 < first <= run.step - 1
    learner = script.learner
    script.learner = learner.reborn("b", first - 1)
    with pytest.raises(AssertionError, match=f"only from step {first} on: buffer.keep_row_bytes=0"):
        script.join()
    assert run.step == STEPS - 1
    script.learner = learner.reborn("c", first)
    script.to_the_end()
    check(tmp_path, script.learner.trained)


class Endless(Script):
    """Half of the rollouts decode until they are cancelled, and stop before a step is trained."""

    def train(self) -> None:
        self.service._apply(self.service.engines.flush())
        self.stop_cancelled()
        super().train()

    def decode(self, rollout: msg.LaunchedRollout) -> None:
        if rollout.rollout_id % 4 > 1:
            super().decode(rollout)
        else:
            self.chunk(rollout.rollout_id, 0, sampled=False, count=2)
            self.chunk(rollout.rollout_id, 2, sampled=True, count=39)


def test_texts_of_cancelled_responses_are_sampled(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """At most two of each group, until the group is trained."""
    settings = ("darts.num_long=0", "redundancy.upper=3", "eval.every=0")
    script = Endless(tmp_path, free_port(), Learner("a"), False, *settings)
    script.to_the_end()
    check(tmp_path, script.learner.trained)
    assert len(script.service.run.cancelled_texts) == 0
    groups = [row for row in rows(tmp_path, "groups.jsonl") if row["end"] == "shipped"]
    cancelled = {
        (row["step"], row["prompt_id"]): [
            (r["tokens"], None, f"cancelled {r['rollout_id']}")
            for r in row["rollouts"]
            if r["end"] == "cancelled"
        ]
        for row in groups
    }
    found: dict[tuple[int, str], list[tuple[int, None, str]]] = {place: [] for place in cancelled}
    for row in rows(tmp_path, "samples.jsonl"):
        if row["end"] == "cancelled":
            text = (row["tokens"], row["reward"], row["response"])
            found[row["step"], row["prompt_id"]].append(text)
    assert max(map(len, cancelled.values())) > 2
    for place, texts in found.items():
        assert set(texts) <= set(cancelled[place])
        assert len(texts) == min(2, len(cancelled[place]))
