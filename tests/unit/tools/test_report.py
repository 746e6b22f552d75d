"""The report of a run from complete, unfinished, damaged and empty folders."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tools.launching.summary import facts
from tools.report import write_report
from tools.reporting import sections
from tools.reporting.audited import audited
from tools.reporting.compact import compact
from tools.reporting.plots import FIGURES, evaluations
from tools.reporting.responses import responses
from tools.reporting.run_directory import RunDirectory

STEPS, GROUPS = 8, 3
END_OF_SEAT = ["selected_short", "selected_short", "selected_long", "cancelled", "truncated"]


def metrics_row(step: int) -> dict:
    lengths = {"mean": 60, "p50": 50, "p90": 90, "p99": 200, "max": 512}
    row = {
        "step": step,
        "time_s": 3.0 * (step + 1),
        "policy_version": step + 1,
        "reward/mean": 0.4 + 0.05 * step,
    }
    row |= {"lag/mean": 1.0, "lag/max": 2.0}
    row |= {
        f"length/{kind}_{name}": value - 2 * step
        for kind in ("generated", "selected")
        for name, value in lengths.items()
    }
    row |= {
        f"tokens/{kind}": 1000.0 * (step + 1)
        for kind in ("generated", "trained", "without_signal", "discarded", "cancelled")
    }
    row |= {
        "darts/budget_mean": 10.0,
        "darts/cancelled_frac": 0.2,
        "darts/pruned_frac": 0.0,
        "train/loss": 0.1,
        "engine/busy_frac": 0.9,
    }
    row |= {"wait/learner_s": 0.2, "wait/pull_s": 0.21, "wait/learner_frac": 0.1}
    if step not in (0, 7):
        return row
    result = 0.5 + step / 20
    return row | {"eval/reward_mean": result, "eval/accuracy": result, "eval/step": step}


def group_row(group_id: int, end: str = "shipped") -> dict:
    rollouts = [
        {
            "rollout_id": 10 * group_id + seat,
            "engine": "pool/0",
            "tokens": 20 + 9 * seat,
            "reward": float(seat % 2),
            "end": end,
            "truncated": end == "truncated",
        }
        for seat, end in enumerate(END_OF_SEAT)
    ]
    step = min(group_id // GROUPS, STEPS - 1)
    return {"step": step, "group_id": group_id, "prompt_id": f"prompt-{group_id}",
            "opened_version": 1, "shipped_version": 3 if end == "shipped" else -1, "budget": 5,
            "long_end": "survivor", "end": end, "rollouts": rollouts}  # fmt: skip


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "little")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing takes seconds, and the text does not depend on it.
    monkeypatch.setattr("tools.report.FIGURES", {})


@pytest.fixture(scope="module")
def finished_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "little"))


def make_run(path: Path) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(
        f"run: {{name: little, steps: {STEPS}}}\nstaleness: {{max_lag: 4}}\n"
    )
    write_rows(path / "metrics.jsonl", [metrics_row(step) for step in range(STEPS)])
    write_rows(
        path / "groups.jsonl",
        [group_row(group_id) for group_id in range(STEPS * GROUPS)] + [group_row(99, "deadline")],
    )
    write_rows(
        path / "samples.jsonl",
        [
            {
                "step": 0,
                "prompt": "1<2?",
                "response": "<script>alert(1)</script>",
                "tokens": 9,
                "reward": 1.0,
            }
        ],
    )
    return path


class Page(HTMLParser):
    """The tags, the external addresses and the text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run_gets_every_figure_and_lacks_nothing(finished_page: Path) -> None:
    run = RunDirectory.read(finished_page.parent)
    assert run.problems == []
    page = Page(finished_page)
    assert page.tags.count("svg") == sum(FIGURES[name](run).count("<svg") for name in FIGURES)
    assert "Missing from this report" not in page.text


def test_the_page_needs_no_network(finished_page: Path) -> None:
    assert all(address.startswith(("#", "data:")) for address in Page(finished_page).addresses)
    assert not re.search(r"@import|url\((?!#)", finished_page.read_text())


def test_samples_cannot_inject_markup(finished_page: Path) -> None:
    page = Page(finished_page)
    assert page.tags.count("script") == 1  # our own
    assert "<script>alert(1)</script>" in page.text


