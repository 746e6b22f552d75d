"""Says so if a run learns nothing, because the rewards of every group are equal.

Owns the number of steps in a row without a signal, and the sentence about them. Never stops a run:
sampling may still find a group with a signal. Driven by `buffer.learner_side`, once per step.
"""

from __future__ import annotations

from collections.abc import Mapping

ALL_RIGHT, ALL_WRONG = 0.95, 0.05  # mean rewards, of verifiers that give 0 and 1
TOO_EASY = (
    "the policy solves these prompts already, so end the run, or use harder ones in data.train"
)
TOO_HARD = (
    "the policy solves none of these prompts, so use easier ones in data.train or a stronger "
    "model.path; raise sampling.max_tokens if most responses are truncated; and let `python -m "
    "tools.check` verify that data.environment gives a right answer a reward"
)
EITHER = (
    "each prompt has a single reward, so raise darts.group_size, or use prompts in data.train that "
    "are solved sometimes; data.environment may also give every response the same reward"
)


class SignalWatch:
    """Counts steps in a row in which all groups were uniform."""

    def __init__(self, num_steps: int) -> None:
        self._last_step = num_steps - 1
        self.num_mute = 0

    def look(self, row: Mapping[str, float]) -> str:
        """A sentence to show after the step of `row`, or "".

        It comes at 2, 4, 8 and so on such steps in a row, and at the end of the run.
        """
        if row["darts/uniform_frac"] < 1:
            self.num_mute = 0
            return ""
        self.num_mute += 1
        is_last = row["step"] == self._last_step
        if not is_last and (self.num_mute == 1 or self.num_mute & (self.num_mute - 1)):
            return ""
        reward = row["reward/mean"]
        advice = TOO_EASY if reward > ALL_RIGHT else TOO_HARD if reward < ALL_WRONG else EITHER
        whole = "the run" if self.num_mute == row["step"] + 1 else f"{self.num_mute} steps"
        return (
            f"in {whole} up to step {row['step']:.0f}, all responses to a prompt had the same "
            f"reward (mean {reward:.2f}), so that rewards taught the policy nothing: {advice}"
        )
