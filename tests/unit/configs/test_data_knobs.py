"""Keys of prompts and verifiers: two values of each change prompts, rewards or processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from actors.environments import EnvironmentFailure, make_environment
from buffer.data.sources import make_sources
from buffer.wire.messages import PromptPayload
from configs.schema import Config
from tests.knobs import Turn, check_turn
from tests.unit.actors.test_turns import respond
from tests.unit.actors.test_worker import EOS, Scene, play


def prompts(config: Config, _: Path) -> object:
    """Texts and answers of one epoch of training prompts, and of the held-out prompts."""
    sources = make_sources(config)
    drawn = sources.train.draw(sources.train.source.size)
    return [
        sorted((prompt.text, prompt.answer) for prompt in payloads)
        for payloads in (drawn, sources.eval_prompts)
    ]


class Tokenizer:
    """Renders a text visibly instead of encoding it."""

    chat_template, bos_token_id, eos_token_id = "a template", None, None

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())


PROMPT = PromptPayload(prompt_id="p", text="2+2?", messages=[], answer="4", metadata="")


def rendered(config: Config, _: Path) -> object:
    environment = make_environment(config)
    try:
        return bytes(environment.render(PROMPT, Tokenizer())).decode()
    finally:
        environment.close()


def scored(config: Config, _: Path) -> object:
    """The reward of a response, or "failed" if it has none."""
    environment = make_environment(config)
    try:
        return asyncio.run(environment.score(PROMPT, "4.0"))
    except EnvironmentFailure:
        return "failed"
    finally:
        environment.close()


def processes_that_verify(config: Config, _: Path) -> object:
    """The number of processes that score two responses at the same time."""
    environment = make_environment(config)

    async def both() -> set[float]:
        return set(await asyncio.gather(*(environment.score(PROMPT, "4") for _ in range(2))))

    try:
        return len(asyncio.run(both()))
    finally:
        environment.close()


def turns_played(config: Config, _: Path) -> object:
    """The number of responses of a rollout whose environment always answers."""

    async def script(scene: Scene) -> None:
        scene.environment.has_turns, scene.environment.observations = True, [[20]] * 9
        scene.launch(1)
        for turn in range(config.data.max_turns):
            await respond(scene, turn, EOS)
        await scene.answered(1)

    return len(play(script, config=config).engine.launched)


ROWS, HELD_OUT = "data.train={folder}/rows.jsonl", "{folder}/held-out.jsonl"
FEW = ("data.num_prompts=60", "eval.num_prompts=5")
TURNS = {
    "data.train": Turn("tagged_sum", "{folder}/rows.jsonl", prompts, FEW),
    "data.eval": Turn('""', HELD_OUT, prompts, (ROWS, *FEW)),
    "data.prompt_field": Turn("prompt", "question", prompts, (ROWS, *FEW)),
    "data.answer_field": Turn("answer", "solution", prompts, (ROWS, *FEW)),
    "data.num_prompts": Turn("60", "70", prompts, ("eval.num_prompts=5",)),
    "eval.every": Turn("20", "0", prompts, FEW),
    "eval.num_prompts": Turn("5", "6", prompts, ("data.num_prompts=60",)),
    "data.environment": Turn("exact", "numeric", scored),
    "data.verifier_timeout_s": Turn(
        "0.1", "60", scored, ("data.environment=slow_verifier:verify",)
    ),
    "data.verifier_memory_mb": Turn(
        "500", "4096", scored, ("data.environment=large_verifier:verify",)
    ),
    "data.verifier_workers": Turn(
        "1", "2", processes_that_verify, ("data.environment=busy_verifier:verify",)
    ),
    "data.max_turns": Turn("1", "3", turns_played),
    "data.system_prompt": Turn('""', "Be brief.", rendered),
    "data.chat_template": Turn("auto", "never", rendered),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", TURNS)
def test_a_key_changes_prompts_or_rewards(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, start in (("rows", 0), ("held-out", 1000)):
        rows = [
            {"prompt": f"{i}+1?", "question": f"{i}+2?", "answer": f"{i + 1}", "solution": f"{i}"}
            for i in range(start, start + 40)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "slow_verifier.py").write_text(
        "import time\n\n\ndef verify(*_):\n    time.sleep(0.5)\n    return 1.0\n"
    )
    (tmp_path / "busy_verifier.py").write_text(
        "import os, time\n\n\ndef verify(*_):\n    time.sleep(0.2)\n    return os.getpid()\n"
    )
    (tmp_path / "large_verifier.py").write_text(
        "def verify(*_):\n    return float(len(bytearray(10**9)) > 0)\n"
    )
    monkeypatch.chdir(tmp_path)
    check_turn(path, TURNS[path], tmp_path)
