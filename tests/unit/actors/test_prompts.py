"""Turning prompts into tokens with real tokenizers: chat templates, special tokens and system
messages.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from actors.environments import make_environment
from actors.prompts import tokenise
from buffer.wire.messages import PromptPayload
from configs.schema import Config
from tests.families import byte_tokenizer

LOOP = "{% for message in messages %}"
TURN = "<|{{ message['role'] }}|>{{ message['content'] }}"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN_TEMPLATE = LOOP + TURN + "{% endfor %}" + ASK
BEGIN_TEMPLATE = "{{ bos_token }}" + PLAIN_TEMPLATE
THINKING_TEMPLATE = PLAIN_TEMPLATE + r"{{ '<think>\n' }}"
ENDING_TEMPLATE = LOOP + TURN + "{{ eos_token }}{% endfor %}"  # has no generation prompt
REFUSING_TEMPLATE = (  # like Gemma's
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + BEGIN_TEMPLATE
)
DROPPING_TEMPLATE = LOOP + "{% if message['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}"
RAISING_TEMPLATE = "{{ raise_exception('roles must alternate') }}"
USER = [{"role": "user", "content": "2+2?"}]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "2+2?"},
]
SYSTEM = {"role": "system", "content": "Think."}


def make_tokenizer(around: str = "$A", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that surrounds each text by `around`, such as "<bos> $A <eos>", by default."""
    tokenizer = byte_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=special
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Any], **data: Any) -> str:
    config = Config()
    for name, value in data.items():
        setattr(config.data, name, value)
    return tokenizer.decode(tokenise(messages, tokenizer, config.data))


@pytest.mark.parametrize(
    ("around", "messages", "expected"),
    [
        ("$A", USER, "2+2?"),
        ("$A <eos>", USER, "2+2?"),
        ("<bos> $A", USER, "<bos>2+2?"),
        ("<bos> $A <eos>", USER, "<bos>2+2?"),
        ("<bos> $A", [{"role": "user", "content": "<bos>2+2?"}], "<bos>2+2?"),
        ("<bos> $A", [{"role": "user", "content": ""}], "<bos>"),
        ("$A", CHAT, "hi\n\nyes?\n\n2+2?"),
    ],
)
def test_plain_text_gets_one_begin_token_and_no_end_token(
    around: str, messages: list[Any], expected: str
) -> None:
    assert rendered(make_tokenizer(around), messages) == expected


@pytest.mark.parametrize("around", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN_TEMPLATE, "<|user|>2+2?<|assistant|>"),
        (BEGIN_TEMPLATE, "<bos><|user|>2+2?<|assistant|>"),
        (THINKING_TEMPLATE, "<|user|>2+2?<|assistant|><think>\n"),
        (ENDING_TEMPLATE, "<|user|>2+2?"),
    ],
)
def test_a_template_overrides_the_special_tokens_of_the_tokenizer(
    around: str, template: str, expected: str
) -> None:
    assert rendered(make_tokenizer(around, template), USER) == expected


def test_earlier_turns_keep_their_end_tokens() -> None:
    text = rendered(make_tokenizer(chat_template=ENDING_TEMPLATE), CHAT)
    assert text == "<|user|>hi<eos><|assistant|>yes?<eos><|user|>2+2?"


def test_a_chat_template_can_be_disabled() -> None:
    tokenizer = make_tokenizer("<bos> $A", BEGIN_TEMPLATE)
    assert rendered(tokenizer, USER, chat_template="never") == "<bos>2+2?"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "Think.\n\n2+2?"),
        (PLAIN_TEMPLATE, "<|system|>Think.<|user|>2+2?<|assistant|>"),
        (REFUSING_TEMPLATE, "<bos><|user|>Think.\n\n2+2?<|assistant|>"),
        (DROPPING_TEMPLATE, "<|user|>Think.\n\n2+2?"),
    ],
)
def test_a_system_message_always_reaches_the_model(template: str | None, expected: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    assert rendered(tokenizer, USER, system_prompt="Think.") == expected
    assert rendered(tokenizer, [SYSTEM, *USER]) == expected


def test_an_error_in_a_template_reaches_the_caller() -> None:
    tokenizer = make_tokenizer(chat_template=RAISING_TEMPLATE)
    for messages in (USER, [SYSTEM, *USER], [SYSTEM]):
        with pytest.raises(Exception, match="roles must alternate"):
            rendered(tokenizer, messages)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        rendered(make_tokenizer("$A <eos>"), [{"role": "user", "content": ""}])


def test_a_token_that_is_both_begin_and_end_is_a_valid_prompt() -> None:
    tokenizer = make_tokenizer("<bos> $A")
    tokenizer.eos_token = "<bos>"
    assert rendered(tokenizer, [{"role": "user", "content": ""}]) == "<bos>"


def test_an_environment_renders_text_as_a_user_message() -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN_TEMPLATE)
    prompt = PromptPayload(prompt_id="p", text="2+2?", messages=[], answer="4", metadata="")
    ids = make_environment(Config()).render(prompt, tokenizer)
    assert tokenizer.decode(ids) == "<|user|>2+2?<|assistant|>"
