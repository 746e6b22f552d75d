"""Append rates of the buffer's logs, with and without fsync, for `python -m tools.bench buffer`.

The loop polls after each record, as the buffer's loop does after each message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from statistics import median

from buffer.records.segments import SegmentLog
from buffer.records.token_log import TokenLog
from buffer.wire.messages import Chunk

FSYNC_S = 0.05
EVENT_BYTES = 100
ROLLOUTS, MAX_TOKENS, CHUNK_TOKENS = 256, 2000, 8
WARM_UP_ROUNDS = 1

Append = Callable[[int], object]


def append_rates(folder: Path, num_records: int, rounds: int) -> None:
    """Print appends per second to logs in `folder`, which chooses the disk to measure."""
    print(f"{num_records:,} appends per round, median of {rounds} rounds, in {folder}")
    for name, run in (("events", _events), ("chunks", _chunks)):
        durable, free = [], []
        # Both take turns, so that noise of the machine affects them alike.
        for index in range(WARM_UP_ROUNDS + rounds):
            rates = [
                run(folder / f"{name}-{index}-{fsync_s}", fsync_s, num_records)
                for fsync_s in (FSYNC_S, inf)
            ]
            if index >= WARM_UP_ROUNDS:
                durable.append(rates[0])
                free.append(rates[1])
        ratio = median(a / b for a, b in zip(durable, free, strict=True))
        size = f"{EVENT_BYTES} bytes" if name == "events" else f"{CHUNK_TOKENS} tokens"
        print(
            f"{name} of {size}: {median(durable):,.0f}/s with fsync every {1000 * FSYNC_S:.0f} ms, "
            f"{median(free):,.0f}/s without (ratio {ratio:.2f})"
        )


def _events(folder: Path, fsync_s: float, num_records: int) -> float:
    payload = bytes(EVENT_BYTES)
    with ThreadPoolExecutor(1) as executor:
        log, _ = SegmentLog.open(folder, fsync_s=fsync_s, executor=executor)
        rate = _rate(lambda index: log.append(payload, 0.0), log, num_records)
        log.close()
    return rate


def _chunks(folder: Path, fsync_s: float, num_records: int) -> float:
    """Rollouts take turns; each is replaced after at most `MAX_TOKENS`, which frees segments."""
    sampled = bytes(4 * CHUNK_TOKENS)
    current = list(range(ROLLOUTS))
    offsets = [0] * ROLLOUTS
    limits = [MAX_TOKENS * (slot + 1) // ROLLOUTS for slot in range(ROLLOUTS)]
    with ThreadPoolExecutor(1) as executor:
        log, _ = TokenLog.open(folder, (), fsync_s=fsync_s, executor=executor)
        for rollout_id in current:
            log.begin(rollout_id, 0, 0.0)

        def append(index: int) -> None:
            slot = index % ROLLOUTS
            if offsets[slot] >= limits[slot]:
                log.discard(current[slot])
                current[slot] += ROLLOUTS
                offsets[slot], limits[slot] = 0, MAX_TOKENS
                log.begin(current[slot], 0, 0.0)
            chunk = Chunk(
                rollout_id=current[slot],
                offset=offsets[slot],
                sampled=True,
                version=0,
                tokens=sampled,
                logprobs=sampled,
            )
            log.append(chunk, 0.0)
            offsets[slot] += CHUNK_TOKENS

        rate = _rate(append, log.log, num_records)
        log.close()
    return rate


def _rate(append: Append, log: SegmentLog, num_records: int) -> float:
    began = time.perf_counter()
    for index in range(num_records):
        append(index)
        log.poll()
    return num_records / (time.perf_counter() - began)
