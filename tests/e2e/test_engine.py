"""`actors.inference.engine.Engine` with real vLLM: aborts, weight swaps with requests in flight,
and the death of vLLM's own process.

The model is tiny, random and made here, so that it never samples <eos> unless its weights make it
likely (`eos_logit`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from vllm.v1.engine.exceptions import EngineDeadError

from actors.inference.engine import BASE_VERSION, Engine, _Router
from actors.inference.generation import Generation, Meter, TokenRun
from buffer.processes.private_folder import private_folder
from configs.schema import Config

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

EOS, VOCABULARY, SLOTS = 2, 64, 4
PROMPT = [5 + i % 50 for i in range(100)]  # three full blocks of the key-value cache
BOUND = 1e-4  # nats between vLLM and transformers in float32; 5e-6 is typical


# Settings that a model's folder may suggest. Each would change the distribution or the
# log-probabilities if it were applied.
UNWANTED_DEFAULTS = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.2,
    "repetition_penalty": 2.0,
}


def make_model(tied: bool, seed: int, eos_logit: float = -60) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, intermediate_size=256,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied,
            max_position_embeddings=1024, eos_token_id=EOS, bos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(
                    parameter,
                    std=0.3
                    if "embed" in name or "head" in name
                    else 0.8 / parameter.shape[1] ** 0.5,
                )
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # So that feature 0 stays 1, as in the embedding, and sets the logit of <eos>.
                parameter[0] = 0
        model.model.embed_tokens.weight[:, 0] = 1
        model.lm_head.weight[EOS] = 0
        model.lm_head.weight[EOS, 0] = eos_logit
    return model.eval()


def save_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": EOS, "<unk>": 3} | {
        chr(60 + i): i for i in range(4, VOCABULARY)
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    generation_config = folder / "generation_config.json"
    generation_config.write_text(
        json.dumps(json.loads(generation_config.read_text()) | UNWANTED_DEFAULTS)
    )


def logprobs_of(
    model: Qwen3ForCausalLM, tokens: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """A plain forward pass: the log-probability of each of `tokens` after `PROMPT`."""
    ids = torch.tensor([PROMPT + tokens])
    with torch.no_grad():
        logprobs = (model(ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
    return logprobs[len(PROMPT) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


def error(model: Qwen3ForCausalLM, run: TokenRun, before: list[int] | None = None) -> float:
    """The largest difference between a run's log-probabilities and those of `model`. `before` has
    the earlier tokens of the response.
    """
    before = before or []
    return float(
        (
            logprobs_of(model, before + list(run.tokens))[len(before) :]
            - torch.tensor(list(run.logprobs))
        )
        .abs()
        .max()
    )


async def score_beside_others(engine: Engine, running: list[Generation]) -> torch.Tensor:
    """Score `PROMPT` while all of `running` decode, which are aborted afterwards."""
    await until(lambda: all(len(generation.tokens) > 5 for generation in running))
    scores = await engine.score(PROMPT)
    assert not any(generation.finished.done() for generation in running)
    await engine.abort([generation.request_id for generation in running])
    return torch.tensor(list(scores))


def scores_of(model: Qwen3ForCausalLM) -> torch.Tensor:
    """A plain forward pass: the log-probability of each token of `PROMPT` but the first."""
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]


@dataclass
class Served:
    """An engine, the model that it started with, and its event loop."""

    engine: Engine
    folder: Path
    tied: bool
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    request_ids: Iterator[int] = field(default_factory=lambda: iter(range(10**6)))

    def launch(self, max_tokens: int, seed: int = 0) -> Generation:
        return self.engine.launch(str(next(self.request_ids)), PROMPT, max_tokens, seed=seed)

    def write(self, model: Qwen3ForCausalLM) -> str:
        """Writes a snapshot and returns its path. As in a checkpoint, a tied head is omitted."""
        path = str(self.folder / f"snapshot {next(self.request_ids)}")
        save_file(
            {
                name: tensor
                for name, tensor in model.state_dict().items()
                if not (self.tied and name == "lm_head.weight")
            },
            path,
        )
        return path

    async def swap(self, path: str) -> int:
        version = self.engine.version + 1
        await self.engine.swap(path, version)
        return version


@pytest.fixture(scope="module", params=["tied", "untied"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder, tied = tmp_path_factory.mktemp(request.param), request.param == "tied"
    save_model(make_model(tied, seed=0), folder / "model")
    config = Config()
    config.model.path, config.actors.slots, config.actors.kv_cache_gib = (
        str(folder / "model"),
        SLOTS,
        0.25,
    )
    config.sampling.seeded = True
    with private_folder(), asyncio.Runner() as runner:
        engine = Engine(config)
        yield Served(engine, folder, tied, runner.run)
        engine.close()


tied_only = pytest.mark.parametrize("served", ["tied"], indirect=True)
untied_only = pytest.mark.parametrize("served", ["untied"], indirect=True)


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.005)


@tied_only
def test_the_base_weights_sample_under_version_minus_one(served: Served) -> None:
    async def generate() -> list[TokenRun]:
        generation = served.launch(20)
        assert await generation.finished == "length"
        return generation.take()

    (run,) = served.run(generate())
    assert served.engine.measure().tokens_per_s > 0
    assert run.version == BASE_VERSION == -1
    assert len(run.tokens) == 20
    assert error(make_model(True, seed=0), run) < BOUND


@untied_only
@pytest.mark.parametrize("temperature", [0.01, 0.7, 2.0])
def test_the_sampling_defaults_of_a_model_are_not_applied(
    served: Served, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Neither `UNWANTED_DEFAULTS` nor a clamp of the lowest allowed temperature is applied."""
    monkeypatch.setattr(served.engine._sampling, "temperature", temperature)

    async def generate() -> TokenRun:
        generation = served.launch(40)
        await generation.finished
        (run,) = generation.take()
        return run

    run, model = served.run(generate()), make_model(False, seed=0)
    expected = logprobs_of(model, list(run.tokens), temperature)
    torch.testing.assert_close(
        torch.tensor(list(run.logprobs)), expected, rtol=0, atol=BOUND / min(1, temperature)
    )


