"""Prompts that a group shares: the layout of packs, the same gradient, and the refusal of models
that would compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from buffer.wire.messages import Trajectory
from learner.packs import attention, branches
from learner.packs.attention import PACKED_SDPA
from learner.packs.batch import Pack, make_packs
from learner.probes.sharing import probe_sharing
from learner.train import LearnerState, train_step
from tests.families import save_family
from tests.learner_cases import (
    assert_same_gradients,
    make_config,
    make_groups,
    make_shards,
    num_sampled,
    save_model,
    shipped,
    single_rank,
    step_gradients,
)

OWN_ROOM = 1  # tokens per pack, so that every sequence has one to itself


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower with more threads, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


# The layout ---------------------------------------------------------------------------------------


def tokens_of(trajectory: Trajectory) -> list[int]:
    return np.frombuffer(trajectory.tokens, "<i4").tolist()


def group(prompt: list[int], responses: list[list[int]]) -> list[Trajectory]:
    return [
        Trajectory(
            rollout_id=number,
            group_id=0,
            tokens=np.array(prompt + sampled, "<i4").tobytes(),
            sampled=bytes(len(prompt)) + b"\1" * len(sampled),
            actor_logprobs=bytes(4 * len(prompt + sampled)),
            versions=[(0, len(sampled))],
            reward=0.0,
            truncated=False,
            advantage=1.0,
        )
        for number, sampled in enumerate(responses)
    ]


PROMPT = list(range(10, 19))


def test_responses_follow_their_prompt_and_begin_with_its_last_token() -> None:
    [pack] = make_packs(group(PROMPT, [[20, 21], [30], [40, 41]]), 64, 0, share_prompts=True)
    assert pack.input_ids_T.tolist() == [*PROMPT[:-1], 18, 20, 18, 18, 40]
    assert pack.position_ids_T.tolist() == [*range(8), 8, 9, 8, 8, 9]
    assert (pack.lengths, pack.parents) == ((8, 2, 1, 2), (-1, 0, 0, 0))
    assert pack.predicts_S.tolist() == [8, 9, 10, 11, 12]
    assert pack.targets_S.tolist() == [20, 21, 30, 40, 41]
    assert pack.response_S.tolist() == [1, 1, 2, 3, 3]
    assert pack.num_saved == 16


def test_a_group_that_fills_more_than_a_pack_repeats_its_prompt() -> None:
    responses = [[20 + n, 30 + n] for n in range(4)]
    packs = make_packs(group(PROMPT, responses), 12, 0, share_prompts=True)
    assert [pack.lengths for pack in packs] == [(8, 2, 2), (8, 2, 2)]
    assert [pack.num_saved for pack in packs] == [8, 8]


def responses_in(pack: Pack) -> list[tuple[list[int], list[int], list[int]]]:
    """Input tokens, positions and targets of each response, as if it were alone."""
    ids, positions = pack.input_ids_T.split(pack.lengths), pack.position_ids_T.split(pack.lengths)
    found = []
    for number, parent in enumerate(pack.parents):
        if number in pack.parents:
            assert parent == -1 and number not in pack.response_S
            continue
        rows = [parent, number] if parent >= 0 else [number]
        found.append(
            (
                torch.cat([ids[row] for row in rows]).tolist(),
                torch.cat([positions[row] for row in rows]).tolist(),
                pack.targets_S[pack.response_S == number].tolist(),
            )
        )
    return found


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(16, 300), st.integers(1, 6))
def test_every_response_is_whole_with_its_prompt_and_the_savings_are_exact(
    seed: int, num_prompt: int, max_tokens: int, group_size: int
) -> None:
    trajectories = make_groups(seed, num_prompt, group_size=max(2, group_size))
    order = np.random.default_rng(seed).permutation(len(trajectories))
    trajectories = [trajectories[index] for index in order[: len(order) - seed % 3]]
    packs = make_packs(trajectories, max_tokens, 0, share_prompts=True)
    expected = sorted(
        (tokens[:-1], list(range(len(tokens) - 1)), tokens[len(tokens) - t.versions[0][1] :])
        for t in trajectories
        for tokens in [tokens_of(t)]
    )
    assert sorted(response for pack in packs for response in responses_in(pack)) == expected
    apart = sum(len(t.sampled) - 1 for t in trajectories)
    forwarded = sum(len(pack.input_ids_T) for pack in packs)
    assert forwarded + sum(pack.num_saved for pack in packs) == apart
    for pack in packs:
        assert sum(pack.lengths) == len(pack.input_ids_T)
        assert sum(pack.lengths) <= max_tokens or len(pack.lengths) == 1


# The gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_gradients_in_float64_agree_to_its_rounding(tmp_path: Path, family: str) -> None:
    path = save_family(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model.set_attn_implementation(PACKED_SDPA)

    def gradients(max_tokens: int, share_prompts: bool) -> dict[str, torch.Tensor]:
        for pack in make_packs(make_groups(seed=2), max_tokens, 0, share_prompts=share_prompts):
            logits = model(
                input_ids=pack.input_ids_T[None],
                position_ids=pack.position_ids_T[None],
                lengths=pack.lengths,
                parents=pack.parents,
                use_cache=False,
            ).logits[0, pack.predicts_S]
            logprobs = logits.log_softmax(1).gather(1, pack.targets_S[:, None])[:, 0]
            (logprobs * pack.advantages_S).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    apart, shared = gradients(OWN_ROOM, False), gradients(200, True)
    assert apart.keys() == shared.keys() == dict(model.named_parameters()).keys()
    for name, gradient in apart.items():
        # The norms of Qwen3 compute in float32.
        bound = 1e-11 if family == "gpt_neox" else 1e-6
        assert (shared[name] - gradient).norm() < bound * max(gradient.norm(), 1e-4), name


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__kl": 0.1},
        {"loss__kind": "gspo"},
        {"loss__kind": "decoupled_ppo", "batch__updates": 2},
        {"learner__activation_checkpointing": True},
        {"model__head_dtype": "float32"},
    ],
    ids=["kl", "gspo", "two updates", "recomputed", "head"],
)
def test_a_step_is_the_same_with_shared_prompts(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    def step(share_prompts: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        config = make_config(
            model_path,
            tmp_path / "run",
            batch__share_prompts=share_prompts,
            optimizer__lr=1e-4,
            **changes,
        )
        [shard] = shipped(
            make_groups(seed=3, num_groups=4), config.loss, updates=config.batch.updates
        )
        with single_rank(config) as state:
            assert state.shares_prompts == share_prompts
            return step_gradients(state, shard)

    (shared, shared_gradients), (apart, gradients) = step(True), step(False)
    assert_same_gradients(shared_gradients, gradients)
    for name in ("train/loss", "train/entropy", "train/kl", "train/ratio_mean", "train/tokens"):
        assert shared[name] == pytest.approx(apart[name], rel=1e-5, abs=1e-7), name
    assert shared["train/shared_tokens_frac"] > 0.2
    assert apart["train/shared_tokens_frac"] == 0.0


def test_the_share_of_saved_tokens_is_exact(model_path: Path, tmp_path: Path) -> None:
    """Three of four responses save the nine tokens before the last one of their prompt."""
    trajectories = [
        msgspec.structs.replace(t, advantage=1.0)
        for t in group(list(range(10)), [[20, 21], [22, 23], [24, 25], [26, 27]])
    ]
    with single_rank(make_config(model_path, tmp_path / "run")) as state:
        metrics = train_step(state, make_shards(trajectories)[0])
        assert metrics["train/shared_tokens_frac"] == 3 * 9 / (4 * 11)
        assert metrics["train/tokens"] == num_sampled(trajectories)
        nothing = train_step(state, make_shards([], step=1)[0])
    assert nothing["train/shared_tokens_frac"] == 0.0


# The kernels --------------------------------------------------------------------------------------


def random_heads(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, num_tokens, 16, generator=generator, dtype=dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


def slow_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """The documented meaning of torch's kernel, which has no CPU version, with its causal mask
    aligned at the last query and the last key.
    """
    assert window_size == (-1, 0) and enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    starts_q, starts_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (starts_q[-1], starts_k[-1]) == (len(query), len(key))
    lengths_q, lengths_k = np.diff(starts_q), np.diff(starts_k)
    assert (lengths_q.max(), lengths_k.max()) == (max_q, max_k)
    outputs = []
    for q, k, v in zip(
        *(
            t.split(n.tolist())
            for t, n in ((query, lengths_q), (key, lengths_k), (value, lengths_k))
        ),
        strict=True,
    ):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_kernels_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "varlen_attn", slow_varlen)
    lengths = (37, 11, 1, 60, 9, 1, 2, 2, 30)
    parents = (-1, 0, 0, 0, -1, -1, 5, 5, -1)
    inputs = random_heads(sum(lengths), dtype)
    weights = torch.randn(1, 4, sum(lengths), 16, dtype=dtype)
    results = []
    for kernel in (branches.on_cpu, branches.by_sequence, branches.varlen):
        query, key, value = inputs
        output = kernel(query, key, value, lengths, parents, 0.3)
        results.append([output, *torch.autograd.grad(output, inputs, weights)])
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for other in results[1:]:
        for measured, expected in zip(other, results[0], strict=True):
            assert (measured - expected).norm() < bound * expected.norm()


def test_memory_grows_with_the_tokens() -> None:
    """Nothing that is kept for the gradient has the size of a mask."""
    saved: list[int] = []
    lengths, parents = (64, 512, 512), (-1, 0, 0)
    query, key, value = random_heads(sum(lengths), torch.float32)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        branches.on_cpu(query, key, value, lengths, parents, 0.3)
    assert max(saved) <= 4 * sum(lengths) * 16


# Models that cannot share -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "lfm2", "bloom"])
def test_other_families_repeat_their_prompts_and_say_why(
    tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"n_layer": 2, "n_head": 2} if family == "bloom" else {}
    path = save_family(tmp_path / "model", family, **changes)
    with single_rank(make_config(path, tmp_path / "run")) as state:
        assert not state.shares_prompts
        packs = train_packs(state)
    assert all(pack.num_saved == 0 for pack in packs)
    reason = f"learner: {family}: each response repeats the prompt of its group, because "
    assert capfd.readouterr().err.count(reason) == 1


def train_packs(state: LearnerState) -> list[Pack]:
    seen: list[Pack] = []
    state.boundaries.logprobs, logprobs = watching(state.boundaries.logprobs, seen)
    train_step(state, make_shards(make_groups(seed=0))[0])
    state.boundaries.logprobs = logprobs
    return seen


def watching(logprobs: Any, seen: list[Pack]) -> tuple[Any, Any]:
    def watched(pack: Pack, temperature: float) -> Any:
        seen.append(pack)
        return logprobs(pack, temperature)

    return watched, logprobs


def test_another_attention_repeats_the_prompts(
    model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with single_rank(make_config(model_path, tmp_path / "run", model__attention="eager")) as state:
        assert not state.shares_prompts
    assert capfd.readouterr().err.count("model.attention=eager") == 1


def ignoring_trunks(q: Any, k: Any, v: Any, lengths: Any, parents: Any, scaling: Any) -> Any:
    return branches.by_sequence(q, k, v, lengths, (-1,) * len(parents), scaling)


def seeing_siblings(q: Any, k: Any, v: Any, lengths: Any, parents: Any, scaling: Any) -> Any:
    return branches.by_sequence(q, k, v, (sum(lengths),), (-1,), scaling)


def failing(*_: Any) -> Any:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("kernel", [ignoring_trunks, seeing_siblings, failing])
def test_a_kernel_that_computes_something_else_is_found_by_measurement(
    model_path: Path, tmp_path: Path, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attention_for", lambda _: kernel)
    with single_rank(make_config(model_path, tmp_path / "run")) as state:
        assert not state.shares_prompts
        sharing = probe_sharing(state.boundaries, state.packing)
        assert all(parameter.grad is None for parameter in state.model.parameters())
    if kernel is failing:
        assert "no kernel image" in sharing.reason
        return
    assert sharing.difference.logprob > 0.01 and sharing.difference.gradient > 0.01
    assert (sharing.difference.leak > 0.001) == (kernel is seeing_siblings)
