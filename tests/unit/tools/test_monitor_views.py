"""The monitor's drawing: exact sizes, counts, the effect of each key, and playback of a ledger."""

from __future__ import annotations

import json
import re
from argparse import ArgumentTypeError
from pathlib import Path

import msgspec
import pytest
from rich.cells import cell_len

from buffer.wire.messages import (
    EngineView,
    GroupView,
    LiveState,
    PromptView,
    RolloutView,
    WaitView,
)
from tools.monitor.charts import (
    Bar,
    Ink,
    counts_in_log_bins,
    growing_bars,
    nice_ceiling,
    race_track,
    sparkline,
    stacked_columns,
)
from tools.monitor.frame import frame, pressed
from tools.monitor.picture import parse_size, picture
from tools.monitor.playback import Frames, Replay, first_speed
from tools.monitor.views import (
    COLUMNS,
    View,
    engines_panel,
    groups_panel,
    lag_panel,
    lengths_panel,
    ordered,
    pattern,
    prompts_panel,
)
from tools.monitor.waits import waits_page
from tools.reporting.run_directory import RunDirectory

PLAIN = View(color=False)
A, B = Ink("#ff0000", "a"), Ink("#00ff00", "b")
EMPTY = LiveState(
    time_s=12.0, run_name="little", phase="starting", step=0, steps=60, policy_version=0, max_lag=4,
    waiting="", groups_open=0, groups_ready=0, bytes_held=0, refused_frames=0,
    histogram_edges=[0, 8, 16, 32], histogram={}, lags=[], metrics={}, groups=[], engines=[],
    prompts=[],
)  # fmt: skip


def snapshot(**changes: object) -> LiveState:
    return msgspec.structs.replace(EMPTY, **changes)


def prompt(
    prompt_id: str = "p",
    right: tuple[int, ...] = (),
    wrong: tuple[int, ...] = (),
    spread: float = 0.5,
    budget: int = 8,
) -> PromptView:
    rate = len(right) / max(len(right) + len(wrong), 1)
    return PromptView(
        prompt_id=prompt_id,
        spread=spread,
        budget=budget,
        pass_rate=rate,
        lengths_right=list(right),
        lengths_wrong=list(wrong),
    )


def group(
    group_id: int = 1, cut: int = 0, states: tuple[tuple[int, str], ...] = ((40, "running"),)
) -> GroupView:
    views = [
        RolloutView(rollout_id=place, tokens=tokens, state=state)
        for place, (tokens, state) in enumerate(states)
    ]
    return GroupView(
        group_id=group_id,
        prompt_id=f"prompt-{group_id}",
        long_end="survivor",
        budget=len(states),
        short_cutoff=cut,
        rollouts=views,
    )


def engine(name: str = "pool/0") -> EngineView:
    return EngineView(
        engine_id=name, engine_type="cpu", slots=64, in_flight=48, policy_version=3,
        tokens_per_s=4200.0, busy_frac=0.9, curve=[(1.0, 5.9), (8.0, 6.1), (64.0, 13.7)],
    )  # fmt: skip


def busy() -> LiveState:
    states = (
        (20, "selected_short"),
        (35, "finished"),
        (70, "running"),
        (66, "cancelled"),
        (512, "truncated"),
        (4, "lost"),
    )
    return snapshot(
        waiting="learner waits for groups: 3 of 16 ready",
        histogram={
            "selected_short": [4, 9, 2, 0],
            "cancelled": [0, 3, 5, 0],
            "truncated": [0, 0, 1, 0],
        },
        lags=[0, 1, 1, 4],
        metrics={"reward/mean": 0.5},
        groups=[group(place, 35, states * 2) for place in range(12)],
        engines=[engine(f"pool/{place}") for place in range(9)],
        prompts=[
            prompt(f"prompt-{place}", (20, 30 + place), (50, 400), place / 20)
            for place in range(40)
        ],
    )


@pytest.mark.parametrize(
    "size",
    [
        (80, 24),
        (200, 50),
        (100, 30),
        (132, 24),
        (40, 12),
        (30, 10),
        (20, 4),
        (1, 1),
        (300, 90),
        (45, 78),
    ],
)
@pytest.mark.parametrize(
    "view",
    [
        View(),
        PLAIN,
        View(page="help"),
        View(page="waits"),
        View(silent_s=9),
        View(source="replay ×1"),
    ],
)
@pytest.mark.parametrize("state", [EMPTY, busy()], ids=["empty", "busy"])
def test_a_frame_has_exactly_the_size_of_the_terminal(
    size: tuple[int, int], view: View, state: LiveState
) -> None:
    width, height = size
    lines = frame(state, view, width, height)
    assert [line.cell_len for line in lines] == [width] * height


