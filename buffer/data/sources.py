"""Where prompts come from: seeded, resumable streams, and the held-out prompts that no stream ever
yields.

A source is either a table (a file, a dataset), checked row by row when it is opened, or a generator
(tagged_sum, reasoning_gym), asked for one prompt at a time. Held-out prompts are identified by the
prompt itself, never by a seed or a row number: a duplicate of a held-out prompt is held out as
well. Never scores anything, and never imports a model library. A source's own dependencies
(reasoning_gym, pyarrow, datasets) are imported when that source is opened. The buffer's service
draws from here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol, cast

import numpy as np

from buffer.data import tagged_sum
from buffer.wire.messages import PromptPayload
from configs.errors import one_line
from configs.extras import import_extra
from configs.schema import Config, DataConfig

FORMS = "tagged_sum, reasoning_gym:<task>, a .jsonl or .parquet file, or hf:<dataset>[:<split>]"
HELD_OUT_FRAC = 0.05  # of a table or of all tagged sums; more if eval.num_prompts needs more
HELD_OUT_SEED = 1_000_000_007  # of generators, so that runs of any seed share held-out prompts
SPARE = 2  # a generated prompt that is held out is replaced by the next of this many


class Source(Protocol):
    """Distinct places 0..size-1, each with a prompt."""

    size: int

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
            self._epoch, self._order = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(self.source.size),
            )
        payload = self.source[int(self._order[place])]
        self.position += 1
        return payload


@dataclass(frozen=True)
class Sources:
    """The training prompts of a run, and its evaluation prompts (empty if eval.every=0)."""

    train: PromptStream
    eval_prompts: list[PromptPayload]


def make_sources(config: Config) -> Sources:
    """Opens data.train and data.eval. Raises a one-line ValueError if the data is missing, empty,
    malformed or too small.
    """
    train = _open_source("data.train", config.data.train, config)
    num_eval = config.eval.num_prompts if config.eval.every else 0
    if num_eval == 0:
        eval_prompts = []
    elif config.data.eval in ("", config.data.train):
        eval_prompts = train.hold_out(num_eval)
    else:
        eval_prompts = _open_source("data.eval", config.data.eval, config).sample(num_eval)
    return Sources(PromptStream(train, config.run.seed), eval_prompts)


def _open_source(key: str, form: str, config: Config) -> Source:
    if form == "tagged_sum":
        return TaggedSumSource(config.data.num_prompts, config.run.seed)
    if form.startswith("reasoning_gym:"):
        return ReasoningGymSource(
            key, form.removeprefix("reasoning_gym:"), config.data.num_prompts, config.run.seed
        )
    if form.startswith("hf:"):
        return TableSource(f"{key}={form}", _read_dataset(key, form), config.data)
    if form.endswith((".jsonl", ".parquet")):
        if not Path(form).is_file():
            raise ValueError(
                f"{key}={form}: there is no such file (looked from {Path.cwd()}); give the path "
                "of an existing one"
            )
        return TableSource(
            form, _read_jsonl(form) if form.endswith(".jsonl") else _read_parquet(form), config.data
        )
    raise ValueError(f"{key}={form!r} is no known source; it must be {FORMS}")


# Generators
# --------------------------------------------------------------------------------------------------


class TaggedSumSource:
    """`size` distinct problems of the embedded task. A twentieth of all that exist is held out,
    whether it is drawn or not.
    """

    def __init__(self, size: int, seed: int) -> None:
        most = tagged_sum.MAX_PROBLEMS // 2  # beyond that, most draws would be repetitions
        if size > most:
            raise ValueError(
                f"data.num_prompts={size} must be at most {most} for tagged_sum, which has no "
                "more distinct prompts to draw from"
            )
        self.size = size
        self._problems = self._draw(Random(seed), size, held_out=False)

    def __getitem__(self, index: int) -> PromptPayload:
        return self._payload(self._problems[index])

    def hold_out(self, num_prompts: int) -> list[PromptPayload]:
        most = int(tagged_sum.MAX_PROBLEMS * HELD_OUT_FRAC) // 2
        if num_prompts > most:
            raise ValueError(
                f"eval.num_prompts={num_prompts} must be at most {most} for tagged_sum"
            )
        return [
            self._payload(problem)
            for problem in self._draw(Random(HELD_OUT_SEED), num_prompts, held_out=True)
        ]

    sample = hold_out

    @staticmethod
    def _draw(random: Random, size: int, held_out: bool) -> list[str]:
        problems: dict[str, None] = {}
        while len(problems) < size:
            problem = tagged_sum.draw_problem(random)
            if (_hash_frac(problem) < HELD_OUT_FRAC) == held_out:
                problems[problem] = None
        return list(problems)

    @staticmethod
    def _payload(problem: str) -> PromptPayload:
        return PromptPayload(
            prompt_id=problem,
            text=problem,
            messages=[],
            answer=tagged_sum.solve(problem),
            metadata="",
        )


class ReasoningGymSource:
    """A task of reasoning-gym. Prompts are generated when drawn, some tasks needing seconds for
    one; few-prompt tasks repeat them.
    """

    def __init__(self, key: str, task: str, size: int, seed: int) -> None:
        reasoning_gym = import_extra("reasoning_gym", f"{key}=reasoning_gym:{task}", "data")
        tasks = list[str](reasoning_gym.factory.DATASETS)
        if task not in tasks:
            near = ", ".join(difflib.get_close_matches(task, tasks, n=3, cutoff=0.5)) or "none"
            raise ValueError(
                f"{key}=reasoning_gym:{task}: reasoning-gym has no task {task!r}; near ones: "
                f"{near}; it has {len(tasks)}"
            )
        try:
            self._create: Callable[[int, int], Any] = lambda size, seed: (
                reasoning_gym.create_dataset(task, size=size, seed=seed)
            )
            self._entries = self._create(SPARE * size, seed)
            self._check_survives_json(f"{key}=reasoning_gym:{task}")
        except (AssertionError, OSError, LookupError, TypeError) as error:
            raise ValueError(
                f"{key}=reasoning_gym:{task}: it cannot be generated here: "
                f"{one_line(error, with_type=True)}; choose another"
            ) from error
        self.task, self.size = task, size
        self._held_out: set[str] = set()

    def __getitem__(self, index: int) -> PromptPayload:
        for entry in (self._entries[index + spare * self.size] for spare in range(SPARE)):
            if entry["question"] not in self._held_out:
                return self._payload(entry)
        raise ValueError(
            f"reasoning_gym:{self.task}: those held out leave too few distinct prompts; lower "
            "eval.num_prompts or name data.eval"
        )

    def hold_out(self, num_prompts: int) -> list[PromptPayload]:
        held_out = self.sample(num_prompts)
        if len(held_out) < num_prompts:
            raise ValueError(
                f"eval.num_prompts={num_prompts} must be at most {len(held_out)}, the distinct "
                f"prompts that reasoning_gym:{self.task} gave"
            )
        self._held_out = {payload.text for payload in held_out}
        return held_out

    def sample(self, num_prompts: int) -> list[PromptPayload]:
        entries = self._create(SPARE * num_prompts, HELD_OUT_SEED)
        distinct: dict[str, PromptPayload] = {}
        for index in range(SPARE * num_prompts):
            if len(distinct) == num_prompts:
                break
            payload = self._payload(entries[index])
            distinct.setdefault(payload.text, payload)
        return list(distinct.values())

    def _check_survives_json(self, named: str) -> None:
        entry = self._entries[0]
        received = json.loads(json.dumps(entry, default=str))
        if self._entries.score_answer(entry["answer"], entry) != self._entries.score_answer(
            entry["answer"], received
        ):
            raise ValueError(
                f"{named}: the task's verifier needs Python objects that cannot travel to the "
                "actors; choose another task"
            )

    @staticmethod
    def _payload(entry: dict[str, Any]) -> PromptPayload:
        return PromptPayload(
            prompt_id=_digest(entry["question"]),
            text=entry["question"],
            messages=[],
            answer=str(entry["answer"]),
            metadata=json.dumps(entry, default=str),
        )


# Tables
# --------------------------------------------------------------------------------------------------


class TableSource:
    """Rows of a file or a dataset, all checked at once. `name` is how errors call it."""

    def __init__(self, name: str, rows: Iterable[tuple[int, Any]], data: DataConfig) -> None:
        self.name = name
        self._payloads = [
            _payload_of_row(f"{name}, row {number}", row, data) for number, row in rows
        ]
        if not self._payloads:
            raise ValueError(f"{name} holds no rows; a source needs at least one prompt")
        self.size = len(self._payloads)

    def __getitem__(self, index: int) -> PromptPayload:
        return self._payloads[index]

    def hold_out(self, num_prompts: int) -> list[PromptPayload]:
        by_hash = self._distinct_by_hash()
        num_held_out = max(num_prompts, round(HELD_OUT_FRAC * len(by_hash)))
        if 2 * num_held_out > len(by_hash):
            raise ValueError(
                f"{self.name} has {len(by_hash)} distinct prompts, too few to hold out "
                f"eval.num_prompts={num_prompts} "
                "and train on at least as many; lower eval.num_prompts, name data.eval, or set "
                "eval.every=0"
            )
        held_out = set(list(by_hash)[:num_held_out])
        self._payloads = [
            payload for payload in self._payloads if _prompt_key(payload) not in held_out
        ]
        self.size = len(self._payloads)
        return list(by_hash.values())[:num_prompts]

    def sample(self, num_prompts: int) -> list[PromptPayload]:
        return list(self._distinct_by_hash().values())[:num_prompts]

    def _distinct_by_hash(self) -> dict[str, PromptPayload]:
        distinct = {_prompt_key(payload): payload for payload in reversed(self._payloads)}
        return {key: distinct[key] for key in sorted(distinct, key=_hash_frac)}


def _payload_of_row(where: str, row: Any, data: DataConfig) -> PromptPayload:
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: expected an object with named fields, got {type(row).__name__}; write one "
            "JSON object a line"
        )
    row = cast("dict[str, Any]", row)
    prompt = _field_of_row(where, row, "data.prompt_field", data.prompt_field)
    # A user's own verifier may need no reference answer; every other one compares with it.
    own_verifier = ":" in data.environment
    answer = (
        row.get(data.answer_field, "")
        if own_verifier
        else _field_of_row(where, row, "data.answer_field", data.answer_field)
    )
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(
            f"{where}: field {data.answer_field!r} must be text or a number, got "
            f"{type(answer).__name__}; fix the row"
        )
    messages = (
        []
        if isinstance(prompt, str)
        else _checked_messages(f"{where}: field {data.prompt_field!r}", prompt)
    )
    if not messages and not prompt.strip():
        raise ValueError(f"{where}: field {data.prompt_field!r} is empty; a prompt needs text")
    text = "" if messages else prompt
    others = {
        name: value
        for name, value in row.items()
        if name not in (data.prompt_field, data.answer_field)
    }
    return PromptPayload(
        prompt_id=_digest(text + json.dumps(messages) + str(answer)),
        text=text,
        messages=messages,
        answer=str(answer),
        metadata=json.dumps(others, default=str) if others else "",
    )


def _field_of_row(where: str, row: dict[str, Any], key: str, name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(
            f"{where}: no field {name!r} (it has {', '.join(map(repr, row)) or 'none'}); name the "
            f"right one with {key}=..."
        )
    return row[name]


def _checked_messages(where: str, prompt: Any) -> list[dict[str, str]]:
    messages = list(cast("Sequence[Any]", prompt)) if isinstance(prompt, (list, tuple)) else []
    if not messages or not all(map(_is_message, messages)):
        raise ValueError(
            f"{where} must be text, or a list of chat messages, each with a text 'role' and "
            "'content'; fix the row"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    named = cast("dict[str, Any]", message)
    return isinstance(named.get("role"), str) and isinstance(named.get("content"), str)


def _read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, row {number}: not valid JSON ({one_line(error, with_type=True)}); "
                    "fix or remove the line"
                ) from error


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    parquet = import_extra("pyarrow.parquet", path, "data")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a readable parquet file: {one_line(error, with_type=True)}; write it "
            "again"
        ) from error
    yield from enumerate(rows, start=1)


def _read_dataset(key: str, form: str) -> Iterator[tuple[int, Any]]:
    """`hf:<dataset>[:<split>]`, the split `train` unless named;
    `hf:<owner>/<dataset>/<configuration>` if it has several.
    """
    datasets = import_extra("datasets", f"{key}={form}", "data")
    name, _, split = form.removeprefix("hf:").partition(":")
    configuration = None
    if name.count("/") == 2 and not Path(name).exists():
        name, _, configuration = name.rpartition("/")
    try:
        rows = datasets.load_dataset(name, configuration, split=split or "train")
    except Exception as error:  # a wrong name, split or network raises a dozen unrelated types
        raise ValueError(
            f"{key}={form}: cannot load it: {one_line(error, with_type=True)}; check name and "
            "split, and that the hub is reachable or the dataset cached"
        ) from error
    yield from enumerate(rows, start=1)


# Identity
# --------------------------------------------------------------------------------------------------


def _prompt_key(payload: PromptPayload) -> str:
    return payload.text or json.dumps(payload.messages)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash_frac(text: str) -> float:
    """Where `text` falls in [0, 1), the same for every run, machine and seed."""
    return int(_digest(text), 16) / 2**64
