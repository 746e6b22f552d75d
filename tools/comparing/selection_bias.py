"""The policy gradient of whole groups beside that of the responses which a rule selects.

Owns the comparison. Gradients come as sketches, short random projections that keep inner products.
Pure. Driven by `tools.bias`; `tools.comparing.selection_rules` has the rules.

A gradient that is estimated from P prompts is the expected one plus noise, and the estimates of two
rules share most of this noise, because they are made of the same responses. Their cosine is
therefore no statement about their expectations. So inner products here are sums over pairs of
*different* prompts, whose noise is independent: they are those of the expected gradients on
average, whatever the number of responses. A rule without bias has a cosine of 1 within its
interval, and `plain` is such a rule.

With `darts.relative_limit`, rules also select from groups of which the long responses end at the
limit. The full group, beside which they are put, has no limit.

Shapes: D entries of a sketch, P prompts, B resamples of the prompts, the first of them plain.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from buffer.advantages import group_advantages, overlong_penalty
from configs.objectives import Objective, objective
from configs.schema import Config
from darts.sizing.rewards import has_signal
from tools.comparing.selection_rules import RULES, Group, Response, Rule

NUM_DECILES = 10
PASS_RATES = (0.25, 0.5, 0.75, 1.0)  # upper ends of the classes of difficulty
TINY = 1e-30
MAX_UNDEFINED = 0.05  # share of the resamples; more leave an estimate undetermined
POINT = 0.01  # of the mean reward


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, with the bounds that hold 95 % of the bootstrap's.

    All three are NaN if the prompts are too few to tell the gradient from its noise.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bias:
    """A rule beside the full group. `norm_ratio` compares gradients of the mean loss.

    `noise_prompts` is the number of prompts per step at which the squared noise of the gradient
    equals its squared norm: the smaller, the better. Source: the simple noise scale
    (arXiv 1812.06162). `length_per_point` is the change of the mean length, in tokens, for each
    0.01 of mean reward that a small step along the gradient gains.

    Weights are shares of the sum of |advantage| x tokens' weights in the loss.
    """

    cosine: Interval
    norm_ratio: Interval
    noise_prompts: Interval
    length_per_point: Interval
    by_length: list[Interval]  # deciles of the lengths of all responses, the shortest first
    by_pass_rate: list[Interval]  # `PASS_RATES`, of the whole group


@dataclass(slots=True)
class _Sums:
    """A rule's sums per prompt, before the division by a total over the prompts."""

    gradient_PD: np.ndarray
    in_loss_P: np.ndarray  # tokens or responses, by `loss.aggregation`
    by_length_P10: np.ndarray
    by_pass_rate_P4: np.ndarray


class _Products:
    """Inner products of expected gradients, from pairs of different prompts, for each resample."""

    def __init__(self, counts_BP: np.ndarray) -> None:
        self.counts_BP = counts_BP
        self.num_prompts = counts_BP.shape[1]

    def of(self, one_PD: np.ndarray, other_PD: np.ndarray) -> np.ndarray:
        """[B], of the mean gradients per prompt.

        A prompt that a resample draws twice makes no pair with itself, so that each resample
        estimates the same products as the sample.
        """
        gram_PP = one_PD @ other_PD.T
        np.fill_diagonal(gram_PP, 0.0)
        sums_B = np.einsum("bp,bp->b", self.counts_BP @ gram_PP, self.counts_BP)
        pairs_B = self.num_prompts**2 - (self.counts_BP**2).sum(1)
        return sums_B / np.maximum(1.0, pairs_B)

    def noise(self, one_PD: np.ndarray) -> np.ndarray:
        """[B], the trace of the covariance of a prompt's gradient."""
        squares_P = np.einsum("pd,pd->p", one_PD, one_PD)
        return self.counts_BP @ squares_P / self.num_prompts - self.of(one_PD, one_PD)


@dataclass(slots=True)
class _Whole:
    """The full groups: their sums, and the gradients of the mean reward and of the mean length."""

    sums: _Sums
    reward_PD: np.ndarray
    length_PD: np.ndarray


def measure(
    groups: Sequence[Group],
    config: Config,
    num_resamples: int = 1000,
    limited: Mapping[str, Sequence[Group]] | None = None,
) -> dict[str, Bias]:
    """Each rule's gradient compared with that of the full groups. Prompts are resampled.

    limited: for some of the rules, the groups with a relative limit, from which they also select.

    Raises `ValueError` if there is only one group, or if all groups are uniform, which leaves no
    gradient to compare.
    """
    if len(groups) < 2:
        raise ValueError("--prompts=1: must be >= 2; the noise of a single prompt is unknown")
    limited = limited or {}
    deciles = length_deciles(
        [r.tokens for group in groups for r in group],
        [r.tokens for with_limit in limited.values() for group in with_limit for r in group],
    )
    rates = [sum(r.reward > 0.5 for r in group) / len(group) for group in groups]
    rng = random.Random(config.run.seed)
    selected_from = {name: (rule, groups) for name, rule in RULES.items()}
    for name, with_limit in limited.items():
        selected_from[f"{name}, limit"] = RULES[name], with_limit
    sums = {
        name: _sums(rule, given, rates, config, deciles, rng)
        for name, (rule, given) in selected_from.items()
    }
    if not sums["full"].gradient_PD.any():
        raise ValueError(
            "the rewards of every group are equal, so no response has a gradient; take another "
            "checkpoint (--step), more prompts or more samples"
        )
    # How often each prompt is drawn: once for the estimate, then at random.
    drawn = np.random.default_rng(config.run.seed).multinomial(
        len(groups), np.full(len(groups), 1 / len(groups)), size=num_resamples
    )
    products = _Products(np.concatenate([np.ones((1, len(groups))), drawn]))
    whole = _Whole(
        sums["full"],
        _covariances(groups, [[r.reward for r in group] for group in groups]),
        _covariances(groups, [[r.tokens for r in group] for group in groups]),
    )
    return {name: _bias(one, whole, products) for name, one in sums.items()}


