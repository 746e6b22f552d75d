"""Responses of simulated policies: their lengths, and which of them are right.

A prompt's lengths are lognormal, and the length of a response predicts whether it is right. Under
pattern I (ineffective verbosity) right responses are shorter, and under pattern II (necessary
depth) they are longer. The j-th response of a prompt's n-th visit is drawn from (seed, prompt, n,
j) alone, so every policy gets the same work. `Shaping` is an assumption about learning, which is
off by default. Draws only, and decides nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts.events import Prompt
from darts.simulate.schema import LengthKeys, PatternKeys, ShapingKeys
from darts.sizing import lengths
from darts.sizing.rewards import RewardStats

MAX_DRAWS = 8192


@dataclass(frozen=True, slots=True)
class SimPrompt:
    """A prompt, with the distribution of its responses.

    `mean_log` and `spread` are moments of log length. `log_odds` are those of a right response of
    median length, and `slope` is their change per standard deviation of log length.
    """

    prompt_id: str
    mean_log: float
    spread: float
    log_odds: float
    slope: float

    @property
    def verbose(self) -> bool:
        """Pattern I."""
        return self.slope < 0


@dataclass(frozen=True, slots=True)
class Draw:
    """One response: its length, whether `sampling.max_tokens` cut it there, and its reward."""

    length: int
    truncated: bool
    reward: float


def make_prompts(keys: LengthKeys, pattern: PatternKeys, seed: int) -> list[SimPrompt]:
    if keys.recorded:
        return recorded_prompts(Path(keys.recorded), pattern)
    rng = random.Random(f"prompts {seed}")
    base_odds = math.log(pattern.pass_rate / (1.0 - pattern.pass_rate))
    prompts: list[SimPrompt] = []
    for index in range(keys.num_prompts):
        mean_log = math.log(keys.median) + keys.between * rng.gauss(0, 1)
        spread = keys.spread * math.exp(keys.spread_between * rng.gauss(0, 1))
        slope = -pattern.strength if rng.random() < pattern.verbosity else pattern.strength
        prompts.append(
            SimPrompt(f"p{index:05d}", mean_log, spread, base_odds + rng.gauss(0, 1), slope)
        )
    return prompts


def recorded_prompts(path: Path, pattern: PatternKeys) -> list[SimPrompt]:
    """The prompts of a run's ledger, with the pass rates and patterns seen in it.

    Lognormals are fitted to all its groups, with cancelled rollouts as lower bounds. Raises
    `ValueError` if the ledger cannot be read.
    """
    seen: dict[str, list[dict[str, Any]]] = {}
    try:
        older = sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))  # segments of a long run
        for segment in [*older, path]:
            for line in segment.read_text().splitlines():
                row = json.loads(line)
                seen.setdefault(row["prompt_id"], []).extend(row["rollouts"])
        fits = {prompt_id: _fit(rollouts) for prompt_id, rollouts in seen.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"lengths.recorded={path}: not a readable groups.jsonl ({error}); give the path of a "
            "run's ledger"
        ) from None
    known = [stats for stats in fits.values() if stats is not None]
    if not known:
        raise ValueError(
            f"lengths.recorded={path}: no response finished in it, so no lengths can be fitted to "
            "it"
        )
    pool = lengths.POOL_PRIOR
    for stats in known:
        pool = lengths.update_pool(pool, stats)
    return [
        _recorded_prompt(
            prompt_id, lengths.estimate(fits[prompt_id], pool), seen[prompt_id], pattern
        )
        for prompt_id in sorted(seen)
    ]


def _fit(rollouts: Sequence[dict[str, Any]]) -> lengths.LengthStats | None:
    ended = [
        r
        for r in rollouts
        if r["reward"] is not None and not r["truncated"] and not r.get("curtailed")
    ]
    finished = [r["tokens"] for r in ended]
    bounds = [r["tokens"] for r in rollouts if r not in ended and r["tokens"] > 0]
    return lengths.update(None, finished, bounds, lengths.POOL_PRIOR) if finished else None


def _recorded_prompt(
    prompt_id: str,
    stats: lengths.LengthStats,
    rollouts: Sequence[dict[str, Any]],
    pattern: PatternKeys,
) -> SimPrompt:
    scored = [r for r in rollouts if r["reward"] is not None]
    right = [r["tokens"] for r in scored if r["reward"] > 0.5]
    wrong = [r["tokens"] for r in scored if r["reward"] <= 0.5]
    odds = math.log((len(right) + 0.5) / (len(wrong) + 0.5))
    verbose = not right or not wrong or sum(right) / len(right) <= sum(wrong) / len(wrong)
    return SimPrompt(
        prompt_id,
        stats.mean_log,
        lengths.spread(stats),
        odds,
        -pattern.strength if verbose else pattern.strength,
    )


class Shaping:
    """ASSUMPTION: the policy moves toward the responses on which it trains.

    In each step, and on prompts of pattern I only,

        shift  += rate * mean(log trained - log drawn)
        factor *= 1 - rate * (1 - spread trained / spread drawn)

    with logs in units of each prompt's spread, and spreads as roots of mean variances over the
    step. Both stay within `floor` and 1/floor of their initial values. On pattern II the short
    responses are wrong, so nothing pulls toward them. If selection is random or absent, both stay
    as they are except for noise.
    """

    def __init__(self, keys: ShapingKeys) -> None:
        self._rate, self._floor = keys.rate, keys.floor
        self.shift, self.factor = 0.0, 1.0

    def learn(self, steps: Sequence[tuple[SimPrompt, Sequence[int], Sequence[int]]]) -> None:
        """One learner step. Per group: the prompt, all lengths drawn for it, the trained ones."""
        if not self._rate:
            return
        gaps: list[float] = []
        var_drawn, var_trained = 0.0, 0.0
        for prompt, drawn, trained in steps:
            if not prompt.verbose:
                continue
            (mean, var), (trained_mean, trained_var) = _log_moments(drawn), _log_moments(trained)
            gaps.append((trained_mean - mean) / prompt.spread)
            var_drawn, var_trained = var_drawn + var, var_trained + trained_var
        if var_drawn > 0:
            self.shift += self._rate * math.fsum(gaps) / len(gaps)
            self.factor *= 1.0 - self._rate * (1.0 - math.sqrt(var_trained / var_drawn))

    def moments(self, prompt: SimPrompt) -> tuple[float, float]:
        """Mean and spread of the prompt's log length under the present policy."""
        if not prompt.verbose:
            return prompt.mean_log, prompt.spread
        most = -math.log(self._floor)
        shift = min(most, max(-most, self.shift * prompt.spread))
        return prompt.mean_log + shift, prompt.spread * min(
            1.0 / self._floor, max(self._floor, self.factor)
        )


