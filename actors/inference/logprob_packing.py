"""vLLM's scheduler, with the log-probabilities of a step in one array and a least duration.

vLLM sends three small arrays per request instead. Encoding, sending and decoding those takes longer
than the tokens themselves, and we read only the sampled tokens' own log-probabilities.
`actors.inference.engine._Router` unpacks the array. Runs in EngineCore's process, and does not
change the schedule. With `actors.min_step_ms` it prolongs steps, to emulate another machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from actors.inference.step_pace import OPTION, least_step_ms

NO_IDS, NO_RANKS = np.empty((0, 0), dtype=np.int32), np.empty(0, dtype=np.int32)


class CompactScheduler(Scheduler):
    """The scheduler that vLLM gets as `scheduler_cls`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        ours = self.vllm_config.additional_config
        self._curve = ours.get(OPTION, []) if isinstance(ours, dict) else []
        self._started_s = 0.0

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        self._started_s = time.monotonic()
        return super().schedule(*args, **options)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """The outputs of a step, once it has lasted its least duration.

        The sleep is inside the step, so that aborts and swaps wait for its end, as on a GPU.
        """
        least_ms = least_step_ms(self._curve, len(scheduler_output.num_scheduled_tokens))
        time.sleep(max(0.0, self._started_s + least_ms / 1000 - time.monotonic()))
        by_client = super().update_from_output(scheduler_output, model_runner_output)
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