@pytest.mark.parametrize(
    "name", ["\x1b[2J\x1b[31m", "提示词" * 9, "a\nb\rc", "👩‍👩‍👧" * 5, "[bold]x[/bold]"]
)
def test_untrusted_ids_cannot_disturb_the_screen(name: str) -> None:
    hostile = snapshot(
        run_name=name, waiting=name, engines=[engine(name)], prompts=[prompt(name, (3,), (4,))]
    )
    for line in frame(hostile, PLAIN, 80, 24):
        assert line.plain.isprintable()
        assert cell_len(line.plain) == 80


def test_a_narrow_and_tall_screen_has_one_panel_above_the_other() -> None:
    lines = [line.plain for line in frame(busy(), PLAIN, 48, 78)]
    titles = ("Lengths by end", "Groups in", "Prompts by", "Prompt ", "Engines", "Lag of")
    places = [
        next(i for i, line in enumerate(lines) if line.startswith(title) and "──" in line)
        for title in titles
    ]
    assert places == sorted(places) and len(set(places)) == 6


def test_without_colour_a_frame_has_no_style() -> None:
    assert not any(span.style for line in frame(busy(), PLAIN, 120, 40) for span in line.spans)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ((10, 20), (40,), "I"),
        ((30,), (30,), "I"),
        ((90,), (30, 40), "II"),
        ((), (30,), ""),
        ((30,), (), ""),
    ],
)
def test_pattern_compares_the_mean_lengths_of_right_and_wrong(
    right: tuple[int, ...], wrong: tuple[int, ...], expected: str
) -> None:
    assert pattern(prompt("p", right, wrong)) == expected


def test_prompts_are_sorted_by_the_chosen_column() -> None:
    prompts = [
        prompt("a", (1,), (1,), 0.1, 9),
        prompt("b", (1,), (), 0.9, 8),
        prompt("c", (), (1,), 0.5, 16),
    ]
    assert [shown.prompt_id for shown in ordered(prompts, "spread")] == ["b", "c", "a"]
    assert [shown.prompt_id for shown in ordered(prompts, "budget")] == ["c", "a", "b"]
    assert [shown.prompt_id for shown in ordered(prompts, "pass_rate")] == ["c", "a", "b"]


def test_the_cursor_stays_on_its_prompt_when_the_order_changes() -> None:
    state = snapshot(
        prompts=[
            prompt("a", (1,), (1,), 0.9),
            prompt("b", (1,), (), 0.5),
            prompt("c", (), (1,), 0.1),
        ]
    )
    view = pressed(View(), "down", state)
    assert view.prompt_id == "b"
    assert pressed(view, "s", state).prompt_id == "b"


def test_a_prompt_that_closed_twice_is_shown_once_and_can_be_passed() -> None:
    state = snapshot(
        prompts=[
            prompt("a", spread=0.9),
            prompt("b", spread=0.8),
            prompt("a", (7,), spread=0.7),
            prompt("c", spread=0.1),
        ]
    )
    assert [(shown.prompt_id, shown.spread) for shown in ordered(state.prompts, "spread")] == [
        ("b", 0.8),
        ("a", 0.7),
        ("c", 0.1),
    ]
    assert pressed(View(prompt_id="a"), "down", state).prompt_id == "c"


def test_empty_bins_at_both_ends_are_omitted() -> None:
    state = snapshot(histogram={"selected_short": [0, 3, 1, 0], "discarded": [0, 0, 1, 0]})
    legend, *chart, axis = [line.plain for line in lengths_panel(state, PLAIN, 20, 5)]
    assert legend.split() == ["s", "short", "4", "d", "disc", "1"]
    assert axis.split() == ["8", "16"]
    assert {len(line.split()) for line in chart} == {1, 2}


def test_the_cursor_stops_at_both_ends() -> None:
    state = snapshot(prompts=[prompt("a", spread=0.9), prompt("b", spread=0.5)])
    assert pressed(View(prompt_id="a"), "up", state).prompt_id == "a"
    assert pressed(View(prompt_id="b"), "j", state).prompt_id == "b"
    assert pressed(View(), "down", EMPTY).prompt_id == ""


