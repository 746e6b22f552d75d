"""`python -m tools.check key=value ...`: whether a run of this configuration would train on the right numbers.

Shows a few prompts as the model is given them, then compares learner and engine on the model itself,
in less than a minute for a small one. Exits with status 1 if the model is refused. Driven by hand;
a run makes the same comparisons by itself and stops at the first that fails.
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
        "Check, before a run, that learner and engine compute the same for the model of this "
        "configuration, also after new weights have been loaded, and show a few prompts as tokens.",
        run,
        schema=Config,
        errors=(Refused, PromptRefused),
    )


if __name__ == "__main__":
    main()
