"""Checks the data of a run before any engine is loaded: rows, lengths and rewards.

Owns the choice of rows that are looked at and the order of the checks. Loads a tokenizer, but no
model. Driven by `tools.check`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from actors.environments import Environment, make_environment
from actors.prompts import PromptTooLong, response_limit
from buffer.data.identity import text_of
from buffer.data.skipped_prompts import SkippedPrompts
from buffer.data.sources import Source, Sources, is_table, make_sources
from buffer.wire.messages import PromptPayload
from configs.errors import one_line
from configs.schema import Config
from tools.checking import rewards
from tools.checking.findings import Finding
from tools.checking.prompts import describe_prompts

QUICK_ROWS = 4  # that are rendered and scored
SCORED_ROWS = 32
RENDERED_ROWS = 2000
RENDER_S = 10.0  # no further row is rendered after that


def check_data(config: Config, quick: bool) -> Iterator[Finding | str]:
    """Findings, and lines that show the first prompts. Raises `ValueError` for unusable rows."""
    sources = make_sources(config)  # first, since faults of rows are found within a second
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    environment = make_environment(config)
    try:
        if is_table(config.data.train):
            yield from _rows(config, sources)
        if not quick:
            yield from describe_prompts(config, sources.train, environment, tokenizer)
        sample = _spread(sources, QUICK_ROWS if quick else RENDERED_ROWS)
        yield from _lengths(config, sample, environment, tokenizer)
        scored = sample[:: max(1, len(sample) // SCORED_ROWS)][:SCORED_ROWS]
        scoring = rewards.score(config, environment, scored)
        yield from rewards.findings(config, config.data.environment, scoring)
    finally:
        environment.close()


def _rows(config: Config, sources: Sources) -> Iterator[Finding]:
    source = sources.train.source
    prompts = [source[index] for index in range(source.size)]
    held_out = len(sources.eval_prompts)
    yield Finding(
        "ok",
        "rows",
        f"{len(prompts):,} to train on, and {held_out} held-out prompts to evaluate on",
    )
    first: dict[str, PromptPayload] = {}
    repeated = [p for p in prompts if first.setdefault(p.prompt_id, p) is not p]
    if repeated:
        again = repeated[0]
        yield Finding(
            "note",
            "duplicates",
            f"{len(repeated):,} rows repeat another one: {again.source} repeats "
            f"{first[again.prompt_id].source}",
        )
    answers: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for prompt in prompts:
        answers[text_of(prompt)].setdefault(prompt.answer, prompt.source)
    if several := [of_prompt for of_prompt in answers.values() if len(of_prompt) > 1]:
        places = " and ".join(list(several[0].values())[:2])
        yield Finding(
            "note", "answers", f"{len(several):,} prompts have several answers: {places} differ"
        )
    if shared := [p for p in sources.eval_prompts if text_of(p) in answers]:
        yield Finding(
            "warning",
            "held out",
            f"{len(shared)} of {held_out} prompts of data.eval={config.data.eval} are also in "
            f"data.train, such as {shared[0].source}; an evaluation on them says little",
        )


def _spread(sources: Sources, most: int) -> list[PromptPayload]:
    """Prompts from all parts of the source, at most `most`, drawn as a run would draw them."""
    source: Source = sources.train.source
    step = max(1, -(-source.size // most))
    started_s, prompts = time.monotonic(), list[PromptPayload]()
    for index in range(0, source.size, step):
        prompts.append(source[index])
        if time.monotonic() - started_s > RENDER_S:
            break
    return prompts


def _lengths(
    config: Config, prompts: Sequence[PromptPayload], environment: Environment, tokenizer: Any
) -> Iterator[Finding]:
    lengths: list[int] = []
    unusable = SkippedPrompts(config.data.max_skipped_frac)
    too_long: list[str] = []
    failures: list[str] = []
    unknown: list[str] = []
    num_short = 0
    for prompt in prompts:
        try:
            ids = environment.render(prompt, tokenizer)
        except Exception as error:  # a template or tokenizer may raise anything
            failures.append(f"{prompt.name}: {one_line(error)}")
            continue
        length = len(ids)
        lengths.append(length)
        if tokenizer.unk_token_id in ids:
            unknown.append(prompt.name)
        try:
            num_short += response_limit(prompt, length, config) < config.sampling.max_tokens
        except PromptTooLong as error:
            unusable.add(prompt, str(error))
            too_long.append(str(error))
    if failures:
        yield Finding(
            "error",
            "template",
            f"{len(failures)} of {len(prompts)} prompts cannot be rendered; {failures[0]}",
        )
    if lengths:
        yield Finding(
            "ok",
            "lengths",
            f"prompts have {min(lengths)} to {max(lengths)} tokens, median {median(lengths):g}, "
            f"of model.max_context={config.model.max_context} ({len(lengths):,} of them looked at)",
        )
    if unknown:
        yield Finding(
            "note",
            "unknown text",
            f"{len(unknown)} of {len(prompts)} prompts hold characters for which the tokenizer has "
            f"no token, such as {unknown[0]}; the model cannot tell them apart",
        )
    if too_long:
        ends = unusable.too_many(len(prompts)) or len(too_long) == len(prompts)
        yield Finding(
            "error" if ends else "note",
            "too long",
            f"a run skips {len(too_long)} of {len(prompts)} prompts"
            + (f", and ends: data.max_skipped_frac={unusable.max_frac:g}" if ends else "")
            + f"; {too_long[0]}",
        )
    if num_short:
        yield Finding(
            "note",
            "room",
            f"{num_short} of {len(prompts)} prompts leave fewer than "
            f"sampling.max_tokens={config.sampling.max_tokens} tokens for a response",
        )
