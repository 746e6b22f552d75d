"""What selection leaves out: the audited groups of a run, in which nothing was cancelled.

Elsewhere, a cancelled response has neither a reward nor a length in full. Pure: from rows of
`groups.jsonl` to a section of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from tools.reporting.intervals import half_width
from tools.reporting.page import section
from tools.reporting.run_directory import Row, RunDirectory

SEATS = {
    "all responses": lambda end: True,
    "selected": lambda end: end.startswith("selected"),
    "left out": lambda end: not end.startswith("selected"),
}


def audited(run: RunDirectory) -> str:
    """A table of all, the selected and the left-out responses; "" with fewer than two groups."""
    groups = [group for group in run.trained_groups() if group.get("audit")]
    whole = [
        group
        for group in groups
        if not {r["end"] for r in group["rollouts"]} & {"cancelled", "lost"}
        and any(_in(SEATS["left out"], group))
    ]
    if len(whole) < 2:
        return ""
    body = "".join(
        f"<tr><td>{name}</td>"
        + "".join(
            f'<td class="n">{fmean(_mean(rows, column) for rows in of_groups):{shown}}</td>'
            for column, shown in (("reward", ".3f"), ("tokens", ".1f"))
        )
        + "</tr>"
        for name, chosen in SEATS.items()
        for of_groups in [[_in(chosen, group) for group in whole]]
    )
    note = (
        f"In {len(whole)} audited groups (darts.audit) nothing was cancelled, so that rewards and "
        "lengths of the responses that selection leaves out are known. Selected responses differ "
        f"from all of their group by {_difference(whole, 'reward', '+.3f')} in reward and by "
        f"{_difference(whole, 'tokens', '+.1f')} tokens (means over the groups, 95 % intervals)."
    )
    if unfinished := len(groups) - len(whole):
        note += f" {unfinished} more ended at their deadline, or had nothing left out."
    return section(
        "What does selection leave out?",
        note,
        '<table><tr><th>of a group</th><th class="n">reward, mean</th>'
        f'<th class="n">sampled tokens, mean</th></tr>{body}</table>',
    )


def _in(chosen: Callable[[str], bool], group: Row) -> list[Row]:
    return [rollout for rollout in group["rollouts"] if chosen(rollout["end"])]


def _mean(rollouts: Sequence[Row], column: str) -> float:
    return fmean(rollout[column] for rollout in rollouts)


def _difference(groups: Sequence[Row], column: str, shown: str) -> str:
    """The selected minus all responses, with half of a 95 % interval over the groups."""
    values = [
        _mean(_in(SEATS["selected"], group), column) - _mean(group["rollouts"], column)
        for group in groups
    ]
    return f"{fmean(values):{shown}} ± {half_width(values):{shown[1:]}}"
