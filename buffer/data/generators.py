"""Generators: sources that make their prompts, tagged_sum and reasoning_gym.

Held-out prompts come from a seed of their own, and a prompt equal to one of them is not trained on.
reasoning_gym is imported when such a source is opened.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from buffer.data import tagged_sum
from buffer.data.identity import HELD_OUT_FRAC, hash_frac, identity
from buffer.wire.messages import PromptPayload
from configs.errors import one_line
from configs.extras import import_extra

HELD_OUT_SEED = 1_000_000_007  # so that runs of any seed share held-out prompts
SPARE = 2  # a generated prompt that is held out is replaced by the next of this many


class TaggedSumSource:
    """`size` distinct problems of the embedded task. A twentieth of all that exist is held out,
    whether it is drawn or not.
    """

    digest = ""

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
            if (hash_frac(problem) < HELD_OUT_FRAC) == held_out:
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
            kind="deep" if tagged_sum.is_deep(problem) else "easy",
        )


class ReasoningGymSource:
    """A task of reasoning-gym. Prompts are generated when drawn, some tasks needing seconds for
    one; few-prompt tasks repeat them.
    """

    digest = ""

    def __init__(self, key: str, task: str, size: int, seed: int) -> None:
        reasoning_gym = import_extra("reasoning_gym", f"{key}=reasoning_gym:{task}", "data")
        tasks = list[str](reasoning_gym.factory.DATASETS)
        if task not in tasks:
            near = ", ".join(difflib.get_close_matches(task, tasks, n=3, cutoff=0.5)) or "none"
            raise ValueError(
                f"{key}=reasoning_gym:{task}: reasoning-gym has no task {task!r}; near ones: "
                f"{near}; it has {len(tasks)}"
            )
        self.name, self.size = f"{key}=reasoning_gym:{task}", size
        self._held_out: set[str] = set()
        try:
            self._create: Callable[..., Any] = partial(reasoning_gym.create_dataset, task)
            self._entries = self._create(size=SPARE * size, seed=seed)
            survives = self._survives_json()
        except Exception as error:  # a task raises as it likes
            raise ValueError(
                f"{self.name}: it cannot be generated here: "
                f"{one_line(error, with_type=True)}; choose another"
            ) from error
        if not survives:
            raise ValueError(
                f"{self.name}: the task's verifier needs Python objects that cannot travel to the "
                "actors; choose another task"
            )

    def __getitem__(self, index: int) -> PromptPayload:
        for spare in range(SPARE):
            payload = self._payload(self._entries, index + spare * self.size)
            if payload.text not in self._held_out:
                return payload
        raise ValueError(
            f"{self.name}: those held out leave too few distinct prompts; lower "
            "eval.num_prompts or name data.eval"
        )

    def hold_out(self, num_prompts: int) -> list[PromptPayload]:
        held_out = self.sample(num_prompts)
        if len(held_out) < num_prompts:
            raise ValueError(
                f"eval.num_prompts={num_prompts} must be at most {len(held_out)}, the number of "
                f"distinct prompts of {self.name}"
            )
        self._held_out = {payload.text for payload in held_out}
        return held_out

    def sample(self, num_prompts: int) -> list[PromptPayload]:
        entries = self._create(size=SPARE * num_prompts, seed=HELD_OUT_SEED)
        distinct: dict[str, PromptPayload] = {}
        for index in range(SPARE * num_prompts):
            if len(distinct) == num_prompts:
                break
            payload = self._payload(entries, index)
            distinct.setdefault(payload.text, payload)
        return list(distinct.values())

    def _survives_json(self) -> bool:
        """Whether the task's verifier takes an entry that has travelled."""
        entry, score = self._entries[0], self._entries.score_answer
        received = json.loads(json.dumps(entry, default=str))
        return score(entry["answer"], entry) == score(entry["answer"], received)

    def _payload(self, entries: Any, index: int) -> PromptPayload:
        try:
            entry: dict[str, Any] = entries[index]
            question, answer = entry["question"], str(entry["answer"])
            # An entry's number differs between repetitions of one prompt.
            facts = {k: v for k, v in entry["metadata"].items() if k != "source_index"}
            return PromptPayload(
                prompt_id=identity(question, answer, facts),
                text=question,
                messages=[],
                answer=answer,
                metadata=json.dumps(entry, default=str),
                source=f"{self.name}, entry {index}",
            )
        except Exception as error:  # a task raises as it likes
            raise ValueError(
                f"{self.name}: entry {index} cannot be generated: "
                f"{one_line(error, with_type=True)}; choose another task or run.seed"
            ) from error
