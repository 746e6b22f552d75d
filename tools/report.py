"""`python -m tools.report runs/<name>`: write runs/<name>/report.html, one self-contained page.

The page shows the outcome of a run, finished or not, the evidence for it, and how to reproduce it.
This module owns the page; `tools.reporting.plots` draws the figures. It never uses the network and
never changes another file of the run. Driven by hand, and by `tools.launch` at the end of a run.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from html import escape
from pathlib import Path
from statistics import fmean
from typing import NoReturn

from omegaconf import OmegaConf

from buffer.records.files import atomic_write
from configs.command import run_command
from tools.reporting.plots import FIGURES, HELD_OUT, compact, evaluations
from tools.reporting.run_directory import FILES, Row, RunDirectory, is_number

SECTIONS = {
    "outcome": (
        "Did it learn?",
        "Held-out prompts are sampled at the training temperature. An evaluation is drawn at "
        "the step of the policy that answered (left) and at the time of the step that reported it "
        "(right).",
    ),
    "lengths": (
        "Response lengths",
        "Bands are quantiles within one step, before selection (left) and after it (right). If "
        "both fall, the policy itself has changed; if only the right one is lower, selection has "
        "left out long responses. A cancelled response counts as generated, with the length at "
        "which it was stopped.",
    ),
    "prompts": (
        "Prompt by prompt",
        "Each column is the group of one prompt, and each dot is one response. A cancelled "
        "response is drawn at the length at which it was stopped; it would have been longer.",
    ),
    "tokens": (
        "Where the tokens went",
        "Cancelled tokens were decoded before the cancel; the further cost of these responses is "
        "unknown. Discarded tokens belong to responses that were truncated, were not selected, or "
        "were in a dropped group.",
    ),
    "lag": (
        "Staleness",
        "Right: the exact lag of the trajectories that the learner received. Left: an estimate by "
        "group, because the ledger records versions of groups, not of trajectories.",
    ),
    "waits": (
        "Waiting times",
        "Left: the seconds that the learner spent waiting in each step. Right: the share of time "
        "that the learner waited, and the share of engine slots that were busy.",
    ),
    "health": ("Health of the run", "Faint: each step. Solid: a running mean."),
}

STYLE = """
:root {
  --ink:#1d2733; --muted:#5d6b7a; --line:#e2e7ec; --paper:#fff; --wash:#f5f7f9; --accent:#3d5bd9;
  --good:#12876f; --bad:#c23f22;
}
* { box-sizing:border-box }
body {
  margin:0; background:var(--wash); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;
}
main { max-width:1080px; margin:0 auto; padding:36px 28px 64px }
h1 { font-size:30px; line-height:1.2; margin:0; letter-spacing:-.01em }
h2 { font-size:19px; margin:0 0 2px }
.kind { color:var(--accent); font-weight:600; font-size:13px; margin:0 0 4px }
.lead { color:var(--muted); margin:6px 0 0 }
section {
  background:var(--paper); border:1px solid var(--line); border-radius:10px;
  padding:20px 24px; margin-top:18px;
}
section > p.note, details > p.note {
  color:var(--muted); margin:0 0 12px; font-size:13.5px; max-width:86ch; text-wrap:pretty;
}
svg { width:100%; height:auto; display:block }
.facts { display:flex; flex-wrap:wrap; gap:10px 40px; margin-top:22px }
.facts b { display:block; font-size:23px; line-height:1.25; font-variant-numeric:tabular-nums }
.facts span { color:var(--muted); font-size:13px }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td {
  text-align:left; padding:7px 14px 7px 0; border-bottom:1px solid var(--line);
  vertical-align:top;
}
th { color:var(--muted); font-weight:500; font-size:13px } tr:last-child td { border-bottom:0 }
td.n,th.n { text-align:right } .good { color:var(--good) } .bad { color:var(--bad) }
.problems { border-left:4px solid #e3a11f } .problems ul { margin:6px 0 0; padding-left:20px }
pre {
  background:var(--wash); border:1px solid var(--line); border-radius:6px; padding:10px 12px;
  margin:6px 0; font:12.5px/1.5 ui-monospace,"DejaVu Sans Mono",monospace; white-space:pre-wrap;
  overflow-wrap:anywhere; max-height:15em; overflow:auto;
}
summary { cursor:pointer; font-weight:600 } details[open] summary { margin-bottom:8px }
.tag { white-space:nowrap; width:1%; font-size:13px; color:var(--muted) }
.tag b { color:var(--ink) }
"""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    Raises `ValueError` if the folder holds none of a run's files.
    """
    run = RunDirectory.read(run_dir)
    figures = {name: draw(run) for name, draw in FIGURES.items()}
    undrawn = [SECTIONS[name][0] for name, svg in figures.items() if not svg]
    if undrawn and run.metrics:
        run.problems.append(f"Sections left out because data is missing: {', '.join(undrawn)}.")
    sections = "".join(_section(*SECTIONS[name], body=svg) for name, svg in figures.items() if svg)
    body = (
        _head(run)
        + _problems(run)
        + _headline(run)
        + sections
        + _ledger(run)
        + _samples(run)
        + _reproduce(run)
        + _config(run)
        + _last_metrics(run)
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(run.name)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    target = run_dir / "report.html"
    atomic_write(target, page, durable=False)  # a browser may reload it at any time
    return target


def _head(run: RunDirectory) -> str:
    settings = [
        (str(run.setting("model.path") or ""), "{}"),
        (str(run.setting("data.train") or ""), "on {}"),
        (run.setting("darts.policy"), "policy {}"),
        (run.setting("pipeline.mode"), "{}"),
        (run.setting("run.seed"), "seed {}"),
    ]
    told = ", ".join(text.format(value) for value, text in settings if value not in (None, ""))
    told += ", on emulated decode latency" if run.emulated else ""
    return (
        f'<header><p class="kind">Training run</p><h1>{escape(run.name)}</h1>'
        f'<p class="lead">{escape(told)}</p></header>'
    )


def _problems(run: RunDirectory) -> str:
    if not run.problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<section class="problems"><h2>Missing from this report</h2><ul>{items}</ul></section>'


def _headline(run: RunDirectory) -> str:
    """Single facts, then the changes from the first steps to the last."""
    if not run.metrics:
        return ""
    last, width = run.metrics[-1], max(1, min(5, len(run.metrics) // 4))
    facts = [(f"{len(run.metrics)}", "learner steps"), (_duration(run.seconds()[-1]), "wall time")]
    for kind in ("generated", "trained"):
        if is_number(last.get(f"tokens/{kind}")):
            facts.append((compact(last[f"tokens/{kind}"]), f"tokens {kind}"))
    if run.trained_groups():
        facts.append((compact(len(run.trained_groups())), "groups trained"))
    ends = Counter(group["end"] for group in run.groups)
    for end, name in (
        ("uniform", "groups replaced, rewards equal"),
        ("no_signal", "groups stopped after their pilots"),
    ):
        facts += [(compact(ends.pop(end)), name)] if ends[end] else []
    dropped = sum(ends.values()) - ends["shipped"] - ends["evaluated"] - ends["run_ended"]
    facts += [(compact(dropped), "groups dropped")] if dropped else []
    skipped = last.get("data/skipped_prompts", 0)
    facts += [(compact(skipped), "prompts skipped")] if skipped else []
    rows = _change(
        f"Held-out {HELD_OUT[run.held_out]}",
        [value for _, _, value in evaluations(run)],
        1,
        rise=True,
        percent=run.held_out == "eval/accuracy",
    )
    rows += _change("Held-out length, mean", run.series("eval/length_mean")[1], 1)
    rows += _change("Held-out length, p99", run.series("eval/length_p99")[1], 1)
    rows += _change("Reward", run.series("reward/mean")[1], width, rise=True)
    for kind, name in (("selected", "Trained"), ("generated", "Generated")):
        for statistic in ("mean", "p99"):
            rows += _change(
                f"{name} length, {statistic}", run.series(f"length/{kind}_{statistic}")[1], width
            )
    cards = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts)
    window = (
        f"the first {width} and the last {width} steps"
        if width > 1
        else "the first and the last step"
    )
    note = (
        '<p class="note">Held-out rows compare the first evaluation with the last; the other rows '
        f"are means over {window}.</p>"
    )
    header = (
        '<tr><th></th><th class="n">before</th><th class="n">after</th>'
        '<th class="n">change</th></tr>'
    )
    table = f"<h2>Before and after</h2>{note}<table>{header}{rows}</table>" if rows else ""
    return f'<div class="facts">{cards}</div>' + (f"<section>{table}</section>" if table else "")


def _change(
    name: str, values: list[float], width: int, *, rise: bool = False, percent: bool = False
) -> str:
    """A table row; if `rise`, higher is better, else lower. Empty for fewer than two values."""
    if len(values) < 2 * width or len(values) < 2:
        return ""
    before, after = fmean(values[:width]), fmean(values[-width:])
    if percent:
        shown = [
            f"{100 * before:.1f} %",
            f"{100 * after:.1f} %",
            f"{100 * (after - before):+.1f} points",
        ]
    else:
        digits = 3 if rise else 1
        change = (
            f"{100 * (after / before - 1):+.0f} %"
            if before > 0 and not rise
            else f"{after - before:+.{digits}f}"
        )
        shown = [f"{before:.{digits}f}", f"{after:.{digits}f}", change]
    small = 0.01 if rise else 0.02 * before  # too small a change for a colour
    verdict = "" if abs(after - before) <= small else "good" if (after > before) == rise else "bad"
    cells = (
        f'<td class="n">{shown[0]}</td><td class="n">{shown[1]}</td>'
        f'<td class="n {verdict}">{shown[2].replace("-", "−")}</td>'
    )
    return f"<tr><td>{name}</td>{cells}</tr>"


def _ledger(run: RunDirectory) -> str:
    """A table that shows whether any prompt starved: how many prompts had each end, how often."""
    ledger = run.ledger()
    if not ledger:
        return ""
    most = max(counts["opened"] for counts in ledger.values())
    header = "".join(f'<th class="n">{times}x</th>' for times in range(most + 1))
    body = ""
    for outcome in ("opened", "shipped", "filled", "dropped"):
        times = Counter(counts[outcome] for counts in ledger.values())
        body += (
            f"<tr><td>{outcome}</td>"
            + "".join(f'<td class="n">{times[n] or ""}</td>' for n in range(most + 1))
            + "</tr>"
        )
    note = (
        f"The number of prompts, of the {compact(len(ledger))} drawn, whose groups were opened, "
        "shipped to the learner, filled up with truncated responses, or dropped, by how often this "
        "happened. A dropped prompt is put back a limited number of times; groups.jsonl records "
        "the reason."
    )
    return _section(
        "Did any prompt starve?", note, f"<table><tr><th>prompts</th>{header}</tr>{body}</table>"
    )


def _samples(run: RunDirectory) -> str:
    """The shortest and the longest of the first samples, and of the last ones."""
    told = [row for row in run.samples if _text(row, "response")]
    if not told:
        return ""
    part = max(1, min(len(told) // 2, 16))
    chosen: list[tuple[str, Row]] = []
    for when, rows in (("early", told[:part]), ("late", told[-part:])):
        ordered = sorted(rows, key=lambda row: _length(row))
        for size, row in (("short", ordered[0]), ("long", ordered[-1])):
            if all(row is not other for _, other in chosen):
                chosen.append((f"{when}, {size}", row))
    body = "".join(_sample(label, row) for label, row in chosen)
    return _section(
        "Responses",
        "The shortest and the longest of the first recorded samples, and of the last ones.",
        f"<table>{body}</table>",
    )


def _sample(label: str, row: Row) -> str:
    facts = [
        f"{key.replace('_', ' ')} {row[key]:g}"
        for key in ("step", "reward", "tokens")
        if is_number(row.get(key))
    ]
    facts += [str(row["end"]).replace("_", " ")] if row.get("end") else []
    prompt, response = _text(row, "prompt"), _text(row, "response")
    shown = (f"<pre>{escape(prompt)}</pre>" if prompt else "") + f"<pre>{escape(response)}</pre>"
    return (
        f'<tr><td class="tag"><b>{label}</b><br>{"<br>".join(escape(fact) for fact in facts)}</td>'
        f"<td>{shown}</td></tr>"
    )


def _reproduce(run: RunDirectory) -> str:
    path = escape(str(run.path))
    commands = (
        f"python -m tools.launch --config {path}/config.yaml run.name={escape(run.name)}-again\n"
        f"python -m tools.replay {path}    # makes the decisions again and compares them\n"
        f"python -m tools.report {path}    # writes this page again"
    )
    note = (
        "The prompts, the rules and the seeds are the same. The timing is not, so an asynchronous "
        "run repeats in distribution, not token by token."
    )
    return _section("How to reproduce", note, f"<pre>{commands}</pre>")


def _config(run: RunDirectory) -> str:
    if not run.config:
        return ""
    settings = escape(OmegaConf.to_yaml(OmegaConf.create(run.config)))
    return (
        "<section><details><summary>Configuration</summary>"
        f"<pre>{settings}</pre></details></section>"
    )


def _last_metrics(run: RunDirectory) -> str:
    if not run.metrics:
        return ""
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="n">'
        f"{compact(value) if is_number(value) else escape(json.dumps(value))}</td></tr>"
        for key, value in sorted(run.metrics[-1].items())
    )
    return (
        "<section><details><summary>All metrics of the last step</summary>"
        f"<table>{rows}</table></details></section>"
    )


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{body}</section>'


def _text(row: Row, key: str) -> str:
    return row[key] if isinstance(row.get(key), str) else ""


def _length(row: Row) -> float:
    return row["tokens"] if is_number(row.get("tokens")) else len(_text(row, "response"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        type=Path,
        help=f"directory of a run with some of the files {', '.join(FILES)}",
    )


def run(given: argparse.Namespace) -> None:
    print(write_report(given.run))


def main() -> NoReturn:
    run_command(
        "Write report.html, one self-contained page, to the directory of a run.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
