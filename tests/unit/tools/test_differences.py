"""A page that compares runs: settings, results at the same step, and curves on shared axes."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tools.report import write_comparison
from tools.reporting.differences import compare, different_settings, labels, outcome
from tools.reporting.run_directory import RunDirectory


def make(name: str, num_steps: int = 6, **settings: Any) -> RunDirectory:
    """A run whose step `n` takes 10 s, generates 100 tokens and has a reward of `n` / 10."""
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "time_s": 30.0 + 10 * step,
            "reward/mean": step / 10,
            "tokens/generated": 100 * (step + 1),
            "wait/learner_s": 2.0,
            "engine/busy_frac": 0.5,
            "eval/accuracy": step / 10,
            "eval/reward_mean": step / 10,
            "eval/step": step,
        }
        for step in range(num_steps)
    ]
    config = {"run": {"name": name, "seed": 0}, "darts": {"group_size": 8}} | settings
    return RunDirectory(Path("runs") / name, config=config, metrics=rows)


def test_settings_that_differ_are_listed_and_the_identity_of_a_run_is_not_one() -> None:
    one = make("a", darts={"group_size": 8, "long_end": "none"}, buffer={"address": "x"})
    other = make("b", darts={"group_size": 16}, buffer={"address": "y"}, weights={"address": "z"})
    assert different_settings([one, other]) == {
        "darts.group_size": [8, 16],
        "darts.long_end": ["none", None],
    }
    assert different_settings([one, make("c", darts=one.config["darts"])]) == {}


def test_a_longer_run_is_compared_at_the_last_step_of_the_shorter_one() -> None:
    page = compare([make("a", num_steps=6), make("b", num_steps=4)])
    assert "Compared after 4 steps" in page
    assert page.count('<td class="n">0.3</td>') == 2  # the held-out accuracy of step 3
    assert page.count("1 min 00 s") == 2


def test_the_outcome_is_in_the_units_of_the_metrics() -> None:
    rows = outcome([make("a"), make("b")])
    assert rows["Held-out accuracy"] == [0.5, 0.5]
    assert rows["Wall time"] == [80.0, 80.0]
    assert rows["Seconds per step, after the first"] == [10.0, 10.0]
    assert rows["Learner waiting, share of time"] == [0.2, 0.2]
    assert rows["Reward"] == pytest.approx([0.3, 0.3])  # of steps 1 to 5
    assert "Tokens cancelled" not in rows  # no run has it


def test_an_evaluation_is_drawn_at_the_step_of_its_policy() -> None:
    """A later row reports it. The other axes are the time and the tokens of that row."""
    late = make("a")
    for row in late.metrics:
        row["eval/step"] = row["step"] / 2
    drawn = re.findall(r'data-plot="(.*?)"', compare([late, make("b")]))
    places = [json.loads(unescape(plot))["series"][0]["x"] for plot in drawn[:3]]
    assert places[0] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert places[2] == [100, 200, 300, 400, 500, 600]


def test_an_accuracy_is_compared_with_a_mean_reward_as_a_mean_reward() -> None:
    graded = make("b")
    for row in graded.metrics:
        del row["eval/accuracy"]
    assert outcome([make("a"), graded])["Held-out mean reward"] == [0.5, 0.5]


def test_seeds_and_several_settings_are_pointed_out() -> None:
    one = make("a", darts={"group_size": 8, "num_long": 1})
    other = make("b", run={"name": "b", "seed": 3}, darts={"group_size": 4, "num_long": 2})
    page = compare([one, other])
    assert "The seeds differ: 0, 3. 2 other settings differ" in page
    assert "Every run has seed 0." in compare([make("a"), make("b")])


def test_names_are_escaped_and_runs_of_one_name_are_told_apart() -> None:
    assert "<b>x" not in compare([make("a"), make("<b>x")]).replace("<b>x</b>", "")
    one, other = make("a"), make("a")
    other.path = Path("elsewhere/a")
    assert labels([one, other]) == ["runs/a", "elsewhere/a"]
    with pytest.raises(ValueError, match="given twice"):
        compare([one, make("a")])


def test_a_comparison_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="1 runs: a comparison needs 2"):
        compare([make("a")])
    with pytest.raises(ValueError, match="runs/b has no rows in metrics.jsonl"):
        compare([make("a"), make("b", num_steps=0)])


def test_the_page_is_written_from_directories(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = make(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(json.dumps(run.config))
        lines = [json.dumps(row) + "\n" for row in run.metrics]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    out = tmp_path / "page.html"
    assert write_comparison([tmp_path / "a", tmp_path / "b"], out) == out
    page = out.read_text()
    assert "<h1>a and b</h1>" in page and "http://" not in page.replace("http://www.w3.org/", "")


def test_the_page_says_which_runs_have_emulated_latency() -> None:
    emulated = make("<b>", actors={"min_step_ms": [[1, 30.0]]})
    assert "The decode latency of &lt;b&gt; is emulated" in compare([make("a"), emulated])
    assert "emulated" not in compare([make("a"), make("c")])
