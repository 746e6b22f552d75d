"""Tokens that prove their origin: a function of rollout, engine, position and policy version.

Owns the token ids, log-probabilities and rewards of the fake engines, and the check of a trained
row. Shared by the fake engine, which samples them, and by the recount, which has only the logs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

END = 2  # the end-of-sequence token
FIRST, NUM_IDS = 16, 300  # ids below FIRST are special
VOCAB_SIZE = FIRST + NUM_IDS


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
        if found == END and position == len(tokens) - 1:
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
        yield f"its reward {trajectory['reward']} is not that of its response"