def test_the_chosen_row_stays_visible() -> None:
    state = busy()
    for shown in state.prompts:
        rows = prompts_panel(state, View(color=False, prompt_id=shown.prompt_id), 60, 6)
        assert [row.plain.split()[0] for row in rows].count(f">{shown.prompt_id}") == 1


def test_left_and_right_choose_the_group_drawn_first() -> None:
    state = snapshot(groups=[group(7), group(8)])
    view = pressed(PLAIN, "right", state)
    assert view.group_id == 8
    assert groups_panel(state, view, 60, 10)[0].plain.startswith("prompt-8")
    assert pressed(view, "left", state).group_id == 7


def test_unknown_keys_change_nothing() -> None:
    assert pressed(View(), "x", busy()) == View()


def test_a_group_that_has_closed_gives_its_place_to_the_first() -> None:
    assert groups_panel(snapshot(groups=[group(7)]), View(color=False, group_id=3), 60, 10)[
        0
    ].plain.startswith("prompt-7")


def test_a_group_line_counts_ended_running_and_cancelled() -> None:
    states = ((20, "finished"), (25, "finished"), (60, "running"), (30, "cancelled"))
    line = groups_panel(snapshot(groups=[group(1, 25, states)]), PLAIN, 100, 10)[0].plain
    assert "2/4" in line and "cut 25" in line and "1 cancelled" in line and "1 running" in line


def test_lags_beyond_the_bound_stand_out() -> None:
    within = "".join(line.plain for line in lag_panel(snapshot(lags=[0, 4, 4]), PLAIN, 30, 6))
    beyond = "".join(line.plain for line in lag_panel(snapshot(lags=[0, 4, 5]), PLAIN, 30, 6))
    assert "!" not in within and "!" in beyond


def test_engines_that_do_not_fit_are_counted() -> None:
    assert engines_panel(busy(), PLAIN, 60, 5)[-1].plain == "and 5 more"


def test_the_page_of_waits_begins_with_the_one_nearest_to_its_deadline() -> None:
    waits = [
        WaitView(what="news of rollout 7", waited_s=3, limit_s=60, key="buffer.rollout_timeout_s"),
        WaitView(what="the learner's step", waited_s=50, limit_s=60, key="buffer.step_timeout_s"),
    ]
    state = snapshot(
        waits=waits, waiting="", refused_frames=3, time_s=100.0, warnings=[(40.0, "e left")],
        metrics={"darts/uniform_frac": 0.25},
    )  # fmt: skip
    page = [line.plain.strip() for line in waits_page(state, PLAIN, 80, 40)]
    assert page[1] == "neither side waits for the other"
    assert page[2] == f"{'━' * 17}───   50 of 60 s  the learner's step  buffer.step_timeout_s"
    assert page[3].startswith("━───") and "news of rollout 7" in page[3]
    assert " ".join(page[6].split()) == "25% groups without signal all their rewards were equal"
    assert page[9:11] == ["3 frames refused", "60 s ago  e left"]


def test_a_key_shows_and_hides_each_page() -> None:
    view = pressed(pressed(View(), "w", EMPTY), "?", EMPTY)
    assert view.page == "help"
    assert pressed(view, "?", EMPTY).page == "panels"


def test_an_evaluation_under_way_shows_its_progress() -> None:
    first = frame(snapshot(phase="training", step=9, evaluated=(3, 16)), PLAIN, 100, 24)[0]
    assert "evaluation 3 of 16 prompts" in first.plain


def test_what_does_not_exist_yet_is_not_drawn_as_a_number() -> None:
    loading = msgspec.structs.replace(engine(), policy_version=-1)
    state = snapshot(policy_version=-1, engines=[loading])
    text = "\n".join(line.plain for line in frame(state, PLAIN, 200, 50))
    assert "version" not in text and "v-1" not in text and "loading" in text


def test_a_replay_gives_the_place_of_its_engines_to_other_panels() -> None:
    drawn = [frame(busy(), View(source=source), 200, 50) for source in ("", "replay")]
    live, played = ("\n".join(line.plain for line in lines) for lines in drawn)
    assert "Engines" in live and "Engines" not in played


@pytest.mark.parametrize("width", range(30, 60))
def test_a_gap_separates_the_facts_of_a_group_from_its_scale(width: int) -> None:
    states = ((20, "finished"), (60, "running"), (30, "cancelled"))
    line = groups_panel(snapshot(groups=[group(1, 25, states)]), PLAIN, width, 10)[0].plain
    assert re.search(r" 64 ▏$", line)


