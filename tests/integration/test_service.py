"""The buffer's service over real sockets, with engines that draw lengths and learners that only
count.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffer.records.event_log import read_sessions
from buffer.records.row_segments import read_rows
from buffer.records.signal_watch import TOO_EASY, TOO_HARD
from buffer.service import Service
from buffer.wire import messages as msg
from buffer.wire.client import EngineLink, LearnerLink, Refused
from buffer.wire.transport import TransportError
from configs import cli
from configs.schema import Config
from darts import events as ev
from tests.fakes import FIRST_TOKEN, PROMPT, FakeEngine, FakeLearner
from tools.replay import replay

STEPS, GROUPS, SIZE = 5, 3, 4


def make_config(folder: Path, port: int, *overrides: str) -> Config:
    return cli.load(
        [
            f"run.dir={folder}", "run.name=r", f"run.steps={STEPS}",
            f"buffer.address=tcp://127.0.0.1:{port}", f"batch.groups={GROUPS}",
            f"darts.group_size={SIZE}", "redundancy.rule=fixed", "redundancy.upper=1.5",
            "sampling.max_tokens=64", "eval.every=2", "eval.num_prompts=5",
            "staleness.max_lag=2", "buffer.peer_timeout_s=3", "data.num_prompts=500",
            "darts.relative_limit=1.5", *overrides,
        ]
    )  # fmt: skip


class Running:
    """A service on a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.service = Service(config)
        self.status: int | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        self.status = self.service.serve()

    def wait(self, timeout_s: float = 60) -> int | None:
        self.thread.join(timeout_s)
        return self.status


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_rows(folder / "r" / name))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> tuple[Path, FakeLearner, list[FakeEngine], int]:
    """One whole run with two engines and a learner. The tests below read its results."""
    folder = tmp_path_factory.mktemp("runs")
    port = free_port()
    running = Running(make_config(folder, port))
    learner = FakeLearner(running.service.run.router.address, STEPS)
    engines = [
        FakeEngine(running.service.run.router.address, f"e/{i}", slots=6 + 4 * i) for i in range(2)
    ]
    for peer in (learner, *engines):
        peer.start()
    status = running.wait()
    for peer in (learner, *engines):
        peer.join(5)
    assert status is not None
    return folder, learner, engines, status


def test_run_ends_well_and_every_peer_is_told(finished: Any) -> None:
    _, learner, engines, status = finished
    assert status == 0
    assert learner.shutdown is not None and learner.shutdown.error == ""
    assert all(e.shutdown is not None and e.shutdown.error == "" for e in engines)


def test_every_step_has_one_metrics_row_within_the_lag_bound(finished: Any) -> None:
    metrics = rows(finished[0], "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    assert all(0 <= row["lag/max"] <= 2 for row in metrics)
    assert all(
        row["tokens/generated"]
        == sum(
            row[f"tokens/{end}"] for end in ("trained", "without_signal", "discarded", "cancelled")
        )
        for row in metrics
    )
    assert [row["tokens/trained"] for row in metrics] == sorted(
        row["tokens/trained"] for row in metrics
    )


def test_tokens_count_as_trained_if_the_learner_reports_them(finished: Any) -> None:
    """The fake learner leaves out one token a step; of truncated responses it is told nothing."""
    metrics, shards = rows(finished[0], "metrics.jsonl"), finished[1].shards
    assert not any(t.truncated for shard in shards for t in shard.trajectories)
    in_loss = np.cumsum([shard.loss_tokens for shard in shards])
    for row, cumulative in zip(metrics, in_loss, strict=True):
        assert row["tokens/trained"] == cumulative - (row["step"] + 1)
        assert row["tokens/without_signal"] >= row["step"] + 1


def test_responses_that_reached_the_relative_limit_are_trained_on(finished: Any) -> None:
    """They are not truncated, and the learner gets those that have a gradient."""
    groups = rows(finished[0], "groups.jsonl")
    curtailed = [
        rollout
        for group in groups
        if group["end"] == "shipped"
        for rollout in group["rollouts"]
        if rollout["curtailed"]
    ]
    assert curtailed and not any(r["truncated"] for r in curtailed)
    long = {r["rollout_id"] for r in curtailed if r["end"] == "selected_long"}
    trained = {t.rollout_id for shard in finished[1].shards for t in shard.trajectories}
    assert long & trained
    assert any(row["darts/curtailed_frac"] > 0 for row in rows(finished[0], "metrics.jsonl"))


def test_every_row_has_the_difference_between_engines_and_learner(finished: Any) -> None:
    metrics = rows(finished[0], "metrics.jsonl")
    assert [row["probe/logprob_diff"] for row in metrics] == [0.0] * STEPS


def test_an_engine_that_computes_something_else_ends_the_run_at_once(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port()))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS)
    engine.probe_nats = 0.25
    for peer in (learner, engine):
        peer.start()
    assert running.wait() != 0
    for peer in (learner, engine):
        peer.join(5)
    assert (
        "fake models are refused: engine e and learner differ by 2.5e-01" in running.service.error
    )
    assert rows(tmp_path, "metrics.jsonl") == []


