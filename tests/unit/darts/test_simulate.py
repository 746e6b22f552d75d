"""The simulator: determinism, conservation, its engine model, its baselines and its refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from configs import cli
from darts import events as ev
from darts.core import Core
from darts.simulate.engines import SimEngine, SimRollout, ptl_table
from darts.simulate.lengths import (
    Responses,
    Shaping,
    SimPrompt,
    make_prompts,
    recorded_prompts,
)
from darts.simulate.schema import LengthKeys, PatternKeys, ShapingKeys, SimulateConfig, check
from darts.simulate.tally import Files
from darts.simulate.world import Simulation, simulate
from darts.sizing.lengths import POOL_PRIOR
from tools.monitor.playback import Frames
from tools.reporting.run_directory import RunDirectory

ROOT = Path(__file__).parents[3]
SMALL = ["run.steps=4", "batch.groups=8", "lengths.num_prompts=32", "engines.slots=32"]


def config(*overrides: str) -> SimulateConfig:
    return cli.load([*SMALL, *overrides], SimulateConfig)


# One run -----------------------------------------------------------------------------------------


def test_a_run_depends_on_its_seed_alone() -> None:
    first, second, other = simulate(config()), simulate(config()), simulate(config("run.seed=1"))
    assert first == second
    assert first["virtual_s"] != other["virtual_s"]


@pytest.mark.parametrize("policy", ["darts", "plain", "first_finished", "random"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_every_step_trains_whole_groups_within_the_bound(policy: str, mode: str) -> None:
    made = config(
        f"darts.policy={policy}",
        f"pipeline.mode={mode}",
        "redundancy.rule=fixed",
        "redundancy.upper=1.5",
    )
    summary = simulate(made)
    assert summary["groups"]["shipped"] == 4 * 8
    assert summary["lag_max"] <= (0 if mode == "sync" else made.staleness.max_lag)
    tokens = {
        name: summary[f"tokens/{name}"]
        for name in ("generated", "trained", "discarded", "cancelled")
    }
    assert tokens["generated"] == tokens["trained"] + tokens["discarded"] + tokens["cancelled"]


def test_all_policies_get_the_same_work() -> None:
    draws: dict[str, dict[tuple[str, int], list[int]]] = {}
    for policy in ("plain", "darts"):
        prompts = make_prompts(LengthKeys(num_prompts=4), PatternKeys(), seed=3)
        moments = Shaping(ShapingKeys()).moments(prompts[2])
        responses = Responses(prompts[2], moments, 512, seed=3, visit=1)
        draws[policy] = {
            ("", 0): [responses.next().length for _ in range(8 if policy == "plain" else 12)]
        }
    assert draws["darts"][("", 0)][:8] == draws["plain"][("", 0)]


def test_waiting_for_the_longest_cancels_nothing_and_selects_offline() -> None:
    summary = simulate(
        config("darts.long_end=longest", "redundancy.rule=fixed", "pipeline.mode=sync")
    )
    assert summary["tokens/cancelled"] == 0
    assert (summary["short_wrong_frac"], summary["long_wrong_frac"]) == (0.0, 0.0)


def test_exact_cancels_give_short_seats_as_the_offline_rule_does() -> None:
    overrides = ("redundancy.rule=fixed", "staleness.max_lag=16", "learner.ms_per_token=0.05")
    one_engine = simulate(config(*overrides))
    assert one_engine["tokens/cancelled"] > 0
    assert one_engine["short_wrong_frac"] == 0.0


def test_eager_cancels_select_by_finish_order_if_rollouts_start_apart() -> None:
    crowded = (
        "redundancy.rule=fixed",
        "redundancy.upper=2.0",
        "engines.slots=17",
        "darts.cancel=eager",
        "staleness.max_lag=16",
    )
    assert simulate(config(*crowded))["short_wrong_frac"] > 0.0


def test_without_streaming_no_rollout_in_flight_is_known_to_be_past_selection() -> None:
    silent = Simulation(
        config("learner.streaming=false", "redundancy.rule=fixed", "pipeline.mode=sync")
    )
    silent.run()
    assert silent.num_events["RolloutProgressed"] == 0
    assert silent.tally.tokens["cancelled"] == 0


def test_the_summary_counts_every_prompt(tmp_path: Path) -> None:
    slow = [
        "engines.num_engines=2",
        "engines.speeds=[1.0,0.2]",
        "sampling.max_tokens=90",
        "staleness.max_lag=1",
        "staleness.on_deadline=drop",
    ]
    made = config(f"run.out={tmp_path / 'run'}", *slow)
    summary = simulate(made, Files(tmp_path / "run", cli.to_yaml(made)))
    ledger = RunDirectory.read(tmp_path / "run").ledger()
    assert set(ledger) <= {f"p{index:05d}" for index in range(32)}
    for use in ("shipped", "filled", "dropped"):
        assert sum(counts[use] for counts in ledger.values()) == summary["groups"][use] > 0
    assert all(
        counts["opened"] == counts["shipped"] + counts["dropped"] for counts in ledger.values()
    )


def test_a_simulation_writes_the_files_of_a_run(tmp_path: Path) -> None:
    made = config(f"run.out={tmp_path / 'run'}")
    files = Files(tmp_path / "run", cli.to_yaml(made))
    simulate(made, files)
    run = RunDirectory.read(tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [0, 1, 2, 3]
    assert len(run.trained_groups()) == 32
    assert len(Frames(run)) == 4
    with pytest.raises(ValueError, match="holds a run already"):
        Files(tmp_path / "run", "")


def test_recorded_lengths_are_replayed(tmp_path: Path) -> None:
    made = config(
        f"run.out={tmp_path / 'run'}",
        "run.steps=16",
        "lengths.num_prompts=16",
        "lengths.spread_between=0",
        "darts.policy=plain",
    )
    simulate(made, Files(tmp_path / "run", ""))
    truth = make_prompts(made.lengths, made.pattern, made.run.seed)
    fitted = make_prompts(
        LengthKeys(recorded=str(tmp_path / "run" / "groups.jsonl")), PatternKeys(), 0
    )
    true_by_id = {prompt.prompt_id: prompt for prompt in truth}
    assert len(fitted) == 16
    error = [abs(prompt.mean_log - true_by_id[prompt.prompt_id].mean_log) for prompt in fitted]
    assert sum(error) / len(error) < 0.2
    assert abs(sum(prompt.spread for prompt in fitted) / 16 - 0.8) < 0.1


def test_a_simulation_that_is_stuck_is_an_error() -> None:
    simulation = Simulation(config())
    simulation.scheduler.handle(ev.AdmissionPaused(True))
    with pytest.raises(RuntimeError, match="stands still"):
        simulation.run()


# Baselines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tail_batching", "partial_rollout"])
def test_round_schedulers_train_whole_batches(name: str) -> None:
    simulation = Simulation(
        config(f"baseline.scheduler={name}", "pipeline.mode=sync", "run.steps=8")
    )
    summary = simulation.run()
    assert summary["groups"]["shipped"] == 8 * 8
    assert all(len(row) > 0 and row["tokens/trained"] > 0 for row in simulation.rows)


def test_tail_batching_answers_deferred_prompts_in_a_long_round() -> None:
    budgets: list[int] = []
    simulation = Simulation(
        config("baseline.scheduler=tail_batching", "pipeline.mode=sync", "run.steps=8"),
        observer=lambda _, decisions: budgets.extend(
            d.budget for d in decisions if isinstance(d, ev.OpenGroup)
        ),
    )
    summary = simulation.run()
    # A short round launches more rollouts.
    long_rounds = budgets.count(simulation.config.darts.group_size)
    assert 8 <= long_rounds < len(budgets)
    assert summary["groups"]["dropped"] >= long_rounds
    assert summary["lag_max"] == 0


def test_partial_rollouts_resume_at_their_last_token() -> None:
    launches: list[ev.Launch] = []
    simulation = Simulation(
        config("baseline.scheduler=partial_rollout", "pipeline.mode=sync", "run.steps=8"),
        observer=lambda _, decisions: launches.extend(
            d for d in decisions if isinstance(d, ev.Launch)
        ),
    )
    summary = simulation.run()
    assert any(launch.continues is not None for launch in launches)
    assert summary["lag_max"] >= 1
    assert summary["tokens/cancelled"] == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ("darts.cancel=eager", "redundancy.rule=fixed"),
        ("staleness.on_deadline=drop", "sampling.max_tokens=150"),
        ("baseline.scheduler=tail_batching", "pipeline.mode=sync"),
    ],
)
def test_every_sampled_token_is_counted_once(overrides: tuple[str, ...]) -> None:
    """For every scheduler, tokens count up to the engine's stop, not up to the decision."""
    sampled: dict[int, int] = {}
    recorded: dict[int, int] = {}

    def observe(event: ev.Event, decisions: list[ev.Decision]) -> None:
        if isinstance(event, (ev.RolloutFinished, ev.RolloutStopped)):
            sampled[event.rollout_id] = event.num_tokens
        for decision in decisions:
            if isinstance(decision, (ev.Close, ev.Drop)):
                recorded.update((r.rollout_id, r.tokens) for r in decision.record.rollouts)

    simulation = Simulation(
        config(*overrides, "run.steps=8", "engines.cancel_s=0.5"), observer=observe
    )
    simulation.run()
    tokens = simulation.tally.tokens
    assert tokens["generated"] == sum(sampled.get(i, seen) for i, seen in recorded.items())
    assert tokens["generated"] == tokens["trained"] + tokens["discarded"] + tokens["cancelled"]
    # Some tokens were sampled after the decision.
    assert tokens["generated"] > sum(recorded.values())


