"""Whether a model computes the same if the prompt of a group is in a pack only once.

Owns the measurement: two groups and a single response of random tokens run through the model that
is about to be trained, with their prompts shared and repeated. Decides by it, never by a list of
models. It is not tried if a layer needs another attention than our own, or has a state, since both
depend on the tokens that come before in the row. Driven by `learner.train` before the first step,
after `learner.probes.capability`. A collective if there are several ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from configs.errors import one_line
from learner.packs.attention import PACKED_SDPA
from learner.packs.batch import Pack, concatenate, plain_pack, tree
from learner.packs.boundaries import Boundaries
from learner.probes.capability import Packing
from learner.probes.differences import (
    Difference,
    device_of,
    gradient_difference,
    largest_of_ranks,
    logprobs_of,
    ordinary_ids,
    run,
    settle,
)

# Tokens of each prompt, and of its responses: unequal, odd, one of a single token.
GROUPS = ((19, (11, 1, 24)), (8, (5, 3)), (13, (9,)))
CHANGED = 1  # the number of the group whose tokens are drawn again to find a leak


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether packs share prompts, and the measurement that led to it."""

    difference: Difference
    reason: str = ""  # why they do not

    @property
    def works(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        """The verdict and its cost, on one line."""
        if self.works:
            return f"shared prompts equal repeated ones ({self.difference})"
        return f"each response repeats the prompt of its group, because {self.reason}"


def probe_sharing(
    boundaries: Boundaries, packing: Packing, dtype: torch.dtype = torch.float32
) -> Sharing:
    """Compare packs with shared prompts to packs of the layout `packing`, which is right."""
    reason = _excluded(boundaries, packing)
    if reason:
        return Sharing(Difference(), reason)
    difference = _measure(boundaries)
    if difference.within_bounds(dtype):
        return Sharing(difference)
    return Sharing(difference, f"shared prompts give other results ({difference})")


def _excluded(boundaries: Boundaries, packing: Packing) -> str:
    attention = boundaries.model.config._attn_implementation
    if packing.one_per_pack:
        return "every response has a micro-batch to itself"
    if packing.split_kinds:
        return f"its {', '.join(packing.split_kinds)} layers take one sequence at a time"
    if attention == "sdpa":
        return "some of its layers attend to a window or with a bias"
    if attention != PACKED_SDPA:
        return f"model.attention={attention} cannot share it, as sdpa can"
    return ""


def _measure(boundaries: Boundaries) -> Difference:
    device = device_of(boundaries.model)
    generator = torch.Generator().manual_seed(0)
    ids = ordinary_ids(boundaries.model)
    groups = [_group(ids, *sizes, generator) for sizes in GROUPS]
    changed = [list(group) for group in groups]
    changed[CHANGED] = _group(ids, *GROUPS[CHANGED], generator)
    # A sibling's tokens, after the prompt that both have.
    sibling = changed[0][-1]
    own = _draw(ids, len(sibling.input_ids_T) - GROUPS[0][0], generator)
    tokens = torch.cat((sibling.input_ids_T[: GROUPS[0][0]], own))
    changed[0][-1] = replace(sibling, input_ids_T=tokens)
    apart = concatenate([sequence for group in groups for sequence in group]).to(device)
    shared, others = _shared(groups).to(device), _shared(changed).to(device)
    try:
        expected, expected_gradients = run(boundaries, [apart])
        logprobs, gradients = run(boundaries, [shared])
        with torch.no_grad():
            leaked = (logprobs_of(boundaries, others) - logprobs).abs()[_unchanged(groups)]
    except Exception as error:  # a model's own code may raise anything
        return Difference(error=one_line(error, with_type=True))
    finally:
        settle(boundaries.model)
    logprob = (logprobs - expected).abs().max().item()
    gradient = gradient_difference(gradients, expected_gradients)
    logprob, gradient, leak = largest_of_ranks([logprob, gradient, leaked.max().item()])
    return Difference(logprob, gradient, leak)


def _group(
    ids: torch.Tensor, num_prompt: int, responses: tuple[int, ...], generator: torch.Generator
) -> list[Pack]:
    prompt = _draw(ids, num_prompt, generator)
    return [
        plain_pack(
            torch.cat((prompt, _draw(ids, num_sampled, generator))),
            torch.randn(num_sampled, generator=generator),
            num_given=num_prompt,
        )
        for num_sampled in responses
    ]


def _draw(ids: torch.Tensor, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    return ids[torch.randint(len(ids), (num_tokens,), generator=generator)]


def _shared(groups: list[list[Pack]]) -> Pack:
    trunks = [num_prompt - 1 for num_prompt, _ in GROUPS]
    return concatenate([tree(group, trunk) for group, trunk in zip(groups, trunks, strict=True)])


def _unchanged(groups: list[list[Pack]]) -> torch.Tensor:
    """Marks the targets of all responses but those whose tokens, or neighbours', were changed."""
    return torch.cat(
        [
            torch.full(
                (len(sequence.targets_S),), number != CHANGED and sequence is not groups[0][-1]
            )
            for number, group in enumerate(groups)
            for sequence in group
        ]
    )
