"""`python -m tools.evaluate runs/<name>`: evaluate every kept checkpoint on held-out prompts.

Works after the run, so that evaluation takes no time from it. One engine loads the checkpoints in
turn, as it loads published weights. Rollouts are played as in training, and none is cancelled.
Writes runs/<name>/evaluations.jsonl (step, reward_mean, accuracy if all rewards are 0 or 1, numbers
of responses, length statistics) and prints it. Driven by hand and by `tools.compare`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from actors.environments import Environment, EnvironmentFailure, make_environment
from actors.inference import weights
from actors.inference.generation import EngineDied
from actors.playing import Player
from actors.prompts import PromptTooLong
from buffer.data.skipped_prompts import SkippedPrompts
from buffer.data.sources import make_sources
from buffer.processes.private_folder import private_folder
from buffer.records import settings
from buffer.records.files import atomic_write
from buffer.records.held_out import Answer, judged
from buffer.wire.messages import Failed, Finished, PromptPayload
from configs.command import run_command
from configs.model_path import check_model
from configs.schema import Config, LoraConfig
from tools.export import load_checkpoint, run_config, steps_saved
from tools.reporting.run_directory import EVALUATIONS, Row

if TYPE_CHECKING:
    from actors.inference.engine import Engine


def evaluate(run: Path, samples: int | None = None) -> list[Row]:
    """Judge all checkpoints on the run's own held-out prompts, and write `evaluations.jsonl`.

    `samples` is the number of responses per prompt (None: `eval.samples_per_prompt`). Raises
    `ValueError` if the run has no checkpoints or no held-out prompts.
    """
    config, steps = run_config(run), steps_saved(run)
    if not config.eval.every and not config.data.eval:
        raise ValueError(
            f"{run} held no prompts out (eval.every=0 and data.eval is empty), and a model cannot "
            "be judged on its training prompts"
        )
    if not steps:
        raise ValueError(
            f"{run}/checkpoints holds no checkpoint; learner.checkpoint_every and "
            "learner.keep_checkpoints control which ones a run keeps"
        )
    check_model(config.model.path)
    config = replace(
        config,
        eval=replace(
            config.eval,
            every=1,
            samples_per_prompt=samples or config.eval.samples_per_prompt,
        ),
        actors=replace(config.actors, min_step_ms=[]),  # waiting would not change any answer
    )
    rows = _outside_any_loop(lambda: _judge_all(config, run, steps))
    atomic_write(run / EVALUATIONS, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _outside_any_loop(call: Callable[[], list[Row]]) -> list[Row]:
    """The result of `call`, which runs an event loop of its own: a notebook's thread has one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def _judge_all(config: Config, run: Path, steps: list[int]) -> list[Row]:
    """The row of each checkpoint, printed as soon as it is known."""
    rows = []
    for row in _judge(config, run, steps):
        rows.append(row)
        result = (
            f"accuracy {100 * row['accuracy']:.1f} %"
            if "accuracy" in row
            else (f"mean reward {row['reward_mean']:.3f}")
        )
        print(
            f"step {row['step']:>6,.0f}: {result}, mean length {row['length_mean']:.1f}, "
            f"p99 {row['length_p99']:.0f}",
            flush=True,
        )
    return rows


def _judge(config: Config, run: Path, steps: list[int]) -> Iterator[Row]:
    sources = make_sources(config)
    settings.check_data(run, config, sources.digests)
    environment = make_environment(config)

    # Here, because it takes seconds; mistakes are reported before.
    import safetensors.torch

    from actors.inference.engine import Engine
    from learner.snapshots.publish import DTYPES, gather

    num_responses = len(sources.eval_prompts) * config.eval.samples_per_prompt
    print(
        f"loading {config.model.path} into an engine, to judge {len(steps)} checkpoints by "
        f"{num_responses} responses each",
        flush=True,
    )
    with private_folder(), asyncio.Runner() as runner:
        merged = replace(config, model=replace(config.model, lora=LoraConfig()))
        engine = Engine(merged)
        try:
            for step in steps:
                state = gather(
                    load_checkpoint(config, run, step), DTYPES[config.model.dtype], keep=True
                )
                runner.run(weights.swap(step, safetensors.torch.save(state), engine))
                yield {"step": step} | runner.run(
                    _answer(config, engine, environment, sources.eval_prompts)
                )
        finally:
            environment.close()
            engine.close()


async def _answer(
    config: Config,
    engine: Engine,
    environment: Environment,
    prompts: list[PromptPayload],
) -> Row:
    """Answer every prompt `eval.samples_per_prompt` times, with the same seeds at every step."""
    player = Player(config, engine, environment)
    skipped = SkippedPrompts(config.data.max_skipped_frac)

    async def answer(number: int, prompt: PromptPayload) -> Answer | None:
        try:
            opening = player.opening(prompt)
            rollout = player.start(opening, number, seed=config.run.seed * 1_000_003 + number)
            end = await player.play(rollout)
            if isinstance(end, Finished):
                return Answer(prompt.kind, end.reward, end.num_tokens)
            if not isinstance(end, Failed):
                raise EngineDied(f"vLLM's processes ended by themselves: {engine.cause}")
            failure = end.error
        except EnvironmentFailure as error:
            failure = str(error)
        except PromptTooLong as error:
            skipped.add(prompt, str(error))
            return None
        if config.data.on_error == "stop":
            raise ValueError(f"{failure} (data.on_error=skip continues without it)")
        skipped.add(prompt, failure)
        return None

    samples = [prompt for prompt in prompts for _ in range(config.eval.samples_per_prompt)]
    asked = await asyncio.gather(*(answer(number, prompt) for number, prompt in enumerate(samples)))
    answers = [one for one in asked if one is not None]
    if skipped.too_many(len(samples)) or not answers:
        raise ValueError(skipped.refusal(len(samples)))
    if skipped.num_skipped:
        print(skipped.summary(len(samples)), flush=True)
    row = {name.removeprefix("eval/"): value for name, value in judged(answers).items()}
    return row | {
        "responses": len(answers),
        "samples_per_prompt": config.eval.samples_per_prompt,
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, such as runs/demo")
    parser.add_argument(
        "--samples",
        type=int,
        help="number of responses per prompt (default: the run's eval.samples_per_prompt)",
    )


def run(given: argparse.Namespace) -> None:
    evaluate(given.run, given.samples)


def main() -> NoReturn:
    run_command(
        "Sample a run's held-out prompts from every checkpoint that it kept, and write "
        "evaluations.jsonl to its directory.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
