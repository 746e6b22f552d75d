"""One forward pass over a pack, and the layers in it that do not know where a sequence ends.

Owns the call of the model: training and the probes all use `Boundaries.logprobs`. Position ids that
start again at 0 keep sequences apart in attention. A layer with state (a convolution, a recurrence,
a scan) gets `seq_idx` and `cu_seq_lens_q`, which only some kernels use. `split` passes such a layer
one sequence at a time, while all other layers stay packed. Never decides which layers need that.

Shapes: T tokens in a pack, S of its positions that predict a trained token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from learner.packs.attention import PACKED_SDPA
from learner.packs.batch import Pack
from learner.packs.head import ScoredForward, Scoring, is_linear

# Arguments that tell a layer where sequences begin, by transformers' names.
TOLD = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

OURS = ("lengths", "parents")


class Boundaries:
    """The model of one rank, as a function of packs.

    `kinds` names the classes of layers that take one sequence at a time. If `fused`, the head runs
    in chunks, and otherwise the logits of a pack exist as a whole. `head_dtype` is that of the
    logits: model or float32.
    """

    def __init__(self, model: PreTrainedModel, head_dtype: str = "model") -> None:
        self.model = model
        self.kinds: tuple[str, ...] = ()
        self.fused = is_linear(model)
        self._lengths: tuple[int, ...] = ()  # of the newest pack, which backward may recompute
        self._whole: dict[torch.nn.Module, Callable[..., Any]] = {}
        parameters = inspect.signature(model.forward).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes = frozenset(parameters)
        ScoredForward(model, float32=head_dtype == "float32")

    def logprobs(self, pack: Pack, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability [S] of each predicted token, and entropy [S] of its distribution."""
        self._lengths = pack.lengths
        arguments = self._taken(
            position_ids=pack.position_ids_T[None],
            logits_to_keep=pack.predicts_S,
            **self._told(pack),
        )
        scoring = Scoring(pack, temperature, self.fused)
        return self.model(input_ids=pack.input_ids_T[None], scoring=scoring, **arguments)

    def plain_logprobs(self, pack: Pack, fused: bool = False) -> torch.Tensor:
        """Log-probabilities [S] of the one sequence in `pack`, from nothing but its tokens."""
        scoring = Scoring(pack, temperature=1.0, fused=fused)
        return self.model(input_ids=pack.input_ids_T[None], scoring=scoring, **self._taken())[0]

    def _taken(self, **arguments: Any) -> dict[str, Any]:
        """The arguments that this model takes."""
        arguments["use_cache"] = False  # with a cache, packed sequences see each other
        if self._takes_all:
            return arguments
        return {name: value for name, value in arguments.items() if name in self._takes}

    def split(self, kind: str) -> None:
        """From now on, pass one sequence at a time to every layer of the class `kind`."""
        for module in self.model.modules():
            if type(module).__name__ == kind:
                self._whole[module] = module.forward
                module.forward = self._one_by_one(module.forward)
        self.kinds += (kind,)

    def undo(self) -> None:
        """Pass whole packs to every layer again."""
        for module, forward in self._whole.items():
            module.forward = forward
        self._whole, self.kinds = {}, ()

    def _told(self, pack: Pack) -> dict[str, Any]:
        """Arguments that say where sequences begin.

        Our attention takes `OURS`; kernels take those of transformers' flattening collator.
        """
        if self.model.config._attn_implementation == PACKED_SDPA:
            return {"lengths": pack.lengths, "parents": pack.parents}
        assert not pack.num_saved, "only our attention knows trunks and branches"
        lengths = torch.tensor(pack.lengths, device=pack.input_ids_T.device)
        starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
        seq_idx = numbers.repeat_interleave(lengths, output_size=len(pack.input_ids_T))[None]
        longest = max(pack.lengths)
        return dict(zip(TOLD, (seq_idx, starts, starts, longest, longest), strict=True))

    def _one_by_one(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def split_forward(*args: Any, **kwargs: Any) -> Any:
            if len(self._lengths) == 1:
                return forward(*args, **kwargs)
            untold = {name: value for name, value in kwargs.items() if name not in (*TOLD, *OURS)}
            parts = zip(_parts(args, self._lengths), _parts(untold, self._lengths), strict=True)
            return _join([forward(*a, **k) for a, k in parts])

        return split_forward


def _parts(value: Any, lengths: tuple[int, ...]) -> list[Any]:
    """`value` once per sequence.

    Tensors [1, T, ...] are cut along T, also inside tuples and dicts. Other values stay the same.
    """
    if isinstance(value, torch.Tensor) and value.shape[:2] == (1, sum(lengths)):
        return list(value.split(lengths, 1))
    if isinstance(value, tuple):
        columns = [_parts(item, lengths) for item in value]
        return [tuple(column[i] for column in columns) for i in range(len(lengths))]
    if isinstance(value, dict):
        rows = {name: _parts(item, lengths) for name, item in value.items()}
        return [{name: row[i] for name, row in rows.items()} for i in range(len(lengths))]
    return [value] * len(lengths)


def _join(outputs: list[Any]) -> Any:
    """The inverse, for the output of a layer: a tensor [1, T, ...], None, or a tuple of these."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        return tuple(_join(list(column)) for column in zip(*outputs, strict=True))
    return torch.cat(outputs, 1)
