"""Prompts that a run skips are counted, explained and limited in number."""

from __future__ import annotations

import pytest

from buffer.data.skipped_prompts import MAX_REASONS, SkippedPrompts
from buffer.wire.messages import PromptPayload


def prompt(number: int) -> PromptPayload:
    return PromptPayload(
        prompt_id=f"id{number}",
        text="?",
        messages=[],
        answer="",
        metadata="",
        source=f"rows.jsonl, row {number}",
    )


def skip(skipped: SkippedPrompts, numbers: range, reason: str) -> None:
    for number in numbers:
        skipped.add(prompt(number), reason.format(name=prompt(number).name, number=number))


@pytest.mark.parametrize(
    ("num_skipped", "num_drawn", "too_many"),
    [(8, 8, False), (9, 9, True), (9, 90, False), (10, 99, True), (100, 1000, False)],
)
def test_a_few_skips_are_always_allowed_and_then_a_fraction(
    num_skipped: int, num_drawn: int, too_many: bool
) -> None:
    skipped = SkippedPrompts(max_frac=0.1)
    skip(skipped, range(num_skipped), "no room")
    assert skipped.too_many(num_drawn) is too_many


def test_equal_reasons_are_counted_together_with_one_example() -> None:
    skipped = SkippedPrompts(max_frac=0.1)
    skip(skipped, range(5), "{name} has 14{number} tokens")
    skip(skipped, range(5, 12), "verifier x on {name}: raised KeyError")
    assert skipped.summary(200) == (
        "12 of 200 prompts were skipped: "
        "7 like this: verifier x on prompt id5 (rows.jsonl, row 5): raised KeyError; "
        "5 like this: prompt id0 (rows.jsonl, row 0) has 140 tokens"
    )


def test_prompts_skipped_before_a_restart_are_counted_without_a_reason() -> None:
    skipped = SkippedPrompts(max_frac=0.1, num_skipped=20)
    assert skipped.summary(300) == "20 of 300 prompts were skipped"
    skip(skipped, range(1), "no room")
    assert skipped.num_skipped == 21 and skipped.summary(300).endswith(": 1 like this: no room")


def test_a_table_of_reasons_stays_small() -> None:
    skipped = SkippedPrompts(max_frac=0.1)
    for number in range(3 * MAX_REASONS):
        skipped.add(prompt(number), "x" * number)
    assert skipped.num_skipped == 3 * MAX_REASONS == sum(skipped._reasons.values())
    assert len(skipped._examples) == MAX_REASONS
