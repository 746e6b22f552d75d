"""Engines, their slots, and which of them takes the next group. Driven by `darts.core.Core`; does no I/O.

A whole group goes to one engine: its prompt is prefilled once and its lengths grow at one pace. The engine is the one
whose predicted latency per token, at the batch it would then have, is lowest; among engines of one type, which share a
latency curve, that is the least loaded, kept in a heap so that a thousand engines cost no more than ten.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from darts.groups import Group, Rollout
from darts.latency import LatencyCurve


@dataclass(slots=True, eq=False)
class Engine:
    """One engine. `backlog`: groups placed here whose rollouts wait for a slot, oldest first."""

    engine_id: str
    engine_type: str
    slots: int
    version: int
    in_flight: dict[int, Rollout] = field(default_factory=dict)
    backlog: deque[Group] = field(default_factory=deque)
    queued: int = 0  # rollouts in the backlog

    @property
    def load(self) -> int:
        return len(self.in_flight) + self.queued

    @property
    def has_room(self) -> bool:
        return self.load < self.slots


class Engines:
    """All engines by id, with the least loaded of each type at hand."""

    def __init__(self) -> None:
        self.by_id: dict[str, Engine] = {}
        self.curves: dict[str, LatencyCurve] = {}
        self._heaps: dict[str, list[tuple[int, int, Engine]]] = {}
        self._serial = 0

    def join(self, engine: Engine) -> None:
        self.by_id[engine.engine_id] = engine
        self.curves.setdefault(engine.engine_type, LatencyCurve())
        self._heaps.setdefault(engine.engine_type, [])
        self.touch(engine)

    def leave(self, engine: Engine) -> None:
        del self.by_id[engine.engine_id]

    def touch(self, engine: Engine) -> None:
        """The load changed: without this call the engine is not offered again."""
        if not engine.has_room or engine.version < 0:
            return
        heap = self._heaps[engine.engine_type]
        self._serial += 1
        heapq.heappush(heap, (engine.load, self._serial, engine))
        if len(heap) > 64 + 8 * len(self.by_id):
            heap[:] = [entry for entry in heap if self._is_current(entry)]
            heapq.heapify(heap)

    def best_with_room(self, batch_of_group: int) -> Engine | None:
        """The engine with a free slot on which a group of `batch_of_group` rollouts would decode fastest."""
        best, best_ms = None, float("inf")
        for engine_type, heap in self._heaps.items():
            while heap and not self._is_current(heap[0]):
                heapq.heappop(heap)
            if not heap:
                continue
            engine = heap[0][2]
            ms = self.curves[engine_type].ptl(min(engine.load + batch_of_group, engine.slots))
            if ms < best_ms:
                best, best_ms = engine, ms
        return best

    def least_loaded(self, min_version: int) -> Engine | None:
        """Where to continue a group whose engine is gone: any engine whose policy is at least `min_version`."""
        able = (e for e in self.by_id.values() if e.version >= max(min_version, 0))
        return min(able, key=lambda e: (e.load / e.slots, e.engine_id), default=None)

    def _is_current(self, entry: tuple[int, int, Engine]) -> bool:
        load, _, engine = entry
        return (
            engine.has_room and engine.load == load and self.by_id.get(engine.engine_id) is engine
        )
