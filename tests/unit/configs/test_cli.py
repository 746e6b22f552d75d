"""`configs.cli`: the configuration of a command line, and the text of each refusal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from configs.cli import keys, load, presets, to_yaml
from configs.schema import REFUSED, RENAMED, Config, key
from darts.simulate.schema import SimulateConfig

ROOT = Path(__file__).parents[3]
PRODUCT = ("actors", "buffer", "configs", "darts", "learner", "tools")
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def refusal(*argv: str, schema: type = Config) -> str:
    with pytest.raises(ValueError) as caught:
        load(argv, schema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Valid command lines -----------------------------------------------------------------------------


def test_no_arguments_give_the_defaults() -> None:
    assert load([]) == Config()


def test_overrides_take_the_type_of_their_key() -> None:
    config = load(
        ["optimizer.lr=1e-4", "run.steps=7", "run.resume=true", "optimizer.betas=[0.8,0.9]"]
    )
    assert (config.optimizer.lr, config.run.steps, config.run.resume, config.optimizer.betas) == (
        1e-4,
        7,
        True,
        [0.8, 0.9],
    )


@pytest.mark.parametrize("text", ["007", "", "yes", "a: b", "tcp://127.0.0.1:*", "[x"])
def test_a_string_key_takes_its_text_verbatim(text: str) -> None:
    assert load([f"run.name={text}"]).run.name == text


def test_quotes_around_a_string_are_removed() -> None:
    assert load(["run.name='a b'"]).run.name == "a b"


def test_interpolation_sees_the_final_values() -> None:
    assert load(["run.name=seed-${run.seed}", "run.seed=3"]).run.name == "seed-3"


def test_the_last_value_wins_and_overrides_win_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("run: {steps: 1, seed: 1, name: a}\n")
    second.write_text("run: {steps: 2, seed: 2}\n")
    run = load(["run.seed=9", "--config", str(first), "--config", str(second)]).run
    assert (run.steps, run.seed, run.name) == (2, 9, "a")


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "section.yaml").write_text("run:\n#  steps: 3\n")
    assert (
        load(["--config", str(tmp_path / "empty.yaml"), "--config", str(tmp_path / "section.yaml")])
        == Config()
    )


def test_a_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load(
        ["optimizer.lr=3e-5", "run.name=007", "launch.pools=['actors.name=b actors.slots=8']"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_by_name_and_by_path(preset: Path) -> None:
    assert load(["--config", preset.stem]) == load(["--config", str(preset)])


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("actor.slots=8", "actors.slots"),
        ("max_lag=2", "staleness.max_lag"),
        ("sampling.max_token=9", "sampling.max_tokens"),
        ("learner.lrr=1", "optimizer.lr"),
        ("model.lora_rank=4", "model.lora.rank"),
        ("eval.eval_every=4", "eval.every"),
        ("warmup=4", "optimizer.warmup_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override: str, nearest: str) -> None:
    assert f"did you mean {nearest}?" in refusal(override)


@pytest.mark.parametrize("override", ["optimizer.learning_rate=1", "optimizer.temperature=1"])
def test_the_keys_of_a_section_are_listed_if_none_of_them_is_near(override: str) -> None:
    assert "optimizer has the keys lr, betas, " in refusal(override)


@pytest.mark.parametrize("override", ["optimizer.learning_rate=1", "foo.bar=1", "rollout.n=8"])
def test_no_key_is_suggested_that_is_not_near(override: str) -> None:
    assert "did you mean" not in refusal(override)


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("run:\n  stepz: 3\n")
    message = refusal("--config", str(tmp_path / "bad.yaml"))
    assert "run.stepz" in message and "bad.yaml" in message and "run.steps" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=many", "expected int"),
        ("run.steps=1.5", "expected int"),
        ("run.steps=", "expected int"),
        ("optimizer.lr=fast", "expected float"),
        ("run.resume=maybe", "expected bool"),
        ("optimizer.betas=0.9", "expected list[float]"),
        ("actors.min_step_ms=25", "expected list[list[float]]"),
    ],
)
def test_a_wrong_type_names_key_value_and_type(override: str, expected: str) -> None:
    message = refusal(override)
    assert (
        override.partition("=")[0] in message
        and override.partition("=")[2] in message
        and expected in message
    )


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("optimizer.lr=0", "must be > 0"),
        ("optimizer.lr=nan", "must be > 0"),
        ("redundancy.upper=9", "must be >= 1 and <= 8"),
        ("sampling.temperature=0.009", "must be >= 0.01 and <= 2"),
        ("sampling.temperature=2.1", "must be >= 0.01 and <= 2"),
        ("optimizer.schedule=step", "must be one of constant, linear, cosine"),
        ("loss.clip_low=1.1", "must be >= 0 and < 1"),
        ("optimizer.betas=[0.9,1.0]", "must be >= 0 and < 1"),
        ("darts.policy=dart", "must be one of darts, plain, first_finished, random"),
    ],
)
def test_a_value_out_of_range_names_the_allowed_range(override: str, allowed: str) -> None:
    message = refusal(override)
    assert override.partition("=")[0] in message and allowed in message


@pytest.mark.parametrize("old", RENAMED)
def test_the_old_name_of_a_key_is_refused_with_the_new_one(old: str) -> None:
    schemas = {one.path: schema for schema in (SimulateConfig, Config) for one in keys(schema)}
    assert old not in schemas
    assert RENAMED[old] in refusal(f"{old}=1", schema=schemas[RENAMED[old]])


def test_the_old_name_of_a_key_is_refused_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("darts: {long: 2}\n")
    message = refusal("--config", str(tmp_path / "old.yaml"))
    assert "old.yaml" in message and "darts.num_long" in message


@pytest.mark.parametrize("path", REFUSED)
def test_an_impossible_key_is_refused_with_the_reason(path: str) -> None:
    assert REFUSED[path] in refusal(f"{path}=0.9")


@pytest.mark.parametrize(
    "argv",
    [
        ["run.steps"],
        ["run=3"],
        ["--steps", "3"],
        ["--run.steps=3"],
        ["--config"],
        ["--config", "no-such-preset"],
        ["batch.groups=[1"],
        ["run.name=${run.nam}"],
    ],
)
def test_an_argument_that_is_no_override_is_refused(argv: list[str]) -> None:
    assert refusal(*argv)


@pytest.mark.parametrize(
    "content", ["run: [1\n", "- a\n- b\n", "run: 3\n", "run: {steps: 1, steps: 2}\n"]
)
def test_a_malformed_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert "bad.yaml" in refusal("--config", str(tmp_path / "bad.yaml"))


# Keys that do not fit together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["darts.num_long=8"], ["darts.num_long=8", "darts.group_size=8"]),
        (["redundancy.upper=1.05"], ["redundancy.upper=1.05", ">= 1.0625"]),
        (["sampling.max_tokens=1024"], ["sampling.max_tokens=1024", "model.max_context=1024"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas", "two"]),
        (["actors.min_step_ms=[[1]]"], ["actors.min_step_ms=[[1.0]]", "pairs"]),
        (["actors.min_step_ms=[[0,9]]"], ["actors.min_step_ms=[[0.0, 9.0]]", "batches", ">= 1"]),
        (["actors.min_step_ms=[[8,9],[1,7]]"], ["actors.min_step_ms", "ascending"]),
        (["actors.min_step_ms=[[8,9],[8,9]]"], ["actors.min_step_ms", "ascending"]),
        (["actors.min_step_ms=[[1,0]]"], ["actors.min_step_ms", "> 0"]),
        (["actors.min_step_ms=[[1,nan]]"], ["actors.min_step_ms", "> 0"]),
        (
            ["batch.groups=1", "darts.group_size=2", "learner.num_ranks=3", "redundancy.upper=2"],
            ["learner.num_ranks=3", "2"],
        ),
        (
            ["batch.groups=1", "learner.num_ranks=8", "cluster.learner.num_nodes=2"],
            ["learner.num_ranks=8", "cluster.learner.num_nodes=2", "8 in total"],
        ),
        (
            ["learner.num_ranks=4", "learner.shard_ranks=3"],
            ["learner.shard_ranks=3", "divide learner.num_ranks = 4", "no whole copy"],
        ),
        (
            ["cluster.learner.num_nodes=3", "learner.num_ranks=2", "learner.shard_ranks=4"],
            ["learner.shard_ranks=4", "cluster.learner.num_nodes = 6"],
        ),
        (["model.attention=flash_attention_2"], ["model.attention", "model.dtype"]),
        (
            ["model.attention=flash_attention_2", "model.dtype=bfloat16", "learner.device=cpu"],
            ["model.attention", "learner.device"],
        ),
        (["batch.updates=3"], ["batch.updates=3", "batch.groups=16"]),
        (["batch.updates=17"], ["batch.updates=17", "batch.groups=16"]),
        (["batch.updates=16", "learner.num_ranks=9"], ["learner.num_ranks=9", "= 8"]),
        (["batch.stream=group", "batch.updates=2"], ["batch.stream=group", "batch.updates=1"]),
        (["loss.overlong_buffer=513"], ["loss.overlong_buffer=513", "sampling.max_tokens=512"]),
        (["darts.pilot=9"], ["darts.pilot=9", "darts.group_size=8"]),
        (["darts.min_mixed_prob=0"], ["darts.min_mixed_prob=0", "must be > 0"]),
        (["darts.min_mixed_prob=1"], ["darts.min_mixed_prob=1", "must be > 0 and < 1"]),
        (["darts.min_mixed_prob=nan"], ["darts.min_mixed_prob", "nan"]),
        (["darts.relative_limit=0.9"], ["darts.relative_limit=0.9", "above 1"]),
        (["darts.rank=reward_per_token"], ["darts.rank", "darts.long_end"]),
        (["buffer.address=localhost:5577"], ["buffer.address=localhost:5577", "tcp://"]),
        (["buffer.address=tcp://127.0.0.1:65535"], ["buffer.address", "65534"]),
        (["weights.address=tcp://127.0.0.1"], ["weights.address", "tcp://HOST:*"]),
        (["weights.deltas=true", "weights.transport=file"], ["weights.deltas", "zmq"]),
        (["buffer.max_bytes=1000000"], ["buffer.max_bytes=1000000", "admission stalls"]),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(overrides: list[str], named: list[str]) -> None:
    message = refusal(*overrides)
    assert all(name in message for name in named), message


@pytest.mark.parametrize(
    "overrides",
    [
        ["darts.num_long=7"],
        ["darts.num_long=8", "darts.long_end=none"],
        ["redundancy.upper=1"],
        ["redundancy.upper=1.0625"],
        ["redundancy.upper=1.05", "redundancy.rule=none"],
        ["sampling.max_tokens=1023"],
        ["model.attention=flash_attention_2", "model.dtype=bfloat16"],
        ["buffer.max_bytes=3145728"],  # 16 groups x 16 rollouts x 1024 tokens x 12 bytes
        ["weights.address=tcp://0.0.0.0:6000", "buffer.address=tcp://[::1]:6001"],
        ["pipeline.mode=sync"],
        ["loss.overlong_buffer=512"],
        ["batch.updates=16", "learner.num_ranks=8"],
    ],
)
def test_limiting_values_that_still_fit_are_accepted(overrides: list[str]) -> None:
    load(overrides)


# Any schema --------------------------------------------------------------------------------------


@dataclass
class Inner:
    depth: int = key(1, "How deep.", ge=1)
    shape: Literal["round", "none"] = key("round", "Its shape.")


@dataclass
class Other:
    """A schema other than that of a run."""

    inner: Inner = field(default_factory=Inner)
    name: str = key("x", "Its name.")


def test_any_dataclass_is_a_schema() -> None:
    loaded = load(["inner.depth=3", "inner.shape=none", "name=7"], Other)
    assert loaded == Other(inner=Inner(depth=3, shape="none"), name="7")


def test_a_preset_is_offered_to_the_schema_that_has_its_keys() -> None:
    assert presets(Config) == [
        "cluster/h100_a10", "darts_paper", "demo", "gfpo", "latency/a10_7b", "latency/h100_14b",
        "qwen2.5_1.5b_2x24gb", "qwen2.5_7b_gpu", "qwen3_4b_lora_24gb",
        "smollm2_cpu",
    ]  # fmt: skip
    assert "simulate/cpu" in presets(SimulateConfig) and "demo" not in presets(SimulateConfig)
    assert presets(Other) == []


def test_every_key_has_a_meaning_and_a_valid_default() -> None:
    both = [*keys(Config), *keys(SimulateConfig)]
    assert [
        one.path for one in both if not one.doc.endswith(".") or one.violated(one.default)
    ] == []
