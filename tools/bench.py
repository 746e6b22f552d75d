"""`python -m tools.bench SUBJECT`: measure one subject on this machine and print the result.

Each subject has one function in `SUBJECTS`. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from configs.command import run_command
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core

ENGINES, SLOTS, GROUP_SIZE, MAX_TOKENS = 64, 256, 8, 100_000


def core(options: Sequence[str]) -> None:
    """Events per second through `Core.handle` on one CPU core.

    Measures reports of progress, then ends of rollouts with all the decisions that follow.
    """
    _no_options("core", options)
    machine = Core(
        CoreConfig(
            groups_per_step=4096,
            group_size=GROUP_SIZE,
            redundancy="fixed",
            upper=1.5,
            max_tokens=MAX_TOKENS,
        )
    )
    launched: list[int] = []

    def send(event: ev.Event) -> None:
        launched.extend(d.rollout_id for d in machine.handle(event) if type(d) is ev.Launch)

    send(ev.PolicyPublished(0))
    for index in range(ENGINES):
        send(ev.EngineJoined(f"engine/{index}", "bench", SLOTS, 0))
    send(ev.PromptsDrawn(tuple(ev.Prompt(f"p{i}") for i in range(4096))))
    print(
        f"{len(launched):,} rollouts in flight on {ENGINES} engines, "
        f"{machine.num_outstanding:,} groups"
    )
    _progress(machine, list(launched))
    _finishes(machine, list(launched))


def _progress(machine: Core, rollouts: list[int]) -> None:
    """Every rollout reports its progress in turn, as if its engine were decoding."""
    rounds = 40
    events: list[ev.Event] = [
        ev.RolloutProgressed(rollout_id, 8 * (n + 1))
        for n in range(rounds)
        for rollout_id in rollouts
    ]
    handle = machine.handle
    rates = []
    for start in range(0, len(events), len(events) // 8):
        part = events[start : start + len(events) // 8]
        began = time.perf_counter()
        for event in part:
            handle(event)
        rates.append(len(part) / (time.perf_counter() - began))
    print(f"progress: {_spread(rates)}")


def _finishes(machine: Core, rollouts: list[int]) -> None:
    """Rollouts end in random order; cancels are confirmed at once and new groups start."""
    rng = random.Random(0)
    rng.shuffle(rollouts)
    running, prompts, rates = list(rollouts), itertools.count(), []
    for _ in range(8):
        num, began = 0, time.perf_counter()
        for _ in range(2_500):
            todo: list[ev.Event] = [
                ev.RolloutFinished(running.pop(), rng.randint(400, 4000), False, 1.0, 0)
            ]
            while todo:
                for decision in machine.handle(todo.pop()):
                    if type(decision) is ev.Launch:
                        running.append(decision.rollout_id)
                    elif type(decision) is ev.Cancel:
                        todo.append(ev.RolloutStopped(decision.rollout_id, 400))
                num += 1
            if machine.num_pending < 4096:
                machine.handle(
                    ev.PromptsDrawn(tuple(ev.Prompt(f"q{next(prompts)}") for _ in range(64)))
                )
        rates.append(num / (time.perf_counter() - began))
    print(
        f"ends:     {_spread(rates)} (finishes and confirmed cancels, with selection, statistics, "
        "admission and launches)"
    )


def _spread(rates: list[float]) -> str:
    ordered = sorted(rates)
    return (
        f"{ordered[len(ordered) // 2]:,.0f} events/s "
        f"(median of {len(ordered)}; {ordered[0]:,.0f} to {ordered[-1]:,.0f})"
    )


def pipeline(options: Sequence[str]) -> None:
    # Here, because it loads vLLM and torch, and vLLM's processes import this module again.
    from tools.benchmarks import pipeline

    pipeline.main(options)


def learner(_: Sequence[str]) -> None:
    from tools.benchmarks import learner, shared_prompts

    shared_prompts.main()
    learner.main()


def checkpoints(options: Sequence[str]) -> None:
    from tools.benchmarks import checkpoints

    _no_options("checkpoints", options)
    checkpoints.main()


def compiled(options: Sequence[str]) -> None:
    from tools.benchmarks import compiling

    _no_options("compile", options)
    compiling.main()


def weights(options: Sequence[str]) -> None:
    from tools.benchmarks import weights

    weights.main(options)


def buffer(options: Sequence[str]) -> None:
    from tools.benchmarks import buffer

    _no_options("buffer", options)
    buffer.main()


def turns(options: Sequence[str]) -> None:
    from tools.benchmarks import turns

    _no_options("turns", options)
    turns.main()


def trl(options: Sequence[str]) -> None:
    from tools.benchmarks import trl_steps

    _no_options("trl", options)
    trl_steps.main()


def _no_options(subject: str, options: Sequence[str]) -> None:
    if options:
        raise ValueError(f"command line: {options[0]}: the subject {subject} takes no options")


SUBJECTS: dict[str, Callable[[Sequence[str]], None]] = {
    "buffer": buffer,
    "checkpoints": checkpoints,
    "compile": compiled,
    "core": core,
    "learner": learner,
    "pipeline": pipeline,
    "trl": trl,
    "turns": turns,
    "weights": weights,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", choices=sorted(SUBJECTS), help="the subject to measure")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        help="for pipeline and weights only: key=value or --config; --help lists all keys",
    )


def run(given: argparse.Namespace) -> None:
    SUBJECTS[given.subject](given.options)


def main() -> NoReturn:
    run_command("Measure one part of the software on this machine.", run, arguments=arguments)


if __name__ == "__main__":
    main()
