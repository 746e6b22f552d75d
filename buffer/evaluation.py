"""Evaluations on held-out prompts: their schedule, their groups and their results.

Owns the collected groups of the evaluation under way. Driven by `buffer.service`; the core decides
when its rollouts are launched.
"""

from __future__ import annotations

from buffer.data.skipped_prompts import SkippedPrompts
from buffer.run_state import RunFailed, RunState
from buffer.wire.messages import Evaluated
from darts import events as ev


class Evaluation:
    """At most one evaluation is under way. Another one requested in that time is skipped."""

    def __init__(self, run: RunState) -> None:
        self.run = run
        # Number of steps done when the evaluation under way was requested; None without one.
        self.step: int | None = None
        # The same for the newest evaluation, which may have ended.
        self.newest: int | None = None
        self._records: list[ev.GroupRecord] = []
        self._skipped = self._none_skipped()

    def due_after(self, step: int) -> bool:
        every = self.run.config.eval.every
        return bool(every) and step % every == 0

    def request(self) -> list[ev.Event]:
        """Evaluate the newest policy, unless there is nothing to evaluate or one is under way."""
        run = self.run
        if not run.eval_payloads or self.step is not None:
            return []
        self.step = self.newest = run.step
        prompts = tuple(ev.Prompt(i, visit=run.step) for i in run.eval_payloads)
        samples = run.config.eval.samples_per_prompt
        return [ev.EvaluationRequested(prompts, samples, run.core.policy_version)]

    @property
    def progress(self) -> tuple[int, int]:
        """(prompts done, prompts) of the evaluation under way, (0, 0) without one."""
        if self.step is None:
            return 0, 0
        return len(self._records), len(self.run.eval_payloads)

    def requested(self, step: int) -> None:
        """Take a request that recovery found in the log."""
        self.step, self.newest = step, step
        self._records, self._skipped = [], self._none_skipped()

    def request_again(self) -> list[ev.Event]:
        """After recovery, request the evaluation that is due, unless the log has its request."""
        return self.request() if self.newest != self.run.step else []

    def group_ended(self, record: ev.GroupRecord) -> int | None:
        """Take a held-out group. Returns the step of its evaluation once that is complete."""
        run = self.run
        run.forget(record)
        reason = run.failure(record)
        if reason:
            self._skipped.add(run.eval_payloads[record.prompt_id], reason)
        self._records.append(record)
        if self.step is None or len(self._records) < len(run.eval_payloads):
            return None
        step, self.step = self.step, None
        records, self._records = self._records, []
        skipped, self._skipped = self._skipped, self._none_skipped()
        kinds = {i: payload.kind for i, payload in run.eval_payloads.items()}
        result = run.metrics.evaluated(records, step, kinds)
        if not run.replaying and (skipped.too_many(len(records)) or not result["eval/responses"]):
            raise RunFailed(f"evaluation after {step} steps: {skipped.refusal(len(records))}")
        if result["eval/responses"]:
            run.evaluated = Evaluated(step=step, reward_mean=result["eval/reward_mean"])
            run.say(
                f"after {step} steps: mean reward {result['eval/reward_mean']:.3f}, "
                f"mean length {result['eval/length_mean']:.1f}"
            )
        if skipped.num_skipped:
            run.say(f"evaluation after {step} steps: {skipped.summary(len(records))}")
        return step

    def _none_skipped(self) -> SkippedPrompts:
        return SkippedPrompts(self.run.config.data.max_skipped_frac)
