"""The worked examples of docs/method.md agree with the core, and its pictures with the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.figures import FOLDER, figures
from tools.reporting.worked_examples import BOUND, SELECTION, lag_example, selection_example

METHOD = Path(__file__).parents[3] / "docs" / "method.md"


@pytest.mark.parametrize("name", figures())
def test_the_figures_in_the_repository_are_those_that_the_command_draws(name: str) -> None:
    assert (FOLDER / name).read_text() == figures()[name], "run `python -m tools.figures`"


def test_the_tables_in_the_method_page_are_the_computed_ones() -> None:
    text = METHOD.read_text()
    assert selection_example().table() in text
    assert lag_example().table() in text


def test_the_selection_keeps_the_shortest_and_one_survivor() -> None:
    bars = selection_example().bars
    finished = sorted(bar.length for bar in bars if bar.end != "cancelled")
    assert [bar.length for bar in bars if bar.end == "selected_long"] == [finished[-1]]
    short = sorted(bar.length for bar in bars if bar.end == "selected_short")
    assert short == sorted(bar.length for bar in bars)[: SELECTION.group_size - SELECTION.num_long]
    assert all(bar.tokens < bar.length for bar in bars if bar.end == "cancelled")


def test_the_long_group_holds_its_batch_and_the_bound_is_reached_but_kept() -> None:
    example = lag_example()
    waited = [step.served - step.requested for step in example.steps]
    assert waited.index(max(waited)) == 2 and 1 in example.steps[2].groups
    lags = [example.bars[group].lag for step in example.steps for group in step.groups]
    assert max(lags) == BOUND.max_lag
