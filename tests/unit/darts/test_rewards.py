"""Pass rates from groups of which some responses were cut off, and the chance of a signal."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from configs import cli
from darts import events as ev
from darts.simulate.lengths import Responses, make_prompts
from darts.simulate.schema import SimulateConfig
from darts.simulate.world import Simulation
from darts.sizing.rewards import (
    POOL_PRIOR,
    Response,
    RewardPool,
    RewardStats,
    has_signal,
    mixed_probability,
    pass_rate,
    prior,
    update,
    update_pool,
)


def test_without_cuts_the_pass_rate_is_the_share_of_right_responses() -> None:
    responses = [Response(10, 1.0), Response(20, 0.0), Response(5, 0.4), Response(7, 0.6)]
    assert pass_rate(responses) == (pytest.approx(0.5), pytest.approx(4.0))
    assert pass_rate([]) == (0.0, 0.0)


def test_a_response_that_was_cut_off_counts_like_those_that_are_longer() -> None:
    """The short one is right. The long one is wrong, and so are probably those cut off before."""
    responses = [Response(10, 1.0), Response(20, None), Response(20, None), Response(90, 0.0)]
    assert pass_rate(responses) == (pytest.approx(0.25), pytest.approx(2.0))


@pytest.mark.parametrize("num", range(1, 40))
def test_no_count_is_negative_if_all_are_right(num: int) -> None:
    stats = update(None, [Response(tokens, 1.0) for tokens in range(num)], 0)
    assert stats.num_right == pytest.approx(num)
    assert stats.num_wrong >= 0


def test_a_response_longer_than_all_others_is_unknown() -> None:
    responses = [Response(10, 1.0), Response(12, 0.0), Response(20, None), Response(20, None)]
    assert pass_rate(responses) == (pytest.approx(0.5), pytest.approx(1.0))
    assert pass_rate([Response(20, None)]) == (0.0, 0.0)


def test_history_fades_and_keeps_the_number_of_stops() -> None:
    first = update(None, [Response(5, 1.0), Response(6, 0.0)], num_stops=0)
    second = update(first, [Response(5, 1.0)], num_stops=2, forgetting=0.5)
    assert second == RewardStats(pytest.approx(1.5), pytest.approx(0.5), 2)


def test_the_pool_learns_how_much_prompts_differ() -> None:
    """Responses to a prompt that all agree make the prior sharp; a coin makes it flat."""
    rng, alike, coin = random.Random(0), POOL_PRIOR, POOL_PRIOR
    for _ in range(300):
        reward = float(rng.random() < 0.5)
        alike = update_pool(alike, [Response(5, reward)] * 4)
        coin = update_pool(coin, [Response(5, float(rng.random() < 0.5)) for _ in range(4)])
    assert alike.pass_rate == pytest.approx(0.5, abs=0.1) and alike.disagreement < 0.01
    assert coin.disagreement == pytest.approx(0.5, abs=0.05)
    pilot = {"num_right": 4, "num_wrong": 0, "num_more": 4}
    assert mixed_probability(prior(None, alike), **pilot) < 0.1
    assert mixed_probability(prior(None, coin), **pilot) > 0.7
    assert update_pool(coin, [Response(5, 1.0)]) == coin  # one response cannot disagree


def test_the_probability_of_a_mixed_group_equals_a_simulation_of_it() -> None:
    rng, beta = random.Random(1), (0.7, 0.4)
    posterior, outcomes = (beta[0] + 3, beta[1]), []
    for _ in range(20_000):
        rate = rng.betavariate(*posterior)
        outcomes.append(any(rng.random() >= rate for _ in range(5)))
    assert mixed_probability(beta, 3, 0, 5) == pytest.approx(fmean(outcomes), abs=0.01)
    assert mixed_probability(beta, 1, 1, 0) == 1.0
    assert mixed_probability(beta, 3, 0, 0) == 0.0
    assert mixed_probability((1.0, 1.0), 0, 0, 2) == pytest.approx(1 / 3)


def test_history_outweighs_the_pool() -> None:
    pool = RewardPool(256.0, 0.9, 0.05)
    a, b = prior(RewardStats(0.0, 30.0), pool)
    assert a / (a + b) < 0.05
    assert prior(None, pool)[0] / sum(prior(None, pool)) == pytest.approx(0.9)


def test_a_signal_is_a_spread_of_rewards() -> None:
    assert has_signal([0.0, 1.0], 0.0) and not has_signal([1.0, 1.0], 0.0)
    assert not has_signal([0.5, 0.6], 0.2) and not has_signal([], 0.0)


def test_the_estimated_pass_rate_does_not_lean_toward_short_responses() -> None:
    """In simulated runs that cancel long responses, it is near the truth for both patterns, while
    the share of right ones among the finished is far off: too high where short ones are right.
    """
    config = cli.load(
        ["run.steps=40", "batch.groups=8", "lengths.num_prompts=40", "darts.pilot=4",
         "redundancy.rule=fixed", "pattern.strength=2", "sampling.max_tokens=2000"],
        SimulateConfig,
    )  # fmt: skip
    finished: dict[str, list[float]] = {}
    learned: dict[str, RewardStats] = {}

    def observe(_: ev.Event, decisions: list[ev.Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, (ev.Close, ev.Drop)):
                record = decision.record
                scored = [r.reward for r in record.rollouts if r.reward is not None]
                finished.setdefault(record.prompt_id, []).extend(scored)
            elif isinstance(decision, ev.RememberRewards):
                learned[decision.prompt_id] = decision.rewards

    Simulation(config, observer=observe).run()
    errors: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for prompt in make_prompts(config.lengths, config.pattern, config.run.seed):
        draws = Responses(prompt, (prompt.mean_log, prompt.spread), 2000, 99, 0)
        truth = fmean(draws.next().reward for _ in range(2000))
        stats = learned[prompt.prompt_id]
        estimate = stats.num_right / (stats.num_right + stats.num_wrong)
        errors[prompt.verbose].append((estimate - truth, fmean(finished[prompt.prompt_id]) - truth))
    for verbose, sign in ((True, 1), (False, -1)):
        estimated, naive = (fmean(pair) for pair in zip(*errors[verbose], strict=True))
        assert abs(estimated) < 0.05 and sign * naive > 0.08
