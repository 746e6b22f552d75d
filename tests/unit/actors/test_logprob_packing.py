"""`actors.inference.logprob_packing`: the log-probabilities of a step in one array."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.inference.logprob_packing import pack_logprobs

LOGPROBS = np.array([[-1.0, -9.0], [-2.0, -9.0], [-3.0, -9.0]], dtype=np.float32)
ROWS = {"a": 0, "b": 1, "c": 2}


def output(request_id: str, *token_ids: int) -> Any:
    return SimpleNamespace(request_id=request_id, new_token_ids=list(token_ids), new_logprobs=None)


def test_they_are_in_the_order_of_the_outputs_which_is_not_that_of_the_batch() -> None:
    outputs = [output("c", 5), output("a", 6), output("b", 7)]
    pack_logprobs(outputs, LOGPROBS, ROWS)
    assert outputs[0].new_logprobs.logprobs.tolist() == [[-3.0], [-1.0], [-2.0]]
    assert [one.new_logprobs for one in outputs[1:]] == [None, None]


def test_an_output_without_a_token_has_none() -> None:
    outputs = [output("a"), output("c", 5), output("gone"), output("b", 7)]
    pack_logprobs(outputs, LOGPROBS, ROWS)
    assert outputs[1].new_logprobs.logprobs.tolist() == [[-3.0], [-2.0]]
    assert [outputs[i].new_logprobs for i in (0, 2, 3)] == [None] * 3


def test_a_step_without_tokens_has_none() -> None:
    outputs = [output("a"), output("gone")]
    pack_logprobs(outputs, LOGPROBS, ROWS)
    assert [one.new_logprobs for one in outputs] == [None, None]