def test_a_truncated_response_that_took_a_seat_is_only_a_lower_bound(tmp_path: Path) -> None:
    """In a ledger, a truncated response that filled a seat has the same end as a selected one."""

    def write(name: str, truncated: bool) -> Path:
        rollouts = [
            {"tokens": 40 + 10 * i, "reward": 1.0, "end": "selected_short", "truncated": False}
            for i in range(3)
        ]
        rollouts.append(
            {"tokens": 60, "reward": 0.0, "end": "selected_long", "truncated": truncated}
        )
        path = tmp_path / name
        path.write_text(json.dumps({"prompt_id": "p", "rollouts": rollouts}) + "\n")
        return path

    [bound] = recorded_prompts(write("bound", True), PatternKeys())
    [exact] = recorded_prompts(write("exact", False), PatternKeys())
    assert bound.mean_log > exact.mean_log


# The engine --------------------------------------------------------------------------------------


def engine_with(*lengths: int, kv_tokens: int = 10_000, slots: int = 8) -> SimEngine:
    engine = SimEngine(
        "e", "t", slots, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], kv_tokens, chunk_tokens=4
    )
    for rollout_id, length in enumerate(lengths):
        engine.admit(SimRollout(rollout_id, 0, engine, length, False, 1.0, 0, prompt_tokens=10))
    return engine


