"""`actors.vllm` passes options on to vLLM, and refuses those that would break a run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from actors.inference import vllm_options
from actors.inference.vllm_options import FORBIDDEN, KEYS, check_options, option_types
from configs import cli
from configs.schema import Config


def load(*overrides: str) -> Config:
    return cli.load(list(overrides))


def test_the_names_are_those_of_the_installed_vllm() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert option_types().keys() == {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_every_refused_name_exists_and_is_refused_once() -> None:
    assert option_types().keys() >= KEYS.keys() | FORBIDDEN.keys()
    assert not KEYS.keys() & FORBIDDEN.keys()
    assert len(FORBIDDEN) == sum(map(len, vllm_options.REASONS.values()))


def test_options_come_from_files_and_single_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("actors: {vllm: {max_num_batched_tokens: 4096, block_size: 16}}")
    config = load("--config", str(file), "actors.vllm.block_size=64")
    assert check_options(config) == {"max_num_batched_tokens": 4096, "block_size": 64}
    whole = load("actors.vllm={compilation_config: {mode: 0}}")
    assert check_options(whole) == {"compilation_config": {"mode": 0}}
    file.write_text(cli.to_yaml(whole))
    assert load("--config", str(file)) == whole


def test_a_run_without_options_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> dict[str, str]:
        raise ValueError

    monkeypatch.setattr(vllm_options, "option_types", refuse)
    assert check_options(load()) == {}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("max_num_batched_token=1", "no such option; did you mean max_num_batched_tokens, "),
        ("max_model_len=1", "is set by model.max_context; use that key"),
        ("seed=1", "is set by run.seed; use that key"),
        ("kv_cache_dtype=fp8", "engines would sample from another distribution"),
        ("quantization=fp8", "engines would sample from another distribution"),
        ("logprobs_mode=raw_logprobs", "engines would sample from another distribution"),
        ("speculative_config={method: ngram}", "a step would not yield exactly one token"),
        ("async_scheduling=true", "a step would not yield exactly one token"),
        ("enable_lora=true", "new weights are loaded into the running engine"),
        ("data_parallel_rank=1", "use actors.num_engines"),
        ("revision=main", "engine and learner would load different models"),
        ("worker_extension_cls=a.B", "it connects vLLM with this software"),
    ],
)
def test_an_option_that_would_break_a_run_is_refused(override: str, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_options(load(f"actors.vllm.{override}"))
    name, _, value = override.partition("=")
    assert str(caught.value).startswith(f"actors.vllm.{name}=") and line in str(caught.value)


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("enable_prefix_caching=maybe", "bool | None"),
        ("block_size=many", "int | None"),
        ("max_num_batched_tokens=0.5", "int | None"),
        ("max_num_batched_tokens=true", "int | None"),
        ("scheduler_reserve_full_isl=1", "bool"),
        ("watermark=low", "float"),
    ],
)
def test_a_value_of_another_type_is_refused_before_an_engine_starts(
    override: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = override.partition("=")[0]
    monkeypatch.setattr(vllm_options, "option_types", lambda: {name: kind})
    with pytest.raises(ValueError) as caught:
        check_options(load(f"actors.vllm.{override}"))
    assert str(caught.value).endswith(f": must be of the type {kind}, as in vLLM")


@pytest.mark.parametrize("override", ["a=3", "a=0.5", "a=null", "b=x", "c={mode: 0}", "d=[1]"])
def test_a_value_of_its_type_is_accepted(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    types = {"a": "float | None", "b": "str", "c": "CompilationConfig", "d": "list[int] | None"}
    monkeypatch.setattr(vllm_options, "option_types", lambda: types)
    assert check_options(load(f"actors.vllm.{override}"))


def test_a_mistake_in_the_value_itself_is_one_of_the_key() -> None:
    with pytest.raises(ValueError, match="actors.vllm=3 .command line.: expected dict"):
        load("actors.vllm=3")


def test_a_cpu_engine_compiles_its_model_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would otherwise go on without a compiler, and the option would do nothing."""
    from actors.inference.engine import engine_args

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # of this process, and set again at the end
    assert not engine_args(load("actors.vllm.enforce_eager=false")).enforce_eager
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert engine_args(load()).enforce_eager
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
