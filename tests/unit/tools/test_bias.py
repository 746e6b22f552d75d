"""`tools.bias`: gradients of selections beside those of whole groups."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from buffer.records import settings
from configs import cli
from configs.schema import Config
from learner.train import save, train_step
from tests.families import save_family
from tests.learner_cases import make_config, make_shards, make_trajectories, single_rank
from tools import bias
from tools.comparing.selection_bias import NUM_DECILES, length_deciles, measure
from tools.comparing.selection_rules import RULES, Response
from tools.export import run_config

SIZE = 4


def small_config() -> Config:
    return cli.load([f"darts.group_size={SIZE}", "sampling.max_tokens=100"])


def group(
    rng: np.random.Generator, lengths: list[int], rewards: list[float], dimensions: int = 64
) -> list[Response]:
    return [
        Response(n, n >= 100, reward, rng.standard_normal(dimensions))
        for n, reward in zip(lengths, rewards, strict=True)
    ]


def chosen(rule: str, responses: list[Response], num_long: int = 1) -> list[int]:
    config = small_config()
    config.darts.num_long = num_long
    picked = RULES[rule](responses, config, random.Random(0))
    return sorted(responses[i].tokens for i in picked)


def test_every_rule_selects_as_its_name_says() -> None:
    lengths = [50, 10, 40, 20, 90, 30, 80, 100]
    rewards = [1.0, 0, 1, 0, 1, 0, 0, 1]
    responses = group(np.random.default_rng(0), lengths, rewards)
    assert chosen("full", responses) == sorted(lengths)
    assert chosen("dual-end", responses) == [10, 20, 30, 90]  # 100 is truncated
    assert chosen("shortest", responses) == [10, 20, 30, 40]
    # At half the speed: 10, 20, 30 and 100 (every second response).
    assert chosen("first finished", responses) == [10, 20, 40, 50]
    assert chosen("reward/token", responses) == [10, 40, 50, 90]
    survivors = {chosen("survivor", group(np.random.default_rng(0), p, rewards))[-1]
                 for p in (lengths, [*reversed(lengths)])}  # fmt: skip
    assert survivors <= {40, 50, 80, 90}
    assert chosen("survivor", responses)[:3] == [10, 20, 30]
    assert len(chosen("random", responses)) == SIZE and 100 not in chosen("random", responses)
    assert chosen("plain", responses) == [10, 20, 40, 50]  # the first four, whatever their lengths


def test_a_group_that_a_run_would_give_up_selects_nothing() -> None:
    """With three responses within the limit, and `darts.fill_truncated=false`."""
    config = small_config()
    config.darts.fill_truncated = False
    responses = group(np.random.default_rng(0), [10, 20, 30, 100, 100, 100], [1.0, 0, 1, 0, 0, 0])
    for name in RULES.keys() - {"full", "plain"}:
        assert RULES[name](responses, config, random.Random(0)) == [], name


def test_the_whole_group_has_no_bias_and_its_weights_are_whole() -> None:
    rng = np.random.default_rng(1)
    groups = [
        group(rng, rng.integers(5, 100, 8).tolist(), rng.integers(0, 2, 8).astype(float).tolist())
        for _ in range(12)
    ]
    found = measure(groups, small_config(), num_resamples=100)
    for rule in found.values():
        assert sum(part.value for part in rule.by_length) == pytest.approx(1)
        assert sum(part.value for part in rule.by_pass_rate) == pytest.approx(1)
        assert len(rule.by_length) == NUM_DECILES
    assert found["shortest"].by_length[-1].value < 0.2 * found["full"].by_length[-1].value


def learnable(num_groups: int, longer: float = 0.0, noise: float = 3.0) -> list[list[Response]]:
    """Groups of 8 whose right responses point along the first axis, and wrong ones against it.

    Long ones also point along the second axis, by `longer`. Length and reward are independent.
    """
    rng, made = np.random.default_rng(5), []
    for _ in range(num_groups):
        members = group(rng, rng.permutation(range(10, 90, 10)).tolist(), [0.0] * 8, dimensions=16)
        for number, response in enumerate(members):
            reward = float(rng.random() < 0.5)
            towards = np.zeros(16)
            towards[0] = 2 * reward - 1
            towards[1] = longer * (2 * reward - 1) * (response.tokens > 40)
            members[number] = Response(
                response.tokens, False, reward, towards + noise * response.sketch_D
            )
        made.append(members)
    return made


def test_noise_that_rules_share_is_no_bias() -> None:
    """Where length says nothing, every rule by length is unbiased, however noisy the gradients."""
    found = measure(learnable(300), small_config(), num_resamples=300)
    assert found["full"].cosine.value == pytest.approx(1)
    assert found["full"].norm_ratio.value == pytest.approx(1)
    for name in ("plain", "dual-end", "survivor", "shortest", "random"):
        one = found[name].cosine
        assert one.low <= 1 <= one.high, (name, one)
        assert one.value == pytest.approx(1, abs=0.1), (name, one)
        assert found[name].noise_prompts.value > found["full"].noise_prompts.value  # 4 of 8


def test_a_rule_that_leaves_a_direction_out_has_its_cosine() -> None:
    """Half of the responses are long. The full gradient is (1, 1) and that of the shortest (1, 0).

    A token of the whole group is in the mean with 45 tokens on average, and one of the shortest
    with 25. Groups of four have equal rewards more often, and less of a gradient.
    """
    found = measure(learnable(400, longer=2.0, noise=0.3), small_config(), num_resamples=300)
    one = found["shortest"].cosine
    assert one.value == pytest.approx(1 / 2**0.5, abs=0.03)
    assert one.low < 1 / 2**0.5 < one.high < 0.9
    assert 1 < found["shortest"].norm_ratio.value < 45 / 25
    assert found["plain"].cosine.value == pytest.approx(1, abs=0.03)


def test_the_push_on_the_length_is_that_of_the_policy() -> None:
    """Gradients of a softmax over two lengths, 20 and 60, of which the longer is right.

    Each 0.01 of reward is 0.01 of probability, and so 0.4 tokens.
    """
    rng = np.random.default_rng(6)
    groups = []
    for _ in range(60):
        long = rng.random(8) < 0.5
        groups.append(
            [
                Response(60 if one else 20, False, float(one), np.array([0.5 if one else -0.5]))
                for one in long
            ]
        )
    for name, rule in measure(groups, small_config(), num_resamples=50).items():
        if name not in ("shortest", "reward/token"):  # these may see a single length
            assert rule.length_per_point.value == pytest.approx(0.4), name


def test_a_gradient_that_is_lost_in_noise_is_undetermined() -> None:
    found = measure(learnable(5, noise=50.0), small_config(), num_resamples=100)
    shown = bias.show(found)
    assert "undetermined" in shown and "nan" not in shown


def test_groups_without_signal_count_in_the_mean_unless_they_are_replaced() -> None:
    rng = np.random.default_rng(7)
    lengths = [10, 20, 30, 40, 50, 50]
    # `plain` selects the first four, whose rewards are equal in half of the groups.
    groups = [group(rng, lengths, [*first, 0, 0]) for first in ([1.0, 0, 0, 1], [1.0] * 4)] * 5
    config = small_config()
    trained = measure(groups, config, num_resamples=10)["plain"]
    config.darts.uniform = "drop"
    replaced = measure(groups, config, num_resamples=10)["plain"]
    assert replaced.by_length == trained.by_length  # a uniform group has no weight in either case
    assert replaced.norm_ratio.value == pytest.approx(2 * trained.norm_ratio.value)


def test_equal_lengths_share_the_deciles_that_they_span() -> None:
    found = length_deciles([10, 20, 20, 20])
    assert found[10].tolist() == pytest.approx([0.4, 0.4, 0.2, *[0] * 7])
    assert found[20].sum() == pytest.approx(1)
    assert found[20][2:4].tolist() == pytest.approx([0.05 / 0.75, 0.1 / 0.75])


def test_a_length_that_no_response_has_is_in_the_decile_into_which_it_would_fall() -> None:
    found = length_deciles(range(10), others=[3, 4, 12])
    assert found[12].tolist() == [0] * 9 + [1]
    assert found[3].tolist() == found[3].round().tolist() == [0, 0, 0, 1, *[0] * 6]


def test_a_selection_of_everything_is_the_full_gradient() -> None:
    """With M responses per group, each rule selects all of them."""
    rng = np.random.default_rng(2)
    groups = [group(rng, [10, 20, 30, 40], [1.0, 0, 0, 1])] * 10
    for rule in measure(groups, small_config(), num_resamples=10).values():
        assert rule.cosine.value == pytest.approx(1)
        assert rule.norm_ratio.value == pytest.approx(1)


def test_the_gradient_is_that_of_the_loss() -> None:
    """By hand: advantages of +1 and -1, and a mean over the tokens of all responses in the loss."""
    rng = np.random.default_rng(3)
    config = small_config()
    one, other = (group(rng, [10, 20, 30, 100], [1.0, 0, 1, 0]) for _ in range(2))
    mute = group(rng, [5, 5, 5, 5], [1.0] * 4)
    found = measure([one, other, mute, mute, mute], config, num_resamples=10)
    assert found["full"].by_pass_rate[1].value == pytest.approx(1)  # half of each is right
    # Of 20 responses 12 have 5 tokens, and 10, 20, 30 and 100 are two each; 100 is truncated.
    weights = [part.value for part in found["full"].by_length]
    assert weights == pytest.approx([0, 0, 0, 0, 0, 0, 1 / 6, 2 / 6, 3 / 6, 0], abs=1e-5)


def test_groups_without_signal_are_refused() -> None:
    groups = [group(np.random.default_rng(4), [10, 20, 30, 40], [1.0] * 4)] * 2
    with pytest.raises(ValueError, match="rewards of every group are equal"):
        measure(groups, small_config())
    with pytest.raises(ValueError, match="must be >= 2; the noise of a single prompt"):
        measure(groups[:1], small_config())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on a tiny model."""
    folder = tmp_path_factory.mktemp("bias")
    config = make_config(save_family(folder / "model", "llama"), folder / "run")
    config.sampling.max_tokens, config.darts.group_size = 12, 2
    config.eval.num_prompts = 3
    (folder / "run").mkdir()
    settings.write(folder / "run", config, {})
    with single_rank(config) as state:
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        save(state)
    return folder / "run"