class Responses:
    """Draws of one visit of a prompt, one after the other."""

    def __init__(
        self,
        prompt: SimPrompt,
        moments: tuple[float, float],
        max_tokens: int,
        seed: int,
        visit: int,
    ) -> None:
        self.prompt = prompt
        self.draws: list[Draw] = []
        self._moments, self._max_tokens = moments, max_tokens
        self._rng = random.Random(f"{seed} {prompt.prompt_id} {visit}")

    def next(self) -> Draw:
        """The next response. It is wrong if it is truncated at the limit."""
        assert len(self.draws) < MAX_DRAWS, (self.prompt.prompt_id, len(self.draws))
        z, luck = self._rng.gauss(0, 1), self._rng.random()
        mean_log, spread = self._moments
        length = max(1, round(math.exp(min(mean_log + spread * z, 20.0))))
        right = luck < 1.0 / (1.0 + math.exp(-(self.prompt.log_odds + self.prompt.slope * z)))
        truncated = length >= self._max_tokens
        draw = Draw(min(length, self._max_tokens), truncated, float(right and not truncated))
        self.draws.append(draw)
        return draw


class SimPromptStream:
    """Prompts in shuffled passes, with their length statistics and their responses."""

    def __init__(self, prompts: Sequence[SimPrompt], max_tokens: int, seed: int) -> None:
        self._by_id = {prompt.prompt_id: prompt for prompt in prompts}
        self._max_tokens, self._seed = max_tokens, seed
        self._rng = random.Random(f"order {seed}")
        self._pass: list[str] = []
        self._num_drawn = 0
        self._visits: Counter[str] = Counter()
        self._remembered: dict[str, lengths.LengthStats] = {}
        self.rewards: dict[str, RewardStats] = {}  # the newest statistics, by prompt

    def draw(self, num: int) -> tuple[Prompt, ...]:
        """The next `num` prompts."""
        drawn: list[Prompt] = []
        while len(drawn) < num:
            if not self._pass:
                self._pass = list(self._by_id)
                self._rng.shuffle(self._pass)
            prompt_id = self._pass.pop()
            self._num_drawn += 1
            drawn.append(
                Prompt(
                    prompt_id,
                    self._remembered.get(prompt_id),
                    self._num_drawn,
                    self.rewards.get(prompt_id),
                )
            )
        return tuple(drawn)

    def remember(self, prompt_id: str, stats: lengths.LengthStats) -> None:
        self._remembered[prompt_id] = stats

    def visit(self, prompt_id: str, shaping: Shaping) -> Responses:
        """The responses of a group that is about to open."""
        prompt, visit = self._by_id[prompt_id], self._visits[prompt_id]
        self._visits[prompt_id] += 1
        return Responses(prompt, shaping.moments(prompt), self._max_tokens, self._seed, visit)


def _log_moments(values: Sequence[int]) -> tuple[float, float]:
    """Mean and variance of log length."""
    logs = [math.log(value) for value in values]
    mean = math.fsum(logs) / len(logs)
    return mean, math.fsum((x - mean) ** 2 for x in logs) / max(1, len(logs) - 1)
