"""The embedded task: add up tagged digits, aloud. Problems, example traces, and the verifier.

    A8B3C7D3=    ->    A8=08,B3=11,C7=18,D3=31.again A8=08,B3=11,C7=18,D3=21.no.#21<eos>

Traces imitate a reasoner's habits: answers at once, repairs after a second look (longer, and mostly
right), and dithering, which repeats what is known and changes nothing (very long, and as often
right as an answer at once). So response lengths are long-tailed within a prompt.
`prompts` draws problems from here, the actors' environments score with `score`, `tools.warm_start`
trains on traces. Owns no randomness: the caller passes a `Random`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

TAGS = "ABCDEFGH"
EOS = "<eos>"
MIN_DIGITS, MAX_DIGITS = 3, 6
MAX_PROBLEMS = sum(9**n for n in range(MIN_DIGITS, MAX_DIGITS + 1))
MAX_TRACE_TOKENS = 512  # <eos> included
DITHER_SPREAD = 0.9  # standard deviation of the logarithm of the number of loops
TOKEN = re.compile(
    r"[a-z]+|<eos>|[^a-z]"
)  # the tokenizer's split: words, otherwise single characters

_PROBLEM = re.compile(r"(?:[A-H][1-9])+=")
_ANSWER = re.compile(r"#([0-9]{2})" + re.escape(EOS))


@dataclass(frozen=True)
class Grammar:
    """How traces go wrong and on. Error rates are per added digit, `deep_error` that of the first
    pass over a deep prompt. A trace that is neither careful nor dithers stops after one pass.
    """

    first_error: float = 0.14
    deep_error: float = 0.32
    careful_frac: float = 0.06
    careful_error: float = 0.04
    careful_stop: float = 0.8
    dither_frac: float = 0.4
    dither_loops: float = 28.0  # median


FULL = Grammar()
CLEAN = Grammar(  # with more second passes than the full grammar has, so that they are learned
    first_error=0,
    deep_error=0,
    careful_frac=0.28,
    careful_error=0,
    careful_stop=0.65,
    dither_loops=14.0,
)
SINGLE_PASS = Grammar(first_error=0, deep_error=0, careful_frac=0, dither_frac=0)


def draw_problem(random: Random, max_digits: int = MAX_DIGITS) -> str:
    """A prompt such as `A6B6C2D8=`: 3 to `max_digits` digits 1-9, as many of one number of digits
    as of another.
    """
    num_digits = random.randint(MIN_DIGITS, max_digits)
    return "".join(f"{tag}{random.randint(1, 9)}" for tag in TAGS[:num_digits]) + "="


def solve(prompt: str) -> str:
    """The sum, as two digits. Raises ValueError when `prompt` is no problem of this task."""
    if not _PROBLEM.fullmatch(prompt):
        raise ValueError(
            f"not a tagged_sum problem: {prompt!r}; expected something like 'A6B6C2D8='"
        )
    return f"{sum(_digits(prompt)):02d}"


def is_deep(prompt: str) -> bool:
    """Whether `prompt` has the most digits. In such prompts a mistake is most likely, so that a
    second look pays most.
    """
    return len(_digits(prompt)) == MAX_DIGITS


def score(prompt: str, response: str) -> float:
    """1.0 iff the response ends with <eos> and its text after the last # is the two-digit sum, else
    0.0.
    """
    match = _ANSWER.fullmatch(response, response.rfind("#")) if "#" in response else None
    return float(match is not None and match[1] == solve(prompt))


def draw_trace(random: Random, prompt: str, grammar: Grammar = FULL) -> str:
    """A response to `prompt`, <eos> included, of at most MAX_TRACE_TOKENS tokens (longer ones are
    drawn again).
    """
    while True:
        trace = _draw_trace(random, _digits(prompt), grammar)
        if len(TOKEN.findall(trace)) <= MAX_TRACE_TOKENS:
            return trace


def _digits(prompt: str) -> list[int]:
    return [int(char) for char in prompt[1::2]]


def _draw_trace(random: Random, digits: list[int], grammar: Grammar) -> str:
    deep = len(digits) == MAX_DIGITS
    error = grammar.deep_error if deep else grammar.first_error
    first, total = _draw_pass(random, digits, error)
    parts = [first]

    def redo(error: float) -> None:
        nonlocal total
        again, new_total = _draw_pass(random, digits, error)
        parts.append(f"again {again}{'ok' if new_total == total else 'no'}.")
        total = new_total

    habit = random.random()
    if habit < grammar.careful_frac:
        redo(grammar.careful_error)
        while random.random() >= grammar.careful_stop:
            redo(grammar.careful_error)
    elif habit < grammar.careful_frac + grammar.dither_frac:
        loops = grammar.dither_loops * math.exp(random.gauss(0.0, DITHER_SPREAD))
        for _ in range(max(1, round(loops))):
            if random.random() < 0.5:
                parts.append(f"wait {TAGS[len(digits) - 1]}{digits[-1]}={total:02d}ok.")
            else:
                parts.append("hmm." * random.randint(1, 3))
    return "".join(parts) + f"#{total:02d}{EOS}"


def _draw_pass(random: Random, digits: list[int], error: float) -> tuple[str, int]:
    """One pass with its running total, and where it ends. A mistake persists; the first item is
    never mistaken.
    """
    total = 0
    steps: list[str] = []
    for i, digit in enumerate(digits):
        total = min(99, total + digit)
        if i > 0 and random.random() < error:
            total = _mistaken(random, total)
        steps.append(f"{TAGS[i]}{digit}={total:02d}")
    return ",".join(steps) + ".", total


def _mistaken(random: Random, total: int) -> int:
    return min(99, max(1, total + random.choice((-10, -2, -1, 1, 2, 10))))
