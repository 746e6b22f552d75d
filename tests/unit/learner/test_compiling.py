"""Compiled blocks: the same gradients, code that is made once, and models that they do not fit."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from configs.schema import Config
from learner import compiling
from learner.metrics import TokenSums
from learner.packs.attention import PACKED_SDPA, packed_sdpa
from learner.train import LearnerState, _packed, build_state, micro_batch_loss, train_step
from tests.families import save_family
from tests.learner_cases import (
    in_ranks,
    make_config,
    make_shards,
    make_trajectories,
    save_model,
    single_rank,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiled code is kept per process, and so is the attention that it needs. Nothing is compiled
    while coverage traces, or after a test of the actors has made the options of a CPU engine here.
    """
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    trace = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(trace)
    torch._dynamo.reset()
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)


def gradients(state: LearnerState, seeds: range) -> dict[str, torch.Tensor]:
    for seed in seeds:
        [(trajectories, _)] = make_shards(make_trajectories(seed))[0].split()
        for pack in _packed(state, trajectories):
            micro_batch_loss(state, pack, 1, TokenSums()).backward()
    found = {
        name: parameter.grad.full_tensor().clone()  # type: ignore[union-attr,operator]
        for name, parameter in state.model.named_parameters()
    }
    state.optimizer.zero_grad()
    return found


def of_both(tmp_path: Path, seeds: range, **changes: Any) -> float:
    """The largest difference of a gradient, relative to the largest entry of its tensor."""
    path = save_model(tmp_path / "model")
    found = []
    for compiled in (False, True):
        config = make_config(
            path, tmp_path / "run", batch__max_tokens=200, learner__compile=compiled, **changes
        )
        with single_rank(config) as state:
            before = counters["stats"]["unique_graphs"]
            found.append(gradients(state, seeds))
            assert counters["stats"]["unique_graphs"] == before  # all packs take the same code
    plain, compiled = found
    return max(
        ((compiled[name] - tensor).abs().max() / tensor.abs().max()).item()
        for name, tensor in plain.items()
    )


@pytest.mark.skipif(not shutil.which("c++"), reason="the compiler of a run builds C++")
def test_compiled_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    """With the compiler of a run, which builds C++ here."""
    assert 0 < of_both(tmp_path, range(6)) < 1e-5


def test_other_layouts_of_a_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")  # the same code, not compiled to C++
    changes = {"batch__share_prompts": False, "learner__activation_checkpointing": True}
    assert of_both(tmp_path, range(3), loss__kl=0.1, **changes) < 1e-5


def _same_step(rank: int, config: Config) -> None:
    compiling.BACKEND = "aot_eager"
    trajectories = make_trajectories(0)
    shard = make_shards(trajectories, parts=[7, len(trajectories) - 7])[rank]
    plain = replace(config, learner=replace(config.learner, compile=False))
    compiled, plainly = (
        train_step(build_state(each, torch.device("cpu"), rank, 2), shard)
        for each in (config, plain)
    )
    for name in ("train/loss", "train/grad_norm"):
        assert compiled[name] == pytest.approx(plainly[name], rel=1e-5)


def test_two_ranks_take_the_same_step(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    config = make_config(path, tmp_path / "run", learner__compile=True)
    in_ranks(2, _same_step, config, tmp_path)


def test_a_compiler_that_is_switched_off_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    with pytest.raises(ValueError, match="left the blocks as they are"):
        of_both(tmp_path, range(1))


def test_a_compiler_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(compiling, "BACKEND", no_compiler)
    config = make_config(save_model(tmp_path / "model"), tmp_path / "run", learner__compile=True)
    with pytest.raises(ValueError, match=r"^learner\.compile=true: .*C\+\+ compiler") as raised:
        with single_rank(config):
            pass
    assert "\n" not in str(raised.value)


def test_other_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, _: Any) -> Any:
        return lambda *args: tuple(
            1.01 * value if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in graph(*args)
        )

    monkeypatch.setattr(compiling, "BACKEND", wrong)
    config = make_config(save_model(tmp_path / "model"), tmp_path / "run", learner__compile=True)
    with pytest.raises(ValueError, match="other results"), single_rank(config):
        pass


def test_code_that_is_made_for_each_pack_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if blocks were told the lengths of sequences."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "OURS", ())
    config = make_config(save_model(tmp_path / "model"), tmp_path / "run", learner__compile=True)
    with pytest.raises(ValueError, match="compiled again"), single_rank(config):
        pass


@pytest.mark.parametrize(("family", "why"), [("gemma3_text", "sdpa"), ("bamba", "one sequence")])
def test_models_that_it_does_not_fit_are_refused(tmp_path: Path, family: str, why: str) -> None:
    path = save_family(tmp_path / "model", family)
    config = make_config(path, tmp_path / "run", learner__compile=True)
    with pytest.raises(ValueError, match=rf"learner\.compile=true: {family}.*{why}"):
        with single_rank(config):
            pass