def test_the_headline_compares_the_first_evaluation_with_the_last(finished_page: Path) -> None:
    assert "50.0 %85.0 %+35.0 points" in Page(finished_page).text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("section", "emulated"),
    [
        ("", False),
        ("actors: {min_step_ms: []}", False),
        ("actors: {min_step_ms: [[1, 12]]}", True),
        ("launch: {pools: ['actors.name=b actors.min_step_ms=[[1,12]]']}", True),
    ],
)
def test_the_report_says_that_the_latency_is_emulated(
    run_dir: Path, section: str, emulated: bool
) -> None:
    with (run_dir / "config.yaml").open("a") as file:
        file.write(section)
    assert ("on emulated decode latency" in Page(write_report(run_dir)).text) == emulated
    named = dict(facts(RunDirectory.read(run_dir), {}))
    assert ("decode latency" in named) == emulated


def test_a_half_written_last_line_is_skipped_and_counted(run_dir: Path) -> None:
    file = run_dir / "groups.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    run = RunDirectory.read(run_dir)
    assert len(run.groups) == STEPS * GROUPS
    assert [f"line {STEPS * GROUPS + 1} " in problem for problem in run.problems] == [True]


def test_a_line_cut_within_a_character_is_skipped(run_dir: Path) -> None:
    with (run_dir / "samples.jsonl").open("ab") as stream:
        stream.write('{"text": "→'.encode()[:-1])
    assert len(RunDirectory.read(run_dir).samples) == 1


