"""Environments: rewards, rendering, and verifiers that raise, hang, die or return nonsense."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.environments import Environment, EnvironmentFailure, make_environment
from actors.verifiers import final_answer
from buffer.wire.messages import PromptPayload
from configs.schema import Config

USER_VERIFIERS = """
import os, time

CALLS = []

def verify(prompt, response, answer, metadata):
    CALLS.append(response)
    print("a verifier may print")
    if response == "raise":
        raise KeyError("no such unit")
    if response == "hang":
        time.sleep(600)
    if response == "die":
        os._exit(3)
    if response == "slow":
        time.sleep(0.5)
    if response == "pid":
        return os.getpid()
    nonsense = {"nan": float("nan"), "text": "1.0", "none": None, "inf": float("inf")}
    return nonsense.get(response, metadata.get("bonus", 0) + (response == answer))

async def later(prompt, response, answer, metadata):
    return float(response == answer)

def odd(prompt, response, answer, metadata):
    import decimal, fractions, numpy
    class Unprintable:
        def __repr__(self):
            raise ValueError("no text")
    return eval(response)

NOT_A_FUNCTION = 3
"""


def payload(
    text: str = "2+2?", answer: str = "4", metadata: str = "", **other: Any
) -> PromptPayload:
    return PromptPayload(
        **{
            "prompt_id": "p1",
            "text": text,
            "messages": [],
            "answer": answer,
            "metadata": metadata,
            **other,
        }
    )


def config_of(environment: str = "auto", train: str = "rows.jsonl", **data: Any) -> Config:
    config = Config()
    config.data.environment, config.data.train = environment, train
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def score(environment: Environment, prompt: PromptPayload, response: str) -> float:
    return asyncio.run(environment.score(prompt, response))


@pytest.fixture(scope="module")
def user_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """An environment whose verifier is in the working directory and has a second per response."""
    folder, before = tmp_path_factory.mktemp("user"), Path.cwd()
    (folder / "my_verifiers.py").write_text(USER_VERIFIERS)
    os.chdir(folder)
    environment = make_environment(config_of("my_verifiers:verify", verifier_timeout_s=1.0))
    yield environment
    environment.close()
    os.chdir(before)


# Rewards


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris ", "Paris"),
        ("I think <answer>3</answer>, no: <answer> 4 </answer>.", "4"),
        (r"so \boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
        (r"first \boxed{5}, then \boxed{\frac{\sqrt{3}}{2}}.", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{\text{{a}{b{c}}}} and \boxed {7}", "7"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{3} and then \boxed{\frac{1", "3"),
        (r"} a stray brace { and \boxed{4}", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{1} but <answer>2</answer>", "2"),
        (r"<answer>1 and \boxed{2}", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>3</answer> is it </answer>", "3"),
        ("12 + 30 = 42\n#### 42", "42"),
    ],
)
def test_the_final_answer_is_extracted_from_a_text(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("verifier", "answer", "response", "reward"),
    [
        ("exact", "Paris", "<answer>Paris</answer>", 1.0),
        ("exact", "Paris", "<answer>paris</answer>", 0.0),
        ("numeric", "1200", "It is 7, or 1,200.", 1.0),
        ("numeric", "long story #### 72", "72.0", 1.0),
        ("numeric", "-0.5", "x = -.5", 1.0),
        ("numeric", "4", "4 or 5", 0.0),
        ("numeric", "4", "four", 0.0),
        ("auto", "4", "that makes 4.0", 1.0),
        ("auto", "4 km", "4", 0.0),
    ],
)
def test_inline_verifiers(verifier: str, answer: str, response: str, reward: float) -> None:
    assert score(make_environment(config_of(verifier)), payload(answer=answer), response) == reward


def test_an_answer_in_nested_braces_is_compared_as_a_whole() -> None:
    environment = make_environment(config_of("exact"))
    prompt = payload(answer=r"\boxed{\frac{\sqrt{3}}{2}}")
    assert score(environment, prompt, r"\boxed{5}, so \boxed{\frac{\sqrt{3}}{2}}") == 1.0
    assert score(environment, prompt, r"\boxed{\frac{\sqrt{3}}{2}}, so \boxed{5}") == 0.0
    assert score(environment, prompt, r"\boxed{\frac{\sqrt{3}}{3}}") == 0.0


def test_a_long_response_of_open_boxes_is_scored_quickly() -> None:
    """The time may only grow linearly, because the event loop waits for this verifier."""
    assert final_answer(r"<answer>\boxed{" * 100_000 + r"\boxed{4}") == "4"


def test_the_load_of_a_verifier_that_runs_inline_is_measured() -> None:
    environment = make_environment(config_of("numeric"))
    score(environment, payload(answer="4"), "4")
    with pytest.raises(EnvironmentFailure):
        score(environment, payload(answer="Paris"), "4")
    report = environment.measure()
    assert (report.num_verified, report.num_failed, report.num_timeouts) == (2, 1, 0)
    assert report.time_s > 0 and environment.measure().num_verified == 0


def test_a_numeric_reference_without_a_number_is_a_failure_not_a_zero() -> None:
    with pytest.raises(
        EnvironmentFailure, match=r"numeric on prompt p1: .*'Paris' holds no number"
    ):
        score(make_environment(config_of("numeric")), payload(answer="Paris"), "4")


def test_tagged_sum_scores_its_own_prompts_and_requires_the_end_token() -> None:
    environment = make_environment(config_of(train="tagged_sum"))
    assert environment.keep_special_tokens and not make_environment(config_of()).keep_special_tokens
    assert [
        score(environment, payload("A1B2C3="), response)
        for response in ("#06<eos>", "#06", "#07<eos>")
    ] == [1.0, 0.0, 0.0]


def test_reasoning_gym_scores_its_own_entries() -> None:
    pytest.importorskip("reasoning_gym")
    entry = {
        "question": "3 + 4 - 7 =",
        "answer": "0",
        "metadata": {"source_dataset": "chain_sum", "source_index": 25},
    }
    prompt = payload("3 + 4 - 7 =", "0", json.dumps(entry))
    environment = make_environment(config_of(train="reasoning_gym:chain_sum"))
    assert score(environment, prompt, "<answer>0</answer>") == 1.0
    assert score(environment, prompt, "<answer>no idea</answer>") < 0.5
    environment.close()


def test_math_verify_accepts_equivalent_expressions() -> None:
    pytest.importorskip("math_verify")
    environment = make_environment(config_of("math_verify"))
    assert score(environment, payload(answer=r"\frac{1}{2}"), r"so it is $\boxed{0.5}$") == 1.0
    assert score(environment, payload(answer=r"\frac{1}{2}"), r"so it is $\boxed{2}$") == 0.0
    environment.close()


def test_a_user_verifier_gets_the_answer_and_the_metadata(user_environment: Environment) -> None:
    prompt = payload(metadata=json.dumps({"bonus": 2}))
    assert score(user_environment, prompt, "4") == 3.0
    assert score(user_environment, prompt, "5") == 2.0


ODD_REWARDS = {
    "True": 1.0,
    "numpy.bool_(True)": 1.0,
    "numpy.float32(0.5)": 0.5,
    "numpy.int64(-3)": -3.0,
    "numpy.array(0.25)": 0.25,
    "decimal.Decimal('0.1')": 0.1,
    "fractions.Fraction(1, 4)": 0.25,
    "-0.0": 0.0,
    "None": "returned None",
    "()": "returned ()",
    "(1.0, 'why')": "returned (1.0, 'why')",
    "[1.0]": "returned [1.0]",
    "{'reward': 1.0}": "returned {'reward': 1.0}",
    "b'1'": "returned b'1'",
    "1j": "returned 1j",
    "10 ** 400": "OverflowError",
    "numpy.array([1.0, 2.0])": "TypeError",
    "numpy.float64('nan')": "nan",
    "decimal.Decimal('sNaN')": "ValueError",
    "(x for x in [1.0])": "returned <generator",
    "Unprintable()": "ValueError",
    "'line\\nbreak'": "returned 'line",
    "exit(0)": "SystemExit",
}


@pytest.fixture(scope="module")
def odd_environment(user_environment: Environment) -> Iterator[Environment]:
    environment = make_environment(config_of("my_verifiers:odd"))
    yield environment
    environment.close()


@pytest.mark.parametrize("returned", ODD_REWARDS)
def test_an_odd_reward_is_a_number_or_a_failure_in_one_line(
    odd_environment: Environment, returned: str
) -> None:
    expected = ODD_REWARDS[returned]
    if isinstance(expected, float):
        assert score(odd_environment, payload(), returned) == expected
        return
    with pytest.raises(EnvironmentFailure) as failure:
        score(odd_environment, payload(), returned)
    assert expected in str(failure.value) and "\n" not in str(failure.value)


def test_a_verifier_may_be_async(user_environment: Environment) -> None:
    environment = make_environment(config_of("my_verifiers:later"))
    try:
        assert score(environment, payload(), "4") == 1.0
        assert score(environment, payload(), "5") == 0.0
    finally:
        environment.close()


# Failures


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("raise", "KeyError: 'no such unit'"),
        ("nan", "returned nan, which is not a finite number"),
        ("inf", "returned inf"),
        ("text", "returned '1.0'"),
        ("none", "returned None"),
        ("die", "exit status 3"),
        ("hang", " s and was stopped; raise data.verifier_timeout_s"),
    ],
)
def test_a_failing_verifier_is_a_failure_and_the_next_response_is_scored(
    user_environment: Environment, response: str, expected: str
) -> None:
    with pytest.raises(EnvironmentFailure) as failure:
        score(user_environment, payload(), response)
    message = str(failure.value)
    assert (
        message.startswith("verifier my_verifiers:verify on prompt p1: ")
        and expected in message
        and "\n" not in message
    )
    assert score(user_environment, payload(), "4") == 1.0


def test_a_hung_verifier_is_killed(user_environment: Environment) -> None:
    pid = int(score(user_environment, payload(), "pid"))
    with pytest.raises(EnvironmentFailure):
        # Runs in the same worker, the most recently used one.
        score(user_environment, payload(), "hang")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_event_loop_keeps_running_while_a_verifier_works(user_environment: Environment) -> None:
    async def count_while_scoring() -> int:
        scoring = asyncio.create_task(user_environment.score(payload(answer="slow"), "slow"))
        turns = 0
        while not scoring.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert scoring.result() == 1.0
        return turns

    assert asyncio.run(count_while_scoring()) > 5


def test_responses_are_scored_concurrently(user_environment: Environment) -> None:
    async def all_of_them() -> list[float]:
        return await asyncio.gather(
            *(user_environment.score(payload(answer=str(i % 2)), "1") for i in range(40))
        )

    assert asyncio.run(all_of_them()) == [0.0, 1.0] * 20


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("no_such_module:verify", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:verify", "AttributeError"),
        ("string:digits", "digits is a str, not a function"),
        ("fuzzy", "it must be auto, exact, numeric"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_is_refused_at_start(
    environment: str, expected: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_environment(config_of(environment))
    message = str(error.value)
    assert message.startswith("data.environment=") and expected in message and "\n" not in message


def test_auto_requires_one_verifier_for_training_and_evaluation() -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.environment=auto would score .* with tagged_sum but data\.eval=rows\.jsonl",
    ):
        make_environment(config_of(train="tagged_sum", eval="rows.jsonl"))
