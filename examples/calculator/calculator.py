"""A calculator that the model may call: the environment of this example."""

import re


class Calculator:
    """Answers `calc 47*38` with the product; any other response is the final answer."""

    def reset(self, row):
        self.answer = row["answer"]

    def step(self, response):
        call = re.fullmatch(r"calc (\d\d)\*(\d\d)", response)
        if call:
            return f"{int(call[1]) * int(call[2]):04d}."  # an observation: the model goes on
        return float(response == f"#{self.answer}")  # a number: the reward, and the end
