"""`tools.check` shows prompts as the model gets them, and refuses those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.environments import make_environment
from buffer.data.sources import make_sources
from configs import cli
from configs.schema import Config
from tests.families import byte_tokenizer
from tools.checking.gate import Refused, _compare
from tools.checking.prompts import PromptRefused, describe_prompts

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_config(folder: Path, rows: list[Any], template: str | None, *overrides: str) -> Config:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text("{}")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cli.load(
        [f"model.path={folder / 'model'}", f"data.train={data}", "eval.every=0", *overrides]
    )


def described(config: Config) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    stream = make_sources(config).train
    return list(describe_prompts(config, stream, make_environment(config), tokenizer))


def row(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "answer": "4"}


def test_prompts_are_shown_as_text_and_tokens_with_their_length(tmp_path: Path) -> None:
    config = make_config(tmp_path, [row("2+2?")], TEMPLATE, "sampling.max_tokens=100")
    lines = described(config)
    assert lines[0].endswith("with the tokenizer's chat template; '<eos>' ends a response")
    assert lines[1] == (
        "prompt 1: 26 of model.max_context=1024 tokens, and up to 100 for the response"
    )
    assert lines[2] == "  text    '<bos><|user|>2+2?<|assistant|>'"
    assert lines[3].startswith("  tokens  <bos> < | u s e r | > 2 + 2 ?")
    assert len(lines) == 4


def test_plain_text_is_reported_as_plain(tmp_path: Path) -> None:
    lines = described(make_config(tmp_path, [row("2+2?")], None))
    assert "as plain text" in lines[0]
    assert lines[2] == "  text    '2+2?'"


def test_at_most_three_prompts_and_eighty_tokens_are_shown(tmp_path: Path) -> None:
    rows = [row(f"{number}" + "x" * 99) for number in range(5)]
    lines = described(make_config(tmp_path, rows, None))
    assert sum(line.startswith("prompt ") for line in lines) == 3
    assert lines[3].endswith("... and 20 more")


def test_a_template_that_does_not_open_the_answer_is_reported(tmp_path: Path) -> None:
    template = TEMPLATE.replace("<|assistant|>", "")
    lines = described(make_config(tmp_path, [row("2+2?")], template))
    assert lines[-1].startswith("warning: the chat template does not open the assistant's turn")


def test_a_template_that_refuses_a_prompt_is_named_with_its_row(tmp_path: Path) -> None:
    config = make_config(tmp_path, [row("2+2?")], "{{ raise_exception('no such role') }}")
    with pytest.raises(PromptRefused, match=r", row 1\): no such role") as refused:
        described(config)
    assert "\n" not in str(refused.value)


def test_a_refusal_names_model_check_numbers_and_remedy() -> None:
    ones, halves = b"\0\0\x80\x3f" * 3, b"\0\0\0\x3f" * 3
    assert _compare(Config(), "llama", "loading", ones, ones, "advice").difference == 0
    with pytest.raises(Refused) as refused:
        _compare(Config(), "llama", "loading", ones, halves, "take another model")
    assert str(refused.value) == (
        "llama models are refused: loading: 5.0e-01 nats per token (allowed: 0.0001; largest: "
        "5.0e-01) with model.dtype=float32; take another model"
    )
