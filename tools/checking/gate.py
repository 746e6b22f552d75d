"""The gate: do learner and engine compute the same log-probabilities, also after a weight swap?

Each check is measured on the model itself, never looked up in a list of models. The learner goes
first and is freed before the engine starts, because both may need the same GPU. Weights travel as
in a run: they are published, fetched and swapped in. Driven by `tools.check`.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.inference import weights
from actors.inference.generation import EngineDied
from actors.inference.probing import probe
from actors.inference.weights import SwapFailed
from buffer.wire.messages import SnapshotRef
from buffer.wire.probe import (
    BROKEN_SWAP,
    NUM_TOKENS,
    OTHER_NUMBERS,
    allowed_difference,
    difference,
    largest,
    probe_sequences,
)
from buffer.wire.snapshots import fetch
from configs.errors import one_line
from configs.schema import Config

if TYPE_CHECKING:
    from actors.inference.engine import Engine


FETCH_TIMEOUT_S = 60.0


class Refused(Exception):
    """The model cannot be trained here. One line: model type, check, numbers, and the remedy."""


@dataclass(frozen=True)
class Verdict:
    """One check that passed. `difference`: the largest over all tokens, in nats."""

    check: str
    result: str
    difference: float


@dataclass(frozen=True)
class LearnerSide:
    """The learner's results for a model: for version 0, and for version 1 with other weights."""

    model_type: str
    packing: Verdict
    probes: tuple[bytes, ...]
    snapshots: tuple[SnapshotRef, ...]


def checks(config: Config) -> Iterator[Verdict]:
    """Every check in turn.

    Raises `Refused` at the first that fails, and `ValueError` if the model cannot be loaded.
    """
    with local_publisher(config) as publisher:
        learner = ask_learner(config, publisher)
        yield learner.packing
        yield from ask_engine(config, learner)


def local_publisher(config: Config) -> Any:
    """A publisher of snapshots that stay on this machine."""
    from learner.snapshots.publish import (
        WeightPublisher,  # here, so that --help need not wait for torch
    )

    local = replace(
        config,
        weights=replace(config.weights, transport="zmq", address="tcp://127.0.0.1:*"),
        buffer=replace(config.buffer, keys=""),
    )
    return WeightPublisher(local, rank=0)


def ask_learner(config: Config, publisher: Any) -> LearnerSide:
    """Load the model as a learner of one rank does, probe and publish two versions, and free it."""
    from learner import fsdp
    from learner.packs.boundaries import Boundaries
    from learner.probe import disturb, probe_logprobs
    from learner.probes.capability import probe_packing
    from learner.probes.sharing import probe_sharing

    with fsdp.process_group(config) as device:
        model = fsdp.load_sharded(config, device)
        boundaries = Boundaries(model, config.model.head_dtype)
        model_type = model.config.model_type
        dtype = fsdp.COMPUTE_DTYPE[config.model.dtype]
        try:
            packing = probe_packing(boundaries, dtype)
        except ValueError as error:
            raise Refused(one_line(error)) from error
        layout = str(packing)
        if config.batch.share_prompts:
            layout += f"; {probe_sharing(boundaries, packing, dtype)}"
        probes, snapshots = [], []
        for version in (0, 1):
            if version == 1:
                disturb(model)
            probes.append(probe_logprobs(boundaries, device))
            snapshots.append(publisher.publish(model, version))
        del model, boundaries
        gc.collect()
        if device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
    verdict = Verdict("packed equals alone", layout, packing.difference.logprob)
    return LearnerSide(model_type, verdict, tuple(probes), tuple(snapshots))


def ask_engine(config: Config, learner: LearnerSide) -> Iterator[Verdict]:
    """Start an engine and compare it with the learner's results, before and after swaps."""
    from actors.inference.engine import Engine  # here, because it takes seconds

    at_temperature_one = replace(config, sampling=replace(config.sampling, temperature=1.0))
    try:
        engine = Engine(at_temperature_one)
    except ValueError as error:
        raise Refused(f"{learner.model_type} models cannot be generated from: {error}") from error
    with asyncio.Runner() as runner:
        verdicts = _engine_checks(config, engine, learner)
        try:
            while (verdict := runner.run(_next(verdicts))) is not None:
                yield verdict
        except EngineDied as error:
            raise Refused(
                f"{learner.model_type} models cannot be generated from: {error}"
            ) from error
        finally:
            engine.close()


async def _next(verdicts: AsyncIterator[Verdict]) -> Verdict | None:
    return await anext(verdicts, None)


async def _engine_checks(
    config: Config, engine: Engine, learner: LearnerSide
) -> AsyncIterator[Verdict]:
    compare = partial(_compare, config, learner.model_type)
    base = await probe(engine)
    yield compare("engine equals learner", base, learner.probes[0], OTHER_NUMBERS)
    decoded, scored = await _decode(engine)
    yield compare("decoding equals scoring", decoded, scored, OTHER_NUMBERS)
    await _load(engine, learner, 0)
    yield compare("loading version 0 changes nothing", await probe(engine), base, BROKEN_SWAP)
    await _load(engine, learner, 1)
    yield compare("loading other weights", await probe(engine), learner.probes[1], BROKEN_SWAP)


def _compare(
    config: Config, model_type: str, check: str, these: bytes, those: bytes, advice: str
) -> Verdict:
    """The verdict on two sides' log-probabilities. Raises `Refused`."""
    mean, most, allowed = (
        difference(these, those),
        largest(these, those),
        allowed_difference(config),
    )
    numbers = f"{mean:.1e} nats per token (allowed: {allowed:g}; largest: {most:.1e})"
    if mean > allowed:
        raise Refused(
            f"{model_type} models are refused: {check}: {numbers} with model.dtype="
            f"{config.model.dtype}; {advice}"
        )
    return Verdict(check, numbers, most)


async def _decode(engine: Engine) -> tuple[bytes, bytes]:
    """The log-probabilities of a response: from decoding it, and from scoring it afterwards."""
    prompt = probe_sequences(engine.vocab_size)[0][: NUM_TOKENS // 2]
    generation = engine.launch("decoded", prompt, NUM_TOKENS // 2, seed=0)
    await generation.finished
    decoded = b"".join(run.logprobs.tobytes() for run in generation.take())
    scored = await engine.score([*prompt, *generation.tokens])
    return decoded, scored[len(prompt) - 1 :].tobytes()


async def _load(engine: Engine, learner: LearnerSide, version: int) -> None:
    """Load a version as an engine does in a run."""
    snapshot = learner.snapshots[version]
    try:
        await weights.load(snapshot, partial(fetch, timeout_s=FETCH_TIMEOUT_S), engine)
    except SwapFailed as error:
        raise Refused(
            f"{learner.model_type} models are refused: {one_line(error)}; {BROKEN_SWAP}"
        ) from error
