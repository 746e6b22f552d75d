"""The probe: its tokens, the comparison of two sides, and its effect on a run."""

from __future__ import annotations

import numpy as np
import pytest

from buffer.probes import ProbeFailed, Probes
from buffer.wire.messages import Probed
from buffer.wire.probe import (
    NUM_SEQUENCES,
    NUM_TOKENS,
    allowed_difference,
    difference,
    largest,
    probe_sequences,
)
from configs.schema import Config


def logprobs(nats: float = 0.0, count: int = 4) -> bytes:
    return (np.arange(count) + nats).astype("<f4").tobytes()


def probed(version: int, nats: float = 0.0) -> Probed:
    return Probed(version=version, model_type="llama", logprobs=logprobs(nats))


def make_probes(**changes: object) -> Probes:
    config = Config()
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    probes = Probes(config)
    probes.published(0, logprobs())
    return probes


@pytest.mark.parametrize("vocab_size", [8, 48, 320, 151_936])
def test_the_tokens_of_the_probe_are_ordinary_and_always_the_same(vocab_size: int) -> None:
    sequences = probe_sequences(vocab_size)
    assert sequences == probe_sequences(vocab_size)
    assert [len(sequence) for sequence in sequences] == [NUM_TOKENS] * NUM_SEQUENCES
    tokens = {token for sequence in sequences for token in sequence}
    assert vocab_size // 4 <= min(tokens) and max(tokens) < vocab_size // 2
    assert len(tokens) > 1


def test_lists_that_cannot_be_compared_differ_infinitely() -> None:
    assert difference(logprobs(), logprobs()) == 0
    assert difference(logprobs(), logprobs(0.5)) == largest(logprobs(), logprobs(0.5)) == 0.5
    assert difference(logprobs(count=4), logprobs(count=5)) == float("inf")
    assert difference(b"", b"") == float("inf")
    assert difference(logprobs(float("nan")), logprobs()) == float("inf")


def test_the_allowed_difference_follows_the_dtype_or_the_key() -> None:
    config = Config()
    assert allowed_difference(config) == 1e-4
    config.model.dtype = "bfloat16"
    assert allowed_difference(config) == 0.3
    config.learner.max_logprob_diff = 0.7
    assert allowed_difference(config) == 0.7


def test_an_engine_that_agrees_is_reported_once() -> None:
    probes = make_probes()
    probes.published(1, logprobs())
    found = [probes.probed("e", probed(version, 1e-5)) for version in (-1, 0, 1)]
    assert [comparison.first for comparison in found if comparison] == [False, True, False]
    assert probes.row()["probe/logprob_diff"] == pytest.approx(1e-5, rel=0.1)


def test_a_row_names_the_engine_with_the_largest_difference_and_omits_lost_ones() -> None:
    probes = make_probes()
    assert probes.row() == {}
    probes.probed("a", probed(0, 1e-5))
    probes.probed("b", probed(0, 5e-5))
    assert probes.row()["probe/logprob_diff"] == pytest.approx(5e-5, rel=0.1)
    probes.forget("b")
    assert probes.row()["probe/logprob_diff"] == pytest.approx(1e-5, rel=0.1)


def test_a_difference_before_any_swap_is_blamed_on_the_model() -> None:
    with pytest.raises(
        ProbeFailed, match="llama models are refused: .* before any swap .*0.0001 with"
    ):
        make_probes().probed("e", probed(-1, 0.01))


def test_a_difference_after_a_swap_is_blamed_on_the_swap() -> None:
    probes = make_probes()
    probes.probed("e", probed(-1))
    with pytest.raises(ProbeFailed, match="after loading version 0 .*cannot take new weights"):
        probes.probed("e", probed(0, 0.01))


def test_nan_is_refused() -> None:
    with pytest.raises(ProbeFailed, match="inf nats"):
        make_probes().probed("e", probed(0, float("nan")))


def test_only_versions_that_the_learner_scored_are_compared() -> None:
    probes = make_probes()
    assert probes.probed("e", probed(3, 9.0)) is None
    probes.published(3, b"")  # a learner that does not probe
    assert probes.probed("e", probed(3, 9.0)) is None


def test_the_newest_versions_and_the_first_are_kept() -> None:
    probes = make_probes()
    for version in range(1, 30):
        probes.published(version, logprobs())
    assert probes.probed("e", probed(29)) is not None
    assert probes.probed("e", probed(22)) is not None
    assert probes.probed("e", probed(21)) is None
    assert probes.probed("late", probed(-1)) is not None
