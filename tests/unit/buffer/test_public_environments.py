"""Environments of the package `verifiers` as sources, loaded in processes of their own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random

import pytest

from actors.environments import make_environment
from actors.verifier_load import Step
from buffer.data.sources import make_sources
from buffer.data.tagged_sum import EOS
from configs.schema import Config, DataConfig, EvalConfig
from examples.verifiers import warm_start
from tests.pages import ROOT

pytestmark = pytest.mark.slow

MODULE = """
import os
import verifiers as vf
from datasets import Dataset

print("hello from the module")

def say(word):
    with open(os.environ["OPENED"], "a") as file:
        file.write(word + "\\n")

class Echo(vf.MultiTurnEnv):
    @vf.cleanup
    async def give_back(self, state):
        say("rollout " + state["answer"])

    @vf.teardown
    async def give_all_back(self):
        say("process")

    async def env_response(self, messages, state, **kwargs):
        return [vf.UserMessage(content=messages[-1].content + "!")]

def right(completion, answer, info):
    return float(answer in completion[-1].content) * info["weight"]

def load_environment():
    def rows(numbers):
        return Dataset.from_list([
            {"question": f"say {n}", "answer": str(n), "info": {"weight": 0.5}} for n in numbers
        ])
    rubric = vf.Rubric(funcs=[right])
    held_out = rows(range(90, 93))
    return Echo(dataset=rows(range(40)), eval_dataset=held_out, rubric=rubric, max_turns=2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_echo.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def load_environment():\n    import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENED", str(tmp_path / "opened"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def config_of(train: str, evaluation: str = "", num_prompts: int = 2) -> Config:
    return Config(
        data=DataConfig(train=train, eval=evaluation),
        eval=EvalConfig(every=1, num_prompts=num_prompts),
    )


def test_rows_and_rewards_come_from_the_environment(folder: Path) -> None:
    config = config_of("verifiers:my-echo", "verifiers:my-echo:eval", num_prompts=9)
    sources = make_sources(config)
    assert sources.train.source.size == 40
    assert {prompt.answer for prompt in sources.eval_prompts} == {"90", "91", "92"}
    prompt = sources.eval_prompts[0]
    assert prompt.messages == [{"role": "user", "content": f"say {prompt.answer}"}]
    assert json.loads(prompt.metadata)["row"]["info"] == {"weight": 0.5}

    environment = make_environment(config)
    try:
        assert environment.has_turns
        first = asyncio.run(environment.step(prompt, "well"))
        assert (first.reward, first.observation) == (0.0, "well!")
        assert asyncio.run(environment.finish(prompt, first.state)) == 0.0
        first = asyncio.run(environment.step(prompt, "well"))
        last = asyncio.run(environment.step(prompt, prompt.answer, first.state))
        assert last == Step(0.5)
    finally:
        environment.close()


def test_the_end_of_an_engine_calls_the_hooks_of_rollouts_and_processes(folder: Path) -> None:
    config = config_of("verifiers:my-echo")
    prompt = make_sources(config).train.source[7]
    (folder / "opened").unlink(missing_ok=True)  # the process that read the rows has ended, too
    environment = make_environment(config)
    assert asyncio.run(environment.step(prompt, "well")).observation == "well!"
    environment.close()
    assert (folder / "opened").read_text().splitlines() == [f"rollout {prompt.answer}", "process"]


@pytest.mark.parametrize("name", ["tools", "reasoning", "game"])
def test_an_example_is_played_as_its_model_has_learned_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt and the observations are those of its warm start, and so is the last reward."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the package sets handlers of its own
    source = f"verifiers:examples.verifiers.{name}"
    config = config_of(source, f"{source}:eval", num_prompts=64)
    sources = make_sources(config)
    assert len(sources.eval_prompts) == 64
    text, *parts = [text for text, _ in getattr(warm_start, f"of_{name}")(Random(0), True)]
    prompt = next(
        prompt
        for prompt in map(sources.train.source.__getitem__, range(sources.train.source.size))
        if "\n\n".join(message["content"] for message in prompt.messages) == text
    )
    environment, state, rewards = make_environment(config), "", []
    try:
        for response, given in zip(parts[::2], [*parts[1::2], None], strict=True):
            played = environment.step(prompt, response.removesuffix(EOS), state)
            step = asyncio.run(played)
            state = step.state
            rewards.append(step.reward)
            if name != "game":
                assert step.observation == given
            elif step.observation is None or step.observation.endswith("Episode already ended."):
                break  # another number is drawn here
            else:
                assert step.observation in ("high.", "low.")
    finally:
        environment.close()
    assert rewards[-1] == 1.0 if name != "game" else set(rewards) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("train", "cause"),
    [
        ("verifiers:my-echo:test", "'test' must be one of train, eval"),
        ("verifiers:broken", "No module named 'no_such_module'"),
    ],
)
def test_a_source_that_cannot_be_opened_is_one_line(train: str, cause: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=cause) as error:
        make_sources(config_of(train))
    assert str(error.value).startswith(f"data.train={train}") and "\n" not in str(error.value)
