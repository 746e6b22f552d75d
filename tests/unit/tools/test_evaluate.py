"""`tools.evaluate` with a fake engine: results, and prompts without a result."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest

from actors.environments import EnvironmentFailure
from actors.inference.generation import EngineDied, Generation
from actors.verifier_load import Step
from buffer.wire.messages import PromptPayload
from configs.schema import Config
from tools import evaluate
from tools.evaluate import _answer


class FakeEngine:
    """Every response has two tokens; its text is the place of its first token."""

    eos_ids = frozenset({2})
    cause = "out of memory"

    class tokenizer:
        @staticmethod
        def decode(tokens: Any, skip_special_tokens: bool) -> str:
            return str(tokens[0])

    def __init__(self, dies: bool = False) -> None:
        self.died, self.launched = asyncio.Event(), list[list[int]]()
        self.dies = dies

    def launch(
        self, request_id: str, ids: list[int], max_tokens: int, *, seed: int, num_continued: int
    ) -> Generation:
        self.launched.append(ids)
        generation = Generation(request_id)
        generation.extend(0, [len(ids), 2], [-0.1, -0.2])
        if self.dies:
            self.died.set()
        generation.end(EngineDied("gone") if self.dies else "stop")
        return generation


class FakeEnvironment:
    """The prompt's text determines its score, or its number of tokens. "turns" are three."""

    keep_special_tokens = False
    has_turns = False

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        if prompt.text == "odd":
            raise KeyError("no such role")
        return [1] * (100 if prompt.text == "long" else 5)

    def render_observation(self, observation: str, last_token: int, tokenizer: Any) -> list[int]:
        return [len(observation), last_token]

    async def step(self, prompt: PromptPayload, text: str, state: str = "") -> Step:
        if prompt.text == "fails":
            raise EnvironmentFailure(f"verifier x on {prompt.name}: raised KeyError")
        if prompt.text == "turns":
            return Step(0.5, "go on" if len(state) < 2 else None, state + "x")
        return Step(float(prompt.text))

    def abandon(self, state: str) -> None: ...

    async def finish(self, prompt: PromptPayload, state: str) -> float:
        return 0.125


def evaluated(
    *texts: str,
    on_error: Literal["stop", "skip"] = "stop",
    max_turns: int = 8,
    engine: FakeEngine | None = None,
) -> dict[str, Any]:
    config = Config()
    config.model.max_context, config.sampling.max_tokens = 64, 32
    config.data.on_error, config.eval.samples_per_prompt = on_error, 1
    config.data.max_turns = max_turns
    prompts = [
        PromptPayload(
            prompt_id=str(i), text=text, messages=[], answer="", metadata="", source=f"row {i}"
        )
        for i, text in enumerate(texts)
    ]

    async def script() -> dict[str, Any]:
        environment: Any = FakeEnvironment()
        return await _answer(config, engine or FakeEngine(), environment, prompts)

    return asyncio.run(script())


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


def test_turns_are_played_and_their_rewards_and_lengths_summed() -> None:
    engine = FakeEngine()
    row = evaluated("turns", engine=engine)
    assert (row["reward_mean"], row["length_mean"], row["responses"]) == (1.5, 6.0, 1)
    assert engine.launched == [
        [1] * 5,
        [1] * 5 + [5, 2, 5, 2],
        [1] * 5 + [5, 2, 5, 2, 9, 2, 5, 2],
    ]
    assert evaluated("turns", max_turns=2)["reward_mean"] == 1.125  # that of finish included


def test_a_prompt_that_cannot_be_rendered_fails_like_a_verifier() -> None:
    with pytest.raises(ValueError, match=r"prompt 1 \(row 1\) cannot be turned into tokens"):
        evaluated("1", "odd")
    assert evaluated("1", "odd", on_error="skip")["responses"] == 1


def test_a_lost_engine_ends_the_evaluation() -> None:
    with pytest.raises(EngineDied, match="out of memory"):
        evaluated("1", engine=FakeEngine(dies=True))


def test_an_emulated_latency_does_not_delay_the_judging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, judged_with = Config(), list[Config]()
    config.actors.min_step_ms, config.eval.every = [[1, 12], [64, 26]], 1

    def judge(given: Config, run: Path, steps: list[int]) -> list[dict[str, Any]]:
        judged_with.append(given)
        return [{"step": step} for step in steps]

    monkeypatch.setattr(evaluate, "run_config", lambda run: config)
    monkeypatch.setattr(evaluate, "steps_saved", lambda run: [7])
    monkeypatch.setattr(evaluate, "check_model", lambda path: None)
    monkeypatch.setattr(evaluate, "_judge_all", judge)

    assert evaluate.evaluate(tmp_path) == [{"step": 7}]
    assert judged_with[0].actors.min_step_ms == []
    assert config.actors.min_step_ms, "the run's own settings are as before"
