"""Each rule of the advice on rows that show its case, and on rows that do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.cli import keys
from configs.schema import Config
from tools.launching.summary import print_summary
from tools.reporting.advice import RULES, RunFacts, advise, estimates
from tools.reporting.run_directory import RunDirectory

CONFIG = {
    "run": {"name": "r"},
    "pipeline": {"mode": "async"},
    "darts": {"group_size": 4, "uniform": "train", "pilot": 0},
    "redundancy": {"upper": 1.5},
    "sampling": {"max_tokens": 400},
    "staleness": {"max_lag": 2},
}
# A run of which nothing is to be said: 10 s per step, of which the learner waited 1.5 s.
QUIET = {
    "wait/learner_s": 1.5,
    "engine/busy_frac": 0.9,
    "verifier/queue_s_mean": 0.1,
    "verifier/busy_frac": 0.2,
    "darts/uniform_frac": 0.1,
    "darts/budget_mean": 6.0,
    "reward/mean": 0.5,
    "train/tis_clip_frac": 0.0,
    "tokens/generated": 1000.0,
    "tokens/cancelled": 100.0,
    "tokens/discarded": 100.0,
}
EVEN, HEAVY = (100, 100, 101, 102), (10, 10, 12, 380)


def ledger(lengths: tuple[int, ...] = EVEN, truncated: int = 0, overdue: int = 0) -> list[dict]:
    rollouts = [
        {"tokens": n, "end": "selected_short", "truncated": i < truncated}
        for i, n in enumerate(lengths)
    ]
    group = {"step": 1, "prompt_id": "p", "end": "shipped", "rollouts": rollouts}
    return [group] * 10 + [group | {"end": "deadline"}] * overdue


def facts(
    changes: dict[str, float] | None = None,
    groups: list[dict] | None = None,
    settings: dict[str, dict] | None = None,
    num_steps: int = 6,
) -> RunFacts:
    first = {"wait/learner_s": 500.0, "engine/busy_frac": 0.0}  # the engines' start
    rows = [{"step": 0, "time_s": 500.0} | QUIET | first]
    rows += [
        {"step": step, "time_s": 500.0 + 10 * step} | QUIET | (changes or {})
        for step in range(1, num_steps)
    ]
    config = {name: CONFIG[name] | (settings or {}).get(name, {}) for name in CONFIG}
    return RunFacts.of(
        RunDirectory(Path("r"), config=config, metrics=rows, groups=groups or ledger())
    )


CASES = [  # rule, rows, the keys that it names
    ("learner_waited", facts({"wait/learner_s": 5.0}), {"actors.num_engines", "actors.slots"}),
    (
        "learner_waited",
        facts({"wait/learner_s": 5.0, "engine/busy_frac": 0.6}),
        {"staleness.max_lag"},
    ),
    (
        "learner_waited",
        facts({"wait/learner_s": 5.0}, settings={"pipeline": {"mode": "sync"}}),
        {"pipeline.mode"},
    ),
    (
        "engines_idle",
        facts({"wait/learner_s": 0.1, "engine/busy_frac": 0.3}),
        {"actors.num_engines", "actors.slots", "batch.max_tokens", "redundancy.upper"},
    ),
    ("verifier_waited", facts({"verifier/queue_s_mean": 3.0}), {"data.verifier_workers"}),
    ("verifier_waited", facts({"verifier/busy_frac": 0.95}), {"data.verifier_workers"}),
    (
        "groups_uniform",
        facts({"darts/uniform_frac": 0.6}),
        {"darts.uniform", "darts.pilot", "darts.group_size"},
    ),
    (
        "groups_uniform",
        facts({"darts/uniform_frac": 0.6}, settings={"darts": {"uniform": "drop"}}),
        {"darts.pilot"},
    ),
    (
        "groups_uniform",
        facts({"darts/uniform_frac": 0.6}, settings={"darts": {"pilot": 2}}),
        {"data.train"},
    ),
    (
        "responses_truncated",
        facts(groups=ledger(truncated=1)),
        {"sampling.max_tokens", "model.max_context"},
    ),
    (
        "surplus_was_wasted",
        facts({"tokens/cancelled": 400.0, "wait/learner_s": 5.0}),
        {"redundancy.upper"},
    ),
    (
        "surplus_saved_no_time",
        facts(groups=ledger((100, 101, 102, 103, 104, 380))),
        {"redundancy.upper", "darts.long_end"},
    ),
    (
        "tail_without_surplus",
        facts({"darts/budget_mean": 4.0}, groups=ledger(HEAVY)),
        {"darts.policy", "redundancy.upper"},
    ),
    (
        "policy_too_stale",
        facts({"train/tis_clip_frac": 0.2}),
        {"staleness.max_lag", "optimizer.lr"},
    ),
    (
        "groups_overdue",
        facts(groups=ledger(overdue=3)),
        {"staleness.max_lag", "staleness.on_deadline"},
    ),
]
RULE = {rule.__name__: rule for rule in RULES}


def test_every_rule_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(RULE)


@pytest.mark.parametrize(("name", "shown", "named"), CASES)
def test_a_rule_names_existing_keys_if_its_case_is_shown_and_is_silent_otherwise(
    name: str, shown: RunFacts, named: set[str]
) -> None:
    assert RULE[name](facts()) is None
    advice = RULE[name](shown)
    assert advice is not None
    assert set(re.findall(r"\b[a-z]+\.[a-z_]+\b", advice.action)) == named
    assert named <= {one.path for one in keys(Config)}
    assert 0 < advice.weight <= 1


def test_the_start_of_the_engines_is_not_a_wait() -> None:
    assert facts().waited == pytest.approx(0.15)
    assert advise(facts()) == []


def test_groups_that_become_uniform_late_are_noticed() -> None:
    late = facts(num_steps=13)
    for row in late.steady[-4:]:
        row["darts/uniform_frac"] = 0.6
    assert late.mean("darts/uniform_frac") == pytest.approx(0.8 / 3)
    assert late.late("darts/uniform_frac") == pytest.approx(0.6)
    assert [advice.weight for advice in advise(late)] == pytest.approx([0.6])
    assert advise(facts({"darts/uniform_frac": 0.4})) == []


def test_a_short_run_gets_no_advice() -> None:
    assert advise(facts({"darts/uniform_frac": 0.9}, num_steps=4)) == []
    assert len(advise(facts({"darts/uniform_frac": 0.9}, num_steps=5))) == 1


def test_the_most_important_advice_comes_first() -> None:
    found = advise(facts({"darts/uniform_frac": 0.9, "wait/learner_s": 5.0}))
    assert [advice.weight for advice in found] == [0.9, 0.5]


def test_rows_without_a_metric_or_a_configuration_apply_to_no_rule() -> None:
    rows = [{"step": step} for step in range(9)]
    run = RunDirectory(Path("r"), metrics=rows, groups=ledger())
    assert advise(RunFacts.of(run)) == []
    assert list(estimates(RunFacts.of(run))) == []


def test_the_estimates_compare_with_a_plain_run() -> None:
    cancelled = {"tokens": 50, "end": "cancelled"}
    groups = [row | {"rollouts": [*row["rollouts"], cancelled]} for row in ledger()]
    spent, plain = estimates(facts(groups=groups))
    assert (
        "In 10 trained groups, 10 responses were cancelled or cut short after 500 tokens" in spent
    )
    assert "this run generated 4.53k" in plain and "waited for one of 102" in plain
    (plain_tokens,) = re.findall(r"about ([0-9.]+)k tokens for the same", plain)
    assert 3.8 < float(plain_tokens) < 4.4


def test_the_summary_of_a_run_has_at_most_two_lines_of_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = facts(
        {"darts/uniform_frac": 0.9, "wait/learner_s": 5.0, "verifier/queue_s_mean": 3.0}
    ).run
    monkeypatch.setattr(RunDirectory, "read", lambda _: shown)
    monkeypatch.setattr("tools.report.write_report", lambda _: Path("r/report.html"))
    print_summary(Path("r"), "finished", {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["advice:", "advice:", "Report:"]
    assert sum("advice:" in line for line in lines) == 2
