"""Calls the verifier of a run on responses whose worth is known, before any engine is loaded.

For each row: the reference answer, in several usual forms until one is worth more than nonsense; an
empty response; and nonsense of the length of a real response. Owns no opinion about a reward's
size: it compares rewards of one row with one another. Driven by `tools.checking.data`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from actors.environments import Environment, EnvironmentFailure
from buffer.data.tagged_sum import EOS
from buffer.wire.messages import PromptPayload
from configs.schema import Config
from tools.checking.findings import Finding

BUDGET_S = 20.0  # no further row is begun after that
MAX_FAILURES = 3  # rows whose verification failed, after which no further row is begun
NONSENSE = "xqzv 4815162342 !? "
CHARS_PER_TOKEN = 4
MAX_CHARS = 20_000
# The usual forms of an answer, from the plainest on.
FORMS = ("{}", r"\boxed{{{}}}", "<answer>{}</answer>", "#### {}", "#{}", "The answer is {}.")


@dataclass
class RowRewards:
    """Rewards of one row. `reference` is the best of its forms; None if it has no answer."""

    prompt: PromptPayload
    reference: float | None = None
    form: str = ""
    empty: float = 0.0
    nonsense: float = 0.0
    failure: str = ""

    @property
    def suspect(self) -> bool:
        """Whether its reference answer is worth no more than a response without any worth."""
        return self.reference is not None and self.reference <= max(self.empty, self.nonsense)


@dataclass
class Scoring:
    """The rewards of several rows, and the load that they were for the verifier."""

    rows: list[RowRewards] = field(default_factory=list)
    mean_s: float = 0.0
    longest_s: float = 0.0
    num_workers: int = 1
    has_turns: bool = False


def score(config: Config, environment: Environment, prompts: Sequence[PromptPayload]) -> Scoring:
    """Score known responses to `prompts`, one prompt after the other, within a time budget."""
    return asyncio.run(_score(config, environment, prompts))


async def _score(
    config: Config, environment: Environment, prompts: Sequence[PromptPayload]
) -> Scoring:
    scoring, started_s = Scoring(has_turns=environment.has_turns), time.monotonic()
    for prompt in prompts:
        num_failed = sum(bool(row.failure) for row in scoring.rows)
        if num_failed == MAX_FAILURES or time.monotonic() - started_s > BUDGET_S:
            break
        scoring.rows.append(await _score_row(config, environment, prompt))
    load = environment.measure()
    scoring.mean_s = load.time_s / max(1, load.num_verified)
    scoring.longest_s, scoring.num_workers = load.longest_s, load.num_workers
    return scoring


async def _score_row(config: Config, environment: Environment, prompt: PromptPayload) -> RowRewards:
    row = RowRewards(prompt)
    num_chars = min(MAX_CHARS, CHARS_PER_TOKEN * config.sampling.max_tokens)
    nonsense = (NONSENSE * (num_chars // len(NONSENSE) + 1))[:num_chars].strip()
    end = EOS if environment.keep_special_tokens else ""
    response = ""
    try:
        row.empty = await _reward(config, environment, prompt, response)
        response = nonsense
        row.nonsense = await _reward(config, environment, prompt, response)
        for form in FORMS if prompt.answer else ():
            response = form.format(prompt.answer) + end
            reward = await _reward(config, environment, prompt, response)
            if row.reference is None or reward > row.reference:
                row.reference, row.form = reward, form
            if not row.suspect:
                break
    except EnvironmentFailure as failure:
        row.failure = f"on the response {_shown(response)}: {failure}"
    return row


async def _reward(
    config: Config, environment: Environment, prompt: PromptPayload, response: str
) -> float:
    """The rewards of a rollout that gives the same response in every turn."""
    rewards, state = 0.0, ""
    for _ in range(config.data.max_turns):
        step = await environment.step(prompt, response, state)
        rewards, state = rewards + step.reward, step.state
        if step.observation is None:
            return rewards
    return rewards + await environment.finish(prompt, state)


def _shown(response: str) -> str:
    return repr(response) if len(response) < 60 else f"{response[:40]!r}... ({len(response)} chars)"


def findings(config: Config, name: str, scoring: Scoring) -> Iterator[Finding]:
    """The verdicts on a verifier called `name`."""
    rows = [row for row in scoring.rows if not row.failure]
    if failed := [row for row in scoring.rows if row.failure]:
        yield _failure(config, failed, len(scoring.rows))
    if not rows:
        return
    rewards = (
        f"empty {_mean([r.empty for r in rows])}, nonsense {_mean([r.nonsense for r in rows])}"
    )
    with_answer = [row for row in rows if row.reference is not None]
    if with_answer:
        reference = _mean([row.reference or 0.0 for row in with_answer])
        rewards = f"the reference answer {reference}, {rewards}"
    yield Finding("ok", "rewards", f"{name} on {len(rows)} rows, means: {rewards}")
    if not with_answer:
        yield Finding("note", "reference", "no row has a reference answer, so none was scored")
    if suspects := [row for row in with_answer if row.suspect]:
        yield (_of_turns if scoring.has_turns else _suspicion)(suspects, len(with_answer))
    per_s = scoring.num_workers / max(1e-9, scoring.mean_s)
    yield Finding(
        "ok",
        "speed",
        f"{1000 * scoring.mean_s:.2g} ms per verification (longest {1000 * scoring.longest_s:.2g} "
        f"ms, limit {config.data.verifier_timeout_s:g} s); {scoring.num_workers} at a time per "
        f"engine, so at most about {per_s:.3g} per second",
    )


def _failure(config: Config, failed: Sequence[RowRewards], num_rows: int) -> Finding:
    skips = config.data.on_error == "skip" and len(failed) < num_rows
    return Finding(
        "note" if skips else "error",
        "verifier",
        f"gave no reward for {len(failed)} of {num_rows} rows; {failed[0].failure}",
    )


def _suspicion(suspects: Sequence[RowRewards], num_rows: int) -> Finding:
    row = suspects[0]
    best = max(row.empty, row.nonsense)
    return Finding(
        "warning",
        "rewards",
        f"THE REFERENCE ANSWER IS WORTH NO MORE THAN NONSENSE in {len(suspects)} of {num_rows} "
        f"rows: {row.reference:g} against {best:g} for {row.prompt.name} with the answer "
        f"{_shown(row.prompt.answer)}, in each of {len(FORMS)} usual forms; check the verifier, "
        "data.answer_field, and the form of answer that it expects",
    )


def _of_turns(suspects: Sequence[RowRewards], num_rows: int) -> Finding:
    return Finding(
        "note",
        "rewards",
        f"the reference answer as the response of every turn earns no more than nonsense in "
        f"{len(suspects)} of {num_rows} rows, which is as it should be if the environment expects "
        "something else",
    )


def _mean(rewards: Sequence[float]) -> str:
    return f"{fmean(rewards):.3g}"
