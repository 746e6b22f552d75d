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
from configs.objectives import Objective, objective
from configs.schema import Config
from tests.families import save_family
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    num_sampled,
    save_model,
    shipped,
    single_rank,
    step_gradients,
    with_advantages,
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
        far.append(less_probable(t, rng.uniform(0.0, 3.0, len(t.sampled))))
    return far


def less_probable(t: Trajectory, nats: Any) -> Trajectory:
    """The same trajectory from an actor that gave its tokens lower log-probabilities."""
    logprobs = np.frombuffer(t.actor_logprobs, "<f4")
    moved = logprobs - np.frombuffer(t.sampled, np.uint8) * nats
    return msgspec.structs.replace(t, actor_logprobs=moved.astype("<f4").tobytes())


def arrays(t: Trajectory) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, a mask of the sampled ones, and the actor's log-probabilities."""
    return (
        torch.tensor(np.frombuffer(t.tokens, "<i4").astype(np.int64)),
        torch.tensor(np.frombuffer(t.sampled, np.uint8).astype(bool)),
        torch.tensor(np.frombuffer(t.actor_logprobs, "<f4").astype(np.float64)),
    )


def advantages(trajectories: list[Trajectory], kind: str) -> list[float]:
    groups: dict[int, list[float]] = {}
    for t in trajectories:
        groups.setdefault(t.group_id, []).append(t.reward)
    found = []
    for t in trajectories:
        rewards = groups[t.group_id]
        others = [*rewards]
        others.remove(t.reward)
        match kind:
            case "rloo":
                found.append(t.reward - statistics.fmean(others))
            case "dr_grpo":
                found.append(t.reward - statistics.fmean(rewards))
            case _:
                centred = t.reward - statistics.fmean(rewards)
                found.append(centred / (statistics.pstdev(rewards) + 1e-6))
    return found


CLIPS = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # the others have 0.2 on both sides
CAP = 2.0


def clipped(ratio: Any, a: float, low: float, high: float) -> tuple[Any, str]:
    """PPO's objective of a token, with the ratio as a constant weight above the cap."""
    value = ratio.item()
    if a > 0 and value > 1 + high:
        return torch.tensor((1 + high) * a), "clip_high"
    if a < 0 and value < 1 - low:
        return torch.tensor((1 - low) * a), "clip_low"
    if value > CAP:
        return CAP * a * (1 + ratio.log() - ratio.log().detach()), "cap"
    return ratio * a, "plain"


def response_objective(
    kind: str, logprobs: torch.Tensor, actor: torch.Tensor, a: float
) -> tuple[torch.Tensor, set[str]]:
    """The sum over a response's tokens of its published objective, and the rules that acted."""
    low, high = CLIPS.get(kind, (0.2, 0.2))
    ratios = (logprobs - actor).exp()
    if kind == "gspo":
        ratios = (logprobs - actor).mean().exp().repeat(len(logprobs))
    terms, rules = [], set()
    for ratio, logprob in zip(ratios, logprobs, strict=True):
        value = ratio.detach()
        match kind:
            case "rloo":
                term = min(value, torch.tensor(CAP)) * a * (1 + logprob - logprob.detach())
                rule = "cap" if value > CAP else "plain"
            case "cispo":
                term = min(value, torch.tensor(5.0)) * a * logprob
                rule = "clip_high" if value > 5 else "plain"
            case "decoupled_ppo":  # the proximal policy equals the learner's in the first update
                term = min(value, torch.tensor(CAP)) * a * (logprob - logprob.detach()).exp()
                rule = "cap" if value > CAP else "plain"
            case _:
                term, rule = clipped(ratio, a, low, high)
        terms.append(term)
        rules.add(rule if abs(a) > 1e-9 else "uniform")
    return torch.stack(terms).sum(), rules


