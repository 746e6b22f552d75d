"""Guess the number, as a Gym environment that the package's `GymEnv` plays."""

from random import randint

from verifiers.envs.experimental.gym_env import GymEnv

LARGEST, NUM_GUESSES = 3, 2


class Game:
    def reset(self, seed):
        self.number, self.guesses_left = randint(1, LARGEST), NUM_GUESSES
        return f"game {100 + seed}="

    def step(self, guess):
        self.guesses_left -= 1
        won = guess == str(self.number)
        ends = won or not self.guesses_left or not guess.isdecimal()
        hint = "" if ends else "high." if int(guess) > self.number else "low."
        return hint, float(won), ends, {}


def load_environment():
    return GymEnv(Game, num_train_episodes=800, num_eval_episodes=64, max_episode_steps=3)
