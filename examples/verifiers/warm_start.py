"""`python -m examples.verifiers.warm_start FOLDER`: a tiny model for the three environments here.

It is trained from scratch on texts such as these, behind the prompts of the environments. It has
seen what earns a reward, but seldom does it, and its guesses are random:

    47*38=  ->  1212
    47*38=  ->  <tool_call>...</tool_call>  ->  <tool_response>...</tool_response>  ->  1786
    ... problem: 4 + 3 =  ->  7                    (without the tags that the prompt asks for)
    ... problem: 4 + 3 =  ->  <answer>7</answer>
    game 217=  ->  2  ->  low. Episode already ended.  ->
"""

from __future__ import annotations

import functools
import json
import re
from itertools import islice
from random import Random

from buffer.data.public_rows import load, rows_of
from buffer.data.tool_calls import result
from examples.verifiers.game import LARGEST, NUM_GUESSES
from tools.warm_start import EOS, Part, Phase, Task, main

GOOD_FRAC = 0.2
PHASES = (
    Phase(steps=500, tokens=1024, lr=3e-3, short_frac=1.0),
    Phase(steps=120, tokens=2048, lr=2e-3, decays=True),
)
WORDS = (
    *'<>_/\n":{}*+-',
    *("tool", "call", "response", "name", "multiply", "arguments", "left", "right"),
    *("answer", "game", "high", "low"),
)


@functools.cache
def prompts(name: str) -> list[str]:
    rows = islice(rows_of(load(f"examples.verifiers.{name}"), "train"), 900)
    return ["\n\n".join(message["content"] for message in row["prompt"]) for row in rows]


def draw(random: Random, _phase: Phase, is_early: bool) -> list[Part]:
    """Parts of one text: (text, whether the model writes it).

    Early texts are all good ones, and short: they lack what all prompts of an environment share.
    """
    kind = random.choice((of_tools, of_tools, of_reasoning, of_reasoning, of_game))
    (prompt, _), *others = kind(random, is_early or random.random() < GOOD_FRAC)
    return [(prompt.rpartition("\n\n")[2] if is_early else prompt, False), *others]


def of_tools(random: Random, is_good: bool) -> list[Part]:
    prompt = random.choice(prompts("tools"))
    left, right = map(int, re.findall(r"\d\d", prompt)[-2:])
    if not is_good:
        return [(prompt, False), (f"{random.randint(100, 9801)}{EOS}", True)]
    call = json.dumps({"name": "multiply", "arguments": {"left": left, "right": right}})
    product = str(left * right)
    written = f"<tool_call>\n{call}\n</tool_call>{EOS}"
    return [(prompt, False), (written, True), (result(product), False), (product + EOS, True)]


def of_reasoning(random: Random, is_good: bool) -> list[Part]:
    prompt = random.choice(prompts("reasoning"))
    terms = re.findall(r"[+-]?\d", prompt.rpartition(":")[2].replace(" ", ""))
    total = str(sum(map(int, terms)))
    return [(prompt, False), ((f"<answer>{total}</answer>" if is_good else total) + EOS, True)]


def of_game(random: Random, _is_good: bool) -> list[Part]:
    number, parts = random.randint(1, LARGEST), [(random.choice(prompts("game")), False)]
    for left in reversed(range(NUM_GUESSES)):
        guess = random.randint(1, LARGEST)
        parts.append((f"{guess}{EOS}", True))
        if guess == number or not left:
            break
        parts.append(("high." if guess > number else "low.", False))
    return [*parts, ("\nEpisode already ended.", False), (EOS, True)]


TASK = Task("verifiers", WORDS, draw)

if __name__ == "__main__":
    main("Train the tiny model of these examples from scratch.", PHASES, TASK)
