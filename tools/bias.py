"""`python -m tools.bias runs/<name>`: the effect of selection on the policy gradient.

Samples responses to held-out prompts from a checkpoint, on the CPU, and compares the gradient of
whole groups with that of the responses that each rule selects. Changes nothing in the run. Driven
by hand; `tools.comparing.selection_bias` has the arithmetic.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import track

from actors.environments import VerifierEnvironment
from actors.prompts import response_limit
from buffer.data.sources import make_sources
from buffer.records import settings
from buffer.wire.messages import PromptPayload
from configs.command import run_command
from configs.schema import Config, largest_budget
from darts.selection import Candidate, relative_cutoff
from tools.comparing.selection_bias import PASS_RATES, Bias, Interval, measure
from tools.comparing.selection_rules import Response
from tools.export import export, run_config

SKETCH = 8192  # entries of a sketch: inner products of gradients are off by about 1 %
Generated = tuple[list[int], bool]  # a response's tokens, and whether it was truncated


def bias(
    run: Path, num_prompts: int, samples: int | None = None, step: int | None = None
) -> dict[str, Bias]:
    """Each rule's gradient beside that of the full group, by the name of the rule.

    If the run has a relative limit, `plain` and `survivor` come a second time, with it. `samples`
    is the largest budget of the run if it is absent. Raises `ValueError` if the run has no
    checkpoint or no held-out prompts, if its environment has turns, or if `samples` is less than
    `darts.group_size`.
    """
    import torch  # here, so that --help need not wait for it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = run_config(run)
    if samples is None:
        samples = largest_budget(config.darts.group_size, config.redundancy.upper)
    if samples < config.darts.group_size:
        raise ValueError(
            f"--samples={samples}: must be >= darts.group_size={config.darts.group_size}; "
            "otherwise a rule has nothing to select from"
        )
    if num_prompts < 2:
        raise ValueError(
            f"--prompts={num_prompts}: must be >= 2; the noise of a single prompt is unknown"
        )
    sources = make_sources(config)
    settings.check_data(run, config, sources.digests)
    prompts = sources.eval_prompts[:num_prompts]
    if not prompts:
        raise ValueError(f"{run} held no prompts out (eval.every=0), so nothing can be sampled")
    torch.manual_seed(config.run.seed)
    with tempfile.TemporaryDirectory() as folder:
        export(run, Path(folder) / "model", step)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    environment = VerifierEnvironment(config)
    try:
        if environment.has_turns:
            raise ValueError(
                f"data.environment={config.data.environment}: has turns, and only responses of a "
                "single turn can be sampled here"
            )
        with asyncio.Runner() as runner:
            sampled = [
                runner.run(_sample(config, model.eval(), tokenizer, environment, prompt, samples))
                for prompt in track(
                    prompts,
                    f"{samples} responses to each of {len(prompts)} prompts",
                    console=Console(stderr=True),
                )
            ]
    finally:
        environment.close()
    return measure(
        [group for group, _ in sampled],
        config,
        limited={name: [limited[name] for _, limited in sampled] for name in sampled[0][1]},
    )


async def _sample(
    config: Config,
    model: Any,
    tokenizer: Any,
    environment: VerifierEnvironment,
    prompt: PromptPayload,
    samples: int,
) -> tuple[list[Response], dict[str, list[Response]]]:
    """The group of a prompt, and what rules with a relative limit would select from."""
    prompt_ids = environment.render(prompt, tokenizer)

    async def scored(ids: list[int], truncated: bool) -> Response:
        text = tokenizer.decode(ids, skip_special_tokens=not environment.keep_special_tokens)
        reward = await environment.score(prompt, text)
        made = sketch(model, prompt_ids, ids, config.sampling.temperature)
        return Response(len(ids), truncated, reward, made)

    generated = generate(config, model, tokenizer, prompt, prompt_ids, samples)
    group = [await scored(*one) for one in generated]
    limited = dict[str, list[Response]]()
    if config.darts.relative_limit:
        for rule, budget in (("plain", config.darts.group_size), ("survivor", samples)):
            most = _most_tokens(generated[:budget], config)
            limited[rule] = [
                whole if whole.tokens <= most else await scored(ids[:most], False)
                for whole, (ids, _) in zip(group[:budget], generated, strict=False)
            ]
    return group, limited


def _most_tokens(generated: Sequence[Generated], config: Config) -> int:
    """The number of tokens at which `darts.relative_limit` ends a response of these."""
    ended = [
        Candidate(len(ids), i) for i, (ids, truncated) in enumerate(generated) if not truncated
    ]
    cutoff = relative_cutoff(sorted(ended), len(generated), config.darts.relative_limit)
    return int(min(cutoff, config.sampling.max_tokens)) + 1


def generate(
    config: Config,
    model: Any,
    tokenizer: Any,
    prompt: PromptPayload,
    prompt_ids: list[int],
    samples: int,
) -> list[Generated]:
    """Responses sampled from the whole distribution, and whether each was truncated."""
    import torch

    listed = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    given = torch.tensor([prompt_ids] * samples)
    rows = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=True,
        temperature=config.sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=response_limit(prompt, len(prompt_ids), config),
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    responses = []
    for row in rows[:, len(prompt_ids) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        responses.append((row if end is None else row[: end + 1], end is None))
    return responses


def sketch(model: Any, prompt_ids: list[int], response_ids: list[int], temperature: float) -> Any:
    """A random projection of the gradient of a response's log-probability, as an array [SKETCH].

    Each weight is added to one of its entries, with a random sign: a count sketch, which keeps
    inner products on average. The same for every response.
    """
    import torch

    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt_ids) - 1 :]
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    chosen = logprobs.gather(1, torch.tensor(response_ids)[:, None]).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(chosen, parameters)
    made, generator = torch.zeros(SKETCH, dtype=torch.float64), torch.Generator().manual_seed(0)
    for gradient in gradients:
        flat = gradient.flatten().double()
        places = torch.randint(2 * SKETCH, flat.shape, generator=generator)
        made.index_add_(0, places // 2, flat * (1 - 2 * (places % 2)))
    return made.numpy()


def show(found: dict[str, Bias]) -> str:
    """The tables that the command prints."""
    lines = [
        f"{'rule':<16}{'cosine':>24}{'norm ratio':>24}{'noise, prompts':>24}"
        f"{'tokens per 0.01 reward':>28}"
    ]
    for name, rule in found.items():
        lines.append(
            f"{name:<16}{_bounds(rule.cosine, 3):>24}{_bounds(rule.norm_ratio, 3):>24}"
            f"{_bounds(rule.noise_prompts, 0):>24}{_bounds(rule.length_per_point, 2):>28}"
        )
    columns = "".join(f"{name:>18}" for name in found)
    lines += ["", "% of the weight in the loss, by decile of length (1: the shortest)"]
    lines.append(f"{'':<10}{columns}")
    for k in range(len(found["full"].by_length)):
        cells = "".join(f"{_share(rule.by_length[k]):>18}" for rule in found.values())
        lines.append(f"{k + 1:<10}{cells}")
    lines += ["", "% of the weight in the loss, by the prompt's pass rate in its full group"]
    lines.append(f"{'':<10}{columns}")
    for k, rate in enumerate(PASS_RATES):
        cells = "".join(f"{_share(rule.by_pass_rate[k]):>18}" for rule in found.values())
        lines.append(f"{f'<= {rate:g}':<10}{cells}")
    return "\n".join(lines)


def _bounds(one: Interval, digits: int) -> str:
    if isnan(one.value):
        return "undetermined"
    return f"{one.value:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"


def _share(one: Interval) -> str:
    return f"{100 * one.value:.1f} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, such as runs/demo")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=256,
        help="largest number of held-out prompts; with few of them, cosines are undetermined",
    )
    parser.add_argument(
        "--samples",
        type=int,
        help="number of responses per prompt, from which each rule selects (default: the largest "
        "budget of the run, redundancy.upper times darts.group_size)",
    )


def run(given: argparse.Namespace) -> None:
    print(show(bias(given.run, given.prompts, given.samples, given.step)))


def main() -> NoReturn:
    run_command(
        "Compare the policy gradient of whole groups with that of the responses which a rule "
        "selects, with 95 % intervals.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
