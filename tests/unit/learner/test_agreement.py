"""A difference between engines and learner ends a run if it persists, not if it occurs once."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import Config
from learner.agreement import IN_FLIGHT_NATS, Agreement, Disagreement
from learner.metrics import TokenSums


def agreement(dtype: Any = "float32", max_logprob_diff: float = 0.0) -> Agreement:
    config = Config()
    config.model.dtype, config.learner.max_logprob_diff = dtype, max_logprob_diff
    return Agreement(config)


def fresh(nats: float) -> TokenSums:
    """A step with 50 tokens in responses of only the newest weights, and some in responses that
    were in flight during a swap, which must not matter.
    """
    return TokenSums(current=100, current_logprob_diff=900, fresh=50, fresh_logprob_diff=50 * nats)


def in_flight(nats: float) -> TokenSums:
    return TokenSums(current=100, current_logprob_diff=100 * nats)


def stops_at(judge: Agreement, steps: list[TokenSums]) -> int | None:
    for step, sums in enumerate(steps):
        try:
            judge.judge(step, sums)
        except Disagreement:
            return step
    return None


@pytest.mark.parametrize(
    ("nats", "step"),
    [
        ([0.2], 0),  # wrong from the start: stops at once
        ([0.001, 0.2], None),  # one bad step is forgiven
        ([0.001, 0.2, 0.001, 0.001, 0.2], None),
        ([0.001, 0.2, 0.2], 2),  # a swap that went wrong stays wrong
        ([0.001, 0.2, 0.001, 0.2], 3),
        ([0.001] * 5, None),
    ],
)
def test_one_bad_step_is_forgiven_and_two_of_three_are_not(
    nats: list[float], step: int | None
) -> None:
    assert stops_at(agreement(), [fresh(value) for value in nats]) == step


def test_a_step_without_tokens_of_the_newest_weights_is_not_judged() -> None:
    steps = [fresh(0.001), fresh(0.2), TokenSums(), TokenSums(), fresh(0.2)]
    assert stops_at(agreement(), steps) == 4


def test_responses_in_flight_may_use_the_cache_of_older_weights() -> None:
    assert stops_at(agreement(), [in_flight(IN_FLIGHT_NATS)] * 3) is None
    assert stops_at(agreement(), [fresh(IN_FLIGHT_NATS)] * 3) == 0
    # The smallest difference measured after a wrong swap.
    assert stops_at(agreement(), [in_flight(0.13)] * 3) == 0


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"),
    [("float32", 0.004, 0.006), ("float16", 0.04, 0.06), ("bfloat16", 0.09, 0.11)],
)
def test_each_dtype_has_its_bound(dtype: str, right: float, wrong: float) -> None:
    assert stops_at(agreement(dtype), [fresh(right)]) is None
    assert stops_at(agreement(dtype), [fresh(wrong)]) == 0
    assert stops_at(agreement(dtype, max_logprob_diff=1.0), [fresh(wrong)]) is None
    assert stops_at(agreement(dtype, max_logprob_diff=0.001), [fresh(right)]) == 0


def test_the_message_names_step_number_bound_and_cause() -> None:
    with pytest.raises(Disagreement) as error:
        agreement().judge(7, fresh(0.134))
    for words in ("step 7", "0.134", "learner.max_logprob_diff allows 0.005", "float32", "swap"):
        assert words in str(error.value)