def test_the_lengths_of_the_chosen_prompt_are_not_in_reverse() -> None:
    state = snapshot(prompts=[prompt("a", (1, 2, 3, 100))])
    row = prompts_panel(state, View(), 100, 3)[1]
    spans = [span for span in row.spans if "reverse" in str(span.style)]
    assert row.style != "reverse" and spans[-1].end < len(row.plain.rstrip()) - 10


def test_silence_replaces_the_waiting_side() -> None:
    text = "".join(line.plain for line in frame(busy(), View(color=False, silent_s=12.4), 80, 24))
    assert "no news for 12 s" in text and "learner waits" not in text


def test_silence_after_the_end_is_no_alarm() -> None:
    done = snapshot(phase="done")
    assert "no news" not in "".join(
        line.plain for line in frame(done, View(color=False, silent_s=99), 80, 24)
    )


def test_stacked_columns_are_as_high_as_their_counts() -> None:
    lines = [
        line.plain for line in stacked_columns([[4, 0, 2], [4, 8, 0]], [A, B], 3, 8, color=False)
    ]
    columns = ["".join(line[place] for line in reversed(lines)) for place in range(3)]
    assert columns == ["aaaabbbb", "bbbbbbbb", "aa      "]


def test_a_cell_of_two_layers_shows_both() -> None:
    (line,) = stacked_columns([[3], [5]], [A, B], 1, 1, color=True)
    assert (line.plain, line.spans[0].style) == ("▃", "#ff0000 on #00ff00")


def test_the_smallest_share_is_still_visible() -> None:
    lines = stacked_columns([[10_000, 1]], [A], 2, 6, color=True)
    assert [line.plain[1] for line in lines] == [" "] * 5 + ["▁"]


def test_more_bins_than_columns_are_merged_without_losing_any() -> None:
    lines = stacked_columns([[1] * 20], [A], 10, 4, color=False)
    assert [line.plain for line in lines] == ["a" * 10] * 4


def test_bars_grow_with_their_length_and_the_mark_crosses_them() -> None:
    lines = growing_bars([Bar(20, A), Bar(5, B)], scale=40, mark=10, width=40, color=False)
    assert [line.plain for line in lines] == [
        "a" * 10 + "│" + "a" * 9 + " " * 20,
        "b" * 5 + " " * 5 + "│" + " " * 29,
    ]


def test_two_bars_share_a_line_in_colour() -> None:
    (line,) = growing_bars([Bar(4, A), Bar(2, B)], scale=6, mark=0, width=6, color=True)
    assert line.plain == "▀▀▀▀  "
    assert [(span.end, span.style) for span in line.spans] == [
        (2, f"{A.color} on {B.shaded().color}"),
        (4, A.color),
    ]


def test_a_track_draws_each_rollout_at_its_length() -> None:
    assert (
        race_track([Bar(0, A), Bar(5, A), Bar(9, B)], scale=10, mark=3, width=10, color=False).plain
        == "···│·a···b"
    )


def test_nice_ceiling_is_the_next_step_of_a_scale() -> None:
    assert [nice_ceiling(value) for value in (0, 8, 9, 13, 17, 25, 33, 500)] == [
        8,
        8,
        12,
        16,
        24,
        32,
        48,
        512,
    ]


