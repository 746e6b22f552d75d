"""The progress of a run: a live display on a terminal, plain lines elsewhere, or nothing.

Owns the wording and the drawing. Reads the states that the buffer publishes and decides nothing.
Driven by `tools.launch`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from buffer.processes.stop_request import AGAIN
from buffer.wire.messages import LiveState

# A plain line follows after this many steps, or this many seconds if a step was taken.
PLAIN_STEPS, PLAIN_S = 5, 10.0
PLAIN_IDLE_S = 30.0  # between plain lines while no step is taken
ETA_STEPS = 3  # learner steps to observe before the end is estimated


class View(Protocol):
    def show(self, snapshot: LiveState) -> None: ...
    def say(self, text: str) -> None:
        """Print a line that stays on screen."""
        ...

    def close(self) -> None: ...


def make_view(kind: str) -> View:
    """The view for `kind`, a value of `launch.progress`."""
    if kind == "none":
        return SilentView()
    return LiveView() if kind == "live" or (kind == "auto" and sys.stdout.isatty()) else PlainView()


def clock(seconds: float) -> str:
    """95 -> '1:35', 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Pace:
    """Estimates when the run will end, from the steps taken since this launch."""

    # (time_s, step) when training was first seen, after the start and the first evaluation.
    first: tuple[float, int] | None = None

    def eta(self, snapshot: LiveState) -> str:
        """The time left, without the last evaluation; "" until enough steps have been seen."""
        if self.first is None and state(snapshot) == "training":
            self.first = (snapshot.time_s, snapshot.step)
        if (
            self.first is None
            or snapshot.step - self.first[1] < ETA_STEPS
            or snapshot.step >= snapshot.steps
        ):
            return ""
        time_s, step = self.first
        left_s = (
            (snapshot.steps - snapshot.step) * (snapshot.time_s - time_s) / (snapshot.step - step)
        )
        return f"{clock(left_s)} left"


def state(snapshot: LiveState) -> str:
    """The current phase of the run, in words."""
    if any(engine.policy_version >= 0 for engine in snapshot.engines) or snapshot.phase == "done":
        return snapshot.phase
    missing = ["the learner's first weights"] if snapshot.policy_version < 0 else []
    missing += ["engines to load the model"] if snapshot.engines else ["engines to join"]
    return f"starting: waiting for {' and '.join(missing)}"


def stopping(snapshot: LiveState | None, limit_s: float) -> str:
    """The answer to a request to stop: the work still to be done, and how long it may take."""
    doing = "the processes are ending"
    if snapshot is not None and state(snapshot) == "training" and snapshot.step < snapshot.steps:
        doing = f"the learner is finishing step {snapshot.step + 1} and will save it"
    return f"stopping: {doing}; this takes up to {limit_s:g} s; {AGAIN}"


class Evaluated(NamedTuple):
    """The mean reward of an evaluation; `is_accuracy` if all its rewards are 0 or 1."""

    reward: float
    is_accuracy: bool


def told(
    snapshot: LiveState, evaluations: dict[int, Evaluated]
) -> tuple[list[str], list[str], str]:
    """Facts about the outcome, facts about the flow, and which part of the run waits for which.

    All are empty while the run is starting.
    """
    if state(snapshot).startswith("starting"):
        return [], [], ""
    return outcome_facts(snapshot.metrics, evaluations), flow_facts(snapshot), snapshot.waiting


def outcome_facts(metrics: dict[str, float], evaluations: dict[int, Evaluated]) -> list[str]:
    """Held-out result, reward and response length. `evaluations` maps a step to its result."""
    facts = []
    if evaluations:
        first, last = evaluations[min(evaluations)], evaluations[max(evaluations)]
        alike = first.is_accuracy and last.is_accuracy
        name = "accuracy" if alike else "held-out reward"
        shown, before = (
            f"{100 * one.reward:.1f} %" if alike else f"{one.reward:.3f}" for one in (last, first)
        )
        facts.append(f"{name} {shown}" + (f" (from {before})" if len(evaluations) > 1 else ""))
    if skipped := metrics.get("data/skipped_prompts"):
        facts.append(f"{skipped:.0f} prompts skipped")
    if "reward/mean" in metrics:
        facts.append(f"reward {metrics['reward/mean']:.2f}")
    if "length/selected_mean" in metrics:
        facts.append(
            f"length {metrics['length/selected_mean']:.0f} mean, "
            f"{metrics['length/selected_p99']:.0f} p99"
        )
    return facts


