"""Describes a few prompts of a run, as text and as the tokens that engine and learner receive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actors.environments import Environment
from actors.prompts import uses_template
from buffer.data.sources import PromptStream
from configs.errors import one_line
from configs.schema import Config

NUM_PROMPTS = 3
SHOWN_TOKENS = 80


class PromptRefused(Exception):
    """No run could train on this prompt. One line that gives the reason."""


def describe_prompts(
    config: Config, stream: PromptStream, environment: Environment, tokenizer: Any
) -> Iterator[str]:
    """Lines that show the first prompts of the run. Raises `PromptRefused`."""
    if uses_template(tokenizer, config.data):
        form = "with the tokenizer's chat template"
    else:
        form = "as plain text"
    yield f"{config.data.train}, {form}; {tokenizer.eos_token!r} ends a response"
    for number, prompt in enumerate(stream.draw(min(NUM_PROMPTS, stream.source.size)), start=1):
        try:
            ids = environment.render(prompt, tokenizer)
        except Exception as error:  # a template or tokenizer may raise anything
            raise PromptRefused(f"{prompt.name}: {one_line(error)}") from error
        yield from _describe(number, ids, tokenizer, config)
    if uses_template(tokenizer, config.data) and not _asks_for_an_answer(tokenizer):
        yield (
            "warning: the chat template does not open the assistant's turn, so the model may "
            "continue the user's turn"
        )


def _describe(number: int, ids: list[int], tokenizer: Any, config: Config) -> Iterator[str]:
    room = min(config.model.max_context - len(ids), config.sampling.max_tokens)
    yield (
        f"prompt {number}: {len(ids)} of model.max_context={config.model.max_context} tokens, and "
        f"up to {room} for the response"
    )
    yield f"  text    {tokenizer.decode(ids)!r}"
    shown = " ".join(repr(tokenizer.decode([token]))[1:-1] for token in ids[:SHOWN_TOKENS])
    more = f" ... and {len(ids) - SHOWN_TOKENS} more" if len(ids) > SHOWN_TOKENS else ""
    yield f"  tokens  {shown}{more}"


def _asks_for_an_answer(tokenizer: Any) -> bool:
    """Whether the template opens the assistant's turn at the start of the response."""
    messages = [{"role": "user", "content": "?"}]
    with_prompt, without = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=asked, tokenize=False)
        for asked in (True, False)
    )
    return with_prompt != without