def test_sketches_keep_the_inner_products_of_gradients(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    prompt, responses = [5, 6, 7], [[8, 9, 10], [8, 9, 11, 12], [30, 31]]

    def gradient(ids: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, 2:-1] / 0.7
        chosen = torch.log_softmax(logits, -1)[range(len(ids)), ids].sum()
        parts = torch.autograd.grad(chosen, list(model.parameters()))
        return torch.cat([part.flatten() for part in parts]).double()

    exact = torch.stack([gradient(ids) for ids in responses]).numpy()
    made = np.stack([bias.sketch(model, prompt, ids, 0.7) for ids in responses])
    norms = np.linalg.norm(exact, axis=1)
    error = (made @ made.T - exact @ exact.T) / np.outer(norms, norms)
    assert np.abs(error).max() < 0.1


def test_a_run_gives_every_rule_with_intervals(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with random weights never answers right, so the verifier is replaced."""

    async def score(self: object, prompt: object, text: str) -> float:
        return float(len(text) % 2)

    monkeypatch.setattr(bias.VerifierEnvironment, "score", score)
    monkeypatch.setattr(bias, "SKETCH", 256)
    found = bias.bias(run, num_prompts=3, samples=6)
    assert found.keys() == RULES.keys()  # the run has no relative limit
    for rule in found.values():
        assert sum(part.value for part in rule.by_pass_rate) == pytest.approx(1)
    text = bias.show(found)
    assert len(text.splitlines()) == 1 + len(RULES) + 2 + 1 + NUM_DECILES + 2 + 1 + 4
    assert "nan" not in text


def test_a_run_with_a_relative_limit_also_gives_the_rules_with_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []

    async def score(self: object, prompt: object, text: str) -> float:
        scored.append(text)
        return float(len(scored) % 2)

    def generate(*_: object) -> list[bias.Generated]:
        return [([5] * length, False) for length in (2, 20, 4, 6)]

    config = run_config(run)
    config.darts.relative_limit = 2.0
    monkeypatch.setattr(bias, "run_config", lambda _: config)
    monkeypatch.setattr(settings, "check_data", lambda *_: None)
    monkeypatch.setattr(bias.VerifierEnvironment, "score", score)
    monkeypatch.setattr(bias, "generate", generate)
    monkeypatch.setattr(bias, "SKETCH", 256)
    found = bias.bias(run, num_prompts=2, samples=4)
    assert found.keys() == RULES.keys() | {"plain, limit", "survivor, limit"}
    # Four responses per prompt, the second of two that ends at 2 x 2 tokens and so is 5 long, and
    # the longest of four that ends at 2 x 4 tokens and so is 9 long.
    assert len(scored) == 2 * (4 + 2)


def test_the_limit_follows_the_median_of_the_budget() -> None:
    config = small_config()
    config.darts.relative_limit = 2.0

    def most(*lengths: int) -> int:
        return bias._most_tokens([([5] * n, n >= 100) for n in lengths], config)

    assert most(2, 20) == 5
    assert most(20, 2, 6, 4) == 9
    assert most(2, 100, 100, 100) == 101  # the median is not known: too few have ended


def test_a_response_that_ends_at_the_limit_pushes_toward_shorter_ones() -> None:
    """A softmax over two lengths, 20 and 60, which are right equally often.

    Without a limit, the gradient has nothing to do with the length. With one, a long response is
    wrong, and each 0.01 of reward costs tokens.
    """
    rng, groups, limited = np.random.default_rng(8), [], []
    for _ in range(200):
        long, right = rng.random(8) < 0.5, rng.random(8) < 0.5
        sketches = [np.array([0.5 if one else -0.5, 1.0 if good else -1.0])
                    for one, good in zip(long, right, strict=True)]  # fmt: skip
        groups.append(
            [
                Response(60 if one else 20, False, float(good), made)
                for one, good, made in zip(long, right, sketches, strict=True)
            ]
        )
        limited.append(
            [
                Response(41, False, 0.0, r.sketch_D) if r.tokens == 60 else r
                for r in groups[-1][:SIZE]
            ]
        )
    found = measure(groups, small_config(), num_resamples=50, limited={"plain": limited})
    assert found["plain"].length_per_point.value == pytest.approx(0.0, abs=0.05)
    assert found["plain, limit"].length_per_point.high < -0.05
    assert found["plain, limit"].cosine.high < 0.98
    assert sum(part.value for part in found["plain, limit"].by_length) == pytest.approx(1)


def test_fewer_samples_than_the_group_are_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="--samples=1: must be >= darts.group_size=2"):
        bias.bias(run, num_prompts=3, samples=1)
