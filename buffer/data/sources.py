"""Where prompts come from: seeded, resumable streams, and the held-out prompts that no stream ever
yields.

A source is either a table (`tables`), checked row by row when it is opened, or a generator
(`generators`), asked for one prompt at a time. Held-out prompts are identified by the prompt
itself, never by a seed or a row number: a duplicate of a held-out prompt is held out as well. Never
scores anything, and never imports a model library. The buffer's service draws from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from buffer.data.generators import ReasoningGymSource, TaggedSumSource
from buffer.data.public_environments import PREFIX, open_environment
from buffer.data.tables import open_table, suffix_of
from buffer.wire.messages import PromptPayload
from configs.schema import Config

FORMS = (
    "tagged_sum, reasoning_gym:<task>, verifiers:<environment>[:<split>], a .jsonl, .jsonl.gz, "
    ".csv or .parquet file, or hf:<dataset>[:<split>]"
)


class Source(Protocol):
    """Distinct places 0..size-1, each with a prompt.

    digest: of all its rows; "" for a generator, whose prompts follow from its name and the seed.
    """

    size: int
    digest: str

    def __getitem__(self, index: int) -> PromptPayload: ...

    def hold_out(self, num_prompts: int) -> list[PromptPayload]:
        """Set this many distinct prompts aside, the same for every seed. They are removed from the
        source.
        """
        ...

    def sample(self, num_prompts: int) -> list[PromptPayload]:
        """At most this many distinct prompts of a source used only for evaluation."""
        ...


class PromptStream:
    """Endless: every epoch is a seeded shuffle of the whole source. `position` counts prompts drawn
    so far.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed, self.position = source, seed, 0
        self._epoch: int = -1
        self._order = np.empty(0, dtype=np.int64)

    def draw(self, num_prompts: int) -> list[PromptPayload]:
        """The next prompts. A prompt keeps its `prompt_id` across epochs and runs."""
        return [self._next() for _ in range(num_prompts)]

    def seek(self, position: int) -> None:
        """Continue as if `position` prompts had been drawn, as a resumed run does."""
        if position < 0:
            raise ValueError(f"position={position} must be at least 0")
        self.position = position

    def _next(self) -> PromptPayload:
        epoch, place = divmod(self.position, self.source.size)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = rng.permutation(self.source.size)
            self._epoch = epoch
        payload = self.source[int(self._order[place])]
        self.position += 1
        return payload


@dataclass(frozen=True)
class Sources:
    """The training prompts of a run, and its evaluation prompts (empty if eval.every=0).

    digests: of the rows of each file or dataset, by its key.
    """

    train: PromptStream
    eval_prompts: list[PromptPayload]
    digests: dict[str, str]


def make_sources(config: Config) -> Sources:
    """Opens data.train and data.eval. Raises a one-line ValueError if the data is missing, empty,
    malformed or too small.
    """
    train = _open_source("data.train", config.data.train, config)
    opened = {"data.train": train}
    num_eval = config.eval.num_prompts if config.eval.every else 0
    if num_eval == 0:
        eval_prompts = []
    elif config.data.eval in ("", config.data.train):
        eval_prompts = train.hold_out(num_eval)
    else:
        opened["data.eval"] = _open_source("data.eval", config.data.eval, config)
        eval_prompts = opened["data.eval"].sample(num_eval)
    digests = {key: source.digest for key, source in opened.items() if source.digest}
    return Sources(PromptStream(train, config.run.seed), eval_prompts, digests)


def is_table(form: str) -> bool:
    """Whether a value of data.train or data.eval names a file or a dataset of the user."""
    return form.startswith(("hf:", PREFIX)) or bool(suffix_of(form))


def _open_source(key: str, form: str, config: Config) -> Source:
    if form == "tagged_sum":
        return TaggedSumSource(config.data.num_prompts, config.run.seed)
    if form.startswith("reasoning_gym:"):
        return ReasoningGymSource(
            key, form.removeprefix("reasoning_gym:"), config.data.num_prompts, config.run.seed
        )
    if form.startswith(PREFIX):
        return open_environment(key, form)
    if is_table(form):
        return open_table(key, form, config.data)
    raise ValueError(f"{key}={form!r} is no known source; it must be {FORMS}")