def test_evaluations_run_before_during_and_after_training(finished: Any) -> None:
    steps = [row["eval/step"] for row in rows(finished[0], "metrics.jsonl") if "eval/step" in row]
    assert steps[0] == 0 and steps[-1] == STEPS
    assert all(
        row["eval/responses"] == 5
        for row in rows(finished[0], "metrics.jsonl")
        if "eval/step" in row
    )


def test_the_learner_is_told_every_evaluation(finished: Any) -> None:
    told = [(result.step, result.reward_mean) for result in finished[1].evaluations]
    in_rows = [
        (row["eval/step"], row["eval/reward_mean"])
        for row in rows(finished[0], "metrics.jsonl")
        if "eval/step" in row
    ]
    # The last row has only the last of the evaluations since the row before.
    assert set(in_rows) <= set(told) and in_rows[-1] == told[-1]
    assert [step for step, _ in told] == sorted({step for step, _ in told})


def test_shards_hold_the_whole_groups_that_have_signal(finished: Any) -> None:
    """Rewards are 0 or 1, so a group with different ones gives each response an advantage."""
    shipped = [row for row in rows(finished[0], "groups.jsonl") if row["end"] == "shipped"]
    for step, shard in enumerate(finished[1].shards):
        by_group: dict[int, list[msg.Trajectory]] = {}
        for t in shard.trajectories:
            by_group.setdefault(t.group_id, []).append(t)
            mask = np.frombuffer(t.sampled, np.uint8)
            assert mask[:3].sum() == 0 and mask[3:].all()
            assert len(t.tokens) == 4 * len(mask) == len(t.actor_logprobs)
            assert sum(n for _, n in t.versions) == mask.sum()
            assert t.advantage != 0
        selected = {
            row["group_id"]: [r for r in row["rollouts"] if r["end"].startswith("selected")]
            for row in shipped[step * GROUPS : (step + 1) * GROUPS]
        }
        mixed = {g for g, of_group in selected.items() if len({r["reward"] for r in of_group}) > 1}
        assert by_group.keys() == mixed
        for group in by_group.values():
            assert len(group) == SIZE
            assert sum(t.advantage for t in group) == pytest.approx(0, abs=1e-9)
        everything = [r for of_group in selected.values() for r in of_group]
        assert shard.loss_tokens == sum(r["tokens"] for r in everything)
        assert sum(m.loss_responses for m in shard.minibatches) == len(everything)


