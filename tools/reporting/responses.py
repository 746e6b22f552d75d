"""The section of a run's report with responses to read. Driven by `tools.report`."""

from __future__ import annotations

from html import escape

from tools.reporting.ends import ENDS
from tools.reporting.page import section
from tools.reporting.run_directory import Row, RunDirectory, is_number

NUM_SHOWN = 3  # of each end: from the beginning, the middle and the end of the run


def responses(run: RunDirectory) -> str:
    """Responses that took short seats and long ones, and cancelled ones, over the run."""
    by_end: dict[str, list[Row]] = {}
    for row in run.samples:
        if _text(row, "response"):
            by_end.setdefault(str(row.get("end") or "recorded"), []).append(row)
    chosen = [
        (ENDS[end].label if end in ENDS else end, row)
        for end, rows in sorted(by_end.items(), reverse=True)
        for row in spread(rows, NUM_SHOWN)
    ]
    if not chosen:
        return ""
    body = "".join(_sample(label, row) for label, row in chosen)
    note = (
        f"Up to {NUM_SHOWN} of each kind, from the beginning, the middle and the end of the run. "
        "The text of a cancelled response ends where it was stopped; it has no reward."
    )
    return section("Responses", note, f"<table>{body}</table>")


def spread(rows: list[Row], num: int) -> list[Row]:
    """At most `num` of the rows, with the first and the last, at even distances."""
    if len(rows) <= num:
        return rows
    return [rows[round(i * (len(rows) - 1) / (num - 1))] for i in range(num)]


def _sample(label: str, row: Row) -> str:
    facts = [
        f"{key.replace('_', ' ')} {row[key]:g}"
        for key in ("step", "reward", "tokens")
        if is_number(row.get(key))
    ]
    prompt, response = _text(row, "prompt"), _text(row, "response")
    shown = (f"<pre>{escape(prompt)}</pre>" if prompt else "") + f"<pre>{escape(response)}</pre>"
    return (
        f'<tr><td class="tag"><b>{label}</b><br>{"<br>".join(escape(fact) for fact in facts)}</td>'
        f"<td>{shown}</td></tr>"
    )


def _text(row: Row, key: str) -> str:
    return row[key] if isinstance(row.get(key), str) else ""
