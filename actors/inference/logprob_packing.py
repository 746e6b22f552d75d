"""vLLM's scheduler, with the log-probabilities of a step in one array instead of three small ones
for every request.

Runs in EngineCore's process. Encoding, sending and decoding those arrays costs more than the tokens
that they belong to; the sampled tokens' own log-probabilities are all that is read here.
`actors.inference.engine._Router` unpacks them. Changes nothing that is scheduled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists

NO_IDS, NO_RANKS = np.empty((0, 0), dtype=np.int32), np.empty(0, dtype=np.int32)


class CompactScheduler(Scheduler):
    """Given to vLLM as `scheduler_cls`."""

    def update_from_output(self, *args: Any, **options: Any) -> dict[int, Any]:
        by_client = super().update_from_output(*args, **options)
        for of_client in by_client.values():
            pack_logprobs(of_client.outputs)
        return by_client


def pack_logprobs(outputs: Sequence[Any]) -> None:
    """Moves all sampled tokens' log-probabilities to the first output that has any, in the order of
    the outputs: float32 [tokens, 1].
    """
    sampled = [output for output in outputs if output.new_logprobs is not None]
    if not sampled:
        return
    packed = np.concatenate([output.new_logprobs.logprobs[:, :1] for output in sampled])
    for output in sampled:
        output.new_logprobs = None
    sampled[0].new_logprobs = LogprobsLists(NO_IDS, packed, NO_RANKS)