def run_dry(engine: SimEngine) -> dict[int, float]:
    """The time at which each rollout finishes."""
    finished: dict[int, float] = {}
    while (due_s := engine.plan()) < math.inf:
        engine.arrive(due_s)
        finished |= {rollout.rollout_id: due_s for rollout in engine.finished()}
        engine.report_due()
        engine.relieve_cache()
    return finished


def test_time_per_token_follows_the_batch() -> None:
    # Two decode 5 tokens at 2 s each, then one is left for 5 more at 1 s.
    assert run_dry(engine_with(5, 10)) == pytest.approx({0: 10.0, 1: 15.0})


def test_a_pause_delays_rollouts_in_flight_and_loses_none() -> None:
    engine = engine_with(5, 10)
    engine.pause(7.0)
    assert run_dry(engine) == pytest.approx({0: 17.0, 1: 22.0})


def test_a_full_cache_preempts_the_youngest_rollout_which_keeps_its_tokens() -> None:
    roomy, tight = run_dry(engine_with(30, 30)), engine_with(30, 30, kv_tokens=50)
    finished = run_dry(tight)
    assert tight.num_preemptions > 0
    assert finished.keys() == roomy.keys()
    assert finished[0] < roomy[0]
    assert finished[1] > finished[0]
    # It decodes no more tokens than in a roomy cache: 15 shared, 15 alone, 15 alone.
    assert finished[1] == pytest.approx(15 * 2.0 + 15 + 15)


def test_a_rollout_without_room_in_the_cache_waits() -> None:
    engine = engine_with(20, 20, kv_tokens=21)
    assert len(engine.decoding) == 1
    assert run_dry(engine).keys() == {0, 1}
    assert engine.num_preemptions == 0


def test_latencies_are_interpolated_on_the_curve() -> None:
    table = ptl_table([1, 16], [10.0, 40.0], 2.0, 16)
    assert table[1] == pytest.approx(5e-3)
    assert table[16] == pytest.approx(20e-3)
    assert table[4] == pytest.approx(10e-3)  # a power law between the two


# Shaping -----------------------------------------------------------------------------------------