@pytest.mark.parametrize("pass_rate", [0.0, 1.0])
def test_a_run_without_any_signal_ends_in_bounded_work_and_says_so(
    tmp_path: Path, free_port: Callable[[], int], pass_rate: float, capfd: Any
) -> None:
    """Every step replaces as many groups as it may, and then trains on nothing."""
    dropping = ["darts.uniform=drop", "darts.max_refill=1", "run.steps=2", "eval.every=0"]
    running = Running(make_config(tmp_path, free_port(), *dropping))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, 2)
    engine.pass_rate = pass_rate
    for peer in (engine, learner):
        peer.start()
    assert running.wait() == 0
    metrics = rows(tmp_path, "metrics.jsonl")
    assert [row["darts/uniform_frac"] for row in metrics] == [1.0, 1.0]
    # Groups that are decided while the learner trains belong to the next step already.
    assert 2 * GROUPS <= sum(row["darts/replaced_groups"] for row in metrics) <= 3 * GROUPS
    assert not any(shard.trajectories for shard in learner.shards)
    advice = TOO_EASY if pass_rate else TOO_HARD
    assert capfd.readouterr().err.count(advice) == 1


def test_an_overlong_penalty_moves_advantages_alone(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Rewards in the ledger, in shards and in metrics are those of the verifier, 0 or 1."""
    overlong = ["loss.overlong_buffer=60", "loss.overlong_factor=0.5", "loss.train_truncated=true"]
    config = make_config(tmp_path, free_port(), "run.steps=2", "eval.every=0", *overlong)
    running = Running(config)
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, 2)
    for peer in (engine, learner):
        peer.start()
    assert running.wait() == 0
    ledger = {row["group_id"]: row for row in rows(tmp_path, "groups.jsonl")}
    for shard, metrics in zip(learner.shards, rows(tmp_path, "metrics.jsonl"), strict=True):
        of_step = [
            [r for r in row["rollouts"] if r["end"].startswith("selected")]
            for row in ledger.values()
            if (row["step"], row["end"]) == (shard.step, "shipped")
        ]
        expected: dict[int, float] = {}
        penalties: list[float] = []
        for group in of_step:
            penalty = [-0.5 * max(0, r["tokens"] - 4) / 60 for r in group]
            shaped = [r["reward"] + p for r, p in zip(group, penalty, strict=True)]
            mean, std = np.mean(shaped), np.std(shaped) + 1e-6
            expected |= {
                r["rollout_id"]: (s - mean) / std for r, s in zip(group, shaped, strict=True)
            }
            penalties += penalty
        moved = {rollout: a for rollout, a in expected.items() if abs(a) > 1e-6}
        assert {t.rollout_id: t.advantage for t in shard.trajectories} == pytest.approx(moved)
        everything = [r["reward"] for group in of_step for r in group]
        assert {t.reward for t in shard.trajectories} <= {0.0, 1.0}
        assert metrics["reward/mean"] == pytest.approx(np.mean(everything))
        assert metrics["reward/overlong_mean"] == pytest.approx(np.mean(penalties))


def test_ledger_has_each_group_once_with_selected_rollouts(finished: Any) -> None:
    ledger = rows(finished[0], "groups.jsonl")
    assert len({row["group_id"] for row in ledger}) == len(ledger)
    shipped = [row for row in ledger if row["end"] == "shipped"]
    assert len(shipped) == STEPS * GROUPS
    for row in shipped:
        ends = [r["end"] for r in row["rollouts"]]
        assert ends.count("selected_short") + ends.count("selected_long") == SIZE
        assert set(row) == {
            "step",
            "group_id",
            "prompt_id",
            "opened_version",
            "shipped_version",
            "budget",
            "long_end",
            "end",
            "rollouts",
            "visit",
            "pilot",
            "mixed_prob",
            "uniform",
            "audit",
        }


def test_slots_are_never_exceeded(finished: Any) -> None:
    assert all(0 < e.most_in_flight <= e.slots for e in finished[2])


def test_log_replays_to_the_same_decisions(finished: Any) -> None:
    for session in read_sessions(finished[0] / "r" / "events"):
        result = replay(session.config, session.state, session.events)
        assert result.difference is None and result.num_events > 100 and result.num_decisions > 50


def test_replay_detects_a_decision_that_was_not_made(finished: Any) -> None:
    [(config, entries)] = [
        (s.config, list(s.events)) for s in read_sessions(finished[0] / "r" / "events")
    ]
    at = next(
        i for i, e in enumerate(entries) if any(isinstance(d, ev.Launch) for d in e.decisions)
    )
    entries[at].decisions.pop()
    assert replay(config, None, iter(entries)).difference is not None


@pytest.mark.slow
def test_killed_engine_loses_only_its_rollouts_in_flight(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port(), "buffer.peer_timeout_s=3"))
    address = running.service.run.router.address
    learner = FakeLearner(address, STEPS, step_s=0.3)
    doomed, other = FakeEngine(address, "doomed"), FakeEngine(address, "other")
    for peer in (learner, doomed, other):
        peer.start()
    while doomed.num_launched < 10:
        other.join(0.01)
    doomed.kill()
    assert running.wait() == 0
    ledger = rows(tmp_path, "groups.jsonl")
    assert sum(row["end"] == "shipped" for row in ledger) == STEPS * GROUPS
    assert {row["end"] for row in ledger} <= {"shipped", "deadline"}


def test_an_engine_that_leaves_hands_over_its_tokens(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    config = make_config(tmp_path, free_port(), "darts.max_attempts=1", "buffer.peer_timeout_s=60")
    running = Running(config)
    address = running.service.run.router.address
    leaver, other = FakeEngine(address, "leaver"), FakeEngine(address, "other")
    learner = FakeLearner(address, STEPS, step_s=0.2)
    for peer in (learner, leaver, other):
        peer.start()
    while leaver.num_launched < 10:
        other.join(0.01)
    leaver.leave()
    assert running.wait() == 0
    assert running.service.run.core.engines.by_id.keys() == {"other"}
    ledger = rows(tmp_path, "groups.jsonl")
    lost = [r for row in ledger for r in row["rollouts"] if r["end"] == "lost"]
    assert lost and {row["end"] for row in ledger} <= {"shipped", "deadline"}
    sessions = read_sessions(tmp_path / "r" / "events")
    decisions = [d for session in sessions for entry in session.events for d in entry.decisions]
    continued = [d for d in decisions if isinstance(d, ev.Launch) and d.continues is not None]
    assert continued and {launch.engine_id for launch in continued} == {"other"}
    for trajectory in (t for shard in learner.shards for t in shard.trajectories):
        tokens = np.frombuffer(trajectory.tokens, "<i4")[len(PROMPT) :]
        assert tokens.tolist() == list(range(FIRST_TOKEN, FIRST_TOKEN + len(tokens)))


def test_learner_that_dies_with_a_shard_is_replaced(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port(), "buffer.peer_timeout_s=3"))
    address = running.service.run.router.address
    engine, first = FakeEngine(address, "e"), FakeLearner(address, STEPS, stop_after=3)
    engine.start()
    first.start()
    first.join(30)
    second = FakeLearner(address, STEPS, start=2)
    second.start()
    assert running.wait() == 0
    metrics = rows(tmp_path, "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    assert all(row["lag/max"] <= 2 for row in metrics)
    in_hand = {t.group_id for t in first.shards[-1].trajectories}
    offered_again = {t.group_id for shard in second.shards for t in shard.trajectories}
    stale = {row["group_id"] for row in rows(tmp_path, "groups.jsonl") if row["end"] == "stale"}
    assert in_hand <= offered_again | stale and not offered_again & stale


def test_resumed_run_draws_unfinished_prompts_and_repeats_none(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    running = Running(make_config(tmp_path, port, "data.num_prompts=60"))
    engine, learner = (
        FakeEngine(running.service.run.router.address, "e"),
        FakeLearner(running.service.run.router.address, 3),
    )
    engine.start()
    learner.start()
    while len(learner.shards) < 3 or learner.step < 3:
        learner.join(0.01)
    while running.service.run.step < 3:
        learner.join(0.01)
    running.service.stop()
    assert running.wait() == 130
    running = Running(make_config(tmp_path, port, "data.num_prompts=60", "run.resume=true"))
    engine, learner = (
        FakeEngine(running.service.run.router.address, "e"),
        FakeLearner(running.service.run.router.address, STEPS, start=2),
    )
    engine.start()
    learner.start()
    assert running.wait() == 0
    metrics = rows(tmp_path, "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    assert [row["policy_version"] for row in metrics] == sorted(
        {row["policy_version"] for row in metrics}
    )
    shipped = [
        row["prompt_id"] for row in rows(tmp_path, "groups.jsonl") if row["end"] == "shipped"
    ]
    # 15 of an epoch of 60, none of them twice.
    assert len(shipped) == STEPS * GROUPS and len(set(shipped)) == len(shipped)


def test_rollout_that_always_fails_stops_the_run_with_its_error(
    tmp_path: Path, free_port: Callable[[], int], capsys: Any
) -> None:
    running = Running(make_config(tmp_path, free_port()))
    engine, learner = (
        FakeEngine(running.service.run.router.address, "e"),
        FakeLearner(running.service.run.router.address, STEPS),
    )
    engine.fail_rollouts = "verifier my_module:verify raised KeyError: 'x'"
    engine.start()
    learner.start()
    assert running.wait() == 1
    assert "my_module:verify raised KeyError" in running.service.error
    learner.join(5)
    assert learner.shutdown is not None and "KeyError" in learner.shutdown.error


def test_a_failing_prompt_is_skipped_if_configured(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """With data.on_error=skip the run goes on, no failed rollout is trained on, and the ledger
    records how each one ended.
    """
    skip = ("data.on_error=skip", "data.max_skipped_frac=0.99", "darts.max_reopens=0")
    running = Running(make_config(tmp_path, free_port(), *skip, "eval.every=0"))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS)
    engine.fail_rollouts = "the verifier raised"
    engine.start()
    learner.start()
    while engine.num_launched < 100:
        engine.join(0.01)
    engine.fail_rollouts = ""
    assert running.wait() == 0
    ledger = rows(tmp_path, "groups.jsonl")
    failed = [row for row in ledger if row["end"] == "failed"]
    assert failed and not any(
        r["end"].startswith("selected") for row in failed for r in row["rollouts"]
    )
    assert sum(row["end"] == "shipped" for row in ledger) == STEPS * GROUPS
    assert all(
        r["reward"] is not None
        for row in ledger
        for r in row["rollouts"]
        if r["end"].startswith("selected")
    )
    skipped = [row["data/skipped_prompts"] for row in rows(tmp_path, "metrics.jsonl")]
    assert 0 < skipped[-1] <= len(failed) and skipped == sorted(skipped)


def test_a_verifier_that_always_fails_ends_the_run_with_the_counts(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    options = ("data.on_error=skip", "darts.max_reopens=0", "eval.every=0")
    running = Running(make_config(tmp_path, free_port(), *options))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e", slots=64), FakeLearner(address, STEPS)
    engine.fail_rollouts = "verifier my_module:verify raised KeyError: 'x'"
    engine.start()
    learner.start()
    assert running.wait() == 1
    error = running.service.error
    assert "9 like this: verifier my_module:verify raised KeyError" in error
    assert "data.max_skipped_frac=0.1" in error
    learner.join(5)
    assert learner.shutdown is not None and learner.shutdown.error == error


@pytest.mark.parametrize("segment_bytes", [1, 64_000_000])
def test_a_restarted_buffer_still_knows_how_many_prompts_were_skipped(
    tmp_path: Path, free_port: Callable[[], int], segment_bytes: int
) -> None:
    """From its event log, or from the checkpoint at the head of the newest segment."""
    options = (
        "data.max_skipped_frac=0.9", "darts.max_reopens=0", "eval.every=0",
        f"buffer.segment_bytes={segment_bytes}",
    )  # fmt: skip
    port = free_port()
    running = Running(make_config(tmp_path, port, *options))
    run = running.service.run
    engine, learner = FakeEngine(run.router.address, "e"), FakeLearner(run.router.address, 3)
    engine.too_long = lambda prompt_id: prompt_id[1] in "0123"
    engine.start()
    learner.start()
    while running.service.run.step < 3:
        learner.join(0.01)
    running.service.stop()
    assert running.wait() == 130
    engine.kill()
    before = run.skipped.num_skipped
    assert before > 0
    again = Service(make_config(tmp_path, port, *options, "run.resume=true"))
    again._recover()
    again.run.close("")
    ledger = [row for row in rows(tmp_path, "groups.jsonl") if row["end"] == "failed"]
    assert again.run.skipped.num_skipped == before == len(ledger)


def test_an_evaluation_without_a_reward_ends_the_run(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port()))
    run = running.service.run
    engine, learner = FakeEngine(run.router.address, "e"), FakeLearner(run.router.address, STEPS)
    engine.too_long = lambda prompt_id: prompt_id in run.eval_payloads
    engine.start()
    learner.start()
    assert running.wait() == 1
    assert running.service.error.startswith(
        "evaluation after 0 steps: 5 of 5 prompts were skipped: 5 like this: prompt "
    )


def test_a_rollout_that_succeeds_at_its_second_attempt_is_not_a_failure(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """This holds in an evaluation too, which comes first, and even with data.on_error=stop."""
    running = Running(make_config(tmp_path, free_port()))
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS)
    engine.num_to_fail = 2
    engine.start()
    learner.start()
    assert running.wait() == 0
    metrics = rows(tmp_path, "metrics.jsonl")
    assert {row["eval/responses"] for row in metrics if "eval/step" in row} == {5}
    assert metrics[-1]["data/skipped_prompts"] == 0


def test_a_prompt_that_is_too_long_is_skipped_and_counted(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """This holds for every data.on_error. The summary names the file and the row."""
    held_out, data = tmp_path / "held-out.jsonl", tmp_path / "rows.jsonl"
    for file, start in ((held_out, 1000), (data, 0)):
        lines = (json.dumps({"prompt": f"{start + i}?", "answer": i}) for i in range(60))
        file.write_text("\n".join(lines))
    options = (f"data.train={data}", f"data.eval={held_out}", "data.max_skipped_frac=0.5")
    running = Running(make_config(tmp_path, free_port(), *options))
    run = running.service.run
    too_long = {p.prompt_id: p for p in (run.prompts._stream.source[i] for i in range(20))}
    too_long |= {p.prompt_id: p for p in list(run.eval_payloads.values())[:2]}
    engine, learner = FakeEngine(run.router.address, "e"), FakeLearner(run.router.address, STEPS)
    engine.too_long = lambda prompt_id: prompt_id in too_long
    engine.start()
    learner.start()
    assert running.wait() == 0
    ledger, metrics = rows(tmp_path, "groups.jsonl"), rows(tmp_path, "metrics.jsonl")
    skipped = {row["prompt_id"] for row in ledger if row["end"] == "failed"}
    assert skipped and skipped <= set(too_long)
    assert not skipped & {row["prompt_id"] for row in ledger if row["end"] == "shipped"}
    assert metrics[-1]["data/skipped_prompts"] == run.skipped.num_skipped > 0
    assert {row["eval/responses"] for row in metrics if "eval/step" in row} == {3}
    summary = run.skipped.summary(run.prompts.num_drawn)
    assert any(f"{too_long[i].name} is too long" in summary for i in skipped)
    assert f"({data}, row " in summary


@pytest.mark.slow
def test_a_full_store_pauses_admission(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """With buffer.max_bytes for little more than a step, engines wait, and the run still ends."""
    config = make_config(tmp_path, free_port())
    # Less than a configuration allows, which assumes the longest responses.
    config.buffer.max_bytes = 4_000
    running = Running(config)
    address = running.service.run.router.address
    engine, learner = FakeEngine(address, "e", slots=64), FakeLearner(address, STEPS, step_s=0.2)
    engine.start()
    learner.start()
    assert running.wait() == 0
    sessions = read_sessions(tmp_path / "r" / "events")
    events = [logged.event for session in sessions for logged in session.events]
    assert any(isinstance(event, ev.AdmissionPaused) and event.paused for event in events)


@pytest.mark.slow
def test_a_run_without_a_learner_ends_with_an_error(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port(), "buffer.rejoin_timeout_s=1.5"))
    FakeEngine(running.service.run.router.address, "e").start()
    assert running.wait(20) == 1
    assert "for a learner" in running.service.error and "rejoin_timeout_s" in running.service.error


def test_second_run_in_the_same_directory_is_refused(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    config = make_config(tmp_path, free_port())
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"run\.resume=true"):
        Service(config)


@pytest.mark.slow
def test_a_second_engine_of_one_name_is_refused_while_the_first_lives(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port()))
    address = running.service.run.router.address
    first = FakeEngine(address, "e")
    first.start()
    while running.service.run.peers.engine("e") is None:
        first.join(0.01)
    hello = msg.EngineHello(
        engine_id="e", engine_type="fake", slots=4, policy_version=-1, pid=1, incarnation="second"
    )
    with EngineLink(address, "e") as link, pytest.raises(Refused, match="names must be unique"):
        link.connect(hello, 20)
    FakeLearner(address, STEPS).start()
    assert running.wait() == 0
    assert first.num_launched > 0


def test_the_files_of_another_run_are_refused(tmp_path: Path, free_port: Callable[[], int]) -> None:
    port = free_port()
    running = Running(make_config(tmp_path / "one", port))
    address = running.service.run.router.address
    engine_hello = msg.EngineHello(
        engine_id="e", engine_type="fake", slots=4, policy_version=-1, pid=1, incarnation="a"
    )
    learner_hello = msg.LearnerHello(rank=0, num_ranks=1, step=0, pid=1, vocab_size=100)
    with (
        EngineLink(address, "e", peer_timeout_s=10) as engine_link,
        LearnerLink(address, "learner/0", peer_timeout_s=10) as learner_link,
    ):
        engine_link.connect(engine_hello, 10)
        learner_link.connect(learner_hello, 10)
        running.service.stop()
        assert running.wait() == 130
        running = Running(make_config(tmp_path / "two", port))
        with pytest.raises(TransportError, match="another run"):
            engine_link.connect(engine_hello, 10)
        with pytest.raises(TransportError, match="another run"):
            learner_link.connect(
                msg.LearnerHello(rank=0, num_ranks=1, step=3, pid=1, vocab_size=100), 10
            )
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS)
    engine.start()
    learner.start()
    assert running.wait() == 0


def test_an_engine_that_sends_a_learner_message_is_dismissed(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port()))
    address = running.service.run.router.address
    with EngineLink(address, "bad", peer_timeout_s=10) as link:
        link.connect(
            msg.EngineHello(
                engine_id="bad",
                engine_type="fake",
                slots=4,
                policy_version=-1,
                pid=1,
                incarnation="a",
            ),
            10,
        )
        link.send(
            msg.Published(  # pyright: ignore[reportArgumentType] -- no engine may say this
                policy=msg.SnapshotRef(version=7, digest="", num_bytes=0, address="", path=""),
                seconds=0.0,
            )
        )  # type: ignore[arg-type]
        answer = link.receive(10)
        while isinstance(answer, msg.Launch):
            answer = link.receive(10)
        assert isinstance(answer, msg.Shutdown) and "not engine bad's to send" in answer.error
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS)
    engine.start()
    learner.start()
    assert running.wait() == 0


def test_engine_with_an_impossible_hello_is_refused_and_the_run_goes_on(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    running = Running(make_config(tmp_path, free_port()))
    address = running.service.run.router.address
    hello = msg.EngineHello(
        engine_id="bad", engine_type="fake", slots=0, policy_version=-1, pid=1, incarnation="a"
    )
    with (
        EngineLink(address, "bad", peer_timeout_s=10) as link,
        pytest.raises(TransportError, match="slots"),
    ):
        link.connect(hello, 10)
    with (
        LearnerLink(address, "learner/7", peer_timeout_s=10) as link,
        pytest.raises(TransportError, match="rank 7 of 2"),
    ):
        link.connect(msg.LearnerHello(rank=7, num_ranks=2, step=0, pid=1, vocab_size=100), 10)
    engine, learner = FakeEngine(address, "e"), FakeLearner(address, STEPS)
    engine.start()
    learner.start()
    assert running.wait() == 0
