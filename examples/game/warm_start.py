"""`python -m examples.game.warm_start FOLDER`: a tiny model that knows the rules of the game.

It is trained from scratch on plays such as this one, in which every guess is random:

    game 217=  ->  2  ->  low.  ->  6  ->  high.  ->  5
"""

from __future__ import annotations

from random import Random

from examples.game.game import LARGEST
from tools.warm_start import EOS, Phase, Task, main

NUM_GUESSES = 3
PHASES = (Phase(steps=120, tokens=512, lr=3e-3, decays=True),)


def draw(random: Random, _phase: Phase, _short: bool) -> list[tuple[str, bool]]:
    """Parts of one play: (text, whether the model writes it)."""
    number, parts = random.randint(1, LARGEST), [(f"game {random.randint(100, 999)}=", False)]
    for left in reversed(range(NUM_GUESSES)):
        guess = random.randint(1, LARGEST)
        parts.append((f"{guess}{EOS}", True))
        if guess == number or not left:
            break
        parts.append(("high." if guess > number else "low.", False))
    return parts


TASK = Task("game", ("game", "high", "low"), draw)

if __name__ == "__main__":
    main("Train the tiny model of this example from scratch.", PHASES, TASK)
