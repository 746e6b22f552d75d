"""`python -m tools.check key=value ...`: check that a run would train on the right numbers.

Shows a few prompts as the model receives them, then compares learner and engine on the model
itself. This takes less than a minute for a small model. Exits with status 1 if the model is
refused. Run by hand; a run makes the same comparisons itself and stops at the first that fails.
"""

from __future__ import annotations

import time
from typing import NoReturn

from configs.command import run_command
from configs.schema import Config
from tools.checking.gate import Refused, checks
from tools.checking.prompts import PromptRefused, describe_prompts

WIDTH = 35


def run(config: Config) -> None:
    for line in describe_prompts(config):
        print(line, flush=True)
    print(f"\n{config.model.path} in {config.model.dtype}:", flush=True)
    started = time.monotonic()
    for verdict in checks(config):
        took_s, started = time.monotonic() - started, time.monotonic()
        print(f"  ok  {verdict.check:<{WIDTH}}{verdict.result}  [{took_s:.1f} s]", flush=True)


def main() -> NoReturn:
    run_command(
        "Check before a run that learner and engine compute the same log-probabilities for the "
        "model of this configuration, also after new weights have been loaded, and show a few "
        "prompts as tokens.",
        run,
        schema=Config,
        errors=(Refused, PromptRefused),
    )


if __name__ == "__main__":
    main()
