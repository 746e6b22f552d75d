"""The loss and its gradient equal those of two references that share no code with ours.

One is written out in float64 and takes one trajectory at a time; the other is TRL's and takes a
padded batch. Both use plain transformers models. Ours is a whole step, packed and sharded.
"""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from buffer.wire.messages import Trajectory
from configs.schema import Config, LossConfig
from tests.families import save_family
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    num_sampled,
    single_rank,
    step_gradients,
)

LOSS_BOUND = 1e-6
GRADIENT_BOUND = 5e-6  # relative to the largest entry of a tensor


def drawn_trajectories() -> list[Trajectory]:
    """Three groups, one of them uniform. The actors are off-policy enough that every rule of the
    loss applies.
    """
    mixed = make_trajectories(seed=0, num_groups=2)
    uniform = make_trajectories(seed=1, num_groups=1)
    uniform = [msgspec.structs.replace(t, reward=0.1, group_id=2) for t in uniform]
    rng = np.random.default_rng(2)
    far = []
    for t in [*uniform, *mixed]:
        logprobs = np.frombuffer(t.actor_logprobs, "<f4")
        sampled = np.frombuffer(t.sampled, np.uint8)
        moved = logprobs - sampled * rng.uniform(0.0, 3.0, len(logprobs))
        far.append(msgspec.structs.replace(t, actor_logprobs=moved.astype("<f4").tobytes()))
    return far


def arrays(t: Trajectory) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, a mask of the sampled ones, and the actor's log-probabilities."""
    return (
        torch.tensor(np.frombuffer(t.tokens, "<i4").astype(np.int64)),
        torch.tensor(np.frombuffer(t.sampled, np.uint8).astype(bool)),
        torch.tensor(np.frombuffer(t.actor_logprobs, "<f4").astype(np.float64)),
    )


def advantage(t: Trajectory, kind: str) -> float:
    centred = t.reward - statistics.fmean(t.group_rewards)
    return centred if kind == "dr_grpo" else centred / (statistics.pstdev(t.group_rewards) + 1e-6)


def transcription(path: Path, trajectories: list[Trajectory], config: Config) -> Any:
    """The model with its gradient in float64, and the loss, computed token by token as the loss's
    documentation defines it.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    rules, total = config.loss, torch.zeros((), dtype=torch.float64)
    seen = set()
    for t in trajectories:
        tokens, sampled, actor = arrays(t)
        logits = model(input_ids=tokens[None]).logits[0] / config.sampling.temperature
        a = advantage(t, rules.kind)
        for position in torch.nonzero(sampled).flatten().tolist():
            logprob = torch.log_softmax(logits[position - 1], -1)[tokens[position]]
            ratio = (logprob.detach() - actor[position]).exp().item()
            if a > 0 and ratio > 1 + rules.clip_high:
                term, rule = torch.tensor((1 + rules.clip_high) * a), "clip_high"
            elif a < 0 and ratio < 1 - rules.clip_low:
                term, rule = torch.tensor((1 - rules.clip_low) * a), "clip_low"
            elif ratio > rules.tis_cap:
                term, rule = rules.tis_cap * a * (1 + logprob - logprob.detach()), "cap"
            else:
                term, rule = (logprob - actor[position]).exp() * a, "plain"
            seen.add(rule if a else "uniform")
            total = total - term / num_sampled(trajectories)
    total.backward()
    return model, float(total.detach()), seen


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "lfm2"])
def test_loss_and_gradient_equal_a_float64_transcription(
    tmp_path: Path, family: str, tied: bool, kind: str
) -> None:
    path = save_family(tmp_path / "model", family, tie_word_embeddings=tied)
    config = make_config(
        path,
        tmp_path / "run",
        loss__kind=kind,
        sampling__temperature=0.7,
        optimizer__max_grad_norm=1e9,
    )
    trajectories = drawn_trajectories()
    model, loss, seen = transcription(path, trajectories, config)
    assert seen == {"clip_high", "clip_low", "cap", "plain", "uniform"}
    with single_rank(config) as state:
        metrics, gradients = step_gradients(state, make_shards(trajectories)[0])
    assert_same(metrics["train/loss"], gradients, loss, model)


def assert_same(
    measured: float, gradients: dict[str, torch.Tensor], loss: float, model: torch.nn.Module
) -> None:
    assert measured == pytest.approx(loss, abs=LOSS_BOUND)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        off = (gradients[name].double() - gradient.double()).abs().max()
        assert off <= GRADIENT_BOUND * max(gradient.abs().max().item(), 1e-3), name


# TRL ---------------------------------------------------------------------------------------------


def padded(trajectories: list[Trajectory], pad_id: int) -> dict[str, torch.Tensor]:
    """TRL's batch: prompts padded on the left, completions on the right."""
    prompts, completions, actors = [], [], []
    for t in trajectories:
        tokens, sampled, actor = arrays(t)
        prompts.append(tokens[~sampled].flip(0))
        completions.append(tokens[sampled])
        actors.append(actor[sampled].float())
    pad = torch.nn.utils.rnn.pad_sequence
    prompt_ids = pad(prompts, batch_first=True, padding_value=-1).flip(1)
    completion_ids = pad(completions, batch_first=True, padding_value=-1)
    return {
        "prompt_ids": prompt_ids.clamp(min=pad_id),
        "prompt_mask": (prompt_ids >= 0).long(),
        "completion_ids": completion_ids.clamp(min=pad_id),
        "completion_mask": (completion_ids >= 0).long(),
        "old_per_token_logps": pad(actors, batch_first=True),
    }