VERBOSE, DEEP = SimPrompt("v", 5.0, 0.8, 0.0, -1.0), SimPrompt("d", 5.0, 0.8, 0.0, 1.0)


def test_shaping_is_off_by_default() -> None:
    shaping = Shaping(ShapingKeys())
    shaping.learn([(VERBOSE, [10, 20, 300], [10, 20])])
    assert shaping.moments(VERBOSE) == (5.0, 0.8)


def test_shaping_moves_towards_trained_lengths_and_spares_necessary_depth() -> None:
    shaping = Shaping(ShapingKeys(rate=0.5))
    shaping.learn([(VERBOSE, [10, 20, 300], [10, 20]), (DEEP, [10, 20, 300], [10, 20])])
    mean_log, spread = shaping.moments(VERBOSE)
    assert mean_log < 5.0 and spread < 0.8
    assert shaping.moments(DEEP) == (5.0, 0.8)


def test_shaping_changes_nothing_if_all_responses_are_trained() -> None:
    shaping = Shaping(ShapingKeys(rate=0.5))
    shaping.learn([(VERBOSE, [10, 20, 300], [10, 20, 300])])
    assert shaping.moments(VERBOSE) == pytest.approx((5.0, 0.8))


def test_shaping_stops_at_its_floor() -> None:
    shaping = Shaping(ShapingKeys(rate=1.0, floor=0.5))
    for _ in range(50):
        shaping.learn([(VERBOSE, [10, 20, 3000], [10, 11])])
    assert shaping.moments(VERBOSE) == pytest.approx((5.0 + math.log(0.5), 0.4))


def test_the_pattern_decides_whether_shorter_responses_are_right() -> None:
    for prompt, shorter_is_right in ((VERBOSE, True), (DEEP, False)):
        responses = Responses(prompt, (5.0, 0.8), 100_000, seed=0, visit=0)
        draws = [responses.next() for _ in range(400)]
        right = [draw.length for draw in draws if draw.reward]
        wrong = [draw.length for draw in draws if not draw.reward]
        assert (sum(right) / len(right) < sum(wrong) / len(wrong)) is shorter_is_right


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["darts.num_long=8"], "darts.num_long=8"),
        (["engines.batches=[1,8]", "engines.ms_per_token=[5]"], "engines.batches"),
        (["engines.batches=[8,1]", "engines.ms_per_token=[5,6]"], "engines.batches"),
        (["engines.batches=[1]", "engines.ms_per_token=[.nan]"], "engines.ms_per_token"),
        (["engines.batches=[1]", "engines.ms_per_token=[1e9]"], "latency point"),
        (["engines.batches=[]", "engines.ms_per_token=[]"], "engines.batches"),
        (["engines.kv_tokens=100"], "engines.kv_tokens=100"),
        (["engines.speeds=[]"], "engines.speeds"),
        (["redundancy.rule=fixed", "redundancy.upper=8", "engines.slots=16"], "redundancy.upper=8"),
        (["baseline.scheduler=tail_batching"], "baseline.scheduler=tail_batching"),
        (["darts.policy=random", "redundancy.rule=none"], "darts.policy=random"),
    ],
)
def test_an_impossible_configuration_is_refused(overrides: list[str], field: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(config(*overrides))
    assert field in str(caught.value)


def test_an_unreadable_ledger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_text('{"prompt_id": "a"')
    with pytest.raises(ValueError, match="lengths.recorded"):
        make_prompts(LengthKeys(recorded=str(path)), PatternKeys(), 0)


def test_absurd_latencies_are_ignored_by_the_core() -> None:
    simulation = Simulation(config())
    assert isinstance(simulation.scheduler, Core)
    simulation.run()
    before = simulation.scheduler.engines.curves["x1"].ptl(16)
    for value in (math.nan, math.inf, -1.0, 0.0, 1e12):
        simulation.scheduler.handle(ev.LatencyReported("sim/0", 16.0, value))
    assert simulation.scheduler.num_ignored_reports == 5
    assert simulation.scheduler.engines.curves["x1"].ptl(16) == before


@pytest.mark.parametrize(
    "preset", sorted(path.stem for path in (ROOT / "configs/simulate").glob("*.yaml"))
)
def test_presets_load(preset: str) -> None:
    loaded = cli.load(["--config", str(ROOT / f"configs/simulate/{preset}.yaml")], SimulateConfig)
    check(loaded)
    assert dataclasses.is_dataclass(loaded) and POOL_PRIOR.weight > 0
