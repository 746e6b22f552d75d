"""Environments, which turn prompts into tokens and score responses.

`actors.prompts` makes the tokens, `actors.verifiers` holds the scoring functions, and
`actors.verifier_workers` runs those that could hang in processes of their own: neither the engine
nor its event loop ever waits for one. A failure is an `EnvironmentFailure`, never a reward of zero.
Driven by the actors' worker. Never generates, and never learns why a rollout was launched.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from actors.prompts import observation_ids, tokenise
from actors.verifier_load import Step, VerifierFailure, VerifierLoad
from actors.verifier_workers import WorkerPool, prompt_text
from actors.verifiers import INLINE, finite
from buffer.data.public_environments import PREFIX, environment_of
from buffer.wire.messages import PromptPayload, VerifierReport
from configs.errors import one_line
from configs.schema import Config

NAMES = (
    "auto, exact, numeric, math_verify, reasoning_gym, verifiers:environment, module:function or "
    "module:Class"
)


class EnvironmentFailure(Exception):
    """A response could not be scored. One line: verifier, prompt, cause, and how to fix it."""


class Environment(Protocol):
    """Turns prompts into tokens and responses into rewards, and into observations between turns."""

    keep_special_tokens: bool  # the response's text must show them
    has_turns: bool  # else the first step ends the rollout

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        """The prompt's token ids, for a `transformers` tokenizer."""
        ...

    def render_observation(self, observation: str, last_token: int, tokenizer: Any) -> list[int]:
        """The tokens between a response that ended with `last_token` and the next one."""
        ...

    async def step(self, prompt: PromptPayload, response_text: str, state: str = "") -> Step:
        """Answer a response; `state` is that of the step before, "" at first.

        Raises `EnvironmentFailure`; safe to cancel.
        """
        ...

    async def finish(self, prompt: PromptPayload, state: str) -> float:
        """The last reward of a rollout that a limit has ended after a step that gave `state`.

        Raises `EnvironmentFailure`; safe to cancel.
        """
        ...

    def abandon(self, state: str) -> None:
        """Close the environment of a rollout that has ended after a step that gave `state`, neither
        by itself nor by `finish`. Does not wait.

        A step or a `finish` that fails or is cancelled has closed it.
        """
        ...

    async def score(self, prompt: PromptPayload, response_text: str) -> float:
        """The reward of the first step."""
        ...

    def measure(self) -> VerifierReport:
        """How busy the verifier is, and its work since the last call."""
        ...

    def close(self) -> None:
        """Ends the worker processes."""
        ...


def make_environment(config: Config) -> Environment:
    """The environment that `data.environment` names.

    ValueError when there is none, or its verifier cannot be imported.
    """
    return VerifierEnvironment(config)


class VerifierEnvironment:
    """A verifier, which ends a rollout with its first response, or a user's class with turns."""

    def __init__(self, config: Config) -> None:
        self.data = config.data
        self.verifier = _verifier_name(config)
        self.keep_special_tokens = self.verifier == "tagged_sum"
        self._inline = VerifierLoad(num_workers=1)
        self._workers = None if self.verifier in INLINE else _start_workers(config, self.verifier)
        self.has_turns = self._workers is not None and self._workers.has_turns

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        """See `actors.prompts.tokenise`."""
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        return tokenise(messages, tokenizer, self.data)

    def render_observation(self, observation: str, last_token: int, tokenizer: Any) -> list[int]:
        """See `actors.prompts.observation_ids`."""
        return observation_ids(observation, last_token, tokenizer, self.data)

    async def score(self, prompt: PromptPayload, response_text: str) -> float:
        return (await self.step(prompt, response_text)).reward

    async def step(self, prompt: PromptPayload, response_text: str, state: str = "") -> Step:
        with self._failures_on(prompt):
            if self._workers is not None:
                return await self._workers.step(prompt, response_text, state)
            return Step(self._score_inline(prompt, response_text))

    async def finish(self, prompt: PromptPayload, state: str) -> float:
        if self._workers is None or not self._workers.has_finish:
            self.abandon(state)
            return 0.0
        with self._failures_on(prompt):
            return (await self._workers.step(prompt, None, state)).reward

    def abandon(self, state: str) -> None:
        if self._workers is not None:
            self._workers.close_environment(state)

    @contextmanager
    def _failures_on(self, prompt: PromptPayload) -> Iterator[None]:
        try:
            yield
        except VerifierFailure as failure:
            raise EnvironmentFailure(
                f"verifier {self.verifier} on {prompt.name}: {failure}"
            ) from failure

    def _score_inline(self, prompt: PromptPayload, response_text: str) -> float:
        started_s, failure = time.monotonic(), None
        try:
            verify = INLINE[self.verifier]
            return finite(verify(prompt_text(prompt), response_text, prompt.answer, {}))
        except ValueError as error:
            failure = VerifierFailure(f"raised {one_line(error, with_type=True)}; fix the row")
            raise failure from error
        finally:
            self._inline.ended(0.0, time.monotonic() - started_s, failure)

    def measure(self) -> VerifierReport:
        return self._workers.measure() if self._workers else self._inline.take(0, 0)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


def _start_workers(config: Config, verifier: str) -> WorkerPool:
    try:
        return WorkerPool(verifier, config.data)
    except VerifierFailure as failure:
        raise ValueError(
            f"data.environment={verifier}: {failure}; it must be {NAMES}, importable from "
            f"{os.getcwd()}"
        ) from failure


def _verifier_name(config: Config) -> str:
    """`auto` follows the form of data.train; data.eval must then be of the same form."""
    if config.data.environment != "auto":
        name = config.data.environment
        if name not in (*INLINE, "math_verify", "reasoning_gym") and not re.fullmatch(
            r"verifiers:[\w./-]+|[\w.]+:\w+", name
        ):
            raise ValueError(f"data.environment={name!r} is no known verifier; it must be {NAMES}")
        return name
    train, held_out = (
        _verifier_of_source(form)
        for form in (config.data.train, config.data.eval or config.data.train)
    )
    if train != held_out:
        raise ValueError(
            f"data.environment=auto would score data.train={config.data.train} with {train} "
            f"but data.eval={config.data.eval} with {held_out}; name one verifier for both with "
            "data.environment"
        )
    return train


def _verifier_of_source(form: str) -> str:
    if form.startswith(PREFIX):
        return environment_of(form)
    return (
        form.partition(":")[0]
        if form.startswith(("tagged_sum", "reasoning_gym:"))
        else "numeric_or_exact"
    )
