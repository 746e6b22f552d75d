"""The built-in task: its scoring, and the form of its traces."""

from __future__ import annotations

from random import Random
from statistics import fmean

import pytest

from buffer.data.tagged_sum import (
    CLEAN,
    FULL,
    MAX_TRACE_TOKENS,
    SINGLE_PASS,
    TOKEN,
    draw_problem,
    draw_trace,
    score,
    solve,
)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("A6=06,B6=12,C2=14,D8=22.#22<eos>", 1.0),
        ("#22<eos>", 1.0),
        ("#21#22<eos>", 1.0),  # the text after the last # counts
        ("#22#21<eos>", 0.0),
        ("#21<eos>", 0.0),
        ("#22", 0.0),  # has no end token
        ("#22<eos><eos>", 0.0),
        ("#22.<eos>", 0.0),
        ("#022<eos>", 0.0),
        ("22<eos>", 0.0),
        ("", 0.0),
    ],
)
def test_a_right_answer_has_the_sum_after_the_last_hash_and_an_end_token(
    response: str, reward: float
) -> None:
    assert score("A6B6C2D8=", response) == reward


def test_a_sum_below_ten_has_two_digits() -> None:
    assert solve("A1B1C1=") == "03"
    assert score("A1B1C1=", "#03<eos>") == 1.0
    assert score("A1B1C1=", "#3<eos>") == 0.0


def test_a_text_that_is_no_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="A6B6C2D8="):
        solve("2+2=")


def test_problems_are_tagged_in_order_with_three_to_six_digits() -> None:
    random = Random(0)
    problems = [draw_problem(random) for _ in range(400)]
    assert {problem[0:-1:2] for problem in problems} == {"ABC", "ABCD", "ABCDE", "ABCDEF"}
    assert {char for problem in problems for char in problem[1::2]} == set("123456789")
    assert {len(draw_problem(random, max_digits=3)) for _ in range(20)} == {7}


def test_a_single_clean_pass_is_the_running_total() -> None:
    assert draw_trace(Random(0), "A6B6C2D8=", SINGLE_PASS) == "A6=06,B6=12,C2=14,D8=22.#22<eos>"
    assert len(TOKEN.findall("A6=06,B6=12,C2=14,D8=22.#22<eos>")) == 28


def test_all_clean_traces_are_right_and_some_take_several_passes() -> None:
    random = Random(1)
    traces = [draw_trace(random, "A6B6C2D8=", CLEAN) for _ in range(300)]
    assert all(score("A6B6C2D8=", trace) == 1.0 for trace in traces)
    assert any("again" in trace for trace in traces) and any("hmm" in trace for trace in traces)
    assert not any("no." in trace for trace in traces)


def test_full_traces_hold_both_patterns_within_the_length_limit() -> None:
    """A second look pays, and dithering makes no difference but to the length."""
    random = Random(2)
    single, careful, dithering = list[float](), list[float](), list[float]()
    for _ in range(4000):
        trace = draw_trace(random, "A6B6C2D8=", FULL)
        length, reward = len(TOKEN.findall(trace)), score("A6B6C2D8=", trace)
        assert length <= MAX_TRACE_TOKENS
        habit = careful if "again" in trace else single if length == 28 else dithering
        habit.append(reward)
    assert min(map(len, (single, careful, dithering))) > 100
    assert fmean(careful) > fmean(single) + 0.15
    assert abs(fmean(dithering) - fmean(single)) < 0.06  # three standard errors


def test_mistakes_persist_but_never_touch_the_first_item() -> None:
    random = Random(3)
    for _ in range(300):
        assert draw_trace(random, "A6B6C2D8=", FULL).startswith("A6=06,")


def test_the_same_random_draws_the_same_traces() -> None:
    assert [draw_trace(Random(4), "A1B2C3=") for _ in range(3)] == [
        draw_trace(Random(4), "A1B2C3=") for _ in range(3)
    ]
