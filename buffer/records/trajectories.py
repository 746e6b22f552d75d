"""What the buffer keeps: the tokens of every rollout (in memory), and what it learned of prompts' lengths (on disk).

Owns validation of what engines send, and exact accounting of the bytes held. Decides nothing: the core says which rollouts
are kept. Driven by the service's loop, on one thread.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from buffer.data.outstanding_prompts import Cursor
from buffer.wire.messages import Chunk, Trajectory
from darts.events import ProtocolError
from darts.lengths import LengthStats

KEPT_CURSORS = 10_000  # steps; a learner resumes from one of its newest checkpoints


class _Rollout:
    """One response so far, growing in place: millions of small appends cost no objects of their own."""

    __slots__ = ("continued", "group_id", "logprobs", "runs", "tokens")

    def __init__(self, group_id: int) -> None:
        self.group_id = group_id
        self.tokens = bytearray()  # int32
        self.logprobs = bytearray()  # float32, 0 where given
        self.runs: list[
            tuple[bool, int, int]
        ] = []  # (sampled, version or -1, number of tokens), in order
        self.continued = False  # its beginning was copied, and its engine has not spoken yet

    def append(self, chunk: Chunk) -> None:
        num_tokens, version = len(chunk.tokens) // 4, chunk.version if chunk.sampled else -1
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs if chunk.sampled else bytes(len(chunk.tokens))
        if self.runs and self.runs[-1][:2] == (chunk.sampled, version):
            num_tokens += self.runs.pop()[2]
        self.runs.append((chunk.sampled, version, num_tokens))

    def copy(self, group_id: int) -> _Rollout:
        twin = _Rollout(group_id)
        twin.tokens, twin.logprobs, twin.runs = self.tokens[:], self.logprobs[:], self.runs[:]
        twin.continued = bool(self.runs)
        return twin

    @property
    def num_bytes(self) -> int:
        return len(self.tokens) + len(self.logprobs)


class TrajectoryStore:
    """The tokens, log-probabilities and versions of rollouts in flight, or finished and not yet handed over.

    `max_bytes` bounds it through `full`, at which admission pauses; what is in flight by then is still taken, since dropping
    it would waste what was already decoded.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes_held = 0  # payload bytes of tokens and log-probabilities, exactly
        self._rollouts: dict[int, _Rollout] = {}

    @property
    def full(self) -> bool:
        return self.bytes_held >= self.max_bytes

    def __contains__(self, rollout_id: int) -> bool:
        return rollout_id in self._rollouts

    def __len__(self) -> int:
        return len(self._rollouts)

    def open(self, rollout_id: int, group_id: int, continues: int | None) -> None:
        """Begin a rollout; with what `continues` had so far, if that is still held. That one must be discarded by the caller."""
        assert rollout_id not in self._rollouts, f"rollout {rollout_id} is open already"
        lost = None if continues is None else self._rollouts.get(continues)
        rollout = _Rollout(group_id) if lost is None else lost.copy(group_id)
        self._rollouts[rollout_id] = rollout
        self.bytes_held += rollout.num_bytes

    def check(self, chunk: Chunk) -> None:
        """Raise ProtocolError for a chunk that no correct engine sends."""
        rollout = self._rollout(chunk.rollout_id)
        _check(chunk)
        if rollout.continued and not chunk.sampled and not rollout.runs[0][0]:
            self._check_same_prompt(rollout, chunk)

    def append(self, chunk: Chunk) -> None:
        """Take a checked chunk as it decodes."""
        rollout = self._rollout(chunk.rollout_id)
        if not chunk.tokens:
            return
        if rollout.continued:
            rollout.continued = False
            if not chunk.sampled and not rollout.runs[0][0]:
                return  # the new engine repeats the prompt, which is held already
        rollout.append(chunk)
        self.bytes_held += 2 * len(chunk.tokens)

    def num_sampled(self, rollout_id: int) -> int:
        """Sampled tokens so far: the rollout's length, as the core counts it."""
        return sum(
            num_tokens for sampled, _, num_tokens in self._rollout(rollout_id).runs if sampled
        )

    def oldest_version(self, rollout_id: int) -> int:
        """The policy version that sampled the oldest token. ProtocolError if none was sampled."""
        versions = [version for sampled, version, _ in self._rollout(rollout_id).runs if sampled]
        if not versions:
            raise ProtocolError(
                f"rollout {rollout_id} has no sampled token, so no policy version: its engine must send chunks before it finishes"
            )
        return min(versions)

    def prefix(self, rollout_id: int) -> bytes:
        """The sampled tokens so far, int32: what another engine continues from."""
        rollout = self._rollout(rollout_id)
        return b"".join(bytes(part) for part, sampled in _spans(rollout) if sampled)

    def discard(self, rollout_id: int) -> None:
        """Forget a rollout; one that is not held is none to forget."""
        rollout = self._rollouts.pop(rollout_id, None)
        if rollout is not None:
            self.bytes_held -= rollout.num_bytes

    def trajectory(
        self, rollout_id: int, reward: float, truncated: bool, group_rewards: list[float]
    ) -> Trajectory:
        """The whole rollout as the learner takes it. It stays held until discarded."""
        rollout = self._rollout(rollout_id)
        versions: list[tuple[int, int]] = []
        for sampled, version, num_tokens in rollout.runs:
            if sampled and versions and versions[-1][0] == version:
                num_tokens += versions.pop()[1]
            if sampled:
                versions.append((version, num_tokens))
        return Trajectory(
            rollout_id=rollout_id,
            group_id=rollout.group_id,
            tokens=bytes(rollout.tokens),
            sampled=b"".join(
                (b"\1" if sampled else b"\0") * num_tokens
                for sampled, _, num_tokens in rollout.runs
            ),
            actor_logprobs=bytes(rollout.logprobs),
            versions=versions,
            reward=reward,
            truncated=truncated,
            group_rewards=group_rewards,
        )

    def _rollout(self, rollout_id: int) -> _Rollout:
        rollout = self._rollouts.get(rollout_id)
        if rollout is None:
            raise ProtocolError(
                f"rollout {rollout_id} is not held: never opened here, or discarded"
            )
        return rollout

    def _check_same_prompt(self, rollout: _Rollout, chunk: Chunk) -> None:
        held = bytes(rollout.tokens[: 4 * rollout.runs[0][2]])
        if held != chunk.tokens:
            raise ProtocolError(
                f"rollout {chunk.rollout_id} continues a lost one, but its prompt has other tokens ({len(chunk.tokens) // 4} against "
                f"{len(held) // 4}): the engines of a run must have the same tokenizer and chat template"
            )