@pytest.mark.usefixtures("no_figures")
def test_the_report_of_an_unfinished_run_names_its_last_step(run_dir: Path) -> None:
    write_rows(run_dir / "metrics.jsonl", [metrics_row(step) for step in range(3)])
    assert f"3 of {STEPS} steps" in Page(write_report(run_dir)).text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "missing", ["config.yaml", "metrics.jsonl", "groups.jsonl", "samples.jsonl"]
)
def test_a_missing_file_is_named(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    assert f"{missing} is missing" in Page(write_report(run_dir)).text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("alone", ["config.yaml", "metrics.jsonl", "groups.jsonl", "samples.jsonl"])
def test_any_single_file_is_enough_for_a_page(run_dir: Path, alone: str) -> None:
    for file in run_dir.iterdir():
        if file.name != alone:
            file.unlink()
    assert "Missing from this report" in Page(write_report(run_dir)).text


@pytest.mark.parametrize("name", FIGURES)
def test_a_single_step_is_drawn(run_dir: Path, name: str) -> None:
    write_rows(run_dir / "metrics.jsonl", [metrics_row(0)])
    write_rows(run_dir / "groups.jsonl", [group_row(0)])
    assert "<svg" in FIGURES[name](RunDirectory.read(run_dir))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_without_data_is_omitted(run_dir: Path, name: str) -> None:
    write_rows(run_dir / "metrics.jsonl", [{"step": 0}])
    write_rows(run_dir / "groups.jsonl", [group_row(0, "deadline")])
    assert FIGURES[name](RunDirectory.read(run_dir)) == ""


def test_a_resumed_run_counts_the_later_record_of_a_step(run_dir: Path) -> None:
    write_rows(
        run_dir / "metrics.jsonl",
        [
            metrics_row(0),
            metrics_row(1) | {"reward/mean": 0.1},
            metrics_row(1) | {"reward/mean": 0.9},
        ],
    )
    assert RunDirectory.read(run_dir).series("reward/mean") == ([0.0, 1.0], [0.4, 0.9])


def test_values_that_are_not_numbers_are_omitted_from_a_series(run_dir: Path) -> None:
    rows = [
        metrics_row(0) | {"train/loss": None},
        metrics_row(1) | {"train/loss": float("nan")},
        metrics_row(2),
    ]
    write_rows(run_dir / "metrics.jsonl", rows)
    assert RunDirectory.read(run_dir).series("train/loss") == ([2.0], [0.1])


def test_evaluations_belong_to_the_step_that_was_evaluated(run_dir: Path) -> None:
    write_rows(
        run_dir / "metrics.jsonl", [metrics_row(3) | {"eval/reward_mean": 0.7, "eval/step": 1}]
    )
    assert evaluations(RunDirectory.read(run_dir)) == [(1, 3, 0.7)]


def test_the_work_per_row_does_not_grow_with_the_run() -> None:
    reads = 0

    class Counted(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal reads
            reads += 1
            return super().get(key, default)

    rows: list[dict[str, Any]] = [Counted(metrics_row(step)) for step in range(200)]
    evaluations(RunDirectory(Path("r"), metrics=rows))
    assert reads < 10 * len(rows)


@pytest.mark.parametrize(("graded", "shown"), [(False, "accuracy"), (True, "mean reward")])
def test_an_evaluation_is_called_accuracy_if_all_of_them_are(
    run_dir: Path, graded: bool, shown: str
) -> None:
    rows = [metrics_row(step) for step in range(8)]
    if graded:
        del rows[7]["eval/accuracy"]
    write_rows(run_dir / "metrics.jsonl", rows)
    page = write_report(run_dir).read_text()
    assert f"Held-out {shown}" in page
    assert [step for step, _, _ in evaluations(RunDirectory.read(run_dir))] == [0, 7]


def test_the_kinds_of_held_out_prompts_are_shown_separately(run_dir: Path) -> None:
    kinds = [
        {"eval/deep/accuracy": 0.25, "eval/deep/length_mean": 90.0},
        {"eval/deep/accuracy": 0.75, "eval/deep/length_mean": 80.0},
    ]
    rows = [metrics_row(0) | kinds[0], metrics_row(7) | kinds[1]]
    write_rows(run_dir / "metrics.jsonl", rows)
    run = RunDirectory.read(run_dir)
    assert run.kinds == ["deep"]
    shown = dict(facts(run, {}))
    assert shown["  deep: accuracy"] == "25.0 -> 75.0 %"
    assert shown["  deep: length, mean"] == "90.0 -> 80.0"
    page = write_report(run_dir).read_text()
    assert "Held-out accuracy, deep prompts" in page
    assert "Held-out length, mean, deep prompts" in page


def test_an_empty_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_audited_groups_tell_what_selection_leaves_out(run_dir: Path) -> None:
    def group(number: int, left_out: float, **more: Any) -> dict:
        ends = {
            "selected_short": (1.0, 10),
            "selected_long": (0.0, 20),
            "discarded": (left_out, 60),
        }
        rollouts = [{"end": end, "reward": r, "tokens": t} for end, (r, t) in ends.items()]
        return group_row(number) | {"audit": True, "rollouts": rollouts} | more

    cancelled = [{"end": "selected_short", "reward": 1.0, "tokens": 9},
                 {"end": "cancelled", "reward": None, "tokens": 5}]  # fmt: skip
    groups = [group(0, 0.5), group(1, 0.2), group(2, 0.0, audit=False),
              group(3, 0.0, end="uniform"), group(4, 0.0, rollouts=cancelled)]  # fmt: skip
    run = RunDirectory(run_dir, groups=groups)
    shown = re.sub(r"<[^>]+>", "|", audited(run))
    assert "In 2 audited groups" in shown
    # Selected: 0.5, beside 0.5 and 0.4 on average. The differences are 0 and 0.1, and t is 12.706.
    assert "differ from all of their group by +0.050 ± 0.635 in reward" in shown
    assert "by -15.0 ± 0.0 tokens" in shown
    assert re.findall(r"all responses\|+([\d.]+)\|+([\d.]+)", shown) == [("0.450", "30.0")]
    assert re.findall(r"left out\|+([\d.]+)\|+([\d.]+)", shown) == [("0.350", "60.0")]
    assert "1 more ended at their deadline" in shown
    assert audited(RunDirectory(run_dir, groups=groups[1:])) == ""


def test_compact_keeps_three_digits() -> None:
    assert [compact(value) for value in (0.12345, 12, 1234, 1234567, 2.5e9)] == [
        "0.123",
        "12",
        "1.23k",
        "1.23M",
        "2.5G",
    ]


def test_three_responses_of_each_kind_come_from_the_whole_run(run_dir: Path) -> None:
    ends = ("selected_short", "selected_long", "cancelled")
    rows = [
        {"step": step, "response": f"{end} of {step}", "tokens": 9, "reward": 1.0, "end": end}
        for step in range(9)
        for end in ends
    ]
    write_rows(run_dir / "samples.jsonl", rows)
    section = responses(RunDirectory.read(run_dir))
    shown = re.findall(r"<pre>(.*?)</pre>", section)
    assert shown == [f"{end} of {step}" for end in ends for step in (0, 4, 8)]


def test_a_prompt_that_is_drawn_hundreds_of_times_does_not_widen_the_page() -> None:
    """Its number of times falls into a range, and every prompt is counted once per row."""
    often = [group_row(0, end="shipped" if place % 3 else "deadline") for place in range(300)]
    groups = [*often, group_row(1), group_row(2, end="deadline")]
    page = sections.ledger(RunDirectory(Path("r"), groups=groups))
    header, opened, shipped, _, dropped = (
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in page.split("<tr>")[1:]
    )
    assert header == [
        "prompts", *[f"{n}x" for n in range(8)],
        "8–15x", "16–31x", "32–63x", "64–127x", "128–255x", "256–511x",
    ]  # fmt: skip
    assert [(header[place], cell) for place, cell in enumerate(opened) if cell] == [
        ("prompts", "opened"), ("1x", "2"), ("256–511x", "1")
    ]  # fmt: skip
    assert shipped[header.index("128–255x")] == "1"
    assert [dropped[header.index(name)] for name in ("0x", "1x", "64–127x")] == ["1", "1", "1"]