@tied_only
def test_prompts_longer_than_a_step_are_sampled_with_their_seeds(
    served: Served,
) -> None:
    """vLLM on a CPU cannot undo a seeded draw, as it must for a prompt prefilled in parts."""

    async def generate() -> list[list[int]]:
        prompts = [[5 + (7 * i + j) % 50 for j in range(900)] for i in range(SLOTS + 1)]
        running = [
            served.engine.launch(str(next(served.request_ids)), prompt, 10, seed=seed)
            for seed, prompt in enumerate(prompts)
        ]
        assert [await generation.finished for generation in running] == ["length"] * len(running)
        return [list(generation.tokens) for generation in running]

    assert served.run(generate()) == served.run(generate())


@tied_only
def test_an_abort_frees_the_slot(
    served: Served, record_property: Callable[[str, object], None]
) -> None:
    async def generate() -> float:
        running = [served.launch(800) for _ in range(SLOTS + 1)]  # one slot is reserved for `score`
        await until(lambda: all(len(generation.tokens) > 5 for generation in running))
        waiting = served.launch(800)
        await asyncio.sleep(0.2)
        assert len(waiting.tokens) == 0  # every slot is taken
        decided = time.monotonic()
        await served.engine.abort([running[0].request_id])
        freed_s = time.monotonic() - decided
        sampled = len(running[0].tokens)
        await until(lambda: len(waiting.tokens) > 0)
        assert running[0].finished.result() == "abort"
        assert 5 < sampled == len(running[0].tokens) < 800
        # It took no slot of another request.
        assert not any(generation.finished.done() for generation in [*running[1:], waiting])
        await served.engine.abort([generation.request_id for generation in [*running, waiting]])
        return freed_s

    record_property("decision_to_freed_ms", round(1000 * served.run(generate()), 1))