def _spans(rollout: _Rollout) -> Iterable[tuple[bytearray, bool]]:
    start = 0
    for sampled, _, num_tokens in rollout.runs:
        yield rollout.tokens[start : start + 4 * num_tokens], sampled
        start += 4 * num_tokens


def _check(chunk: Chunk) -> None:
    where = f"rollout {chunk.rollout_id}: a chunk's"
    if len(chunk.tokens) % 4:
        raise ProtocolError(
            f"{where} tokens are {len(chunk.tokens)} bytes; int32 needs a multiple of 4"
        )
    if len(chunk.logprobs) != (len(chunk.tokens) if chunk.sampled else 0):
        expected = (
            f"{len(chunk.tokens)} bytes, one float32 per sampled token"
            if chunk.sampled
            else "none, since its tokens were given"
        )
        raise ProtocolError(
            f"{where} logprobs are {len(chunk.logprobs)} bytes; expected {expected}"
        )
    if chunk.tokens and np.frombuffer(chunk.tokens, "<i4").min() < 0:
        raise ProtocolError(f"{where} tokens hold a negative id; ids are 0 or more")
    if chunk.sampled:
        if chunk.version < 0:
            raise ProtocolError(
                f"{where} version is {chunk.version}; sampled tokens need the policy version that sampled them, 0 or more"
            )
        if not np.isfinite(np.frombuffer(chunk.logprobs, "<f4")).all():
            raise ProtocolError(
                f"{where} logprobs hold a value that is not finite; training on it would destroy the policy"
            )


class Journal:
    """What outlives the buffer: length statistics per prompt, "" being the pool of all. SQLite in WAL mode, nothing cached.

    Each call commits once, so a kill loses at most the call under way and never damages the file. (A power cut may lose the
    last commits: they are statistics, not worth an fsync each.)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(
            self.path, isolation_level=None, timeout=10, check_same_thread=False
        )  # used by one thread at a time
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS lengths (prompt_id TEXT PRIMARY KEY, stats BLOB NOT NULL) WITHOUT ROWID"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS cursors (step INTEGER PRIMARY KEY, cursor BLOB NOT NULL)"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS run (id TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(
                f"journal {self.path} cannot be used ({error}): move it away to start without length statistics"
            ) from error

    def run_id(self) -> str:
        """A name drawn when this journal was made: the same across resumes, another for every other run."""
        if self._db.execute("SELECT id FROM run").fetchone() is None:
            self._db.execute("INSERT INTO run VALUES (?)", (secrets.token_hex(8),))
        return self._db.execute("SELECT id FROM run").fetchone()[0]

    def remember_lengths(self, items: Iterable[tuple[str, LengthStats]]) -> None:
        """Keep the newest statistics of these prompts, in one commit."""
        rows = [(prompt_id, msgspec.msgpack.encode(stats)) for prompt_id, stats in items]
        if not rows:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT OR REPLACE INTO lengths VALUES (?, ?)", rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def lengths(self, prompt_ids: Iterable[str]) -> dict[str, LengthStats]:
        """What is remembered of these prompts; those never seen are left out."""
        found: dict[str, LengthStats] = {}
        asked = list(prompt_ids)
        for start in range(0, len(asked), 500):  # SQLite bounds the number of parameters
            some = asked[start : start + 500]
            marks = ",".join("?" * len(some))
            for prompt_id, stats in self._db.execute(
                f"SELECT prompt_id, stats FROM lengths WHERE prompt_id IN ({marks})", some
            ):
                found[prompt_id] = self._decode(stats)
        return found

    def save_cursor(self, num_steps: int, cursor: Cursor) -> None:
        """Where the prompt stream stood when `num_steps` steps were done; `KEPT_CURSORS` of them are kept."""
        self._db.execute(
            "INSERT OR REPLACE INTO cursors VALUES (?, ?)",
            (num_steps, msgspec.msgpack.encode(cursor)),
        )
        self._db.execute("DELETE FROM cursors WHERE step <= ?", (num_steps - KEPT_CURSORS,))

    def cursor(self, num_steps: int) -> Cursor | None:
        """Where the stream stood then, or at the last step before that was recorded."""
        row = self._db.execute(
            "SELECT cursor FROM cursors WHERE step <= ? ORDER BY step DESC LIMIT 1", (num_steps,)
        ).fetchone()
        return msgspec.msgpack.decode(row[0], type=Cursor) if row else None

    def _decode(self, stats: bytes) -> LengthStats:
        try:
            return msgspec.msgpack.decode(stats, type=LengthStats)
        except msgspec.MsgspecError as error:
            raise ValueError(
                f"journal {self.path} was written by another version ({error}): move it away to start without it"
            ) from error

    def close(self) -> None:
        """May be called twice."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
