"""`tools.evaluate` with a fake engine: results, and prompts without a result."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.environments import EnvironmentFailure
from actors.inference.generation import Generation
from buffer.wire.messages import PromptPayload
from configs.schema import Config
from tools.evaluate import _answer


class FakeEngine:
    """Every response has two tokens."""

    class tokenizer:
        @staticmethod
        def decode(tokens: Any, skip_special_tokens: bool) -> str:
            return "yes"

    def launch(self, request_id: str, ids: list[int], max_tokens: int, *, seed: int) -> Generation:
        generation = Generation(request_id)
        generation.extend(0, [1, 2], [-0.1, -0.2])
        generation.end("stop")
        return generation


class FakeEnvironment:
    """The prompt's text determines its score, or its number of tokens."""

    keep_special_tokens = False

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        return [1] * (100 if prompt.text == "long" else 5)

    async def score(self, prompt: PromptPayload, text: str) -> float:
        if prompt.text == "fails":
            raise EnvironmentFailure(f"verifier x on {prompt.name}: raised KeyError")
        return float(prompt.text)


def evaluated(*texts: str, on_error: str = "stop") -> dict[str, Any]:
    config = Config()
    config.model.max_context, config.sampling.max_tokens = 64, 32
    config.data.on_error, config.eval.samples_per_prompt = on_error, 1
    prompts = [
        PromptPayload(
            prompt_id=str(i), text=text, messages=[], answer="", metadata="", source=f"row {i}"
        )
        for i, text in enumerate(texts)
    ]
    return asyncio.run(_answer(config, FakeEngine(), FakeEnvironment(), prompts, step=3))  # type: ignore[arg-type]


def test_rewards_of_0_and_1_are_an_accuracy() -> None:
    row = evaluated("0", "1", "1", "1")
    assert (row["reward_mean"], row["accuracy"], row["responses"]) == (0.75, 0.75, 4)
    assert (row["length_mean"], row["length_p99"]) == (2.0, 2.0)
    assert "accuracy" not in evaluated("0.5", "1")


def test_a_prompt_that_is_too_long_is_omitted_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = evaluated("1", "long", "0")
    assert (row["reward_mean"], row["responses"]) == (0.5, 2)
    assert "1 of 3 prompts were skipped: 1 like this: prompt 1 (row 1) has 100 tokens" in (
        capsys.readouterr().out
    )


def test_a_failing_verifier_ends_the_evaluation_or_is_counted() -> None:
    with pytest.raises(
        ValueError, match=r"prompt 1 \(row 1\): raised KeyError \(data.on_error=skip"
    ):
        evaluated("1", "fails")
    assert evaluated("1", "fails", on_error="skip")["responses"] == 1
    with pytest.raises(ValueError, match=r"2 of 2 prompts were skipped: 2 like this: verifier x"):
        evaluated("fails", "fails", on_error="skip")
