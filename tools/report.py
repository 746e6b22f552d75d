"""`python -m tools.report runs/<name>`: write runs/<name>/report.html, one self-contained page.

    python -m tools.report runs/a runs/b --out comparison.html

The page shows the outcome of a run, finished or not, the evidence for it, and how to reproduce it.
This module owns the page; `tools.reporting.plots` draws the figures, `tools.reporting.differences`
compares runs. It never uses the network and never changes another file of the run. Driven by hand,
and by `tools.launch` at the end of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from buffer.records.files import atomic_write
from configs.command import run_command
from tools.reporting import sections
from tools.reporting.audited import audited
from tools.reporting.differences import compare
from tools.reporting.page import page_of, section
from tools.reporting.plots import FIGURES
from tools.reporting.responses import responses
from tools.reporting.run_directory import FILES, RunDirectory

SECTIONS = {
    "outcome": (
        "Did it learn?",
        "Held-out prompts are sampled at the training temperature. An evaluation is drawn at "
        "the step of the policy that answered, and at the time of the step that reported it.",
    ),
    "lengths": (
        "Response lengths",
        "Bands are quantiles within one step, before selection and after it. If both fall, the "
        "policy itself has changed; if only those of selected responses are lower, selection has "
        "left out long responses. A cancelled response counts as generated, with the length at "
        "which it was stopped.",
    ),
    "prompts": (
        "Prompt by prompt",
        "Each column is the group of one prompt, and each dot is one response. A cancelled "
        "response is drawn at the length at which it was stopped; it would have been longer. A dot "
        "is filled if the reward exceeds ½.",
    ),
    "tokens": (
        "Where the tokens went",
        "Cancelled tokens were decoded before the cancel; Advice estimates the further cost of "
        "these responses. Discarded tokens belong to responses that were truncated, were not "
        "selected, or were in a dropped group.",
    ),
    "lag": (
        "Staleness",
        "The lag of trajectories is exact. That of groups is an estimate, because the ledger "
        "records versions of groups, not of trajectories.",
    ),
    "waits": (
        "Waiting times",
        "The seconds that the learner spent waiting in each step; and the share of time that it "
        "waited, with the share of engine slots that were busy.",
    ),
    "health": ("Health of the run", "Each step, and a running mean."),
}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    Raises `ValueError` if the folder holds none of a run's files.
    """
    run = RunDirectory.read(run_dir)
    figures = {name: draw(run) for name, draw in FIGURES.items()}
    undrawn = [SECTIONS[name][0] for name, svg in figures.items() if not svg]
    if undrawn and run.metrics:
        run.problems.append(f"Sections left out because data is missing: {', '.join(undrawn)}.")
    plots = "".join(section(*SECTIONS[name], body=svg) for name, svg in figures.items() if svg)
    body = (
        sections.head(run)
        + sections.problems(run)
        + sections.headline(run)
        + sections.advice(run)
        + plots
        + audited(run)
        + sections.ledger(run)
        + responses(run)
        + sections.reproduce(run)
        + sections.config(run)
        + sections.last_metrics(run)
    )
    page = page_of(run.name, body)
    target = run_dir / "report.html"
    atomic_write(target, page, durable=False)  # a browser may reload it at any time
    return target


def write_comparison(run_dirs: Sequence[Path], target: Path) -> Path:
    """Write a page that compares the runs, and return its path."""
    page = compare([RunDirectory.read(run_dir) for run_dir in run_dirs])
    atomic_write(target, page, durable=False)
    return target


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        type=Path,
        nargs="+",
        help=f"directory of a run with some of the files {', '.join(FILES)}; two or more are "
        "compared",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page of the comparison (default: comparison.html in the directory of the first run)",
    )


def run(given: argparse.Namespace) -> None:
    first, *others = given.run
    if others:
        print(write_comparison(given.run, given.out or first / "comparison.html"))
    elif given.out:
        raise ValueError(f"--out={given.out}: needs two runs or more; a report has its own place")
    else:
        print(write_report(first))


def main() -> NoReturn:
    run_command(
        "Write report.html, one self-contained page, to the directory of a run. Compare runs if "
        "several are given.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
