"""Every key does something: a table here or in `test_*_knobs.py` turns it, and behaviour changes.

This file turns every key of a simulation, and the keys of a run that the core reads. A key whose
effect only a real engine shows is listed with the reason and the test that has such an engine.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from configs import cli
from configs.schema import Config
from darts import events as ev
from darts.config import CoreConfig, core_config
from darts.core import Core
from darts.simulate.__main__ import run
from darts.simulate.schema import SimulateConfig
from darts.simulate.world import simulate
from tests.unit.configs import (
    test_actor_knobs,
    test_buffer_knobs,
    test_data_knobs,
    test_launch_knobs,
    test_learner_knobs,
)

ROOT = Path(__file__).parents[3]
PRODUCT = ("actors", "buffer", "configs", "darts", "learner", "tools")
# Keys of a simulation that have their own tests below.
IN_FILES = {"run.name", "run.out", "lengths.recorded"}
ELSEWHERE = [
    test_actor_knobs.TURNS,
    test_actor_knobs.VLLM_TURNS,
    test_buffer_knobs.TURNS,
    test_buffer_knobs.SLOW_TURNS,
    test_data_knobs.TURNS,
    test_launch_knobs.TURNS,
    test_learner_knobs.TURNS,
]


def test_every_key_of_a_run_is_turned() -> None:
    turned = {path for table in (CORE, *ELSEWHERE) for path in table}
    assert {key.path for key in cli.keys(Config)} == turned


def test_every_key_of_a_simulation_is_turned() -> None:
    assert {key.path for key in cli.keys(SimulateConfig)} == SIMULATION.keys() | IN_FILES


# A simulation ------------------------------------------------------------------------------------

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
# Key -> another value, and the overrides under which it matters.
SIMULATION: dict[str, tuple[str, list[str]]] = {
    "run.seed": ("1", []),
    "run.steps": ("4", []),
    "pipeline.mode": ("sync", []),
    "batch.groups": ("5", []),
    "batch.stream": ("group", []),
    "staleness.max_lag": ("1", []),
    "staleness.on_deadline": ("drop", LATE),
    "darts.policy": ("plain", []),
    "darts.group_size": ("6", []),
    "darts.num_long": ("2", []),
    "darts.long_end": ("longest", []),
    "darts.cancel": ("eager", []),
    "darts.fill_truncated": ("false", TRUNCATING),
    "darts.uniform": ("drop", []),
    "darts.max_refill": ("0.1", ["darts.uniform=drop", "darts.group_size=2"]),
    "darts.rank": ("reward_per_token", ["darts.long_end=none"]),
    "darts.relative_limit": ("1.5", []),
    "darts.audit": ("0.5", []),
    "darts.min_spread": ("1", ["darts.uniform=drop"]),
    "darts.pilot": ("4", []),
    "darts.min_mixed_prob": ("0.95", ["darts.pilot=2"]),
    "darts.max_stops": ("0", ["darts.pilot=2", "darts.min_mixed_prob=0.9"]),
    "darts.max_reopens": ("0", [*LATE, "staleness.on_deadline=drop"]),
    "redundancy.rule": ("none", []),
    "redundancy.upper": ("1.5", []),
    "redundancy.price": ("5", []),
    "redundancy.variance": ("ema", []),
    "redundancy.alpha": ("1", ["redundancy.variance=ema", "run.steps=9"]),
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


@pytest.mark.parametrize("path", SIMULATION)
def test_a_key_of_a_simulation_changes_it(path: str) -> None:
    value, circumstances = SIMULATION[path]
    before: SimulateConfig = cli.load([*SMALL, *circumstances], SimulateConfig)
    after: SimulateConfig = cli.load([*SMALL, *circumstances, f"{path}={value}"], SimulateConfig)
    assert simulate(before) != simulate(after)


def files_of(*overrides: str) -> dict[str, str]:
    """Name -> text of each file that a simulation writes to `out` in the working directory."""
    run(cli.load([*SMALL, *overrides], SimulateConfig))
    return {path.name: path.read_text() for path in Path("out").glob("*") if path.is_file()}


def test_a_simulation_writes_to_the_given_folder_under_the_given_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert files_of() == {}
    first = files_of("run.out=out", "run.name=a")
    shutil.rmtree("out")
    second = files_of("run.out=out", "run.name=b")
    assert [name for name in first if first[name] != second[name]] == ["config.yaml"]


def test_a_simulation_draws_lengths_from_the_given_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "groups.jsonl" in files_of("run.out=out", "lengths.median=20")
    drawn = simulate(cli.load(SMALL, SimulateConfig))
    recorded = simulate(cli.load([*SMALL, "lengths.recorded=out/groups.jsonl"], SimulateConfig))
    assert recorded["tokens/generated"] < drawn["tokens/generated"]


# Keys that the core reads ------------------------------------------------------------------------

CORE: dict[str, str] = {
    "run.seed": "1",
    "pipeline.mode": "sync",
    "batch.groups": "7",
    "batch.stream": "group",
    "weights.publish_every": "2",
    "staleness.max_lag": "1",
    "staleness.on_deadline": "drop",
    "darts.policy": "plain",
    "darts.group_size": "6",
    "darts.num_long": "2",
    "darts.long_end": "longest",
    "darts.cancel": "eager",
    "darts.fill_truncated": "false",
    "darts.max_attempts": "1",
    "darts.uniform": "drop",
    "darts.max_refill": "1",
    "darts.rank": "reward_per_token",
    "darts.relative_limit": "3",
    "darts.audit": "0.5",
    "darts.min_spread": "1",
    "darts.pilot": "4",
    "darts.min_mixed_prob": "0.5",
    "darts.max_stops": "0",
    "darts.max_reopens": "0",
    "redundancy.rule": "fixed",
    "redundancy.upper": "1.5",
    "redundancy.price": "5",
    "redundancy.variance": "ema",
    "redundancy.alpha": "0.5",
    "sampling.max_tokens": "60",
}


@pytest.mark.parametrize("path", CORE)
def test_a_key_reaches_the_core(path: str) -> None:
    """The simulations above show the effect of these keys, except one, which is tested below."""
    given = ["darts.long_end=none"] if path == "darts.rank" else []
    changed = cli.load([*given, f"{path}={CORE[path]}"])
    assert core_config(changed) != core_config(cli.load(given))


def launches_until_given_up(**changes: Any) -> int:
    """The number of rollouts launched for a single prompt, if all of them fail."""
    core = Core(CoreConfig(groups_per_step=1, group_size=2, redundancy="none", **changes))
    todo: list[ev.Event] = [
        ev.PolicyPublished(0),
        ev.EngineJoined("engine", "type", 2, 0),
        ev.PromptsDrawn((ev.Prompt("p"),)),
    ]
    launched = 0
    while todo:
        for decision in core.handle(todo.pop(0)):
            if isinstance(decision, ev.Launch):
                launched += 1
                todo.append(ev.RolloutFailed(decision.rollout_id))
    return launched


def test_attempts_and_reopens_bound_the_launches_of_a_prompt_that_always_fails() -> None:
    assert launches_until_given_up(max_attempts=1, max_reopens=0) == 2
    assert launches_until_given_up(max_attempts=3, max_reopens=0) == 6
    assert launches_until_given_up(max_attempts=3, max_reopens=2) == 18


# No dead keys ------------------------------------------------------------------------------------


def sources() -> Iterator[ast.Module]:
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.parts[-2:] not in (("configs", "schema.py"), ("configs", "checks.py")):
                yield ast.parse(path.read_text(), str(path))


def last_name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def sections_by_class(config: object, prefix: str = "") -> dict[str, str]:
    """The path of every section, also of those inside others, by the name of its class."""
    found = {}
    for name, section in vars(config).items():
        if is_dataclass(section):
            found[type(section).__name__] = prefix + name
            found |= sections_by_class(section, f"{prefix}{name}.")
    return found


SECTION_OF_CLASS = sections_by_class(Config())


def read_keys(tree: ast.Module) -> set[str]:
    """`section.key` for every key that is read from a section.

    A section is `config.section`, or a name that is assigned from one or annotated as one; trackers
    read `config["section"]["key"]`, from the configuration that a run has recorded.
    """
    sections = set(SECTION_OF_CLASS.values())
    # Section -> names that refer to it in this module.
    aliases = {section: {section.rpartition(".")[2]} for section in sections}
    by_name: dict[str, list[str]] = {}
    for section in sections:  # cluster.learner has the last name of learner
        by_name.setdefault(section.rpartition(".")[2], []).append(section)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = [(target, node.value) for target in node.targets]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                targets = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            for target, value in targets:
                for section in by_name.get(last_name(value), ()):
                    aliases[section].add(last_name(target))
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            annotation = last_name(node.annotation) if node.annotation else ""
            if annotation in SECTION_OF_CLASS:
                aliases[SECTION_OF_CLASS[annotation]].add(name)
    reads = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    ]
    recorded = {
        f"{section.value}.{key.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Subscript)
        if isinstance(section := node.value.slice, ast.Constant)
        if isinstance(key := node.slice, ast.Constant)
    }
    return recorded | {
        f"{section}.{node.attr}"
        for node in reads
        for section in sections
        if last_name(node.value) in aliases[section]
    }


def test_every_key_is_read_by_the_product() -> None:
    read = set().union(*(read_keys(tree) for tree in sources()))
    assert [key.path for key in cli.keys(Config) if key.path not in read] == []


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("config.sampling.temperature", {"sampling.temperature"}),
        ("config.model.lora.rank", {"model.lora", "model.lora.rank"}),
        ("def f(given: LoraConfig): return given.rank", {"model.lora.rank"}),
        ("s = config.sampling\ns.temperature", {"sampling.temperature"}),
        ("def f(s: SamplingConfig): return s.temperature", {"sampling.temperature"}),
        ("config.sampling.temperature = 1.0", set()),
        ("other.temperature", set()),
    ],
)
def test_code_that_reads_a_key_is_recognised(code: str, read: set[str]) -> None:
    assert read_keys(ast.parse(code)) == read
