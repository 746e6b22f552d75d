"""The token log restores the content of a `TrajectoryStore` bit for bit through rotations,
compaction, kills and power cuts.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.records.token_log import StoredRollout, TokenLog
from buffer.records.trajectories import TrajectoryStore
from buffer.wire.messages import Chunk
from tests.disks import MemoryDisk, PowerCutError

FOLDER = Path("/run/tokens")
SEGMENT_BYTES = 300


def chunk(
    rollout_id: int, sampled: bool, version: int, num_tokens: int, start: int, offset: int
) -> Chunk:
    tokens = np.arange(start, start + num_tokens, dtype="<i4")
    logprobs = (-tokens / 7).astype("<f4") if sampled else np.empty(0, "<f4")
    return Chunk(
        rollout_id=rollout_id,
        offset=offset,
        sampled=sampled,
        version=version,
        tokens=tokens.tobytes(),
        logprobs=logprobs.tobytes(),
    )


def content(store: TrajectoryStore, rollout_id: int) -> StoredRollout:
    held = store._rollouts[rollout_id]
    return held.copy(held.group_id)


def is_beginning(found: StoredRollout, whole: StoredRollout) -> bool:
    size = len(found.tokens)
    tokens = sum(run[2] for run in found.runs)
    flags = [run[:2] for run in found.runs for _ in range(run[2])]
    return (
        found.group_id == whole.group_id
        and found.tokens == whole.tokens[:size]
        and found.logprobs == whole.logprobs[:size]
        and tokens == size // 4
        and flags == [run[:2] for run in whole.runs for _ in range(run[2])][:tokens]
    )


class TokenMachine(RuleBasedStateMachine):
    """A store and its log get the same calls. `promised` counts the durable tokens per rollout, and
    `written` those that survive a kill.
    """

    @initialize()
    def start(self) -> None:
        self.disk, self.next_id, self.next_token = MemoryDisk(), 0, 0
        self.at_fuse: random.Random | None = None
        self.store = TrajectoryStore(max_bytes=1 << 30, max_context=1 << 20)
        self.promised: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.texts: dict[int, str] = {}  # those that are durable, by rollout
        self.log, found = TokenLog.open(FOLDER, set(), segment_bytes=SEGMENT_BYTES, disk=self.disk)
        assert found == {}

    @property
    def outstanding(self) -> list[int]:
        return sorted(self.store._rollouts)

    @rule(group_id=st.integers(0, 5), data=st.data())
    def begin(self, group_id: int, data: st.DataObject) -> None:
        continues = data.draw(st.sampled_from([None, *self.outstanding]))
        rollout_id, self.next_id = self.next_id, self.next_id + 1
        self.store.open(rollout_id, group_id, continues)
        copied = None if continues is None else content(self.store, continues)
        self.attempt(lambda: self.log.begin(rollout_id, group_id, 0.0, copied), rollout_id)

    @precondition(lambda self: self.outstanding)
    @rule(
        data=st.data(),
        sampled=st.booleans(),
        version=st.integers(0, 2),
        num_tokens=st.integers(1, 12),
    )
    def decode(self, data, sampled: bool, version: int, num_tokens: int) -> None:
        rollout_id = data.draw(st.sampled_from(self.outstanding))
        offset = content(self.store, rollout_id).num_tokens
        start, self.next_token = self.next_token, self.next_token + num_tokens
        new = chunk(rollout_id, sampled, version, num_tokens, start, offset)
        self.store.append(new)
        self.attempt(lambda: self.log.append(new, 0.0))

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data(), text=st.text(max_size=20))
    def finish(self, data, text: str) -> None:
        rollout_id = data.draw(st.sampled_from(self.outstanding))
        if self.store.text(rollout_id):
            return  # a rollout finishes once
        self.store.finish(rollout_id, text)
        self.attempt(lambda: self.log.finish(rollout_id, text, 0.0))

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        rollout_id = data.draw(st.sampled_from(self.outstanding))
        self.store.discard(rollout_id)
        self.log.discard(rollout_id)
        self.promised.pop(rollout_id, None)
        self.written.pop(rollout_id, None)

    @rule()
    def write(self) -> None:
        self.attempt(self.log.write)

    @rule()
    def sync(self) -> None:
        self.attempt(self.log.sync)

    @rule(num_steps=st.integers(0, 20), kills=st.booleans(), seed=st.integers(0, 2**32))
    def light_fuse(self, num_steps: int, kills: bool, seed: int) -> None:
        self.disk.fuse, self.at_fuse = num_steps, None if kills else random.Random(seed)

    @rule(num_bytes=st.integers(0, 200))
    def fill_disk(self, num_bytes: int) -> None:
        self.disk.free_bytes = num_bytes

    @rule()
    def free_disk(self) -> None:
        self.disk.free_bytes = 1 << 40

    @rule(seed=st.integers(0, 2**32))
    def power_cut(self, seed: int) -> None:
        self.at_fuse = random.Random(seed)
        self.stop()

    @rule()
    def close_and_open(self) -> None:
        self.disk.free_bytes = 1 << 40
        self.attempt(self.log.close)
        self.at_fuse = None
        before = {rollout_id: content(self.store, rollout_id) for rollout_id in self.outstanding}
        self.stop()
        assert {r: content(self.store, r) for r in self.outstanding} == before

    def attempt(self, act, new: int | None = None) -> None:
        """Call `act`, or stop if the disk fails. After a full disk the buffer would end and be
        restarted.
        """
        try:
            act()
        except OSError:
            self.at_fuse = None
            self.stop()
        except PowerCutError:
            self.stop()
        else:
            if not self.log.log.num_waiting:
                self.written = {r: len(content(self.store, r).tokens) for r in self.outstanding}
            if self.log.log.synced_seq == self.log.log.next_seq - 1:
                self.promised = {r: len(content(self.store, r).tokens) for r in self.outstanding}
                self.texts = {r: self.store.text(r) for r in self.outstanding}

    def stop(self) -> None:
        """The store is lost, and the log fills another one."""
        rng = self.at_fuse
        self.disk = self.disk.after_kill() if rng is None else self.disk.after_power_cut(rng)
        wanted = set(self.outstanding)
        self.log, found = TokenLog.open(FOLDER, wanted, segment_bytes=SEGMENT_BYTES, disk=self.disk)
        assert wanted >= found.keys() >= {r for r, num_bytes in self.promised.items() if num_bytes}
        survives = self.promised if rng is not None else self.written
        assert found.keys() >= {r for r, num_bytes in survives.items() if num_bytes}
        for rollout_id, rollout in found.items():
            whole = content(self.store, rollout_id)
            assert is_beginning(rollout, whole)
            assert len(rollout.tokens) >= survives.get(rollout_id, 0)
            # Without the newest record if its write failed or was not durable.
            assert rollout.text in (self.store.text(rollout_id), self.texts.get(rollout_id, ""))
            if len(rollout.tokens) == len(whole.tokens) and rng is None:
                assert rollout.runs == whole.runs
        restored = TrajectoryStore(max_bytes=1 << 30, max_context=1 << 20)
        restored.restore(found)
        for rollout_id in wanted - found.keys():  # as `buffer.recovery` does
            group_id = content(self.store, rollout_id).group_id
            restored.open(rollout_id, group_id, None)
            self.log.begin(rollout_id, group_id, 0.0)
        self.store = restored
        self.written = {r: len(content(restored, r).tokens) for r in wanted}

    @invariant()
    def live_bytes_are_on_disk(self) -> None:
        assert 0 <= self.log.live_bytes <= self.log.num_bytes
        assert self.outstanding or self.log.live_bytes == 0

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.disk.fuse = None
            self.close_and_open()


TestTokens = TokenMachine.TestCase
TestTokens.settings = settings(
    max_examples=120, stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


class Traffic:
    """Three endless rollouts among short ones, so that most of each old segment is garbage."""

    def __init__(self, seed: int, segment_bytes: int) -> None:
        self.rng, self.disk = random.Random(seed), MemoryDisk()
        self.log, _ = TokenLog.open(FOLDER, (), segment_bytes=segment_bytes, disk=self.disk)
        self.offsets: dict[int, int] = {}  # offsets by outstanding rollout
        self.next_id = 0

    def step(self) -> None:
        while len(self.offsets) < 12:
            rollout_id, self.next_id = self.next_id, self.next_id + 1
            self.offsets[rollout_id] = 0
            self.log.begin(rollout_id, 0, 0.0)
        rollout_id = self.rng.choice(list(self.offsets)[3:])
        if self.rng.random() < 0.02:
            rollout_id = self.rng.randrange(3)
        offset = self.offsets[rollout_id]
        self.offsets[rollout_id] += 8
        self.log.append(chunk(rollout_id, True, 0, 8, offset, offset), 0.0)
        if rollout_id >= 3 and offset == 24:
            self.log.discard(rollout_id)
            del self.offsets[rollout_id]


def sizes(found: dict[int, StoredRollout]) -> dict[int, int]:
    return {rollout_id: len(rollout.tokens) // 4 for rollout_id, rollout in found.items()}


def test_disk_use_follows_the_outstanding_tokens() -> None:
    segment_bytes = 4000
    traffic = Traffic(seed=0, segment_bytes=segment_bytes)
    peak_live = peak = 0
    for _ in range(15_000):
        traffic.step()
        peak_live = max(peak_live, traffic.log.live_bytes)
        peak = max(peak, traffic.log.num_bytes)
    assert peak <= 2 * peak_live + 6 * segment_bytes
    traffic.log.write()
    _, found = TokenLog.open(FOLDER, traffic.offsets.keys(), disk=traffic.disk)
    assert sizes(found) == {r: offset for r, offset in traffic.offsets.items() if offset}


@given(fuse=st.integers(0, 400), seed=st.integers(0, 2**16))
@settings(max_examples=100)
def test_a_power_cut_during_compaction_loses_nothing_durable(fuse, seed) -> None:
    traffic = Traffic(seed, segment_bytes=500)
    for _ in range(150):  # from now on each rotation moves records
        traffic.step()
    traffic.disk.fuse = fuse
    durable: dict[int, int] = {}
    try:
        while True:
            traffic.step()
            if traffic.rng.random() < 0.1:
                traffic.log.sync()
            if traffic.log.log.synced_seq == traffic.log.log.next_seq - 1:
                durable = dict(traffic.offsets)
    except PowerCutError:
        disk = traffic.disk.after_power_cut(traffic.rng)
    _, found = TokenLog.open(FOLDER, traffic.offsets.keys(), disk=disk)
    for rollout_id, num_tokens in durable.items():
        if num_tokens and rollout_id in traffic.offsets:
            rollout = found[rollout_id]
            expected = chunk(rollout_id, True, 0, rollout.num_tokens, 0, 0)
            assert len(rollout.tokens) // 4 >= num_tokens
            assert rollout.tokens == expected.tokens and rollout.logprobs == expected.logprobs


def test_a_full_disk_takes_no_part_of_the_records_that_wait() -> None:
    disk = MemoryDisk()
    log, _ = TokenLog.open(FOLDER, (), disk=disk)
    prompt = StoredRollout(0, bytearray(400), bytearray(400), [(False, -1, 100)])
    disk.free_bytes = 100
    log.begin(1, 7, 0.0, prompt)
    with pytest.raises(OSError, match="No space left"):
        log.write()
    disk.free_bytes = 1 << 40
    disk = disk.after_kill()
    log, found = TokenLog.open(FOLDER, {1}, disk=disk)
    assert found == {}
    log.begin(1, 7, 0.0, prompt)
    log.write()
    _, found = TokenLog.open(FOLDER, {1}, disk=disk.after_kill())
    assert found == {1: StoredRollout(7, prompt.tokens, prompt.logprobs, prompt.runs)}


def test_a_first_record_that_only_names_the_group_is_read() -> None:
    """Earlier versions wrote it for each rollout that began."""
    disk = MemoryDisk()
    log, _ = TokenLog.open(FOLDER, (), disk=disk)
    log.log.add(0.0, struct.pack("<B?qQQ", 0, False, -1, 1, 7))
    log.log.add(0.0, struct.pack("<B?qQQ", 0, False, -1, 2, 8))
    log.log.add(0.0, struct.pack("<B?qQQ", 1, False, -1, 1, 0), bytes(12))
    log.write()
    _, found = TokenLog.open(FOLDER, {1, 2}, disk=disk.after_kill())
    prompt = StoredRollout(7, bytearray(12), bytearray(12), [(False, -1, 3)])
    assert found == {1: prompt, 2: StoredRollout(8)}


def test_damage_to_an_outstanding_rollout_is_refused() -> None:
    disk = MemoryDisk()
    log, _ = TokenLog.open(FOLDER, set(), disk=disk)
    log.begin(1, 0, 0.0)
    log.append(chunk(1, True, 0, 4, 0, 0), 0.0)
    log.append(chunk(1, True, 0, 4, 0, 5), 0.0)
    log.close()
    with pytest.raises(ValueError, match="rollout 1 has 4 tokens before token 5"):
        TokenLog.open(FOLDER, {1}, disk=disk)
    assert TokenLog.open(FOLDER, {2}, disk=disk)[1] == {}
