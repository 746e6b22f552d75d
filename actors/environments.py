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
from typing import Any, Protocol

from actors.prompts import tokenise
from actors.verifier_load import VerifierFailure, VerifierLoad
from actors.verifier_workers import WorkerPool, prompt_text
from actors.verifiers import INLINE, finite
from buffer.wire.messages import PromptPayload, VerifierReport
from configs.errors import one_line
from configs.schema import Config

NAMES = "auto, exact, numeric, math_verify, reasoning_gym, or module:function"


class EnvironmentFailure(Exception):
    """A response could not be scored. One line: verifier, prompt, cause, and how to fix it."""


class Environment(Protocol):
    """Turns prompts into tokens and responses into rewards."""

    keep_special_tokens: bool  # the response's text must show them

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        """The prompt's token ids, for a `transformers` tokenizer."""
        ...

    async def score(self, prompt: PromptPayload, response_text: str) -> float:
        """A finite reward. Raises `EnvironmentFailure`; safe to cancel."""
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
    return SingleTurn(config)


class SingleTurn:
    """One response to one prompt: it only scores."""

    def __init__(self, config: Config) -> None:
        self.data = config.data
        self.verifier = _verifier_name(config)
        self.keep_special_tokens = self.verifier == "tagged_sum"
        self._inline = VerifierLoad(num_workers=1)
        self._workers = None if self.verifier in INLINE else _start_workers(config, self.verifier)

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        """See `actors.prompts.tokenise`."""
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        return tokenise(messages, tokenizer, self.data)

    async def score(self, prompt: PromptPayload, response_text: str) -> float:
        try:
            if self._workers is not None:
                return await self._workers.score(prompt, response_text)
            return self._score_inline(prompt, response_text)
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
            r"[\w.]+:\w+", name
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
    return (
        form.partition(":")[0]
        if form.startswith(("tagged_sum", "reasoning_gym:"))
        else "numeric_or_exact"
    )
