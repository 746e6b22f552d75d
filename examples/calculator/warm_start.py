"""`python -m examples.calculator.warm_start FOLDER`: a tiny model that seldom calls the calculator.

It is trained from scratch on texts such as these. At first all of them are of the second kind, so
that it learns to copy, and later only `CALLS_FRAC` of them:

    47*38=  ->  #1212                                    (a guess, nearly always wrong)
    47*38=  ->  calc 47*38  ->  1786.  ->  #1786         (a call, its result, and the answer)
"""

from __future__ import annotations

from random import Random

from tools.warm_start import EOS, Phase, Task, main

CALLS_FRAC = 0.2
PHASES = (Phase(steps=450, tokens=768, lr=3e-3, short_frac=0.8, decays=True),)


def draw(random: Random, _phase: Phase, is_early: bool) -> list[tuple[str, bool]]:
    """Parts of one text: (text, whether the model writes it). Early texts are all calls."""
    left, right = random.randint(10, 99), random.randint(10, 99)
    prompt, product = f"{left}*{right}=", left * right
    if is_early or random.random() < CALLS_FRAC:
        called, answered = f"calc {prompt[:-1]}{EOS}", f"#{product:04d}{EOS}"
        return [(prompt, False), (called, True), (f"{product:04d}.", False), (answered, True)]
    return [(prompt, False), (f"#{random.randint(100, 9801):04d}{EOS}", True)]


TASK = Task("calculator", ("calc", "*"), draw)

if __name__ == "__main__":
    main("Train the tiny model of this example from scratch.", PHASES, TASK)