def transcription(path: Path, trajectories: list[Trajectory], config: Config) -> Any:
    """The model with its gradient in float64, and the loss, computed response by response as
    published.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    kind, total, seen = config.loss.kind, torch.zeros((), dtype=torch.float64), set()
    for t, a in zip(trajectories, advantages(trajectories, kind), strict=True):
        tokens, sampled, actor = arrays(t)
        logits = model(input_ids=tokens[None]).logits[0] / config.sampling.temperature
        logprobs = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
        made, rules = response_objective(kind, logprobs[sampled[1:]], actor[sampled], a)
        num_tokens = int(sampled.sum())
        match kind:
            case "grpo" | "gspo":
                divisor = num_tokens * len(trajectories)
            case "dr_grpo" | "rloo":
                divisor = config.sampling.max_tokens * len(trajectories)
            case _:
                divisor = num_sampled(trajectories)
        total = total - made / divisor
        seen |= rules
    total.backward()
    return model, float(total.detach()), seen


ALL_RULES = {"clip_high", "clip_low", "cap", "plain", "uniform"}
RULES = {  # rules of the objective that the drawn trajectories must meet
    "dapo": ALL_RULES,
    "grpo": ALL_RULES,
    "dr_grpo": ALL_RULES,
    "rloo": {"cap", "plain", "uniform"},
    "gspo": ALL_RULES,
    "cispo": {"clip_high", "plain", "uniform"},
    "decoupled_ppo": {"cap", "plain", "uniform"},
}
FAMILIES = ("llama", "qwen3_moe", "lfm2")
CASES = [
    *((family, tied, "dapo") for family in FAMILIES for tied in (True, False)),
    *(("llama", True, kind) for kind in RULES if kind != "dapo"),
]


@pytest.mark.parametrize(("family", "tied", "kind"), CASES)
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
    if kind == "gspo":  # whose ratios of whole responses differ less
        trajectories = [less_probable(t, 5.0 * (t.group_id == 1)) for t in trajectories]
    model, loss, seen = transcription(path, trajectories, config)
    assert seen == RULES[kind]
    with single_rank(config) as state:
        metrics, gradients = step_gradients(state, shipped(trajectories, config.loss)[0])
    assert_same(metrics["train/loss"], gradients, loss, model)


def test_dropping_what_has_no_gradient_changes_no_gradient(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "qwen3")
    config = make_config(path, tmp_path / "run", optimizer__max_grad_norm=1e9)
    trajectories = with_advantages(drawn_trajectories())
    made = []
    for shard in (make_shards(trajectories)[0], shipped(trajectories, config.loss)[0]):
        with single_rank(config) as state:
            made.append((len(shard.trajectories), *step_gradients(state, shard)))
    (num_all, all_metrics, expected), (num_left, metrics, gradients) = made
    assert (num_all, num_left) == (12, 8)
    assert metrics["train/loss"] == pytest.approx(all_metrics["train/loss"], abs=LOSS_BOUND)
    assert metrics["train/grad_norm"] == pytest.approx(all_metrics["train/grad_norm"], rel=1e-5)
    for name, gradient in expected.items():
        largest = max(gradient.abs().max().item(), 1e-3)
        assert (gradients[name] - gradient).abs().max() <= GRADIENT_BOUND * largest, name


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_penalty_equals_a_float64_transcription(tmp_path: Path, estimator: str) -> None:
    """All responses are in a uniform group, so that the penalty alone has a gradient."""
    path, other = (save_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    config = make_config(
        path,
        tmp_path / "run",
        loss__kl=0.3,
        loss__kl_estimator=estimator,
        loss__reference=str(other),
        optimizer__max_grad_norm=1e9,
    )
    uniform = [msgspec.structs.replace(t, reward=0.0) for t in drawn_trajectories()]
    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64, attn_implementation="eager")
        for p in (path, other)
    ]
    total = torch.zeros((), dtype=torch.float64)
    for t in uniform:
        tokens, sampled, _ = arrays(t)
        policy, reference = (
            torch.log_softmax(model(input_ids=tokens[None]).logits[0, :-1], -1).gather(
                1, tokens[1:, None]
            )[:, 0][sampled[1:]]
            for model in models
        )
        d = policy - reference.detach()
        penalty = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
        total = total + 0.3 * penalty.sum() / num_sampled(uniform)
    total.backward()
    with single_rank(config) as state:
        metrics, gradients = step_gradients(state, shipped(uniform, config.loss)[0])
    assert_same(metrics["train/loss"], gradients, float(total.detach()), models[0])
    assert metrics["train/loss"] == pytest.approx(0.3 * metrics["train/kl"], rel=1e-5)


def test_a_reference_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "qwen3")
    other = save_model(tmp_path / "llama", family="llama")
    config = make_config(path, tmp_path / "run", loss__kl=0.1, loss__reference=str(other))
    with pytest.raises(ValueError, match=r"loss.reference=.*llama model.*qwen3"):
        with single_rank(config):
            pass


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


def trl_trainer(model: torch.nn.Module, kind: str, rules: Objective) -> SimpleNamespace:
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
        # For CISPO it is the bound itself.
        epsilon_high=rules.clip_high + (kind == "cispo"),
        importance_sampling_level=rules.ratio,
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


@pytest.mark.parametrize(
    ("kind", "trl_kind"),
    [
        ("dapo", "dapo"),
        ("grpo", "grpo"),
        ("dr_grpo", "dr_grpo"),
        ("gspo", "grpo"),
        ("cispo", "cispo"),
    ],
)
def test_loss_and_gradient_equal_those_of_trl(tmp_path: Path, kind: str, trl_kind: str) -> None:
    """Compared without capped importance weights, because TRL clamps a weight above `delta` and
    drops its gradient.
    """
    from trl.trainer.grpo_trainer import GRPOTrainer  # takes seconds to import

    path = save_family(tmp_path / "model", "qwen3")
    config = make_config(
        path, tmp_path / "run", loss__kind=kind, loss__tis_cap=1e9, optimizer__max_grad_norm=1e9
    )
    trajectories = drawn_trajectories()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    num_tokens = num_sampled(trajectories)
    inputs = padded(trajectories, pad_id=0) | {
        "advantages": torch.tensor(advantages(trajectories, kind)),
        "num_items_in_batch": torch.tensor(float(num_tokens)),
    }
    trainer = trl_trainer(model, trl_kind, objective(config.loss))
    trainer.max_completion_length = config.sampling.max_tokens
    loss = GRPOTrainer._compute_loss(trainer, model, inputs)
    loss.backward()
    with single_rank(config) as state:
        metrics, gradients = step_gradients(state, shipped(trajectories, config.loss)[0])
    assert_same(metrics["train/loss"], gradients, loss.item(), model)
