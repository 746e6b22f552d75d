"""The output of an engine: the tokens of each request as they come, and their latency.

Owns two records without I/O: `Generation` (tokens, logprobs, and the policy version that sampled
each) and `Meter` (batch, time per token, occupied slots). Never talks to an engine or a socket, and
does not import vLLM, so that a worker can be tested without it. Filled by
`actors.inference.engine`, emptied by `actors.worker`.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

BASE_VERSION = -1  # the weights of an engine at its start, before any published policy


class EngineDied(Exception):
    """vLLM's processes ended by themselves, so nothing more will be sampled."""


@dataclass(slots=True)
class TokenRun:
    """Consecutive sampled tokens of one policy version: int32 ids and float32 logprobs."""

    version: int
    tokens: array[int]
    logprobs: array[float]


class Generation:
    """One request in an engine. Create it inside a running event loop.

    `tokens` holds everything sampled so far. `finished` resolves to "stop", "length" or "abort", or
    to the exception that ended the request. `prompt_logprobs` holds those of each prompt token
    after the first, if they were requested.
    """

    __slots__ = ("request_id", "tokens", "prompt_logprobs", "finished", "num_taken", "_runs")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.tokens: array[int] = array("i")
        self.prompt_logprobs: array[float] = array("f")
        self.finished: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.num_taken = 0
        self._runs: list[TokenRun] = []

    @property
    def num_pending(self) -> int:
        """Number of tokens that `take` would return."""
        return len(self.tokens) - self.num_taken

    def extend(self, version: int, token_ids: Iterable[int], logprobs: Iterable[float]) -> None:
        """Add tokens sampled by policy `version`, each with its log-probability when sampled."""
        if not self._runs or self._runs[-1].version != version:
            self._runs.append(TokenRun(version, array("i"), array("f")))
        run, before = self._runs[-1], len(self._runs[-1].tokens)
        run.tokens.extend(token_ids)
        run.logprobs.extend(logprobs)
        self.tokens.extend(run.tokens[before:])

    def take(self) -> list[TokenRun]:
        """Return the tokens sampled since the last take, in order, one run per policy version."""
        taken: list[TokenRun] = []
        skipped = self.num_taken
        for run in self._runs:
            if skipped < len(run.tokens):
                taken.append(TokenRun(run.version, run.tokens[skipped:], run.logprobs[skipped:]))
            skipped = max(0, skipped - len(run.tokens))
        self.num_taken = len(self.tokens)
        return taken

    def rewind(self, num_taken: int) -> None:
        """Make `take` return all tokens after the first `num_taken` again."""
        self.num_taken = min(num_taken, len(self.tokens))

    def end(self, outcome: str | Exception) -> None:
        """Resolve `finished`. Only the first outcome counts."""
        if self.finished.done():
            return
        if isinstance(outcome, str):
            self.finished.set_result(outcome)
        else:
            self.finished.set_exception(outcome)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The activity of an engine between two reports.

    `batch` and `ms_per_token` are averages over the same intervals, weighted by time. Both are 0 if
    no request decoded two tokens in a row.
    """

    batch: float
    ms_per_token: float
    tokens_per_s: float
    busy_frac: float


class Meter:
    """Latency and occupancy of one engine, from its steps.

    All times are from one monotonic clock, in seconds.
    """

    def __init__(self, slots: int, time_s: float) -> None:
        self._slots = slots
        self._occupied = 0
        self._occupied_since_s = time_s
        self._last_step_s: float | None = None
        self._decoding = 0
        self._start(time_s)

    def _start(self, time_s: float) -> None:
        self._since_s = time_s
        self._occupied_slot_s = self._decode_s = self._decoding_s = 0.0
        self._intervals = self._tokens = 0

    def occupy(self, num_requests: int, time_s: float) -> None:
        """The engine now holds `num_requests`, waiting ones included."""
        self._occupied_slot_s += self._occupied * (time_s - self._occupied_since_s)
        self._occupied, self._occupied_since_s = num_requests, time_s

    def step(self, time_s: float, num_tokens: int, num_ended: int) -> None:
        """Count one step: one token for each of `num_tokens` requests, of which `num_ended` ended.

        The time since the last step is the latency of the requests that decoded in both steps. If
        there are none, the engine was idle, and the time is not counted.
        """
        if self._last_step_s is not None and self._decoding:
            interval_s = max(time_s - self._last_step_s, 0.0)
            self._decode_s += interval_s
            self._decoding_s += interval_s * num_tokens
            self._intervals += 1
        self._tokens += num_tokens
        self._last_step_s, self._decoding = time_s, num_tokens - num_ended

    def interrupt(self) -> None:
        """Do not count the interval up to the next step, because a swap interrupts decoding."""
        self._last_step_s = None

    def report(self, time_s: float) -> Measurement:
        """Return the measurement since the last report, and start the next one."""
        self.occupy(self._occupied, time_s)
        elapsed_s = max(time_s - self._since_s, 1e-9)
        measured = self._decode_s > 0
        measurement = Measurement(
            batch=self._decoding_s / self._decode_s if measured else 0.0,
            ms_per_token=1000 * self._decode_s / self._intervals if measured else 0.0,
            tokens_per_s=self._tokens / elapsed_s,
            busy_frac=min(self._occupied_slot_s / (elapsed_s * self._slots), 1.0),
        )
        self._start(time_s)
        return measurement
