"""The warm start writes a folder, once, that loads like any other model.

These tests take only a few steps; the demo shows that the model learns.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from buffer.data.tagged_sum import FULL, SINGLE_PASS, TOKEN, draw_problem, draw_trace  # noqa: E402
from learner.packs.attention import PACKED_SDPA  # noqa: E402
from tools.warm_start import (  # noqa: E402
    PHASES,
    Phase,
    build_model,
    build_tokenizer,
    draw_packs,
    lengths_of,
    torch,
    warm_start,
)

SHORT = (
    Phase(SINGLE_PASS, steps=3, tokens=128, lr=3e-3, short_frac=1 / 3),
    Phase(FULL, steps=1, tokens=768, lr=2e-3, decays=True),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert warm_start(folder, seed=0, phases=SHORT)
    return folder


def test_the_folder_loads_as_a_model_and_its_tokenizer(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (type(model).__name__, model.num_parameters(), model.dtype) == (
        "Qwen3ForCausalLM",
        599_104,
        torch.float32,
    )
    assert (
        model.config.tie_word_embeddings and model.config.vocab_size == 64 and len(tokenizer) == 33
    )
    assert (
        model.generation_config.eos_token_id
        == tokenizer.eos_token_id
        == tokenizer.encode("<eos>")[0]
    )
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_the_same_recipe_reuses_its_folder_and_another_seed_makes_a_new_model(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    assert not warm_start(folder, seed=0, phases=SHORT)
    assert warm_start(folder, seed=1, phases=SHORT)
    assert (folder / "model.safetensors").read_bytes() != before
    assert warm_start(folder, seed=0, phases=SHORT)
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_interrupted_warm_start_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # The model is written by then.
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm_start(tmp_path / "tiny", phases=SHORT[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_warm_start_did_not_make_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by tools.warm_start"):
        warm_start(tmp_path, phases=SHORT)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_traces_survive_the_tokenizer_one_token_per_word_or_character() -> None:
    tokenizer, random = build_tokenizer(), Random(0)
    for _ in range(200):
        problem = draw_problem(random)
        trace = draw_trace(random, problem)
        ids = tokenizer.encode(problem + trace)
        assert tokenizer.decode(ids) == problem + trace
        assert (
            len(ids) == len(problem) + len(TOKEN.findall(trace))
            and tokenizer.unk_token_id not in ids
        )
    assert tokenizer.decode(ids, skip_special_tokens=True) == (problem + trace).removesuffix(
        "<eos>"
    )


def test_packs_are_full_and_only_responses_are_trained() -> None:
    tokenizer = build_tokenizer()
    tokens, positions, targets = next(
        draw_packs(Random(0), tokenizer, Phase(SINGLE_PASS, steps=1, tokens=256, lr=1e-3))
    )
    assert 256 - 50 < len(tokens) <= 256 and len(tokens) == len(positions) == len(targets)
    starts = (positions == 0).nonzero().flatten().tolist()
    first = tokens[: starts[1]].tolist()
    prompt_length = first.index(tokenizer.encode("=")[0]) + 1
    assert targets[: starts[1]].tolist() == [-100] * (prompt_length - 1) + first[prompt_length:] + [
        -100
    ]


def test_packed_traces_do_not_see_one_another() -> None:
    tokenizer, model = build_tokenizer(), build_model(seed=0).eval()
    tokens, positions, _ = next(
        draw_packs(Random(0), tokenizer, Phase(SINGLE_PASS, steps=1, tokens=128, lr=1e-3))
    )
    lengths = lengths_of(positions)
    assert sum(lengths) == len(tokens) and len(lengths) == (positions == 0).sum()
    second = int((positions == 0).nonzero()[1])
    end = int((positions == 0).nonzero()[2]) if (positions == 0).sum() > 2 else len(tokens)
    with torch.no_grad():
        model.set_attn_implementation(PACKED_SDPA)
        packed = model(
            input_ids=tokens[None], position_ids=positions[None], lengths=lengths, use_cache=False
        ).logits[0, second:end]
        model.set_attn_implementation("sdpa")
        alone = model(input_ids=tokens[None, second:end], use_cache=False).logits[0]
    assert torch.allclose(packed, alone, atol=1e-3)


def test_the_default_recipe_is_the_measured_one() -> None:
    assert [(phase.steps, phase.tokens) for phase in PHASES] == [
        (230, 1024),
        (220, 1536),
        (220, 1536),
    ]
