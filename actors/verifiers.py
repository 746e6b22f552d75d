"""Verifiers: functions (prompt, response, answer, metadata) -> reward.

The cheap ones that cannot hang are in INLINE. `load_verifier` finds the others, which
`actors.verifier_workers` runs in processes of their own. To add a verifier, write such a function
and a line in one of the two.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from typing import Any, SupportsFloat, cast

from actors.turns import Turns, turns_of
from buffer.data import tagged_sum
from buffer.data.public_environments import PREFIX
from buffer.wire.messages import MAX_REWARD
from configs.extras import import_extra

Verifier = Callable[[str, str, str, dict[str, Any]], float]


class BadReward(ValueError):
    """A verifier returned something that is not a reward."""


def finite(reward: Any) -> float:
    """The reward as a number. Raises BadReward for anything that cannot be trained on."""
    number = isinstance(reward, SupportsFloat) and not isinstance(reward, str | bytes)
    if not number or not abs(float(reward)) <= MAX_REWARD:
        raise BadReward(
            f"returned {repr(reward)[:100]}, which is not a finite number up to {MAX_REWARD:g}"
        )
    return float(reward)


def final_answer(text: str) -> str:
    r"""The conclusion of a text: its last <answer> tag, else its last \boxed{}, else the text after
    its last ####, else all of it. A tag or box that is never closed does not count.
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if opened and closed:
        return tagged.partition("</answer>")[0].strip()
    if (boxed := _last_box(text)) is not None:
        return boxed.strip()
    return text.rpartition("####")[2].strip()


def _last_box(text: str) -> str | None:
    r"""The content of the \boxed{} that opens last, its own braces included; \{ and \} are text."""
    open_braces: list[tuple[bool, int]] = []  # (whether it opens a box, start of its content)
    start, end = -1, -1
    for found in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if found[0].startswith("\\boxed") or found[0] == "{":
            open_braces.append((found[0] != "{", found.end()))
        elif found[0] == "}" and open_braces:
            is_box, opened = open_braces.pop()
            if is_box and opened > start:
                start, end = opened, found.start()
    return text[start:end] if start >= 0 else None


def exact(_prompt: str, response: str, answer: str, _metadata: dict[str, Any]) -> float:
    """1 iff the final answer is the reference, character by character (outer space aside)."""
    return float(final_answer(response) == final_answer(answer))


def numeric(_prompt: str, response: str, answer: str, _metadata: dict[str, Any]) -> float:
    """1 iff the last number of the final answer equals the reference to nine digits; `1,200` and
    `1200.0` are one number.
    """
    reference = _numbers(final_answer(answer))
    if not reference:
        raise ValueError(f"the reference answer {answer[:60]!r} holds no number")
    given = _numbers(final_answer(response))
    return float(
        bool(given) and math.isclose(given[-1], reference[-1], rel_tol=1e-9, abs_tol=1e-12)
    )


def numeric_or_exact(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> float:
    """Files' own verifier: numeric if the reference is a number and nothing else, else exact."""
    is_number = re.fullmatch(_NUMBER, final_answer(answer)) is not None
    return (numeric if is_number else exact)(prompt, response, answer, metadata)


def _tagged_sum(prompt: str, response: str, _answer: str, _metadata: dict[str, Any]) -> float:
    return tagged_sum.score(prompt, response)


_NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(_NUMBER, text)]


INLINE: dict[str, Verifier] = {
    "tagged_sum": _tagged_sum,
    "exact": exact,
    "numeric": numeric,
    "numeric_or_exact": numeric_or_exact,
}


def load_verifier(name: str) -> Verifier | Turns:
    """The function or environment behind a name, which runs in a worker process.

    Raises any error of the import that it needs.
    """
    if name == "math_verify":
        math_verify = import_extra("math_verify", "data.environment=math_verify", "data")
        parse, verify = math_verify.parse, math_verify.verify

        def verify_math(
            _prompt: str, response: str, answer: str, _metadata: dict[str, Any]
        ) -> float:
            # Without the dollars the library would look for a number only; its own time limits
            # leave a response unproven: 0.
            reference = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$")
            if not reference:
                raise ValueError(
                    f"the reference answer {answer[:60]!r} is no mathematical expression"
                )
            return float(verify(reference, parse(response)))

        return verify_math
    if name == "reasoning_gym":
        reasoning_gym = import_extra("reasoning_gym", "data.environment=reasoning_gym", "data")

        def score_entry(
            _prompt: str, response: str, _answer: str, metadata: dict[str, Any]
        ) -> float:
            score_answer = cast(
                Callable[..., float],
                reasoning_gym.get_score_answer_fn(metadata["metadata"]["source_dataset"]),
            )
            return float(score_answer(final_answer(response), metadata))

        return score_entry
    if name.startswith(PREFIX):
        import_extra("verifiers.envs.multiturn_env", f"data.environment={name}", "verifiers")
        from actors.public.turns import turns_of_environment  # it needs the package

        return turns_of_environment(name.removeprefix(PREFIX))
    module, _, function = name.partition(":")
    verifier = getattr(importlib.import_module(module), function)
    if isinstance(verifier, type):
        return turns_of(verifier)
    if not callable(verifier):
        raise TypeError(f"{function} is a {type(verifier).__name__}, not a function")
    return cast(Verifier, verifier)