@untied_only
def test_a_sequence_is_scored_while_every_slot_decodes(served: Served) -> None:
    async def generate() -> torch.Tensor:
        running = [served.launch(800) for _ in range(SLOTS)]
        scores = await score_beside_others(served.engine, running)
        for generation in running:
            (run,) = generation.take()
            # Their own log-probabilities, not those of `score`.
            assert error(make_model(False, seed=0), run) < BOUND
        return scores

    scores, expected = served.run(generate()), scores_of(make_model(False, seed=0))
    torch.testing.assert_close(scores, expected, rtol=0, atol=BOUND)


@tied_only
def test_aborting_an_ended_request_changes_nothing(served: Served) -> None:
    async def generate() -> str:
        generation = served.launch(3)
        await generation.finished
        await served.engine.abort([generation.request_id, "never launched"])
        return generation.finished.result()

    assert served.run(generate()) == "length"


@tied_only
@pytest.mark.parametrize("during_a_swap", [False, True])
def test_an_abort_reaches_a_request_that_was_just_launched(
    served: Served, during_a_swap: bool
) -> None:
    snapshot = served.write(make_model(True, seed=1))

    async def generate() -> None:
        swap = asyncio.create_task(served.swap(snapshot)) if during_a_swap else None
        await asyncio.sleep(0.001)
        aborted = served.launch(900)
        await served.engine.abort([aborted.request_id])
        assert await aborted.finished == "abort"
        if swap is not None:
            await swap
        others = [served.launch(400) for _ in range(SLOTS)]
        await until(lambda: any(len(generation.tokens) > 100 for generation in others))
        # No request waits for the slot of the aborted one.
        assert all(len(generation.tokens) > 20 for generation in others)
        await served.engine.abort([generation.request_id for generation in others])

    served.run(generate())


def test_after_a_swap_logprobs_are_those_of_the_new_weights(
    served: Served, record_property: Callable[[str, object], None]
) -> None:
    """This includes a prompt that the old weights had prefilled and cached."""
    new = make_model(served.tied, seed=7)
    snapshot = served.write(new)

    async def generate() -> tuple[int, TokenRun]:
        await served.launch(5).finished
        version = await served.swap(snapshot)
        generation = served.launch(60)
        await generation.finished
        (run,) = generation.take()
        return version, run

    version, run = served.run(generate())
    assert run.version == version
    record_property("logprob_error", error(new, run))
    assert error(new, run) < BOUND
    # The old weights would differ by this much.
    assert error(make_model(served.tied, seed=0), run) > 0.1


@tied_only
def test_each_request_of_a_step_has_its_own_logprobs(served: Served) -> None:
    """Also where others end before it and begin after it, which changes its place in the batch."""
    model = make_model(tied=True, seed=5, eos_logit=-600)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.2)  # else it soon samples one token only, which is certain

    async def generate() -> list[TokenRun]:
        await served.swap(served.write(model))
        first = [served.launch(max_tokens, seed=max_tokens) for max_tokens in (9, 60, 23, 90)]
        await asyncio.gather(first[0].finished, first[2].finished)
        later = [served.launch(max_tokens, seed=max_tokens) for max_tokens in (30, 50)]
        await asyncio.gather(*(one.finished for one in [*first, *later]))
        return [run for one in [*first, *later] for run in one.take()]

    runs = served.run(generate())
    assert [len(run.tokens) for run in runs] == [9, 60, 23, 90, 30, 50]
    assert max(error(model, run) for run in runs) < BOUND


@tied_only
def test_requests_in_flight_survive_a_swap_and_every_token_knows_its_version(
    served: Served,
) -> None:
    old, new = make_model(True, seed=1), make_model(True, seed=2)
    snapshots = served.write(old), served.write(new)

    async def generate() -> tuple[int, list[Generation]]:
        await served.swap(snapshots[0])
        generations = [served.launch(600, seed) for seed in range(SLOTS)]
        await until(lambda: all(len(generation.tokens) > 20 for generation in generations))
        version = await served.swap(snapshots[1])
        assert [await generation.finished for generation in generations] == ["length"] * SLOTS
        return version, generations

    version, generations = served.run(generate())
    for generation in generations:
        before, after = generation.take()
        assert (before.version, after.version) == (version - 1, version)
        assert len(before.tokens) + len(after.tokens) == len(generation.tokens) == 600
        assert error(old, before) < BOUND  # up to and including the last token before the pause
        assert (
            error(old, TokenRun(version, after.tokens[:1], after.logprobs[:1]), list(before.tokens))
            > 1e-3
        )  # from the first token after it


