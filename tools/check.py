"""`python -m tools.check key=value ...`: check that a run would train on the right numbers.

First the data, before any engine is loaded: the rows, a few prompts as the model receives them,
their lengths, and the rewards of responses whose worth is known. Then the model itself: learner and
engine are compared on it, which takes less than a minute for a small model. Exits with status 1 if
anything is wrong. Run by hand; `tools.launch` runs the quick part of it for data of the user, and a
run makes the same comparisons of the model itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, NoReturn

from buffer.processes.private_folder import private_folder
from configs.command import run_command
from configs.errors import ExitStatus
from configs.model_path import check_model
from configs.schema import Config, key
from tools.checking.data import check_data
from tools.checking.findings import Finding
from tools.checking.gate import Refused, checks
from tools.checking.prompts import PromptRefused

WIDTH = 35


@dataclass
class CheckConfig(Config):
    depth: Literal["quick", "data", "all"] = key(
        "all",
        "How much is checked. all: the data, then the model on an engine. data: only the data, "
        "without loading a model. quick: only a few rows of the data, which takes seconds; "
        "suspicions are printed but do not fail.",
    )


def run(config: CheckConfig) -> int:
    check_model(config.model.path)
    quick = config.depth == "quick"
    bad = [finding for finding in _shown(config, quick) if not finding.good]
    failed = [finding for finding in bad if finding.verdict == "error"]
    if failed:
        raise Refused(f"{failed[0].subject}: {failed[0].result}")
    if config.depth == "all" and not bad:
        check_engine(config)
    return ExitStatus.FAILED if bad and not quick else ExitStatus.OK


def _shown(config: CheckConfig, quick: bool) -> list[Finding]:
    """The findings on the data, printed as they come; of a quick check, only the bad ones."""
    findings: list[Finding] = []
    for line in check_data(config, quick):
        if isinstance(line, Finding):
            findings.append(line)
        if not quick or (isinstance(line, Finding) and line.verdict == "warning"):
            print(line, flush=True)
    return findings


def check_engine(config: Config) -> None:
    print(f"\n{config.model.path} in {config.model.dtype}:", flush=True)
    started = time.monotonic()
    with private_folder():
        for verdict in checks(config):
            took_s, started = time.monotonic() - started, time.monotonic()
            print(f"  ok  {verdict.check:<{WIDTH}}{verdict.result}  [{took_s:.1f} s]", flush=True)


def main() -> NoReturn:
    run_command(
        "Check before a run that its data can be trained on and that its verifier tells answers "
        "from nonsense, and show a few prompts as tokens. Then check that learner and engine "
        "compute the same log-probabilities for the model of this configuration, also after new "
        "weights have been loaded.",
        run,
        schema=CheckConfig,
        errors=(Refused, PromptRefused),
    )


if __name__ == "__main__":
    main()
