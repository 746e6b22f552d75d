"""The sections of a run's report that are text and tables, as HTML.

Each is a function from a `RunDirectory` to HTML, or to "" if its data is missing. Driven by
`tools.report`.
"""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from statistics import fmean

from omegaconf import OmegaConf

from tools.reporting.advice import RunFacts, advise, estimates
from tools.reporting.compact import compact, duration
from tools.reporting.page import section
from tools.reporting.plots import HELD_OUT, evaluations
from tools.reporting.run_directory import RunDirectory, is_number


def head(run: RunDirectory) -> str:
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


def problems(run: RunDirectory) -> str:
    if not run.problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<section class="problems"><h2>Missing from this report</h2><ul>{items}</ul></section>'


def headline(run: RunDirectory) -> str:
    """Single facts, then the changes from the first steps to the last."""
    if not run.metrics:
        return ""
    last, width = run.metrics[-1], max(1, min(5, len(run.metrics) // 4))
    facts = [(f"{run.num_steps}", "learner steps"), (duration(run.seconds()[-1]), "wall time")]
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
    for kind in run.kinds:
        rows += _change(
            f"Held-out {HELD_OUT[run.held_out]}, {kind} prompts",
            run.series(run.held_out.replace("eval/", f"eval/{kind}/"))[1],
            1,
            rise=True,
            percent=run.held_out == "eval/accuracy",
        )
        length = run.series(f"eval/{kind}/length_mean")[1]
        rows += _change(f"Held-out length, mean, {kind} prompts", length, 1)
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


def advice(run: RunDirectory) -> str:
    if not run.metrics:
        return ""
    facts = RunFacts.of(run)
    found = advise(facts)
    items = "".join(
        f"<li>{escape(advice.observation)} <b>{escape(advice.action)}</b></li>" for advice in found
    )
    body = f"<ol>{items}</ol>" if items else "<p>No key stands out: change none of them.</p>"
    body += "".join(f"<p>{escape(sentence)}</p>" for sentence in estimates(facts))
    note = (
        "From the rows after the first step; the most important advice comes first. Estimates use "
        "a distribution fitted to the lengths of each prompt."
    )
    return section("Advice", note, body)


def ledger(run: RunDirectory) -> str:
    """A table that shows whether any prompt starved: how many prompts had each end, how often."""
    ledger = run.ledger()
    if not ledger:
        return ""
    most = max(counts["opened"] for counts in ledger.values())
    # Each number of times up to 7, and then ranges: a small set is drawn hundreds of times.
    columns = [(n, n) for n in range(min(most, 7) + 1)]
    while columns[-1][1] < most:
        first = columns[-1][1] + 1
        columns.append((first, 2 * first - 1))
    header = "".join(
        f'<th class="n">{first}{f"–{last}" if last > first else ""}x</th>'
        for first, last in columns
    )
    body = ""
    for outcome in ("opened", "shipped", "filled", "dropped"):
        times = Counter(counts[outcome] for counts in ledger.values())
        body += (
            f"<tr><td>{outcome}</td>"
            + "".join(
                f'<td class="n">{sum(times[n] for n in range(first, last + 1)) or ""}</td>'
                for first, last in columns
            )
            + "</tr>"
        )
    note = (
        f"The number of prompts, of the {compact(len(ledger))} drawn, whose groups were opened, "
        "shipped to the learner, filled up with truncated responses, or dropped, by how often this "
        "happened. A dropped prompt is put back a limited number of times; groups.jsonl records "
        "the reason."
    )
    return section(
        "Did any prompt starve?", note, f"<table><tr><th>prompts</th>{header}</tr>{body}</table>"
    )


def reproduce(run: RunDirectory) -> str:
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
    return section("How to reproduce", note, f"<pre>{commands}</pre>")


def config(run: RunDirectory) -> str:
    if not run.config:
        return ""
    settings = escape(OmegaConf.to_yaml(OmegaConf.create(run.config)))
    return (
        "<section><details><summary>Configuration</summary>"
        f"<pre>{settings}</pre></details></section>"
    )


def last_metrics(run: RunDirectory) -> str:
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