def trl_trainer(model: torch.nn.Module, kind: str, rules: LossConfig) -> SimpleNamespace:
    """The attributes of a trainer that `GRPOTrainer._compute_loss` reads: one process, no
    accumulation, no penalty.
    """

    def logps(_: Any, ids: Any, mask: Any, keep: int, **__: Any) -> tuple[Any, Any, None]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        logprobs = logits[:, -keep - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(2, ids[:, -keep:, None])[..., 0]
        return chosen, torch.zeros_like(chosen), None

    return SimpleNamespace(
        model=model,
        loss_type=kind,
        epsilon_low=rules.clip_low,
        epsilon_high=rules.clip_high,
        importance_sampling_level="token",
        beta=0.0,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1,
            reduce=lambda x, **_: x,
            gather=lambda x: x,
            autocast=contextlib.nullcontext,
        ),
        max_completion_length=1,
        _metrics={mode: dict_of_lists() for mode in ("train", "eval")},
        _get_per_token_logps_and_entropies=logps,
    )


class dict_of_lists(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


@pytest.mark.parametrize(("kind", "trl_kind"), [("grpo", "dapo"), ("dr_grpo", "dr_grpo")])
def test_loss_and_gradient_equal_those_of_trl(tmp_path: Path, kind: str, trl_kind: str) -> None:
    """Compared without capped importance weights, because TRL clamps a weight above `delta` and
    drops its gradient.
    """
    grpo_trainer = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason="trl is not installed: pip install 'darts-rl[reference]'"
    )
    path = save_family(tmp_path / "model", "qwen3")
    config = make_config(
        path, tmp_path / "run", loss__kind=kind, loss__tis_cap=1e9, optimizer__max_grad_norm=1e9
    )
    trajectories = drawn_trajectories()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    num_tokens = num_sampled(trajectories)
    inputs = padded(trajectories, pad_id=0) | {
        "advantages": torch.tensor([advantage(t, kind) for t in trajectories]),
        "num_items_in_batch": torch.tensor(float(num_tokens)),
    }
    trainer = trl_trainer(model, trl_kind, config.loss)
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, model, inputs)
    # Its denominator is responses x longest response; ours is the number of tokens.
    if trl_kind == "dr_grpo":
        loss = loss * len(trajectories) / num_tokens
    loss.backward()
    with single_rank(config) as state:
        metrics, gradients = step_gradients(state, make_shards(trajectories)[0])
    assert_same(metrics["train/loss"], gradients, loss.item(), model)
