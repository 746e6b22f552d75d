"""A simulated engine: continuous batching, a latency curve, a key-value cache, and preemption.

All rollouts in flight advance together, one token per PTL(batch). The state of an engine is thus
one number, `position` (tokens decoded since it started), and its next event is a position too: the
next finish, the next report, or a full cache. An engine costs one heap entry, however many rollouts
it holds. Never decides anything. Driven by `darts.simulate`.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from darts.sizing.latency import LatencyCurve

SLACK = 1e-6  # in tokens, since positions are floats
RESUME_FRAC = 0.95  # a preempted rollout resumes if the cache is then at most this full


@dataclass(slots=True, eq=False)
class SimRollout:
    """A rollout as the world knows it.

    `length` is its full length, and `origin` the engine's position at its token 0.
    """

    rollout_id: int
    group_id: int
    engine: SimEngine
    length: int
    truncated: bool
    reward: float
    oldest_version: int
    prompt_tokens: int
    tokens: int = 0  # sampled so far, while it is not decoding
    origin: float = 0.0
    decoding: bool = False

    def sampled(self) -> int:
        """Number of tokens sampled so far."""
        if not self.decoding:
            return self.tokens
        return min(self.length, int(self.engine.position - self.origin + SLACK))


class SimEngine:
    """One engine. Times are in seconds; `ptl_s[b]` is the time per token at batch b."""

    def __init__(
        self,
        engine_id: str,
        engine_type: str,
        slots: int,
        ptl_s: list[float],
        kv_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self.engine_id = engine_id
        self.engine_type = engine_type
        self.slots = slots
        self.ptl_s = ptl_s
        self.kv_tokens = kv_tokens
        self.chunk_tokens = chunk_tokens
        self.version = 0
        self.position = 0.0
        self.serial = 0  # number of the newest plan; older ones in the simulator's heap are void
        self.decoding: dict[int, SimRollout] = {}
        self.preempted: deque[SimRollout] = deque()
        self.occupied_slot_s = 0.0
        self.num_preemptions = 0
        self._time_s = 0.0
        self._paused_until_s = 0.0
        self._finishes: list[tuple[float, int]] = []
        self._next_report = math.inf
        self._target = math.inf
        self._kv_base = 0.0  # cache use is _kv_base + batch * position

    # Time
    # ----------------------------------------------------------------------------------------------

    def advance(self, time_s: float) -> None:
        """Decode until `time_s`."""
        batch = len(self.decoding)
        if batch:
            start = max(self._time_s, self._paused_until_s)
            if time_s > start:
                self.position = min(
                    self.position + (time_s - start) / self.ptl_s[batch], self._target
                )
        self.occupied_slot_s += (batch + len(self.preempted)) * (time_s - self._time_s)
        self._time_s = time_s

    def pause(self, seconds: float) -> None:
        self._paused_until_s = max(self._paused_until_s, self._time_s) + seconds

    def plan(self) -> float:
        """The time of the next event, provided that the batch stays the same; inf if idle.

        Voids earlier plans.
        """
        self.serial += 1
        batch = len(self.decoding)
        if not batch:
            self._target = math.inf
            return math.inf
        while not self._is_current(self._finishes[0]):
            heapq.heappop(self._finishes)
        full = (self.kv_tokens - self._kv_base) / batch if batch > 1 else math.inf
        self._target = max(self.position, min(self._finishes[0][0], self._next_report, full))
        return (
            max(self._time_s, self._paused_until_s)
            + (self._target - self.position) * self.ptl_s[batch]
        )

    def arrive(self, time_s: float) -> None:
        """Decode until `time_s`, the planned time of the next event."""
        target = self._target
        self.advance(time_s)
        self.position = target

    # What is due
    # ----------------------------------------------------------------------------------------------

    def finished(self) -> Iterator[SimRollout]:
        """Remove and yield the rollouts that have reached their length."""
        while self._finishes and self._finishes[0][0] <= self.position + SLACK:
            entry = heapq.heappop(self._finishes)
            if self._is_current(entry):
                rollout = self.decoding[entry[1]]
                self.remove(rollout)
                rollout.tokens = rollout.length
                yield rollout

    def report_due(self) -> bool:
        if self._next_report > self.position + SLACK:
            return False
        self._next_report = self.position + self.chunk_tokens
        return True

    # Rollouts
    # ----------------------------------------------------------------------------------------------

    def admit(self, rollout: SimRollout) -> bool:
        """Take a new rollout. False if it has to queue, since the cache has no room for it."""
        rollout.engine = self
        needed = rollout.prompt_tokens + rollout.tokens
        if self.preempted or (
            self.decoding and self._cache_use() + needed > RESUME_FRAC * self.kv_tokens
        ):
            self.preempted.append(rollout)
            return False
        self._add(rollout)
        return True

    def _add(self, rollout: SimRollout) -> None:
        """Start decoding, or resume it after `rollout.tokens` tokens."""
        if not self.decoding:
            self._next_report = self.position + self.chunk_tokens
        rollout.decoding, rollout.origin = True, self.position - rollout.tokens
        self.decoding[rollout.rollout_id] = rollout
        self._kv_base += rollout.prompt_tokens - rollout.origin
        heapq.heappush(self._finishes, (rollout.origin + rollout.length, rollout.rollout_id))

    def remove(self, rollout: SimRollout) -> None:
        """Stop decoding. `rollout.tokens` is then the number of tokens sampled."""
        if not rollout.decoding:
            self.preempted.remove(rollout)
            return
        rollout.tokens = rollout.sampled()
        rollout.decoding = False
        del self.decoding[rollout.rollout_id]
        self._kv_base = (
            self._kv_base - (rollout.prompt_tokens - rollout.origin) if self.decoding else 0.0
        )

    def relieve_cache(self) -> float:
        """Preempt the youngest while the cache is full; resume the oldest while it has room.

        Returns the number of tokens to recompute.
        """
        while len(self.decoding) > 1 and self._cache_use() >= self.kv_tokens - SLACK:
            youngest = next(reversed(self.decoding.values()))
            self.remove(youngest)
            self.preempted.appendleft(youngest)
            self.num_preemptions += 1
        recomputed = 0.0
        while self.preempted:
            needed = self.preempted[0].prompt_tokens + self.preempted[0].tokens
            if self.decoding and self._cache_use() + needed > RESUME_FRAC * self.kv_tokens:
                break
            recomputed += needed
            self._add(self.preempted.popleft())
        return recomputed

    def _is_current(self, finish: tuple[float, int]) -> bool:
        """False if the rollout has left, or was preempted and resumed, in the meantime."""
        position, rollout_id = finish
        rollout = self.decoding.get(rollout_id)
        return rollout is not None and rollout.origin + rollout.length == position

    def _cache_use(self) -> float:
        return self._kv_base + len(self.decoding) * self.position


def ptl_table(
    batches: list[float], ms_per_token: list[float], speed: float, slots: int
) -> list[float]:
    """Seconds per token at batch 0 .. slots, interpolated and extended by `LatencyCurve`."""
    curve = LatencyCurve.from_points(zip(batches, ms_per_token, strict=True))
    return [curve.ptl(batch) / (1e3 * speed) for batch in range(slots + 1)]
