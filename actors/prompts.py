"""Turns a prompt into tokens, which are exactly those of the engine and the learner.

Owns chat templates, system messages and the special tokens around a prompt. Never scores and never
generates. Called by `actors.environments`, and by `tools.check` to show prompts.
"""

from __future__ import annotations

from typing import Any

from buffer.wire.messages import PromptPayload
from configs.schema import Config, DataConfig

LEAST_ROOM = 16  # least tokens left for a response, unless sampling.max_tokens is smaller
Message = dict[str, str]
_MARK = "a response 7c1e"  # whose surroundings in the template are looked up


def tokenise(messages: list[Message], tokenizer: Any, data: DataConfig) -> list[int]:
    """The token ids of `messages` for a `transformers` tokenizer.

    The prompt begins with at most one begin token, and never ends with an end-of-sequence token,
    which the model would take for the end of the conversation. Raises `ValueError` if no token is
    left, and any error of the template or the tokenizer.
    """
    if data.system_prompt:
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    if uses_template(tokenizer, data):
        # The template writes the special tokens itself; encoding must not add them again.
        text = _with_template(messages, tokenizer)
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    else:
        ids = list(tokenizer.encode("\n\n".join(message["content"] for message in messages)))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    while len(ids) > 1 and ids[0] == ids[1] == begin:
        del ids[0]
    while ids and ids[-1] == end and ids != [begin]:  # one token may be both
        del ids[-1]
    if not ids:
        raise ValueError("it has no tokens, but a response needs at least one before it")
    return ids


def observation_ids(
    observation: str, last_token: int, tokenizer: Any, data: DataConfig
) -> list[int]:
    """The tokens between a response that ended with `last_token` and the next response.

    Only this new text is turned into tokens, never that of the turns before it. With a chat
    template it is a user's message, and what the template writes around it.

    Raises `ValueError` if the template writes earlier messages differently before later ones.
    """
    if not uses_template(tokenizer, data):
        return list(tokenizer.encode(observation, add_special_tokens=False))
    asked = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    told = [*asked, {"role": "user", "content": observation}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=False, tokenize=False)
    after, (_, found, end) = _apply(tokenizer, told), before.rpartition(_MARK)
    if not found or not after.startswith(before):
        raise ValueError(
            "the chat template writes earlier messages differently once others follow, so a second "
            "turn cannot continue the sampled tokens; set data.chat_template=never, or use another "
            "model"
        )
    new = end + after[len(before) :]
    ends = (tokenizer.decode([last_token]), tokenizer.eos_token)
    sampled = next((text for text in ends if text and new.startswith(text)), "")
    return list(tokenizer.encode(new[len(sampled) :], add_special_tokens=False))


class PromptTooLong(ValueError):
    """A prompt leaves too few tokens of the context for a response. The message is one line."""


def response_limit(prompt: PromptPayload, num_tokens: int, config: Config) -> int:
    """The largest number of tokens that a response to a prompt of `num_tokens` tokens may have.

    Raises `PromptTooLong` if that is too small.
    """
    max_context, max_tokens = config.model.max_context, config.sampling.max_tokens
    room, needed = max_context - num_tokens, min(LEAST_ROOM, max_tokens)
    if room < needed:
        raise PromptTooLong(
            f"{prompt.name} has {num_tokens} tokens and leaves {room} for a response in "
            f"model.max_context={max_context}, but {needed} are needed: raise model.max_context, "
            "or drop the prompt"
        )
    return min(room, max_tokens)


def uses_template(tokenizer: Any, data: DataConfig) -> bool:
    """Whether prompts are formatted by the tokenizer's own chat template."""
    return data.chat_template == "auto" and bool(getattr(tokenizer, "chat_template", None))


def _with_template(messages: list[Message], tokenizer: Any) -> str:
    """The text of the template, which contains the system message in any case.

    Some templates refuse a system message, and some drop it silently. It then becomes a part of the
    user's turn.
    """
    if messages[0]["role"] != "system":
        return _apply(tokenizer, messages)
    system, others = messages[0], messages[1:]
    if not others or others[0]["role"] != "user":
        return _apply(tokenizer, messages)
    try:
        text = _apply(tokenizer, messages)
    except Exception:  # a template may raise anything
        text = ""
    if text and text != _apply(tokenizer, others):
        return text
    first = others[0] | {"content": f"{system['content']}\n\n{others[0]['content']}"}
    return _apply(tokenizer, [first, *others[1:]])


def _apply(tokenizer: Any, messages: list[Message]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