def test_log_bins_hold_every_value_once() -> None:
    assert counts_in_log_bins([1, 2, 4, 8, 15, 16], 1, 16, 4) == [1, 1, 1, 3]


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([1, 8], 4) == "▁█  "
    assert sparkline([], 3) == "   "


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three steps of two groups; a dropped group lies between."""
    ends = ["shipped", "shipped", "shipped", "deadline", "shipped", "shipped", "shipped"]
    groups = []
    for place, end in enumerate(ends):
        rollouts = [
            {
                "rollout_id": seat,
                "engine": "e",
                "tokens": 10 + seat,
                "reward": seat % 2,
                "end": "selected_short",
            }
            for seat in range(4)
        ]
        step = min(2, ends[:place].count("shipped") // 2)
        groups.append({"step": step, "group_id": place, "prompt_id": f"p{place}",
                       "opened_version": 0,
                       "shipped_version": place // 2, "budget": 4, "long_end": "survivor",
                       "end": end, "rollouts": rollouts})  # fmt: skip
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    rows = [
        {"step": step, "time_s": float(step), "policy_version": step, "reward/mean": 0.1 * step}
        for step in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        "run: {steps: 3, name: old}\nbatch: {groups: 2}\nstaleness: {max_lag: 4}\n"
    )
    return tmp_path


def test_a_replay_shows_each_group_of_the_ledger_once(run_dir: Path) -> None:
    played = Frames(RunDirectory.read(run_dir))
    assert [[shown.group_id for shown in state.groups] for state in played] == [
        [0, 1],
        [2, 3, 4],
        [5, 6],
    ]
    assert [state.phase for state in played] == ["training", "training", "done"]


def test_a_replays_histogram_counts_every_rollout_of_its_window(run_dir: Path) -> None:
    last = Frames(RunDirectory.read(run_dir))[-1]
    assert {name: sum(counts) for name, counts in last.histogram.items()} == {"selected_short": 28}
    assert len(last.lags) == 6


def test_a_replay_keeps_an_evaluation_until_the_next(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[1] |= {"eval/step": 1, "eval/reward_mean": 0.5}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    played = Frames(RunDirectory.read(run_dir))
    assert [state.metrics.get("eval/reward_mean") for state in played] == [None, 0.5, 0.5]
    assert [state.metrics["step"] for state in played] == [0, 1, 2]


def test_a_replay_without_a_ledger_says_what_is_missing(run_dir: Path) -> None:
    (run_dir / "groups.jsonl").unlink()
    with pytest.raises(ValueError, match="groups.jsonl is missing"):
        Frames(RunDirectory.read(run_dir))


def test_a_replay_keeps_the_recorded_pace_and_can_be_moved(run_dir: Path) -> None:
    replay = Replay(run_dir)
    assert replay.speed == 2  # steps of 1 s, and about two of them per second
    replay.change_speed(64)
    seen = [state.step for _ in range(40) if (state := replay.receive(0.01))]
    assert seen == [1, 2, 3] and replay.ended()
    assert replay.seek(-1.0).step == 1
    assert replay.seek(0.0, 1).step == 2
    assert replay.seek(1.0).step == 3
    assert replay.seek(0.0, -5).step == 1
    replay.change_speed(1 / 1024)
    assert replay.receive(0.05) is None  # the next step is due in several seconds


def test_the_first_speed_fits_short_and_long_steps() -> None:
    assert first_speed([0.0]) == first_speed([0.0, 0.1, 0.2]) == 1
    assert first_speed([60.0 * step for step in range(100)]) == 128


def test_a_picture_has_the_text_of_a_frame_and_refers_to_no_file() -> None:
    svg = picture(frame(EMPTY, View(), 80, 24), 80, "little")
    assert "little" in svg and "step&#160;0/60" in svg
    assert not re.search(r"url\((?!#)|@font-face|<image|href", svg)


def test_the_size_of_a_picture_is_columns_and_lines() -> None:
    assert parse_size("80x24") == (80, 24)
    with pytest.raises(ArgumentTypeError, match="COLUMNSxLINES"):
        parse_size("80")


def test_the_table_of_prompts_has_one_axis_and_the_beginnings_of_prompts() -> None:
    prompts = [
        msgspec.structs.replace(prompt("a", (1, 2, 3, 100)), text="add 1", num_cancelled=2),
        prompt("b", (), (50,)),
    ]
    state = snapshot(prompts=prompts)
    heading, first, second = [line.plain for line in prompts_panel(state, PLAIN, 100, 3)]
    assert heading.split() == ["prompt", *COLUMNS, "1", "100"]
    assert first.split()[:7] == [">add", "1", "2", "100", "2", "100%", "–"]
    assert second.split()[:5] == ["b", "50", "50", "0", "0%"]
    bars = second[heading.index(" 1 ") + 1 :]
    place = bars.index(max(bars))  # not at the end, as it would be on an axis of its own
    assert 0.75 < place / 24 < 0.95
    for width in range(20, 140, 7):
        lines = prompts_panel(state, PLAIN, width, 3)
        assert all(cell_len(line.plain) <= width for line in lines)
        assert ("p99" in lines[0].plain) == (width >= 27)


def test_a_state_of_a_replay_is_made_when_it_is_shown(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a million responses has too many states to make all of them first."""
    made: list[int] = []
    monkeypatch.setattr(
        "tools.monitor.playback._prompt_views", lambda groups: made.append(len(groups)) or []
    )
    frames = Frames(RunDirectory.read(run_dir))
    assert len(frames) == 3 and made == []
    assert frames[1].step == 2 and made == [5]