def length_deciles(lengths: Sequence[int], others: Sequence[int] = ()) -> dict[int, np.ndarray]:
    """By length, the share [10] of its responses in each decile of `lengths`, the shortest first.

    Responses of one length are in no order, so they are spread evenly over the deciles that they
    span. Each of `others` that is no such length is in the decile into which it would fall.
    """
    made, below, edges = dict[int, np.ndarray](), 0, np.arange(NUM_DECILES + 1) / NUM_DECILES
    for length, number in sorted(Counter(lengths).items()):
        ranks = np.clip(edges * len(lengths), below, below + number)
        made[length] = np.diff(ranks) / number
        below += number
    for length in set(others) - made.keys():
        rank = sum(one < length for one in lengths)
        made[length] = np.eye(NUM_DECILES)[min(NUM_DECILES - 1, NUM_DECILES * rank // len(lengths))]
    return made


def _sums(
    rule: Rule,
    groups: Sequence[Group],
    rates: Sequence[float],
    config: Config,
    deciles: dict[int, np.ndarray],
    rng: random.Random,
) -> _Sums:
    rules, num = objective(config.loss), len(groups)
    made = _Sums(
        gradient_PD=np.zeros((num, len(groups[0][0].sketch_D))),
        in_loss_P=np.zeros(num),
        by_length_P10=np.zeros((num, NUM_DECILES)),
        by_pass_rate_P4=np.zeros((num, len(PASS_RATES))),
    )
    for number, group in enumerate(groups):
        chosen = [group[i] for i in sorted(rule(group, config, rng))]
        if not chosen or _is_replaced(chosen, config):
            continue
        shaped = [
            r.reward + overlong_penalty(r.tokens, config.sampling.max_tokens, config.loss)
            for r in chosen
        ]
        for response, advantage in zip(chosen, group_advantages(shaped, rules), strict=True):
            if response.truncated and not config.loss.train_truncated:
                continue
            per_token = advantage * _token_weight(response, rules, config)
            weight = abs(per_token) * response.tokens
            made.gradient_PD[number] += per_token * response.sketch_D
            made.in_loss_P[number] += response.tokens if rules.aggregation == "token_mean" else 1.0
            made.by_length_P10[number] += weight * deciles[response.tokens]
            made.by_pass_rate_P4[number, int(np.searchsorted(PASS_RATES, rates[number]))] += weight
    return made


def _is_replaced(chosen: Group, config: Config) -> bool:
    """Whether a run would train another group in place of this one, which has no signal."""
    darts = config.darts
    return darts.uniform == "drop" and not has_signal([r.reward for r in chosen], darts.min_spread)


def _token_weight(response: Response, rules: Objective, config: Config) -> float:
    match rules.aggregation:
        case "token_mean":
            return 1.0
        case "sequence_mean":
            return 1.0 / response.tokens
        case _:
            return 1.0 / config.sampling.max_tokens


def _covariances(groups: Sequence[Group], values: Sequence[Sequence[float]]) -> np.ndarray:
    """[P, D]: per prompt, the gradient of the expectation of a value of its responses."""
    made = []
    for group, own in zip(groups, values, strict=True):
        centred = np.array(own, float) - np.mean(own)
        made.append(centred @ np.stack([r.sketch_D for r in group]) / max(1, len(group) - 1))
    return np.stack(made)


def _bias(rule: _Sums, whole: _Whole, products: _Products) -> Bias:
    mine_PD, full_PD, counts_BP = rule.gradient_PD, whole.sums.gradient_PD, products.counts_BP
    mine_B, full_B = products.of(mine_PD, mine_PD), products.of(full_PD, full_PD)
    in_loss_B, full_in_loss_B = (
        np.maximum(1.0, counts_BP @ one.in_loss_P) for one in (rule, whole.sums)
    )
    gained_B = products.of(mine_PD, whole.reward_PD)
    longer_B = products.of(mine_PD, whole.length_PD)
    return Bias(
        cosine=_interval(_ratio(products.of(mine_PD, full_PD), _root(mine_B) * _root(full_B))),
        norm_ratio=_interval(_ratio(_root(mine_B), _root(full_B)) * full_in_loss_B / in_loss_B),
        noise_prompts=_interval(_ratio(products.noise(mine_PD), mine_B)),
        length_per_point=_interval(POINT * _ratio(longer_B, gained_B)),
        by_length=_shares(counts_BP @ rule.by_length_P10),
        by_pass_rate=_shares(counts_BP @ rule.by_pass_rate_P4),
    )


def _root(values_B: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(0.0, values_B))


def _ratio(values_B: np.ndarray, divisors_B: np.ndarray) -> np.ndarray:
    """NaN where the divisor, which is positive in expectation, is lost in its noise."""
    return np.where(
        divisors_B > TINY, values_B / np.where(divisors_B > TINY, divisors_B, 1), np.nan
    )


def _shares(weights_BK: np.ndarray) -> list[Interval]:
    totals_B1 = np.maximum(TINY, weights_BK.sum(1, keepdims=True))
    return [_interval(column) for column in (weights_BK / totals_B1).T]


def _interval(values: np.ndarray) -> Interval:
    """Of an estimate, followed by the bootstrap's."""
    undefined = np.isnan(values)
    if undefined[0] or undefined[1:].mean() > MAX_UNDEFINED:
        return Interval(np.nan, np.nan, np.nan)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
