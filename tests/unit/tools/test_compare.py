"""The comparison's table: its averages, and the conditions for reporting a speedup."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from buffer.records import settings
from configs import cli
from darts.simulate.schema import SimulateConfig, check
from tools.compare import CompareConfig, _check_live, _is_judged, _settings, run
from tools.comparing.page import markdown, plot_curves
from tools.comparing.rows import add_cost_to_reach, summarise, table
from tools.comparing.sets import SETS
from tools.reporting.intervals import half_width
from tools.reporting.run_directory import RunDirectory


def result(step_s: float, **more: float) -> dict[str, Any]:
    return {
        "step_s": step_s,
        "tokens/trained": 10,
        "tokens/discarded": 0,
        "tokens/cancelled": 0,
        **more,
    }


def test_a_speedup_is_reported_unless_the_reward_is_lower() -> None:
    rows = table(
        {
            "sync plain": [result(3.0, judged_reward=0.80)],
            "good": [result(2.0, judged_reward=0.79)],
            "bad": [result(1.0, judged_reward=0.70)],
            "better": [result(2.0, judged_reward=0.85)],
            "simulated": [result(1.5)],
        },
        margin=0.02,
    )
    assert [row["verdict"] for row in rows] == [
        "reference",
        "1.50x speedup",
        "no speedup claimed: held-out reward -0.100",
        "1.50x speedup, held-out reward +0.050",
        "2.00x in time; held-out reward not modelled",
    ]


def test_seeds_are_compared_pairwise() -> None:
    rows = table({"a": [result(2.0), result(8.0)], "b": [result(1.0), result(8.0)]}, margin=0.0)
    assert rows[1]["step_s"] == 4.5
    assert (rows[1]["time_ratio"], rows[1]["time_ratio_range"]) == (1.5, [1.0, 2.0])


def test_a_run_is_summarised_from_its_files(tmp_path: Path) -> None:
    metrics = [
        {"step": 0, "time_s": 10.0, "wait/learner_s": 9.0, "lag/mean": 0, "lag/max": 0},
        {"step": 1, "time_s": 12.0, "wait/learner_s": 1.0, "lag/mean": 1, "lag/max": 2},
        {"step": 2, "time_s": 14.0, "wait/learner_s": 0.0, "lag/mean": 2, "lag/max": 2,
         "tokens/generated": 60, "tokens/trained": 30, "tokens/discarded": 20,
         "tokens/cancelled": 10},
    ]  # fmt: skip
    judged = [
        {"step": 2, "reward_mean": 0.6, "length_mean": 9.0, "length_p99": 30.0},
        {
            "step": 3,
            "reward_mean": 0.7,
            "length_mean": 8.0,
            "length_p99": 20.0,
            "deep/reward_mean": 0.5,
            "deep/length_mean": 15.0,
            "deep/accuracy": 0.5,
        },
    ]
    rollouts = [
        {"tokens": 10, "end": "selected_short"},
        {"tokens": 20, "end": "selected_long"},
        {"tokens": 99, "end": "cancelled"},
    ]
    group = {
        "step": 0,
        "prompt_id": "p",
        "opened_version": 0,
        "shipped_version": 0,
        "budget": 3,
        "end": "shipped",
        "rollouts": rollouts,
    }
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    (tmp_path / "groups.jsonl").write_text(json.dumps(group) + "\n")
    summary = summarise(RunDirectory.read(tmp_path))
    assert (summary["step_s"], summary["trained_s"]) == (2.0, 4.0)
    assert summary["wait_frac"] == 0.25
    assert (summary["lag_mean"], summary["lag_max"]) == (1.0, 2)
    assert (summary["length_mean"], summary["tokens/cancelled"], summary["judged_reward"]) == (
        15.0,
        10,
        0.7,
    )
    assert (summary["judged_length_mean"], summary["judged_length_p99"]) == (8.0, 20.0)
    shown = markdown(table({"a": [summary]}, margin=0.0))
    assert "held-out reward of deep | held-out length mean of deep |" in shown
    assert "| 0.500 | 15 |" in shown
    # After two and after three steps, measured from the end of the first.
    times_rewards_steps = [point[:3] for point in summary["curve"]]
    assert times_rewards_steps == [[2.0, 0.6, 2], [4.0, 0.7, 3]]
    assert summary["curve"][1][3] == 60


def test_the_cost_to_the_final_reward_of_the_reference_with_the_same_seed() -> None:
    rows: list[dict[str, Any]] = [
        {"judged_reward": 0.90, "curve": [[5.0, 0.50, 2, 20], [9.0, 0.90, 4, 40]]},
        {"judged_reward": 0.80, "curve": [[5.0, 0.79, 2, 20], [9.0, 0.80, 4, 40]]},
        {"judged_reward": 0.88, "curve": [[2.0, 0.68, 2, 30], [4.0, 0.88, 4, 60]]},
        {"judged_reward": 0.85, "curve": [[2.0, 0.81, 2, 30], [4.0, 0.85, 4, 60]]},
    ]
    add_cost_to_reach([0, 1, 0, 1], rows, margin=0.1)
    assert [row.get("reach_s") for row in rows] == [9.0, 9.0, None, 2.0]
    assert [row["near_s"] for row in rows] == pytest.approx([8.0, 5.0, 3.2, 2.0])
    costs = [(row.get("reach_steps"), row.get("tokens/to_reach")) for row in rows]
    assert costs == [(4, 40), (4, 40), (None, None), (2, 30)]


def test_the_cost_to_a_fixed_reward() -> None:
    row: dict[str, Any] = {"judged_reward": 0.9, "curve": [[5.0, 0.5, 2, 20], [9.0, 0.9, 4, 40]]}
    add_cost_to_reach([0], [row], margin=0.0, reach=0.4)  # there is nothing before the first point
    assert (row["reach_s"], row["reach_steps"], row["tokens/to_reach"]) == (5.0, 2, 20)
    add_cost_to_reach([0], [row], margin=0.0, reach=0.6)  # a quarter of the way to the second
    assert [row["reach_s"], row["reach_steps"], row["tokens/to_reach"]] == pytest.approx(
        [6.0, 2.5, 25]
    )


def test_intervals_are_those_of_student() -> None:
    assert half_width([3.0]) == 0.0
    # The standard deviation is 1, and t is 4.303 for two degrees of freedom.
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    # No jump from the table (2.262 for ten values) to what follows it; 2.042 is exact for 31.
    quantiles = {n: half_width([*range(n)]) / (stdev(range(n)) / n**0.5) for n in (10, 11, 31)}
    assert quantiles == pytest.approx({10: 2.262, 11: 2.228, 31: 2.042}, abs=0.01)
    rows = table({"a": [result(1.0), result(2.0), result(3.0)]}, margin=0.0)
    assert rows[0]["half_widths"]["step_s"] == pytest.approx(2.484, abs=1e-3)
    assert "| 2 ± 2.484 |" in markdown(rows)


def test_a_gain_within_the_spread_of_the_seeds_is_not_claimed() -> None:
    rewards = {"judged_reward": 0.8}
    plain = [result(2.0, **rewards), result(2.0, **rewards)]
    rows = table(
        {
            "plain": plain,
            "noisy": [result(1.0, **rewards), result(2.1, **rewards)],
            "faster": [result(1.0, **rewards), result(1.001, **rewards)],
        },
        margin=0.0,
    )
    assert rows[1]["verdict"].startswith("no speedup claimed: 1.48x")
    assert rows[2]["verdict"] == "2.00x ± 0.01 speedup"


def test_curves_are_drawn_for_every_seed(tmp_path: Path) -> None:
    of_a, of_b = (
        [{"curve": [[1.0, 0.5, 1, 9], [2.0, 0.7, 2, 18]]}, {"curve": [[1.0, 0.6, 1, 9]]}],
        [{"curve": [[0.5, 0.6, 1, 9]]}],
    )
    plot_curves({"a": of_a, "b": of_b}, tmp_path / "curves.png", emulated=True)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_simulated_variants_end_in_one_table(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(
        "run: {steps: 3}\nbatch: {groups: 4}\nlengths: {num_prompts: 16}\nengines: {slots: 16}\n"
    )
    run(
        CompareConfig(
            set="rules",
            base=str(base),
            only=["async plain", "exact, survivor"],
            seeds=[0, 1],
            out=str(tmp_path / "out"),
        )
    )
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["variant"] for row in written["rows"]] == ["async plain", "exact, survivor"]
    assert written["rows"][0]["time_ratio"] == 1.0
    assert written["rows"][1]["tokens/cancelled"] > 0
    assert (tmp_path / "out" / "table.png").stat().st_size > 1000
    assert "not modelled" in (tmp_path / "out" / "table.html").read_text()


LIVE = {"live", "live_ablation", "live_async", "live_k_l", "live_k_of_g"}


@pytest.mark.parametrize("chosen", sorted(set(SETS) - LIVE))
def test_every_simulated_variant_can_be_simulated(chosen: str) -> None:
    for values in SETS[chosen].values():
        check(cli.load(["--config", "configs/simulate/qwen14b.yaml", *values], SimulateConfig))


@pytest.mark.parametrize("chosen", sorted(LIVE | {"sensitivity", "k_of_g"}))
def test_every_live_variant_is_a_valid_run(chosen: str) -> None:
    for values in SETS[chosen].values():
        cli.load(["--config", "demo", "--config", "configs/latency/a10_7b.yaml", *values])


def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    def comparison(*overrides: str) -> CompareConfig:
        return CompareConfig(
            set="live_async",
            base="configs/demo.yaml",
            only=["async plain"],
            live=True,
            overrides=list(overrides),
            out=str(tmp_path),
        )

    before = comparison("staleness.max_lag=2", "buffer.address=tcp://127.0.0.1:5610")
    folder = tmp_path / "async-plain-0"
    folder.mkdir()
    job = (before, "async plain", SETS["live_async"]["async plain"], 0)
    settings.write(folder, cli.load([*_settings(job), "run.dir=elsewhere", "run.name=a"]), {})
    with pytest.raises(ValueError, match=r"async-plain-0 was run with staleness.max_lag=2, .* 4;"):
        run(comparison("staleness.max_lag=4"))
    # Neither a folder nor a port makes it another run.
    _check_live((comparison("staleness.max_lag=2"), *job[1:]))
    with pytest.raises(ValueError, match=r"run.seed=0, and this comparison has 7"):
        (tmp_path / "async-plain-7").mkdir()
        (tmp_path / "async-plain-7" / "config.yaml").write_bytes(
            (folder / "config.yaml").read_bytes()
        )
        _check_live((*job[:3], 7))


def test_runs_are_judged_again_if_another_number_of_samples_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.jsonl"
    assert not _is_judged(file, 2)
    file.write_text('{"step": 8, "samples_per_prompt": 2}\n')
    assert _is_judged(file, 2)
    assert not _is_judged(file, 4)


def test_an_unknown_variant_is_named() -> None:
    with pytest.raises(ValueError, match="only='fast'"):
        run(CompareConfig(only=["fast"]))
