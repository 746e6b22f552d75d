"""The tokens of every outstanding rollout, in memory and in a log on disk.

Owns the validation of chunks and an exact account of the bytes held. Decides nothing: the core
chooses the rollouts that are kept. Driven by the buffer's loop, on one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from buffer.records.token_log import Piece, StoredRollout, TokenLog
from buffer.wire.messages import Chunk, Trajectory
from darts.events import ProtocolError

MAX_VOCAB_SIZE = 2**31  # the number of ids that an int32 can hold
TOKENS, LOGPROBS = np.dtype("<u4"), np.dtype("<f4")  # a negative id is too large as well


class TrajectoryStore:
    """The tokens, log-probabilities and versions of rollouts that are outstanding.

    They are in flight, or finished and not yet trained. `max_bytes` bounds the store through
    `full`, at which admission pauses. Tokens in flight by then are still taken, since dropping them
    would waste decoding already done.
    """

    def __init__(self, max_bytes: int, max_context: int, log: TokenLog | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_context = max_context  # most tokens of one rollout, including its prompt
        self.vocab_size = MAX_VOCAB_SIZE  # until a learner reports its own
        self.log = log
        self.ended: list[int] = []  # discarded here, but not yet in the log
        self.bytes_held = 0  # payload bytes of tokens and log-probabilities, exactly
        self._rollouts: dict[int, StoredRollout] = {}

    @property
    def full(self) -> bool:
        return self.bytes_held >= self.max_bytes

    def __contains__(self, rollout_id: int) -> bool:
        return rollout_id in self._rollouts

    def __len__(self) -> int:
        return len(self._rollouts)

    def open(self, rollout_id: int, group_id: int, continues: int | None) -> None:
        """Begin a rollout, with the tokens of `continues` if that rollout is still held.

        The caller must discard that one.
        """
        assert rollout_id not in self._rollouts, f"rollout {rollout_id} is open already"
        lost = None if continues is None else self._rollouts.get(continues)
        rollout = StoredRollout(group_id) if lost is None else lost.copy(group_id)
        if self.log is not None:
            self.log.begin(rollout_id, group_id, 0.0, rollout if lost is not None else None)
        self._rollouts[rollout_id] = rollout
        self.bytes_held += rollout.num_bytes

    def new_part(self, chunk: Chunk, end: int | None = None) -> Chunk:
        """The part of a chunk that is new, since an engine that joins again repeats tokens.

        It follows the tokens held, or the first `end` tokens if others of its message come before
        it. Raises `ProtocolError` for a chunk that no correct engine sends.
        """
        rollout = self._rollout(chunk.rollout_id)
        _check_form(chunk)
        offset, num_tokens = chunk.offset, len(chunk.tokens) // 4
        end = rollout.num_tokens if end is None else end
        if not 0 <= offset <= end:
            raise ProtocolError(
                f"rollout {chunk.rollout_id}: a chunk begins at token {offset}, "
                f"but {end} tokens came before it"
            )
        if offset + num_tokens > self.max_context:
            raise ProtocolError(
                f"rollout {chunk.rollout_id} has {offset + num_tokens} tokens, "
                f"including its prompt; model.max_context={self.max_context} is the limit"
            )
        num_repeated = min(end - offset, num_tokens)
        if not num_repeated:
            return chunk
        _check_repeated(rollout, chunk, num_repeated)
        return msgspec.structs.replace(
            chunk,
            offset=offset + num_repeated,
            tokens=chunk.tokens[4 * num_repeated :],
            logprobs=chunk.logprobs[4 * num_repeated :],
        )

    def append(self, *chunks: Chunk) -> None:
        """Store the new parts of chunks of rollouts that decode.

        Raises `ProtocolError`, with nothing stored, for a value that no correct engine sends.
        """
        _check_values(chunks, self.vocab_size)
        for chunk in chunks:
            if chunk.tokens:
                self._append(chunk)

    def _append(self, chunk: Chunk) -> None:
        rollout = self._rollout(chunk.rollout_id)
        assert chunk.offset == rollout.num_tokens, f"rollout {chunk.rollout_id} has a gap"
        if self.log is not None:
            self.log.append(chunk, 0.0)
        rollout.append(Piece.of(chunk))
        self.bytes_held += 2 * len(chunk.tokens)

    def finish(self, rollout_id: int, text: str) -> None:
        """Keep the text of a response that has finished, for `samples.jsonl`."""
        rollout = self._rollout(rollout_id)
        if self.log is not None:
            self.log.finish(rollout_id, text, 0.0)
        rollout.text = text

    def text(self, rollout_id: int) -> str:
        """The text of a response that has finished."""
        return self._rollout(rollout_id).text

    def restore(self, rollouts: dict[int, StoredRollout]) -> None:
        """Load the tokens that the log held when the buffer restarted."""
        self._rollouts |= rollouts
        self.bytes_held += sum(rollout.num_bytes for rollout in rollouts.values())

    def num_tokens(self, rollout_id: int) -> int:
        """Number of tokens so far, with those of the prompt. The next chunk begins there."""
        return self._rollout(rollout_id).num_tokens

    def num_sampled(self, rollout_id: int) -> int:
        """Number of sampled tokens so far, which is the rollout's length in the core."""
        return self._rollout(rollout_id).num_sampled

    def oldest_version(self, rollout_id: int) -> int:
        """The version of the oldest sampled token. Raises `ProtocolError` if there is none."""
        versions = [version for sampled, version, _ in self._rollout(rollout_id).runs if sampled]
        if not versions:
            raise ProtocolError(
                f"rollout {rollout_id} has no sampled token, so no policy version: its engine "
                "must send chunks before it finishes"
            )
        return min(versions)

    def prefix(self, rollout_id: int) -> bytes:
        """The sampled tokens so far (int32), from which another engine continues."""
        rollout = self._rollout(rollout_id)
        if not rollout.num_sampled:
            return b""  # as a rule
        return b"".join(bytes(part) for part, sampled in _spans(rollout) if sampled)

    def discard(self, rollout_id: int) -> None:
        """Forget a rollout. No-op if it is not held."""
        rollout = self._rollouts.pop(rollout_id, None)
        if rollout is not None:
            self.bytes_held -= rollout.num_bytes
            self.ended.append(rollout_id)

    def trajectory(
        self, rollout_id: int, reward: float, truncated: bool, advantage: float
    ) -> Trajectory:
        """The whole rollout, in the learner's format. It stays held until it is discarded."""
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
                [
                    (b"\1" if sampled else b"\0") * num_tokens
                    for sampled, _, num_tokens in rollout.runs
                ]
            ),
            actor_logprobs=bytes(rollout.logprobs),
            versions=versions,
            reward=reward,
            truncated=truncated,
            advantage=advantage,
        )

    def _rollout(self, rollout_id: int) -> StoredRollout:
        rollout = self._rollouts.get(rollout_id)
        if rollout is None:
            raise ProtocolError(
                f"rollout {rollout_id} is not held: it was never opened here, or was discarded"
            )
        return rollout


