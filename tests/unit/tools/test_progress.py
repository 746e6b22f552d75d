"""The text of the launcher's progress views, and the moments at which they print."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from buffer.wire.messages import EngineView, LiveState
from tools.launching.progress import LiveView, Pace, PlainView, clock, state

ENGINE = EngineView(
    engine_id="pool/0",
    engine_type="cpu",
    slots=64,
    in_flight=48,
    policy_version=3,
    tokens_per_s=4200.0,
    busy_frac=0.9,
    curve=[],
)
LOADING = msgspec.structs.replace(ENGINE, policy_version=-1)
EMPTY = LiveState(
    time_s=12.0, run_name="little", phase="training", step=0, steps=20, policy_version=0, max_lag=4,
    waiting="", groups_open=0, groups_ready=0, bytes_held=0, refused_frames=0, histogram_edges=[],
    histogram={}, lags=[], metrics={}, groups=[], engines=[ENGINE], prompts=[],
)  # fmt: skip


def snapshot(**changes: object) -> LiveState:
    return msgspec.structs.replace(EMPTY, **changes)


def test_durations_read_as_clocks() -> None:
    assert [clock(5), clock(95), clock(3700)] == ["0:05", "1:35", "1:01:40"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"engines": [], "policy_version": -1},
            "starting: waiting for the learner's first weights and engines to join",
        ),
        ({"engines": [LOADING]}, "starting: waiting for engines to load the model"),
        ({"phase": "first evaluation"}, "first evaluation"),
        ({}, "training"),
    ],
)
def test_until_an_engine_is_ready_the_state_names_the_missing_side(
    changes: dict[str, object], said: str
) -> None:
    assert state(snapshot(**changes)) == said


def test_time_left_comes_from_the_steps_of_this_launch() -> None:
    pace = Pace()
    assert pace.eta(snapshot(step=10, steps=20, time_s=100.0)) == ""
    assert pace.eta(snapshot(step=15, steps=20, time_s=110.0)) == "0:10 left"


def test_a_plain_line_comes_every_five_steps(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(clock_s=lambda: 1.0)
    for step in range(11):
        view.show(snapshot(step=step, steps=20))
    assert [line.partition(";")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step {step}/20 training" for step in (0, 5, 10)
    ]


@pytest.mark.parametrize(
    ("is_accuracy", "shown"),
    [(True, "accuracy 75.0 % (from 25.0 %)"), (False, "held-out reward 0.750 (from 0.250)")],
)
def test_the_live_view_shows_first_and_last_evaluation_and_the_lag_with_its_bound(
    is_accuracy: bool, shown: str
) -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    view = LiveView(console)
    for step, reward in ((1, 0.25), (9, 0.75)):
        metrics = {"eval/reward_mean": reward, "eval/step": step - 1.0}
        metrics |= {"eval/accuracy": reward} if is_accuracy else {}
        view.show(snapshot(step=step, metrics=metrics))
    view.close()
    console.print(view.picture(snapshot(step=9, lags=[0, 3])))
    text = console.export_text()
    assert shown in text and "lag 3 of at most 4" in text
