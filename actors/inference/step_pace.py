"""The least duration of a decoding step, by batch: the latency of another machine, emulated.

Owns the curve of `actors.min_step_ms` and its interpolation. Never runs a model. Used by
`actors.inference.logprob_packing.CompactScheduler`, in EngineCore's process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

OPTION = "min_step_ms"  # in vLLM's `additional_config`


def least_step_ms(curve: Sequence[Sequence[float]], batch: int) -> float:
    """Milliseconds for a step of `batch` requests, linear between the points (batch, ms).

    Constant beyond both ends. 0 without any point.
    """
    if not curve:
        return 0.0
    after = bisect_left(curve, batch, key=lambda point: point[0])
    if after == 0:
        return curve[0][1]
    if after == len(curve):
        return curve[-1][1]
    (below, ms_below), (above, ms_above) = curve[after - 1], curve[after]
    return ms_below + (ms_above - ms_below) * (batch - below) / (above - below)
