"""Turning a key changes something: every key of a simulation, and every key by which the core decides or the learner learns.

What remains of a run's keys, those of processes, sockets and files, is listed with the test that shows its effect.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import cli
from configs.schema import Config
from darts import events as ev
from darts.config import CoreConfig, core_config
from darts.core import Core
from darts.simulate.schema import SimulateConfig
from darts.simulate.world import simulate
from learner.batch import make_packs
from learner.fsdp import whole
from learner.train import train_step
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    make_trajectory,
    save_model,
    single_rank,
)

TESTS = Path(__file__).parents[2]


# A simulation ------------------------------------------------------------------------------------------------------

SMALL = [
    "run.steps=3",
    "batch.groups=4",
    "lengths.num_prompts=12",
    "engines.slots=24",
    "engines.num_engines=2",
    "lengths.spread=1.0",
]
LATE = ["staleness.max_lag=1", "engines.speeds=[1.0,0.2]", "sampling.max_tokens=90"]
TRUNCATING = ["sampling.max_tokens=60"]
ROUNDS = ["pipeline.mode=sync", "baseline.scheduler=tail_batching", "redundancy.rule=none"]
SIMULATION: dict[
    str, tuple[str, list[str]]
] = {  # key -> another value, and the circumstances in which it matters
    "run.seed": ("1", []),
    "run.steps": ("4", []),
    "pipeline.mode": ("sync", []),
    "batch.groups": ("5", []),
    "staleness.max_lag": ("1", []),
    "staleness.on_deadline": ("drop", LATE),
    "darts.policy": ("plain", []),
    "darts.group_size": ("6", []),
    "darts.num_long": ("2", []),
    "darts.long_end": ("longest", []),
    "darts.cancel": ("eager", []),
    "darts.fill_truncated": ("false", TRUNCATING),
    "darts.max_reopens": ("0", [*LATE, "staleness.on_deadline=drop"]),
    "redundancy.rule": ("none", []),
    "redundancy.upper": ("1.5", []),
    "redundancy.price": ("5", []),
    "sampling.max_tokens": ("60", []),
    "weights.publish_every": ("2", []),
    "weights.publish_s": ("1", []),
    "weights.fetch_s": ("2", []),
    "weights.swap_s": ("1", []),
    "engines.num_engines": ("3", []),
    "engines.slots": ("40", []),
    "engines.speeds": ("[1.0,0.5]", []),
    "engines.batches": ("[1,4,8,12,16,24,32]", []),
    "engines.ms_per_token": ("[9,9,9,9,9,9,9]", []),
    "engines.prefill_ms_per_token": ("5", []),
    "engines.kv_tokens": ("1200", []),
    "engines.chunk_tokens": ("64", []),
    "engines.latency_every_s": ("0.2", []),
    "engines.cancel_s": ("0.5", []),
    "learner.num_gpus": ("2", []),
    "learner.fixed_s": ("1", []),
    "learner.ms_per_token": ("2", []),
    "learner.prepare_ms_per_token": ("1", ["learner.streaming=false"]),
    "learner.streaming": ("false", []),
    "lengths.num_prompts": ("20", []),
    "lengths.prompt_tokens": ("640", []),
    "lengths.median": ("40", []),
    "lengths.between": ("1", []),
    "lengths.spread": ("0.4", []),
    "lengths.spread_between": ("0.9", []),
    "pattern.verbosity": ("0", []),
    "pattern.pass_rate": ("0.9", []),
    "pattern.strength": ("0", []),
    "shaping.rate": ("0.5", []),
    "shaping.floor": ("0.95", ["shaping.rate=1", "pattern.verbosity=1"]),
    "baseline.scheduler": ("partial_rollout", ["pipeline.mode=sync"]),
    "baseline.oversample": ("2.5", ROUNDS),
    "baseline.extra": ("2", ROUNDS),
}
SHOWN_IN_FILES = {
    "run.name",
    "run.out",
    "lengths.recorded",
}  # test_simulate.py: the files of a run, and a run drawn from one


def test_every_key_of_a_simulation_is_turned_below() -> None:
    assert {one.path for one in cli.keys(SimulateConfig)} == SIMULATION.keys() | SHOWN_IN_FILES


@pytest.mark.parametrize("path", SIMULATION)
def test_a_key_of_a_simulation_changes_it(path: str) -> None:
    value, circumstances = SIMULATION[path]
    before: SimulateConfig = cli.load([*SMALL, *circumstances], SimulateConfig)
    after: SimulateConfig = cli.load([*SMALL, *circumstances, f"{path}={value}"], SimulateConfig)
    assert simulate(before) != simulate(after)


# What the core decides by ------------------------------------------------------------------------------------------

CORE: dict[str, str] = {
    "run.seed": "1", "pipeline.mode": "sync", "batch.groups": "7", "weights.publish_every": "2", "staleness.max_lag": "1",
    "staleness.on_deadline": "drop", "darts.policy": "plain", "darts.group_size": "6", "darts.num_long": "2", "darts.long_end": "longest",
    "darts.cancel": "eager", "darts.fill_truncated": "false", "darts.max_attempts": "1", "darts.max_reopens": "0",
    "redundancy.rule": "fixed", "redundancy.upper": "1.5", "redundancy.price": "5", "sampling.max_tokens": "60",
}  # fmt: skip


@pytest.mark.parametrize("path", CORE)
def test_a_key_reaches_the_core(path: str) -> None:
    """What the core then does with it is shown by the simulations above, and for the two that they lack, below."""
    assert core_config(cli.load([f"{path}={CORE[path]}"])) != core_config(Config())


def launches_until_given_up(**changes: Any) -> int:
    """Rollouts launched for a single prompt whose every rollout fails."""
    core = Core(CoreConfig(groups_per_step=1, group_size=2, redundancy="none", **changes))
    todo: list[ev.Event] = [
        ev.PolicyPublished(0.0, 0), ev.ActorJoined(0.0, "engine", "type", 2, 0), ev.PromptsDrawn(0.0, (ev.Prompt("p"),))
    ]  # fmt: skip
    launched = 0
    while todo:
        for decision in core.handle(todo.pop(0)):
            if isinstance(decision, ev.Launch):
                launched += 1
                todo.append(ev.RolloutFailed(0.0, decision.rollout_id))
    return launched


def test_attempts_and_reopens_bound_what_is_launched_for_a_prompt_that_always_fails() -> None:
    assert launches_until_given_up(max_attempts=1, max_reopens=0) == 2
    assert launches_until_given_up(max_attempts=3, max_reopens=0) == 6
    assert launches_until_given_up(max_attempts=3, max_reopens=2) == 18


# What the learner learns by ----------------------------------------------------------------------------------------

LEARNER: dict[str, Any] = {
    "loss.kind": "dr_grpo", "loss.clip_low": 0.01, "loss.clip_high": 0.01, "loss.tis_cap": 0.5, "loss.train_truncated": True,
    "optimizer.lr": 1e-2, "optimizer.betas": [0.5, 0.5], "optimizer.weight_decay": 0.1, "optimizer.warmup_steps": 5,
    "optimizer.max_grad_norm": 1e-2, "sampling.temperature": 2.0, "model.dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def trained(model_path: Path, run: Path, **changes: Any) -> torch.Tensor:
    """All weights after two steps on the same trajectories, one of them truncated."""
    with single_rank(make_config(model_path, run, **changes)) as state:
        for step in range(2):
            trajectories = make_trajectories(seed=step)
            rng = np.random.default_rng(step)
            trajectories.append(make_trajectory(rng, 4, 20, 0.0, [0.0, 1.0], truncated=True))
            train_step(state, make_shards(trajectories, step)[0])
        return torch.cat(
            [whole(parameter.detach()).flatten() for parameter in state.model.parameters()]
        )


@pytest.fixture(scope="module")
def by_default(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return trained(model_path, tmp_path_factory.mktemp("default"))


def test_training_repeats_itself(
    model_path: Path, tmp_path: Path, by_default: torch.Tensor
) -> None:
    assert torch.equal(trained(model_path, tmp_path), by_default)


@pytest.mark.parametrize("path", LEARNER)
def test_a_key_of_the_learner_changes_the_weights(
    path: str, model_path: Path, tmp_path: Path, by_default: torch.Tensor
) -> None:
    changed = trained(model_path, tmp_path, **{path.replace(".", "__"): LEARNER[path]})
    assert not torch.equal(changed, by_default)


def test_batch_tokens_divides_a_shard() -> None:
    (shard,) = make_shards(make_trajectories(seed=0))
    assert len(make_packs(shard, 64, False, 0)) > len(make_packs(shard, 4096, False, 0)) == 1


# The rest ----------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "run.name": "integration/test_run_plan.py::test_an_existing_run_is_left_alone",
    "run.dir": "e2e/test_pipeline.py::launch",
    "run.steps": "integration/test_service.py::make_config",
    "run.resume": "integration/test_service.py::test_resumed_run_draws_what_was_unfinished_and_repeats_nothing",
    "model.path": "unit/actors/test_pool.py::test_a_folder_that_is_not_there_is_refused_by_name",
    "model.attention": "unit/learner/test_train.py::test_the_gradient_does_not_depend_on_the_packing",
    "model.max_context": "unit/actors/test_worker.py::test_a_prompt_too_long_for_the_context_stops_the_run",
    "data.train": "unit/actors/test_environments.py::test_reasoning_gym_scores_an_entry_of_its_own",
    "data.eval": "unit/buffer/test_sources.py::test_a_named_evaluation_file_leaves_the_training_file_whole",
    "data.environment": "unit/actors/test_environments.py::config_of",
    "data.prompt_field": "unit/buffer/test_sources.py::test_rows_become_payloads_with_their_other_columns_as_metadata",
    "data.answer_field": "unit/buffer/test_sources.py::test_rows_become_payloads_with_their_other_columns_as_metadata",
    "data.system_prompt": "unit/actors/test_environments.py::test_prompts_are_rendered_by_the_template_or_as_plain_text",
    "data.chat_template": "unit/actors/test_environments.py::test_prompts_are_rendered_by_the_template_or_as_plain_text",
    "data.num_prompts": "unit/buffer/test_sources.py::test_more_tagged_sums_than_there_are_is_refused",
    "data.verifier_timeout_s": "unit/actors/test_environments.py::user_environment",
    "data.on_error": "integration/test_service.py::test_a_failing_prompt_is_skipped_where_that_is_asked",
    "sampling.top_p": "e2e/test_engine.py::test_a_narrow_nucleus_leaves_one_response",
    "actors.name": "integration/test_run_plan.py::test_every_pool_gets_the_run_s_configuration_and_its_own_overrides",
    "actors.num_engines": "unit/actors/test_pool.py::test_each_engine_gets_gpus_of_its_own",
    "actors.slots": "integration/test_run_plan.py::test_every_pool_gets_the_run_s_configuration_and_its_own_overrides",
    "actors.tensor_parallel": "unit/actors/test_pool.py::test_each_engine_gets_gpus_of_its_own",
    "actors.device": "unit/actors/test_pool.py::test_cpu_engines_are_given_no_gpus",
    "actors.gpu_memory_frac": "gpu/test_gpu.py::test_an_engine_keeps_to_its_share_of_memory",
    "actors.kv_cache_gib": "e2e/test_engine.py::served",
    "actors.stream_interval": "unit/actors/test_worker.py::test_progress_waits_for_stream_interval_tokens_and_leaves_out_what_was_sent",
    "actors.flush_s": "unit/actors/test_worker.py::test_reports_leave_as_often_as_flush_s_says",
    "actors.max_restarts": "unit/actors/test_pool.py::test_an_engine_that_keeps_dying_is_given_up",
    "buffer.address": "integration/test_run_plan.py::test_a_port_in_use_is_refused_before_anything_starts",
    "buffer.keys": "integration/test_links.py::test_wrong_keys_open_nothing",
    "buffer.max_bytes": "integration/test_service.py::test_a_full_store_pauses_admission",
    "buffer.connect_timeout_s": "unit/learner/test_train.py::test_an_absent_buffer_is_waited_for_as_long_as_asked",
    "buffer.peer_timeout_s": "integration/test_service.py::test_killed_engine_loses_only_what_it_had_in_flight",
    "buffer.rejoin_timeout_s": "integration/test_service.py::test_a_run_without_a_learner_ends_with_an_error",
    "weights.transport": "unit/learner/test_train.py::test_a_snapshot_reloads_to_identical_logits",
    "weights.address": "integration/test_links.py::test_a_snapshot_never_published_is_gone_too",
    "weights.dir": "unit/learner/test_train.py::test_file_snapshots_lie_where_they_are_told_to",
    "learner.num_ranks": "integration/test_fsdp.py::test_who_is_killed_takes_all_along",
    "learner.device": "unit/actors/test_pool.py::test_cpu_engines_are_given_no_gpus",
    "learner.activation_checkpointing": "unit/learner/test_train.py::test_activation_checkpointing_changes_nothing_but_memory",
    "learner.checkpoint_every": "e2e/test_pipeline.py::test_killed_learner_resumes_from_its_checkpoint",
    "learner.keep_checkpoints": "unit/learner/test_train.py::test_a_rank_keeps_as_many_checkpoints_as_asked",
    "eval.every": "unit/buffer/test_sources.py::test_without_evaluation_nothing_is_held_out",
    "eval.num_prompts": "integration/test_service.py::make_config",
    "eval.samples_per_prompt": "e2e/test_pipeline.py::trained",
    "launch.launcher": "e2e/test_launch_ray.py",
    "launch.ray_address": "e2e/test_launch_ray.py::test_an_address_without_a_cluster_is_named",
    "launch.pools": "integration/test_run_plan.py::test_every_pool_gets_the_run_s_configuration_and_its_own_overrides",
    "launch.progress": "integration/test_launch.py",
}


def test_every_key_of_a_run_is_turned_here_or_elsewhere() -> None:
    covered = CORE.keys() | LEARNER.keys() | ELSEWHERE.keys() | {"batch.max_tokens"}
    assert {one.path for one in cli.keys(Config)} == covered


@pytest.mark.parametrize("path", ELSEWHERE)
def test_the_test_named_turns_the_key(path: str) -> None:
    file, _, name = ELSEWHERE[path].partition("::")
    source = (TESTS / file).read_text()
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    starts = {
        node.name: min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        for node in functions
    }
    ends = {node.name: node.end_lineno for node in functions}
    text = "\n".join(source.splitlines()[starts[name] - 1 : ends[name]]) if name else source
    assert path.partition(".")[2] in text
