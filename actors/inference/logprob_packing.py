"""vLLM's scheduler, with the log-probabilities of a step in one array and a least duration.

vLLM sends three small arrays per request instead. Encoding, sending and decoding those takes longer
than the tokens themselves, and we read only the sampled tokens' own log-probabilities.
`actors.inference.engine._Router` unpacks the array. Runs in EngineCore's process, and does not
change the schedule. With `actors.min_step_ms` it prolongs steps, to emulate another machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
        left_s = self._started_s + least_ms / 1000 - time.monotonic()
        if left_s > 0:  # a sleep of 0 s takes 0.1 ms
            time.sleep(left_s)
        logprobs = model_runner_output.logprobs
        model_runner_output.logprobs = None  # vLLM would slice it for each request
        by_client = super().update_from_output(scheduler_output, model_runner_output)
        if logprobs is not None:
            for of_client in by_client.values():
                pack_logprobs(
                    of_client.outputs, logprobs.logprobs, model_runner_output.req_id_to_index
                )
        return by_client


def pack_logprobs(outputs: Sequence[Any], logprobs: np.ndarray, row_of: Mapping[str, int]) -> None:
    """Give the first output with a token the log-probabilities of all outputs' tokens.

    logprobs: float32 [requests of the step, 1 or more], the sampled token's own first.
    row_of: of a request, by its id.

    They become one array, float32 [tokens, 1], in the order of the outputs. Each has at most one
    token, because a run cannot use speculative decoding (`actors.inference.vllm_options`).
    """
    sampled = [output for output in outputs if output.new_token_ids]
    if sampled:
        rows = [row_of[output.request_id] for output in sampled]
        sampled[0].new_logprobs = LogprobsLists(NO_IDS, logprobs[rows, :1], NO_RANKS)
