"""vLLM's scheduler, with the log-probabilities of a step in one array.

vLLM sends three small arrays per request instead. Encoding, sending and decoding those takes longer
than the tokens themselves, and we read only the sampled tokens' own log-probabilities.
`actors.inference.engine._Router` unpacks the array. Runs in EngineCore's process, and does not
change the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists

NO_IDS, NO_RANKS = np.empty((0, 0), dtype=np.int32), np.empty(0, dtype=np.int32)


class CompactScheduler(Scheduler):
    """The scheduler that vLLM gets as `scheduler_cls`."""

    def update_from_output(self, *args: Any, **options: Any) -> dict[int, Any]:
        by_client = super().update_from_output(*args, **options)
        for of_client in by_client.values():
            pack_logprobs(of_client.outputs)
        return by_client


def pack_logprobs(outputs: Sequence[Any]) -> None:
    """Move all sampled tokens' log-probabilities to the first output that has any.

    They become one array, float32 [tokens, 1], in the order of the outputs.
    """
    sampled = [output for output in outputs if output.new_logprobs is not None]
    if not sampled:
        return
    packed = np.concatenate([output.new_logprobs.logprobs[:, :1] for output in sampled])
    for output in sampled:
        output.new_logprobs = None
    sampled[0].new_logprobs = LogprobsLists(NO_IDS, packed, NO_RANKS)
