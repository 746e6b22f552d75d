"""What an engine has sampled: one request's tokens as they come, and what decoding them cost.

Owns two ledgers without I/O: `Generation` (tokens, logprobs, and which policy version sampled each)
and `Meter` (batch, time per token, occupied slots). Never talks to an engine or a socket, and
imports no vLLM, so that a worker is tested without one. Filled by `actors.inference.engine`, emptied by
`actors.worker`.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

BASE_VERSION = -1  # the weights an engine starts with, before any published policy


class EngineDied(Exception):
    """vLLM's processes ended by themselves: nothing will be sampled any more."""


@dataclass(slots=True)
class TokenRun:
    """Consecutive sampled tokens of one policy version: int32 ids beside float32 logprobs."""

    version: int
    tokens: array[int]
    logprobs: array[float]


class Generation:
    """One request in an engine. Made inside a running event loop.

    `tokens` holds everything sampled so far; `finished` ends with "stop", "length" or "abort", or
    with the exception that ended it. `prompt_logprobs`: of each token of the prompt after the
    first, if they were asked for.
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
        """Tokens that `take` would return."""
        return len(self.tokens) - self.num_taken

    def extend(self, version: int, token_ids: Iterable[int], logprobs: Iterable[float]) -> None:
        """Tokens sampled by policy `version`, each with its log-probability under the distribution
        that was sampled.
        """
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
        """Have `take` return all tokens after the first `num_taken` again."""
        self.num_taken = min(num_taken, len(self.tokens))

    def end(self, outcome: str | Exception) -> None:
        """Settle `finished`, once; later outcomes are ignored."""
        if self.finished.done():
            return
        if isinstance(outcome, str):
            self.finished.set_result(outcome)
        else:
            self.finished.set_exception(outcome)


@dataclass(frozen=True, slots=True)
class Measurement:
    """An engine between two reports.

    `batch` and `ms_per_token` belong together: the same intervals, weighted by time.

    Both are 0 if no request decoded two tokens in a row.
    """

    batch: float
    ms_per_token: float
    tokens_per_s: float
    busy_frac: float


class Meter:
    """Latency and occupancy of one engine, from its steps.

    Every `time_s` is of one monotonic clock.
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
        """The engine reported one step: a token each of `num_tokens` requests, of which `num_ended`
        ended with it.

        The time since the last step is what the requests that decoded in both waited for a token.
        Where none went on from the last step, it was idle time and measures nothing.
        """
        if self._last_step_s is not None and self._decoding:
            interval_s = max(time_s - self._last_step_s, 0.0)
            self._decode_s += interval_s
            self._decoding_s += interval_s * num_tokens
            self._intervals += 1
        self._tokens += num_tokens
        self._last_step_s, self._decoding = time_s, num_tokens - num_ended

    def interrupt(self) -> None:
        """Decoding pauses for something else (a swap): the interval up to the next step measures
        nothing.
        """
        self._last_step_s = None

    def report(self, time_s: float) -> Measurement:
        """Return the measurements since the last report, and start the next one."""
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
