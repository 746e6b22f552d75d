"""The head of a model, called in chunks inside the model's own forward pass.

Owns the replacement of `model.forward`, through which FSDP2 gathers the head's weight before and
handles its gradient after. The model runs with a head that passes hidden states on. A scale that
the model applies to its logits then applies to the hidden states, which gives the same logits,
since the head is linear. The bound of logits is not linear, so it is switched off and applied to
each chunk. Whether all this holds for a model is measured by `learner.probes.capability`.

Shapes: S positions of a pack that predict a trained token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from learner.packs.batch import Pack
from learner.packs.logprobs import LOGITS, Head, token_logprobs

SOFTCAP = "final_logit_softcapping"  # transformers' name
OTHER_BOUNDS = ("logits_soft_cap", "output_logit_soft_cap")  # of few models, each in its own way


def is_linear(model: PreTrainedModel) -> bool:
    """Whether logits are a linear function of hidden states, up to the bound `SOFTCAP`."""
    config = model.config.get_text_config()
    bounded = any(getattr(config, name, None) for name in OTHER_BOUNDS)
    return isinstance(model.get_output_embeddings(), torch.nn.Linear) and not bounded


@dataclass(frozen=True, slots=True)
class Scoring:
    """The tokens of a pack to score, and at which temperature."""

    pack: Pack
    temperature: float
    fused: bool


class ScoredForward:
    """The forward pass of `model`, which also scores tokens if it is given a `Scoring`.

    It returns their log-probabilities and entropies instead of logits.
    """

    def __init__(self, model: PreTrainedModel, float32: bool) -> None:
        self._model, self._plain, self._float32 = model, model.forward, float32
        self._config = model.config.get_text_config()
        model.forward = self

    def __call__(self, *args: Any, scoring: Scoring | None = None, **kwargs: Any) -> Any:
        if scoring is None:
            return self._plain(*args, **kwargs)
        pack, head = scoring.pack, LOGITS
        if scoring.fused:
            head = self._head()
            with self._passing_hidden_states_on():
                rows = self._plain(*args, **kwargs).logits[0]
        else:
            rows = self._plain(*args, **kwargs).logits[0]
        if len(rows) != len(pack.predicts_S):  # some models ignore `logits_to_keep`
            rows = rows[pack.predicts_S]
        return token_logprobs(rows, pack.targets_S, scoring.temperature, head)

    def _head(self) -> Head:
        layer = self._model.get_output_embeddings()
        assert layer is not None
        return Head(
            weight_VH=layer.get_parameter("weight"),
            bias_V=getattr(layer, "bias", None),
            softcap=getattr(self._config, SOFTCAP, None) or 0.0,
            float32=self._float32,
        )

    @contextmanager
    def _passing_hidden_states_on(self) -> Iterator[None]:
        layer, softcap = self._model.get_output_embeddings(), getattr(self._config, SOFTCAP, None)
        assert layer is not None
        layer.forward = _same
        if softcap:
            setattr(self._config, SOFTCAP, None)
        try:
            yield
        finally:
            del layer.forward
            if softcap:
                setattr(self._config, SOFTCAP, softcap)


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
