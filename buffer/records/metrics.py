"""From closed groups and peers' reports to one row of `metrics.jsonl` per learner step.

Owns the sums, and never decides anything. The service calls `row` once per step, and the other
methods during the step. Lengths and tokens count sampled tokens. *Generated* covers every rollout
of a step's groups, with a cancelled one as long as it was then. *Selected* tokens were shipped to
the learner, which trains most of them. `tokens/*` are cumulative over the run.
"""

from __future__ import annotations

import resource
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from buffer.records.held_out import Answer, judged
from buffer.wire.messages import EngineReport, PolicyLoaded, PromptView
from darts.events import CountOvershoot, GroupRecord, RolloutRecord
from darts.step_row import step_lags, step_row

HISTOGRAM_EDGES = [
    0, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768
]  # fmt: skip
ENDS = ("selected_short", "selected_long", "discarded", "truncated", "cancelled")
SHOWN_PROMPTS = 256  # the last ones that closed, whose lengths monitors draw
WINDOW = 2048  # number of rollouts and of lags in the live histograms


class Latest:
    """The newest reports of the engines, and the prompts that closed last."""

    def __init__(self) -> None:
        self.reports: dict[str, EngineReport] = {}
        self.prompts: deque[PromptView] = deque(maxlen=SHOWN_PROMPTS)

    def closed(self, record: GroupRecord, spread: float, text: str) -> None:
        scored = [r for r in record.rollouts if r.reward is not None]
        right = [r.tokens for r in scored if (r.reward or 0.0) > 0.5]
        self.prompts.append(
            PromptView(
                prompt_id=record.prompt_id,
                spread=spread,
                budget=record.budget,
                pass_rate=len(right) / max(1, len(scored)),
                lengths_right=right,
                lengths_wrong=[r.tokens for r in scored if (r.reward or 0.0) <= 0.5],
                num_cancelled=sum(r.end == "cancelled" for r in record.rollouts),
                text=text,
            )
        )