def _spans(rollout: StoredRollout) -> Iterable[tuple[bytearray, bool]]:
    start = 0
    for sampled, _, num_tokens in rollout.runs:
        yield rollout.tokens[start : start + 4 * num_tokens], sampled
        start += 4 * num_tokens


def _check_repeated(rollout: StoredRollout, chunk: Chunk, num_tokens: int) -> None:
    """Raise `ProtocolError` unless the first `num_tokens` of a chunk equal those held."""
    start, end = chunk.offset, chunk.offset + num_tokens
    sampled, version, tokens, logprobs = Piece.of(chunk)
    if (
        bytes(rollout.tokens[4 * start : 4 * end]) != tokens[: 4 * num_tokens]
        or bytes(rollout.logprobs[4 * start : 4 * end]) != logprobs[: 4 * num_tokens]
        or any(run != (sampled, version) for run in _runs_within(rollout, start, end))
    ):
        raise ProtocolError(
            f"rollout {chunk.rollout_id}: tokens {start}..{end - 1} differ from those sent before. "
            "If another engine began the rollout, both engines must have the same tokenizer and "
            "chat template"
        )


def _runs_within(rollout: StoredRollout, start: int, end: int) -> Iterable[tuple[bool, int]]:
    """(sampled, version) of each run that overlaps tokens `start`..`end`."""
    position = 0
    for sampled, version, num_tokens in rollout.runs:
        if position < end and start < position + num_tokens:
            yield sampled, version
        position += num_tokens


def _check_form(chunk: Chunk) -> None:
    sampled, num_bytes = chunk.sampled, len(chunk.tokens)
    if num_bytes % 4:
        error = f"tokens are {num_bytes} bytes; int32 needs a multiple of 4"
    elif len(chunk.logprobs) != (num_bytes if sampled else 0):
        expected = (
            f"{num_bytes} bytes, one float32 per sampled token"
            if sampled
            else "none, since its tokens were given"
        )
        error = f"logprobs are {len(chunk.logprobs)} bytes; expected {expected}"
    elif sampled and chunk.version < 0:
        error = (
            f"version is {chunk.version}; sampled tokens need the policy version that "
            "sampled them, 0 or more"
        )
    else:
        return
    raise ProtocolError(f"rollout {chunk.rollout_id}: a chunk's {error}")


def _check_values(chunks: Sequence[Chunk], vocab_size: int) -> None:
    """Check all chunks of a message together, and each alone only to name the one at fault."""
    tokens = np.frombuffer(b"".join([chunk.tokens for chunk in chunks]), TOKENS)
    logprobs = np.frombuffer(b"".join([chunk.logprobs for chunk in chunks]), LOGPROBS)
    in_vocab = np.maximum.reduce(tokens, initial=0) < vocab_size
    is_finite = np.count_nonzero(np.isfinite(logprobs)) == logprobs.size
    if in_vocab and is_finite:
        return
    if len(chunks) > 1:
        for chunk in chunks:
            _check_values([chunk], vocab_size)
    where = f"rollout {chunks[0].rollout_id}: a chunk's"
    if not in_vocab:
        raise ProtocolError(
            f"{where} tokens hold an id that is negative or not below the vocabulary's size, "
            f"{vocab_size}: the learner has no embedding for it"
        )
    raise ProtocolError(
        f"{where} logprobs hold a value that is not finite; training on it would destroy the policy"
    )
