"""Tokens that prove their origin: a function of rollout, engine, position and policy version.

Owns the token ids, log-probabilities and rewards of the fake engines, and the check of a trained
row. Shared by the fake engine, which samples them, and by the recount, which has only the logs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

END = 2  # the end-of-sequence token
FIRST, NUM_IDS = 16, 300  # ids below FIRST are special
VOCAB_SIZE = FIRST + NUM_IDS
TOOL_S, MOST_TURNS = 0.05, 3


@dataclass(frozen=True)
class Life:
    """A rollout on one engine. If it is lost there, it continues as another life."""

    rollout_id: int
    engine_id: str


def token(life: Life, position: int, version: int) -> int:
    """The token that an engine samples at a position of the row, prompt included."""
    place = f"{life.rollout_id} {life.engine_id} {position} {version}"
    return FIRST + zlib.crc32(place.encode()) % NUM_IDS


def logprob(token_id: int) -> float:
    return -token_id / 128  # exact in float32


def text(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


def score(_prompt: str, response: str, _answer: str, _metadata: dict[str, Any]) -> float:
    """The verifier `data.environment=tools.faults.sampled:score`: 1 for half of the responses."""
    return float(zlib.crc32(response.encode()) & 1)


def given(words: str) -> list[int]:
    """The tokens of a prompt or an observation."""
    return [FIRST + byte for byte in words.encode()]


class Conversation:
    """The environment `data.environment=tools.faults.sampled:Conversation`.

    Each response decides whether another turn follows. The reward is that of `score` for all of
    them together.
    """

    def __init__(self) -> None:
        self.responses: list[str] = []

    def step(self, response: str) -> str | float:
        time.sleep(TOOL_S)
        self.responses.append(response)
        whole = " ".join(self.responses)
        if len(self.responses) < MOST_TURNS and zlib.crc32(whole.encode()) & 2:
            return f"turn {len(self.responses)} had {len(response)} characters"
        return score("", whole, "", {})


def faults_of(trajectory: dict[str, Any], lives: Sequence[Life]) -> Iterator[str]:
    """Every part of a trained row that its engines did not sample.

    `lives` are those of the rollout, oldest first. Once a rollout continues as the next life, the
    former one samples no more.
    """
    tokens, sampled = trajectory["tokens"], trajectory["sampled"]
    places = [position for position, is_sampled in enumerate(sampled) if is_sampled]
    versions = [version for version, count in trajectory["versions"] for _ in range(count)]
    if len(versions) != len(places):
        yield f"{len(places)} tokens were sampled, and {len(versions)} have a version"
        return
    life = 0
    for position, version in zip(places, versions, strict=True):
        found = tokens[position]
        if found == END and not any(sampled[position + 1 : position + 2]):
            continue
        while life < len(lives) and token(lives[life], position, version) != found:
            life += 1
        if life == len(lives):
            yield f"no engine of {lives} sampled token {position} at version {version}"
            return
    response = [tokens[position] for position in places]
    if [trajectory["logprobs"][position] for position in places] != [*map(logprob, response)]:
        yield "its log-probabilities are not those of its tokens"
    if trajectory["reward"] != score("", text(response), "", {}):
        yield f"its reward {trajectory['reward']} is not that of its responses"
    yield from _faults_of_turns(tokens, sampled)


def _faults_of_turns(tokens: Sequence[int], sampled: Sequence[int]) -> Iterator[str]:
    """Play the responses again: each observation's tokens follow its response, and no others."""
    is_new = [s and not before for s, before in zip(sampled, [0, *sampled], strict=False)]
    starts = [position for position, new in enumerate(is_new) if new]
    conversation = Conversation()
    for start, following in pairwise([*starts, len(tokens)]):
        end = next((i for i in range(start, following) if not sampled[i]), following)
        answer = conversation.step(text(tokens[start:end])) if len(starts) > 1 else 0.0
        expected = given(answer) if isinstance(answer, str) and following < len(tokens) else []
        if list(tokens[end:following]) != expected:
            yield f"tokens {end}..{following - 1} are not those of the observation {answer!r}"
