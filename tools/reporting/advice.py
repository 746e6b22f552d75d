"""Reads a run as an experienced user would, and names the keys to turn: waits, signal, surplus.

Each rule is a function from the facts of a run to an `Advice` or None. Pure: a `RunDirectory` in,
sentences out. Driven by `tools.report`, which shows all of them, and by the launcher's summary,
which shows the most important ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

from tools.reporting.compact import compact
from tools.reporting.counterfactual import Counterfactual, counterfactual
from tools.reporting.run_directory import Row, RunDirectory, is_number

MIN_STEPS = 4  # fewer do not show a pattern
# The run's start is not in the shares: the first step includes the start of the engines.
LONG_WAIT, SHORT_WAIT = 0.25, 0.1  # the learner's waits, as shares of the time
FULL, HALF_EMPTY = 0.8, 0.5  # busy slots, as shares of all
MOSTLY_UNIFORM = 0.5  # of the run or of its last third; at 0.3 nothing was gained by any key
MANY_TRUNCATED, MANY_OVERDUE, MANY_CAPPED = 0.1, 0.05, 0.05
NO_SAVING = 1.1  # longest response that was trained on, relative to that of a plain run
HEAVY_TAIL = 2.5  # longest response of a group, relative to the mean response


@dataclass(frozen=True)
class Advice:
    """An observation, the keys to turn because of it, and the share of the run that it concerns."""

    observation: str
    action: str
    weight: float


@dataclass(frozen=True)
class RunFacts:
    """The input of the rules: rows after the first step, and estimates from the ledger."""

    run: RunDirectory
    steady: list[Row]
    estimate: Counterfactual | None

    @classmethod
    def of(cls, run: RunDirectory) -> RunFacts:
        size, limit = run.setting("darts.group_size"), run.setting("sampling.max_tokens")
        known = isinstance(size, int) and isinstance(limit, int)
        return cls(run, run.metrics[1:], counterfactual(run.groups, size, limit) if known else None)

    def mean(self, key: str) -> float | None:
        values = [float(row[key]) for row in self.steady if is_number(row.get(key))]
        return fmean(values) if values else None

    def late(self, key: str) -> float | None:
        """The mean over the last third of the steps."""
        part = self.steady[-max(1, len(self.steady) // 3) :]
        return RunFacts(self.run, part, self.estimate).mean(key)

    @property
    def step_s(self) -> float:
        seconds = self.run.seconds()
        return max(1e-9, (seconds[-1] - seconds[0]) / len(self.steady))

    @property
    def waited(self) -> float | None:
        """The share of time for which the learner waited for groups."""
        waited_s = self.mean("wait/learner_s")
        return None if waited_s is None else min(1.0, waited_s / self.step_s)

    @property
    def surplus(self) -> float | None:
        """Rollouts per group beyond those that are trained on, relative to these."""
        budget, size = self.mean("darts/budget_mean"), self.run.setting("darts.group_size")
        return None if budget is None or not is_number(size) else budget / size - 1


def learner_waited(facts: RunFacts) -> Advice | None:
    waited, busy = facts.waited, facts.mean("engine/busy_frac")
    if waited is None or busy is None or waited < LONG_WAIT:
        return None
    if facts.run.setting("pipeline.mode") == "sync":
        action = (
            "Set pipeline.mode=async: the engines then generate the next groups while the learner "
            "trains."
        )
    elif busy >= FULL:
        action = (
            "The engines are the bottleneck. Add engines (actors.num_engines), or raise "
            "actors.slots if the latency per token hardly grows with them."
        )
    else:
        lag = facts.run.setting("staleness.max_lag")
        action = (
            f"The engines had free slots while the learner waited for long responses. Raise "
            f"staleness.max_lag (now {lag}), so that more groups are open at a time"
        )
        action += (
            "; or raise redundancy.upper, so that a group depends less on its longest responses."
            if facts.surplus == 0
            else "."
        )
    return Advice(
        f"The learner waited for groups {_percent(waited)} of the time, while {_percent(busy)} of "
        "the engines' slots were busy.",
        action,
        waited,
    )


def engines_idle(facts: RunFacts) -> Advice | None:
    waited, busy = facts.waited, facts.mean("engine/busy_frac")
    if waited is None or busy is None or waited > SHORT_WAIT or busy > HALF_EMPTY:
        return None
    return Advice(
        f"Only {_percent(busy)} of the engines' slots were busy, and the learner waited for groups "
        f"just {_percent(waited)} of the time.",
        "The learner is the bottleneck. Give it more of the machine: lower actors.num_engines or "
        "actors.slots, or raise batch.max_tokens if its memory is not full. Otherwise raise "
        "redundancy.upper, since free slots cost little.",
        1 - busy,
    )


def verifier_waited(facts: RunFacts) -> Advice | None:
    queue_s, busy = facts.mean("verifier/queue_s_mean"), facts.mean("verifier/busy_frac")
    if queue_s is None or (queue_s < 0.1 * facts.step_s and (busy or 0) < FULL):
        return None
    return Advice(
        f"A response waited {queue_s:.2g} s on average for a free verifier, in steps of "
        f"{facts.step_s:.2g} s; {_percent(busy or 0)} of the verifiers were busy.",
        "Raise data.verifier_workers, which is half the cores by default, or make the verifier "
        "faster.",
        min(1.0, queue_s / facts.step_s),
    )


def groups_uniform(facts: RunFacts) -> Advice | None:
    share, late = facts.mean("darts/uniform_frac"), facts.late("darts/uniform_frac")
    if share is None or late is None or max(share, late) < MOSTLY_UNIFORM:
        return None
    reward = facts.late("reward/mean")
    size = facts.run.setting("darts.group_size")
    if facts.run.setting("darts.pilot"):
        where = "solved almost always" if (reward or 0) > 0.5 else "almost never solved"
        action = f"Pilots are on already. Many prompts are {where}: change data.train."
    elif facts.run.setting("darts.uniform") == "drop" and isinstance(size, int):
        action = (
            f"They were replaced after all of their tokens had been generated. With darts.pilot at "
            f"about {max(1, size // 2)}, those of prompts that are nearly always solved, or never, "
            "are stopped after their first responses."
        )
    else:
        action = (
            "Other prompts, solved neither nearly always nor never, give more signal per token. "
            "With the present ones, darts.uniform=drop puts more signal into a step at the cost "
            "of more tokens, and darts.pilot at about half of darts.group_size saves some of these."
        )
    return Advice(
        f"{_percent(share)} of the groups had equal rewards and so no gradient "
        f"({_percent(late)} in the last third of the run).",
        action,
        max(share, late),
    )


def responses_truncated(facts: RunFacts) -> Advice | None:
    ended = [
        rollout
        for group in facts.run.trained_groups()
        for rollout in group["rollouts"]
        if rollout["end"] not in ("cancelled", "lost")
    ]
    share = sum(bool(rollout.get("truncated")) for rollout in ended) / max(1, len(ended))
    if share < MANY_TRUNCATED:
        return None
    return Advice(
        f"{_percent(share)} of the responses that ended were cut off at the length limit.",
        f"Raise sampling.max_tokens (now {facts.run.setting('sampling.max_tokens')}) and "
        "model.max_context with it, in a new run: a response without an end is usually wrong.",
        share,
    )


def surplus_was_wasted(facts: RunFacts) -> Advice | None:
    """A large part of the tokens was generated in vain, on engines that the learner waited for."""
    waited, busy, surplus = facts.waited, facts.mean("engine/busy_frac"), facts.surplus
    last = facts.run.metrics[-1]
    unused = sum(last.get(f"tokens/{use}", 0) for use in ("cancelled", "discarded"))
    share = unused / max(1, last.get("tokens/generated", 0))
    if not surplus or share < 0.35 or (waited or 0) < LONG_WAIT or (busy or 0) < FULL:
        return None
    return Advice(
        f"{_percent(share)} of the tokens were cancelled or discarded, with {1 + surplus:.2g} "
        "times as many rollouts as were trained on.",
        f"Lower redundancy.upper (now {facts.run.setting('redundancy.upper')}) to spend the "
        "engines' time on more groups.",
        share,
    )


def surplus_saved_no_time(facts: RunFacts) -> Advice | None:
    """The long seats waited for longer responses than all of a smaller group would have had."""
    estimate = facts.estimate
    if estimate is None or not facts.surplus:
        return None
    ratio = estimate.longest / max(1.0, estimate.plain_longest)
    if ratio < NO_SAVING:
        return None
    return Advice(
        f"A group waited for a response of {estimate.longest:.0f} tokens, and a plain run would "
        f"have waited for one of {estimate.plain_longest:.0f}: the surplus saved no time.",
        f"Lower redundancy.upper (now {facts.run.setting('redundancy.upper')}), or set "
        "darts.long_end=none if long responses need not be trained on.",
        min(1.0, ratio - 1),
    )


def tail_without_surplus(facts: RunFacts) -> Advice | None:
    estimate = facts.estimate
    if estimate is None or facts.surplus != 0:
        return None
    size = facts.run.setting("darts.group_size")
    mean = estimate.plain_tokens / estimate.num_groups / size
    ratio = estimate.plain_longest / max(1.0, mean)
    if ratio < HEAVY_TAIL:
        return None
    return Advice(
        f"The longest response of a group had {ratio:.1f} times the mean length, and no group had "
        "a rollout to spare.",
        "Set darts.policy=darts and redundancy.upper to 1.5 or more: a group then ends without its "
        "longest responses.",
        1 - 1 / ratio,
    )


def policy_too_stale(facts: RunFacts) -> Advice | None:
    share = facts.mean("train/tis_clip_frac")
    if share is None or share < MANY_CAPPED:
        return None
    return Advice(
        f"{_percent(share)} of the tokens had their importance weight capped: the policy that "
        "sampled them differs from the one that trained on them.",
        f"Lower staleness.max_lag (now {facts.run.setting('staleness.max_lag')}) or optimizer.lr.",
        share,
    )


def groups_overdue(facts: RunFacts) -> Advice | None:
    ends = [group["end"] for group in facts.run.groups]
    share = sum(end in ("deadline", "stale") for end in ends) / max(1, len(ends))
    if share < MANY_OVERDUE:
        return None
    return Advice(
        f"{_percent(share)} of the groups were dropped because they exceeded the lag bound.",
        f"Raise staleness.max_lag (now {facts.run.setting('staleness.max_lag')}), or set "
        "staleness.on_deadline=wait to keep their tokens.",
        share,
    )


RULES: tuple[Callable[[RunFacts], Advice | None], ...] = (
    learner_waited,
    engines_idle,
    verifier_waited,
    groups_uniform,
    responses_truncated,
    surplus_was_wasted,
    surplus_saved_no_time,
    tail_without_surplus,
    policy_too_stale,
    groups_overdue,
)


def advise(facts: RunFacts) -> list[Advice]:
    """The advice of all rules that apply, the most important first."""
    if len(facts.steady) < MIN_STEPS:
        return []
    found = [advice for rule in RULES if (advice := rule(facts)) is not None]
    return sorted(found, key=lambda advice: -advice.weight)


def estimates(facts: RunFacts) -> Iterator[str]:
    """Sentences on the tokens that the surplus cost and saved, and on a run without it."""
    found = facts.estimate
    if found is None:
        return
    num = compact(found.num_groups)
    if found.num_cut:
        yield (
            f"In {num} trained groups, {compact(found.num_cut)} responses were cancelled or "
            f"cut short after {compact(found.cut_tokens)} tokens in total. Had they gone on, they "
            f"would have cost about {compact(found.rest_tokens)} tokens more."
        )
    yield (
        f"A plain run would have generated about {compact(found.plain_tokens)} tokens for the same "
        f"groups, where this run generated {compact(found.tokens)}. Each group would have waited "
        f"for a response of about {found.plain_longest:.0f} tokens, where it waited for one of "
        f"{found.longest:.0f}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
