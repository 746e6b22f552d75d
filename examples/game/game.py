"""Guess the number: the environment of this example."""

import random

LARGEST = 7


class Game:
    """The number is between 1 and 7, and there are three guesses. Every wrong one gets a hint.

    Each play has a number of its own, so that no prompt has one to be learned by heart.
    """

    def reset(self, row):
        self.number, self.guesses_left = random.randint(1, LARGEST), 3

    def step(self, response):
        self.guesses_left -= 1
        if response == str(self.number):
            return 1.0  # a number: the reward, and the end
        if not self.guesses_left or not response.isdecimal():
            return 0.0
        return "high." if int(response) > self.number else "low."  # text: the model goes on