class Metrics:
    """Running sums of one run. `restore` continues the cumulative ones from an earlier row."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.latest = Latest()
        self.recent: deque[tuple[str, int]] = deque(maxlen=WINDOW)
        self.recent_lags: deque[int] = deque(maxlen=WINDOW)
        self._dropped: Counter[str] = Counter()
        self._freed_s: list[float] = []
        self._swaps: list[PolicyLoaded] = []
        self._reports: dict[str, list[EngineReport]] = {}
        self._evaluation: dict[str, float] = {}

    def restore(self, row: dict[str, float]) -> None:
        self.tokens.update(
            {k.removeprefix("tokens/"): int(v) for k, v in row.items() if k.startswith("tokens/")}
        )

    # During a step
    # ----------------------------------------------------------------------------------------------

    def closed(self, record: GroupRecord) -> None:
        """Count the tokens of a training group that has ended, trained or dropped."""
        tokens = self.tokens
        for rollout in record.rollouts:
            tokens["generated"] += rollout.tokens + rollout.overshoot
            tokens[_use_of_tokens(rollout)] += rollout.tokens
            tokens["cancelled"] += rollout.overshoot
            if rollout.end in ENDS:
                self.recent.append((rollout.end, rollout.tokens))
        if record.end != "shipped":
            self._dropped[record.end] += 1

    def trained(self, num_tokens: int) -> None:
        """Count the tokens of the groups just closed that contributed to the gradient."""
        self.tokens["trained"] += num_tokens
        self.tokens["without_signal"] -= num_tokens

    def count_overshoot(self, late: CountOvershoot) -> None:
        """Count the tokens that a recorded group's rollout decoded before its cancel arrived."""
        self.tokens["generated"] += late.num_tokens
        self.tokens["cancelled"] += late.num_tokens

    def evaluated(
        self, records: Sequence[GroupRecord], step: int, kinds: Mapping[str, str] | None = None
    ) -> dict[str, float]:
        """The results of one evaluation, from all of its held-out groups; `kinds` maps a prompt to
        its kind.

        Every rollout counts. Temperature and length limit are those of training.
        """
        answers = [
            Answer((kinds or {}).get(record.prompt_id, ""), rollout.reward, rollout.tokens)
            for record in records
            for rollout in record.rollouts
            if rollout.reward is not None
        ]
        self._evaluation = {"eval/step": step, "eval/responses": len(answers), **judged(answers)}
        return self._evaluation

    def note_freed(self, seconds: float) -> None:
        """Note the time from the decision to cancel to the confirmation that the slot is free."""
        self._freed_s.append(seconds)

    def note_swap(self, message: PolicyLoaded) -> None:
        self._swaps.append(message)

    def note_report(self, engine_id: str, report: EngineReport) -> None:
        self._reports.setdefault(engine_id, []).append(report)

    # One row
    # ----------------------------------------------------------------------------------------------

    def row(self, records: Sequence[GroupRecord]) -> dict[str, float]:
        """The row of the step that trained `records`, for the time since the last row."""
        self.recent_lags.extend(step_lags(records))
        row = {
            **step_row(
                records,
                num_uniform=self._dropped.pop("uniform", 0),
                num_stopped=self._dropped.pop("no_signal", 0),
            ),
            **{
                f"tokens/{name}": self.tokens[name]
                for name in ("generated", "trained", "without_signal", "discarded", "cancelled")
            },
            "darts/dropped_groups": sum(self._dropped.values()),
            **self.take_evaluation(),
            "memory/buffer_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        row |= self._verifiers() | self._engines() | self._cancels()
        self._reports.clear()
        self._dropped.clear()
        return row

    def take_evaluation(self) -> dict[str, float]:
        """The evaluations since the last row. Each evaluation appears in one row."""
        taken, self._evaluation = self._evaluation, {}
        return taken

    def _verifiers(self) -> dict[str, float]:
        """Values over all engines, including evaluations. Zeros if none has reported."""
        by_engine = [[report.verifier for report in of] for of in self._reports.values()]
        reports = [report for of_engine in by_engine for report in of_engine]
        num_verified = max(1, sum(v.num_verified for v in reports))
        return {
            "verifier/time_s_mean": sum(v.time_s for v in reports) / num_verified,
            "verifier/time_s_max": max((v.longest_s for v in reports), default=0.0),
            "verifier/queue_s_mean": sum(v.queue_s for v in reports) / num_verified,
            "verifier/queue_mean": sum(
                float(np.mean([v.num_waiting for v in of_engine])) for of_engine in by_engine
            ),
            "verifier/busy_frac": _mean(v.num_busy / max(1, v.num_workers) for v in reports),
            "verifier/failures": sum(v.num_failed for v in reports),
            "verifier/timeouts": sum(v.num_timeouts for v in reports),
        }

    def _engines(self) -> dict[str, float]:
        row: dict[str, float] = {}
        if self._reports:
            reports = [report for of_engine in self._reports.values() for report in of_engine]
            row["engine/busy_frac"] = float(np.mean([r.busy_frac for r in reports]))
            row["engine/tokens_per_s"] = sum(
                float(np.mean([r.tokens_per_s for r in of])) for of in self._reports.values()
            )
        if self._swaps:
            row["publish/swap_pause_s"] = float(np.mean([s.pause_s for s in self._swaps]))
            row["publish/fetch_s"] = float(np.mean([s.fetch_s for s in self._swaps]))
        self._swaps.clear()
        return row

    def _cancels(self) -> dict[str, float]:
        if not self._freed_s:
            return {}
        freed_ms = np.array(self._freed_s) * 1e3
        self._freed_s.clear()
        return {f"cancel/freed_p{q}_ms": float(np.percentile(freed_ms, q)) for q in (50, 99)}

    def histogram(self) -> dict[str, list[int]]:
        """Recent rollouts by end and length bin (`HISTOGRAM_EDGES`; the last bin is open)."""
        counts = {end: [0] * len(HISTOGRAM_EDGES) for end in ENDS}
        for end, tokens in self.recent:
            counts[end][bisect_right(HISTOGRAM_EDGES, tokens) - 1] += 1
        return counts


def _use_of_tokens(rollout: RolloutRecord) -> str:
    if rollout.end.startswith("selected"):
        return "without_signal"  # until the learner reports the number of trained tokens
    return "cancelled" if rollout.end == "cancelled" else "discarded"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
