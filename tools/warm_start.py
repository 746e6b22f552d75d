"""`python -m tools.warm_start FOLDER`: train the embedded default, a tiny reasoner, from scratch.

Writes a complete Hugging Face folder in one rename, so that an interrupted run leaves no files
behind. A folder made by the same recipe is left unchanged. The file reads from top to bottom:
tokenizer, model, training, packs of traces. The recipe was found by experiment: a model with the
library's default initialisation, or one trained on digits without tags, does not learn the task.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from buffer.data.tagged_sum import (
    CLEAN,
    EOS,
    FULL,
    MAX_DIGITS,
    SINGLE_PASS,
    TAGS,
    Grammar,
    draw_problem,
    draw_trace,
)
from buffer.records.files import atomic_folder
from configs.command import run_command
from learner.packs.attention import PACKED_SDPA

RECIPE_FILE = "recipe.json"
VOCABULARY = [
    "<pad>",
    "<bos>",
    EOS,
    "<unk>",
    "wait",
    "again",
    "ok",
    "no",
    "hmm",
    "so",
    *"0123456789",
    *"=,.# ",
    *TAGS,
]
MODEL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
INIT_GAIN = 0.8  # matrices start as N(0, gain / sqrt(fan_in)), embeddings as N(0, 1)
WARMUP_STEPS, FINAL_LR_FRAC = 50, 0.02


Part = tuple[str, bool]  # a piece of text, and whether the model is to write it


@dataclass(frozen=True)
class Phase:
    """Steps on traces of one grammar, each on a pack of about `tokens` tokens."""

    grammar: Grammar = FULL
    _: KW_ONLY
    steps: int
    tokens: int
    lr: float
    short_frac: float = 0.0  # share of the steps, at the start, with problems of at most 5 digits
    decays: bool = False  # the learning rate falls linearly to FINAL_LR_FRAC of lr


def draw_tagged_sum(random: Random, phase: Phase, short: bool) -> list[Part]:
    """A problem and a trace of the embedded task."""
    problem = draw_problem(random, max_digits=5 if short else MAX_DIGITS)
    return [(problem, False), (draw_trace(random, problem, phase.grammar), True)]


class Task(NamedTuple):
    """Texts to train on. `draw` returns the next one in parts; `words` join the vocabulary."""

    name: str
    words: tuple[str, ...]
    draw: Callable[[Random, Phase, bool], list[Part]]


TAGGED_SUM = Task("tagged_sum", (), draw_tagged_sum)
PHASES = (
    Phase(SINGLE_PASS, steps=230, tokens=1024, lr=3e-3, short_frac=1 / 3),
    Phase(CLEAN, steps=220, tokens=1536, lr=3e-3),
    Phase(FULL, steps=220, tokens=1536, lr=2e-3, decays=True),
)


def warm_start(
    folder: Path, seed: int = 0, phases: tuple[Phase, ...] = PHASES, task: Task = TAGGED_SUM
) -> bool:
    """Make `folder` unless this recipe has already made it. Returns whether it was made now.

    Raises `ValueError` if the folder exists but was not made by this tool.
    """
    recipe = json.loads(
        json.dumps(
            {
                "model": MODEL,
                "init_gain": INIT_GAIN,
                "phases": [asdict(phase) for phase in phases],
                "seed": seed,
            }
            | ({} if task == TAGGED_SUM else {"task": task.name, "words": task.words})
        )
    )
    recipe["digest"] = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    if folder.exists():
        made_by = folder / RECIPE_FILE
        if not made_by.is_file():
            raise ValueError(
                f"{folder} exists and was not made by tools.warm_start; name another folder, "
                "or remove it"
            )
        if json.loads(made_by.read_text()).get("digest") == recipe["digest"]:
            print(f"{folder} already exists, made by this recipe with seed {seed}")
            return False
    started = time.monotonic()
    tokenizer, model = build_tokenizer(task.words), build_model(seed)
    show = ProgressLine(sum(phase.steps for phase in phases))
    train(model, tokenizer, phases, seed, show, task=task)
    transformers_logging.disable_progress_bar()  # saving takes a tenth of a second
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / RECIPE_FILE).write_text(json.dumps(recipe, indent=1))
    print(
        f"{folder}: {model.num_parameters():,} parameters, trained in "
        f"{time.monotonic() - started:.0f} s"
    )
    return True


def build_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of words and single characters: those of the embedded task, and `words`.

    Decoding joins the tokens without spaces, so text survives a round trip.
    """
    tokenizer = Tokenizer(
        WordLevel({token: i for i, token in enumerate([*VOCABULARY, *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+|[^a-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=EOS,
        unk_token="<unk>",
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> Qwen3ForCausalLM:
    """An untrained tiny reasoner in float32."""
    special: dict[str, Any] = {
        name: VOCABULARY.index(f"<{name[:3]}>")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL, **special)).float()
    model.generation_config.update(**special)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied: the output head is the embedding
            if parameter.ndim == 2:
                std = 1.0 if "embed" in name else INIT_GAIN / math.sqrt(parameter.shape[1])
                parameter.normal_(0.0, std, generator=generator)
    return model


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    phases: tuple[Phase, ...],
    seed: int,
    show: Callable[[int, float], None],
    task: Task = TAGGED_SUM,
) -> None:
    """Train in place, with supervision. Calls `show(steps done, loss)` after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    random, step = Random(seed), 0
    # Operations are so small that two threads gain a third on an idle machine, if they spin while
    # they wait for each other, and take ten times as long beside another process.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.set_attn_implementation(PACKED_SDPA)  # three times as fast as a mask of the whole pack
    model.train()
    for phase in phases:
        packs = draw_packs(random, tokenizer, phase, task)
        for phase_step in range(phase.steps):
            decay = 1 - (1 - FINAL_LR_FRAC) * phase_step / phase.steps if phase.decays else 1.0
            optimizer.param_groups[0]["lr"] = phase.lr * decay * min(1.0, (step + 1) / WARMUP_STEPS)
            tokens_T, positions_T, targets_T = next(packs)
            logits_TV = model(
                input_ids=tokens_T[None],
                position_ids=positions_T[None],
                lengths=lengths_of(positions_T),
                use_cache=False,
            ).logits[0]
            loss = torch.nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            show(step, loss.item())
    model.eval()
    model.set_attn_implementation("sdpa")
    torch.set_num_threads(num_threads)


def lengths_of(positions_T: torch.Tensor) -> tuple[int, ...]:
    """The lengths of the texts in a pack, in which positions restart at 0 with each text."""
    starts = (positions_T == 0).nonzero()[:, 0].tolist()
    return tuple(end - start for start, end in pairwise([*starts, len(positions_T)]))


def draw_packs(
    random: Random, tokenizer: PreTrainedTokenizerFast, phase: Phase, task: Task = TAGGED_SUM
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (tokens, positions, targets) forever, int64 [T] with T <= phase.tokens.

    A target of -100 is ignored: those of parts that the model does not write.
    """
    pack: tuple[list[int], list[int], list[int]] = ([], [], [])
    num_drawn = 0
    while True:
        short = num_drawn < phase.short_frac * phase.steps
        tokens: list[int] = []
        targets: list[int] = []
        for text, written in task.draw(random, phase, short):
            ids = tokenizer.encode(text)
            tokens += ids
            targets += ids if written else [-100] * len(ids)
        if len(pack[0]) + len(tokens) > phase.tokens:
            yield tuple(torch.tensor(column) for column in pack)  # type: ignore[misc]
            pack, num_drawn = ([], [], []), num_drawn + 1
        pack[0].extend(tokens)
        pack[1].extend(range(len(tokens)))
        pack[2].extend([*targets[1:], -100])


class ProgressLine:
    """A line with the time left that redraws itself on a terminal; elsewhere about ten lines."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.started, self.redraws = (
            num_steps,
            time.monotonic(),
            sys.stderr.isatty(),
        )

    def __call__(self, step: int, loss: float) -> None:
        if not self.redraws and step % max(1, self.num_steps // 10):
            return
        done_frac = step / self.num_steps
        left_s = (time.monotonic() - self.started) * (1 / done_frac - 1)
        bar = "█" * round(24 * done_frac) + "░" * (24 - round(24 * done_frac))
        line = (
            f"warm start {bar} step {step}/{self.num_steps}  loss {loss:.3f}  {left_s:3.0f} s left"
        )
        last = step == self.num_steps
        print(
            f"\r{line}" if self.redraws else line,
            end="" if self.redraws and not last else "\n",
            file=sys.stderr,
            flush=True,
        )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="folder for the model, such as models/tiny-reasoner"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the initial weights and of the traces (default: %(default)s)",
    )


def main(
    description: str = "Train the embedded default, a tiny reasoner, from scratch.",
    phases: tuple[Phase, ...] = PHASES,
    task: Task = TAGGED_SUM,
) -> NoReturn:
    def run(given: argparse.Namespace) -> None:
        warm_start(given.folder, given.seed, phases, task)

    run_command(description, run, arguments=arguments)


if __name__ == "__main__":
    main()