def flow_facts(snapshot: LiveState) -> list[str]:
    """Cancellation, signal, an evaluation, staleness, throughput and utilisation.

    The first evaluation is told by `LiveState.waiting`.
    """
    metrics, facts = snapshot.metrics, []
    if "darts/cancelled_frac" in metrics:
        facts.append(f"{100 * metrics['darts/cancelled_frac']:.0f} % cancelled")
    if metrics.get("darts/curtailed_frac"):
        facts.append(f"{100 * metrics['darts/curtailed_frac']:.0f} % cut short")
    if "darts/uniform_frac" in metrics:
        facts.append(f"{100 * metrics['darts/uniform_frac']:.0f} % without signal")
    if snapshot.evaluated[1] and snapshot.step:
        facts.append("evaluation {} of {} prompts".format(*snapshot.evaluated))
    if snapshot.lags:
        facts.append(f"lag {max(snapshot.lags)} of at most {snapshot.max_lag}")
    if snapshot.engines:
        facts.append(f"{sum(engine.tokens_per_s for engine in snapshot.engines):,.0f} tokens/s")
        busy = f"{100 * fmean(engine.busy_frac for engine in snapshot.engines):.0f} % busy"
        facts.append(
            f"engine {busy}"
            if len(snapshot.engines) == 1
            else f"{len(snapshot.engines)} engines {busy}"
        )
    return facts


class SilentView:
    """Prints only the lines that must be said."""

    def show(self, snapshot: LiveState) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _Following:
    """The state that both views keep of a run."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.evaluations: dict[int, Evaluated] = {}

    def follow(self, snapshot: LiveState) -> None:
        metrics = snapshot.metrics
        if "eval/reward_mean" in metrics:
            self.evaluations[int(metrics["eval/step"])] = Evaluated(
                metrics["eval/reward_mean"], "eval/accuracy" in metrics
            )


class PlainView(SilentView):
    """Prints a line every few steps, for logs."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._following, self._clock_s = _Following(), clock_s
        self._step, self._state, self._said_s = 0, "", 0.0

    def show(self, snapshot: LiveState) -> None:
        self._following.follow(snapshot)
        eta = self._following.pace.eta(snapshot)
        now, current = self._clock_s(), state(snapshot)
        steps, idle_s = snapshot.step - self._step, now - self._said_s
        due = (
            steps >= PLAIN_STEPS
            or (steps and idle_s >= PLAIN_S)
            or current != self._state
            or idle_s >= PLAIN_IDLE_S
        )
        if not due or current == "done":
            return
        self._step, self._state, self._said_s = snapshot.step, current, now
        outcome, flow, waiting = told(snapshot, self._following.evaluations)
        self.say(
            "; ".join(
                filter(
                    None,
                    [
                        f"step {snapshot.step}/{snapshot.steps} {current}",
                        *outcome,
                        *flow,
                        eta,
                        waiting,
                    ],
                )
            )
        )


class LiveView:
    """A display that redraws itself at the bottom of the terminal; lines scroll above it."""

    def __init__(self, console: Console | None = None) -> None:
        self._following, self._started_s = _Following(), time.monotonic()
        self._console = console or Console(highlight=False)
        self._live = Live(
            Text("starting"),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()

    def show(self, snapshot: LiveState) -> None:
        self._following.follow(snapshot)
        self._live.update(self.picture(snapshot))

    def picture(self, snapshot: LiveState) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        times = " ".join(
            filter(
                None,
                [clock(time.monotonic() - self._started_s), self._following.pace.eta(snapshot)],
            )
        )
        bar.add_row(
            Text(snapshot.run_name, "bold"),
            ProgressBar(total=snapshot.steps, completed=snapshot.step),
            Text(f"step {snapshot.step}/{snapshot.steps}  {times}"),
        )
        outcome, flow, waiting = told(snapshot, self._following.evaluations)
        lines = [
            Text("   ".join(facts), no_wrap=True, overflow="ellipsis")
            for facts in (outcome, flow)
            if facts
        ]
        last = "; ".join(filter(None, [state(snapshot), waiting]))
        return Group(bar, *lines, Text(last, "dim", no_wrap=True, overflow="ellipsis"))

    def say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()
