"""AdamW with moments in bfloat16 follows the one with moments in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import cli
from configs.memory import learner as memory
from configs.schema import Config, LoraConfig
from learner import checkpoint, optimizer
from learner.model_shape import shape_of_path
from learner.optimizer import CompactAdamW, rounded_at_random
from learner.train import save, train_step
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    save_model,
    single_rank,
    train,
    with_and_without_restart,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(
        save_model(tmp_path / "model"), tmp_path / "run", optimizer__moments="bfloat16"
    )


def test_a_number_becomes_one_of_its_neighbours_and_stays_itself_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([1.0, -3.5, 0.0, 2.0**-130])
    assert torch.equal(rounded_at_random(exact, generator).float(), exact)
    for value in (1 + 2**-9, -(1 + 2**-9), 3e-20, 1.9999):
        values = torch.full((100_000,), value)
        rounded = rounded_at_random(values, generator).double()
        assert len(rounded.unique()) == 2
        assert (rounded / value - 1).abs().max() < 2**-7
        assert rounded.mean().item() == pytest.approx(values[0].double().item(), rel=1e-4)


@pytest.mark.parametrize("chunk", [7, 2**22])
def test_the_first_step_is_that_of_adamw(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "CHUNK", chunk)
    torch.manual_seed(0)
    begun, gradient = torch.randn(5, 9), torch.randn(5, 9)
    moved, states = [], []
    for kind in (torch.optim.AdamW, CompactAdamW):
        weight = torch.nn.Parameter(begun.clone())
        made = kind([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        weight.grad = gradient.clone()
        made.step()
        moved.append(weight.detach())
        states.append(made.state[weight])
    assert torch.equal(*moved)
    assert states[1]["step"] == states[0]["step"] == 1
    for moment in ("exp_avg", "exp_avg_sq"):
        assert states[1][moment].dtype == torch.bfloat16
        torch.testing.assert_close(states[1][moment].float(), states[0][moment], rtol=2**-7, atol=0)


def test_a_slow_second_moment_is_right_on_average() -> None:
    """Rounded to the nearest number it would not decline at all, once gradients have become 0."""
    weight = torch.nn.Parameter(torch.zeros(20_000))
    made = CompactAdamW([weight], betas=(0.9, 0.999), fused=True)
    weight.grad = torch.linspace(1, 2, len(weight))
    made.step()
    begun = made.state[weight]["exp_avg_sq"].float()
    weight.grad = torch.zeros(len(weight))
    for _ in range(500):
        made.step()
    left = made.state[weight]["exp_avg_sq"].float() / begun
    assert left.mean().item() == pytest.approx(0.999**500, rel=0.01)


def curve(config: Config, steps: int) -> torch.Tensor:
    """The loss of the same trajectories, step after step."""
    shard = make_shards(make_trajectories(seed=0))[0]
    with single_rank(config) as state:
        return torch.tensor([train_step(state, shard)["train/loss"] for _ in range(steps)])


def test_the_curve_stays_close_to_that_of_float32(config: Config) -> None:
    exact = replace(config, optimizer=replace(config.optimizer, moments="float32"))
    expected, measured = curve(exact, 30), curve(config, 30)
    decline = expected[0] - expected[-1]
    assert decline > 0.1
    assert not torch.equal(measured, expected)
    assert (measured - expected).abs().max() < 0.005 * decline


@pytest.mark.parametrize("rank", [0, 4])
def test_a_resumed_run_rounds_as_if_it_had_not_stopped(config: Config, rank: int) -> None:
    config = replace(config, model=replace(config.model, lora=LoraConfig(rank=rank)))
    resumed, undisturbed = with_and_without_restart(config)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_checkpoint_is_resumed_with_the_other_type(
    config: Config, before: str, after: str
) -> None:
    def of(moments: str) -> Config:
        return replace(config, optimizer=replace(config.optimizer, moments=moments))

    with single_rank(of(before)) as state:
        train(state, 2)
        save(state)
        saved = {
            n: t.clone() for n, t in checkpoint.tensors_of(state.model, state.optimizer).items()
        }
    with single_rank(of(after)) as state:
        assert checkpoint.load_latest(state.saver.folder, state.model, state.optimizer)
        loaded = checkpoint.tensors_of(state.model, state.optimizer)
        for name, tensor in saved.items():
            torch.testing.assert_close(
                loaded[name].float(), tensor.float(), rtol=2**-8, atol=1e-30, msg=name
            )
        state.step = 2
        train(state, 1)


@pytest.mark.parametrize("others", [(), ("model.lora.rank=2",)])
def test_moments_take_four_bytes_less(config: Config, others: tuple[str, ...]) -> None:
    shape = shape_of_path(config.model.path)
    exact, rounded = (
        cli.load([f"optimizer.moments={moments}", *others]) for moments in ("float32", "bfloat16")
    )
    number = memory.adapter_parameters(shape, exact) if others else shape.parameters
    ranks = [memory.on_device(shape, of, cuda=True).total for of in (exact, rounded)]
    assert ranks[0] - ranks[1] == 4 * number
    assert memory.saved_bytes(exact) - memory.saved_bytes(rounded) == 4