@tied_only
def test_a_snapshot_that_lacks_a_parameter_is_refused(served: Served) -> None:
    path = str(served.folder / "partial")
    tensors = {
        name: tensor
        for name, tensor in make_model(True, seed=1).state_dict().items()
        if "layers.0." not in name
    }
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(Exception, match="lacks"):
        served.run(served.engine.swap(path, 99))


@untied_only
def test_eos_ends_a_response_and_is_its_last_token(served: Served) -> None:
    async def generate() -> Generation:
        await served.swap(served.write(make_model(False, seed=3, eos_logit=60)))
        generation = served.launch(50)
        assert await generation.finished == "stop"
        return generation

    assert served.run(generate()).tokens.tolist() == [EOS]
    assert served.engine.eos_ids == {EOS}


@untied_only
def test_the_death_of_vllm_is_reported(served: Served) -> None:
    """This is the last test of this engine, because it kills it."""

    async def generate() -> Generation:
        await served.swap(served.write(make_model(False, seed=3)))
        generation = served.launch(800)
        await until(lambda: len(generation.tokens) > 0)
        (core,) = [
            child
            for child in psutil.Process(os.getpid()).children()
            if "EngineCore" in " ".join(child.cmdline())
        ]
        core.send_signal(signal.SIGKILL)
        await asyncio.wait_for(served.engine.died.wait(), 30)
        return generation

    generation = served.run(generate())
    assert generation.finished.exception() is not None


def test_a_step_of_many_requests_is_one_step(tmp_path: Path) -> None:
    """More than 128, after which vLLM would pass a step's outputs on in slices."""
    many = 150
    model = make_model(tied=True, seed=0)
    save_model(model, tmp_path)
    config = Config()
    config.model.path, config.actors.slots, config.actors.kv_cache_gib = str(tmp_path), many, 0.25
    with private_folder(), asyncio.Runner() as runner:
        engine = Engine(config)
        try:

            async def generate() -> tuple[list[Generation], float]:
                running = [engine.launch(str(i), PROMPT[:20], 200, seed=i) for i in range(many)]
                await until(lambda: all(len(one.tokens) > 5 for one in running), timeout_s=120)
                engine.measure()
                await until(lambda: all(len(one.tokens) > 40 for one in running), timeout_s=120)
                batch = engine.measure().batch
                await engine.abort([one.request_id for one in running])
                return running, batch

            generations, batch = runner.run(generate())
        finally:
            engine.close()
    assert batch == pytest.approx(many)
    for generation in generations:
        (run,) = generation.take()
        assert len(run.logprobs) == len(run.tokens)


def test_a_context_that_the_model_lacks_names_the_key(tmp_path: Path) -> None:
    save_model(make_model(tied=True, seed=0), tmp_path)
    config = Config()
    config.model.path, config.model.max_context = str(tmp_path), 4096  # of 1024
    config.actors.kv_cache_gib = 0.25
    with private_folder(), pytest.raises(ValueError, match=r"; lower model\.max_context=4096$"):
        Engine(config)


@tied_only
def test_an_error_between_vllm_and_the_requests_is_told(served: Served) -> None:
    """Tokens without their log-probabilities, for example: EngineCore is well and says nothing."""

    async def outcome() -> tuple[str, str]:
        router = _Router(Meter(1, 0.0))
        generation = Generation("1")
        router.expect(generation)
        router.add_request(SimpleNamespace(external_req_id="1", request_id="internal"), None)
        output = SimpleNamespace(request_id="internal", new_token_ids=[5], new_logprobs=None)
        with pytest.raises(AssertionError) as raised:
            router.process_outputs([output], 0.0, None)
        router.propagate_error(raised.value)
        with pytest.raises(AssertionError):
            await generation.finished
        ours, router.error = router.error, ""
        router.propagate_error(EngineDeadError())
        return ours, router.error

    assert served.run(outcome()) == ("AssertionError: tokens without log-probabilities", "")
