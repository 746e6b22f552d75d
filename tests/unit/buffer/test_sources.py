"""Prompt streams are seeded, resumable and disjoint from held-out prompts. Errors name the place
and the remedy.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import buffer.data.generators
from actors.verifiers import INLINE
from buffer.data.generators import TaggedSumSource
from buffer.data.sources import make_sources
from buffer.data.tables import TableSource
from buffer.wire.messages import PromptPayload
from configs.schema import Config


def config_of(train: str = "tagged_sum", **data: Any) -> Config:
    config = Config()
    config.data.train, config.data.num_prompts, config.eval.num_prompts = train, 300, 20
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(num_rows: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"what is {i} + 1?", "answer": i + 1, "level": i % 3} for i in range(num_rows)
    ]


def ids(payloads: list[PromptPayload]) -> list[str]:
    return [payload.prompt_id for payload in payloads]


def test_an_epoch_draws_every_prompt_once_and_the_next_one_in_another_order() -> None:
    stream = make_sources(config_of()).train
    first, second = ids(stream.draw(300)), ids(stream.draw(300))
    assert len(set(first)) == 300
    assert sorted(first) == sorted(second) and first != second


def test_a_seed_draws_the_same_stream_and_another_seed_another_one() -> None:
    config = config_of()
    first, again = make_sources(config).train.draw(50), make_sources(config).train.draw(50)
    config.run.seed = 1
    assert first == again != make_sources(config).train.draw(50)


@pytest.mark.parametrize("position", [0, 7, 299, 300, 650])
def test_a_stream_resumes_from_any_position(position: int) -> None:
    whole = make_sources(config_of()).train
    whole.draw(position)
    resumed = make_sources(config_of()).train
    resumed.seek(whole.position)
    assert resumed.draw(10) == whole.draw(10)
    assert resumed.position == position + 10


def test_tagged_sums_of_six_digits_are_deep_and_the_others_easy() -> None:
    kinds = {(p.kind, len(p.text) == 13) for p in TaggedSumSource(10, seed=0).hold_out(400)}
    assert kinds == {("easy", False), ("deep", True)}


def test_no_tagged_sum_is_both_trained_on_and_held_out_for_any_seed() -> None:
    held_out = set(ids(TaggedSumSource(10, seed=0).hold_out(400)))
    # Some of the few that recur in every stream.
    assert len(held_out) == 400 and any(len(problem) == 7 for problem in held_out)
    for seed in range(4):
        source = TaggedSumSource(5000, seed)
        trained_on = {source[i].text for i in range(source.size)}
        assert len(trained_on) == 5000 and not trained_on & held_out


def test_runs_with_different_seeds_are_evaluated_on_the_same_prompts() -> None:
    config = config_of()
    first = make_sources(config).eval_prompts
    config.run.seed = 5
    assert len(first) == 20 and first == make_sources(config).eval_prompts


def test_a_file_holds_out_by_prompt_so_that_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    sources = make_sources(config_of(write_jsonl(tmp_path / "a.jsonl", rows(100) + rows(100))))
    held_out = {payload.text for payload in sources.eval_prompts}
    trained_on = [payload.text for payload in sources.train.draw(160)]
    assert len(held_out) == 20 and len(trained_on) == 160 and len(set(trained_on)) == 80
    assert not held_out & set(trained_on)


def test_the_held_out_prompts_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    forward = make_sources(config_of(write_jsonl(tmp_path / "a.jsonl", rows(100)))).eval_prompts
    backward = make_sources(
        config_of(write_jsonl(tmp_path / "b.jsonl", rows(100)[::-1]))
    ).eval_prompts
    assert ids(forward) == ids(backward)


def test_without_evaluation_nothing_is_held_out(tmp_path: Path) -> None:
    config = config_of(write_jsonl(tmp_path / "a.jsonl", rows(3)))
    config.eval.every = 0
    sources = make_sources(config)
    assert sources.eval_prompts == [] and len(set(ids(sources.train.draw(3)))) == 3


def test_a_named_evaluation_file_leaves_the_training_file_whole(tmp_path: Path) -> None:
    train, held_out = (
        write_jsonl(tmp_path / "a.jsonl", rows(30)),
        write_jsonl(tmp_path / "b.jsonl", rows(5)),
    )
    sources = make_sources(config_of(train, eval=held_out))
    assert sources.train.source.size == 30 and len(sources.eval_prompts) == 5


def test_rows_become_payloads_with_their_other_columns_as_metadata(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"q": "one?", "a": 1, "level": 2}, {"q": messages, "a": "yes"}]
    )
    config = config_of(path, prompt_field="q", answer_field="a")
    config.eval.every = 0
    text, chat = sorted(
        make_sources(config).train.draw(2), key=lambda payload: payload.text, reverse=True
    )
    assert (text.text, text.messages, text.answer, json.loads(text.metadata)) == (
        "one?",
        [],
        "1",
        {"level": 2},
    )
    assert (chat.text, chat.messages, chat.answer, chat.metadata) == ("", messages, "yes", "")


def test_parquet_rows_are_read_like_jsonl_rows(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows(100)), tmp_path / "a.parquet")
    from_parquet = make_sources(config_of(str(tmp_path / "a.parquet")))
    from_jsonl = make_sources(config_of(write_jsonl(tmp_path / "a.jsonl", rows(100))))
    assert ids(from_parquet.train.draw(200)) == ids(from_jsonl.train.draw(200))
    assert ids(from_parquet.eval_prompts) == ids(from_jsonl.eval_prompts)


def test_a_local_dataset_is_read_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", rows(100))
    assert make_sources(config_of(f"hf:{tmp_path / 'set'}:train")).train.source.size == 80


def test_reasoning_gym_entries_carry_the_data_of_their_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    sources = make_sources(config_of("reasoning_gym:chain_sum"))
    payload = sources.train.draw(1)[0]
    entry = json.loads(payload.metadata)
    assert (payload.text, payload.answer) == (entry["question"], entry["answer"])
    assert entry["metadata"]["source_dataset"] == "chain_sum"


def test_a_generated_prompt_that_is_held_out_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    # The run's own seed, so that both streams draw the same prompts first.
    monkeypatch.setattr(buffer.data.generators, "HELD_OUT_SEED", 0)
    sources = make_sources(config_of("reasoning_gym:chain_sum"))
    held_out = {payload.text for payload in sources.eval_prompts}
    trained_on = {payload.text for payload in sources.train.draw(300)}
    assert len(held_out) == 20 and len(trained_on) > 250
    assert not held_out & trained_on


def image_message() -> str:
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image", "url": "x.png"}]
    return json.dumps({"prompt": [{"role": "user", "content": parts}], "answer": "a cat"})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ['{"prompt": "a", "answer": "b"}', '{"question": "a", "answer": "b"}'],
            ["row 2", "'prompt'", "'question'", "data.prompt_field"],
        ),
        (['{"prompt": "a"}'], ["row 1", "'answer'", "data.answer_field"]),
        (['{"prompt": "a", "answer": "b"}', "", '{"prompt": '], ["row 3", "not valid JSON"]),
        (['["a", "b"]'], ["row 1", "list", "JSON object"]),
        (['{"prompt": " ", "answer": "b"}'], ["row 1", "'prompt'", "empty"]),
        (['{"prompt": 3, "answer": "b"}'], ["row 1", "'prompt'", "chat messages"]),
        (['{"prompt": [{"role": "user"}], "answer": "b"}'], ["row 1", "'prompt'", "'content'"]),
        (['{"prompt": "a", "answer": ["b"]}'], ["row 1", "'answer'", "list"]),
        (['{"prompt": "a", "answer": true}'], ["row 1", "'answer'", "bool"]),
        (['{"prompt": "a", "answer": null}'], ["row 1", "'answer' is null"]),
        (['{"prompt": "a", "answer": NaN}'], ["row 1", "'answer' is nan"]),
        (['{"prompt": "a", "answer": "b"}', "{}"], ["row 2", "no field 'prompt'"]),
        (['{"prompt": "\\ud800", "answer": "b"}'], ["row 1", "surrogate"]),
        (['{"prompt": "a", "answer": "b", "x": "\\udfff"}'], ["row 1", "surrogate"]),
        (["[" * 100_000], ["row 1", "not valid JSON (RecursionError"]),
        (['{"prompt": "a", "answer": ' + "9" * 5000 + "}"], ["row 1", "not valid JSON"]),
        ([image_message()], ["row 1", "'prompt'", "parts that are text"]),
        (['{"prompt": [{"role": "user", "content": " "}], "answer": 1}'], ["row 1", "is empty"]),
        ([], ["no rows"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_the_place(
    tmp_path: Path, lines: list[str], expected: list[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError) as error:
        make_sources(config_of(str(path)))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in [str(path), *expected]), message


def payload_of(row: Any, **data: Any) -> PromptPayload:
    return TableSource("rows.jsonl", [(7, row)], config_of("rows.jsonl", **data).data)[0]


def test_a_nested_field_can_be_named() -> None:
    row = {
        "data": {"messages": [{"role": "user", "content": "hi"}]},
        "reward_model": {"style": "rule", "ground_truth": 4},
        "answer.key": "flat",
    }
    nested = payload_of(row, prompt_field="data.messages", answer_field="reward_model.ground_truth")
    assert (nested.messages[0]["content"], nested.answer) == ("hi", "4")
    assert json.loads(nested.metadata)["reward_model"]["style"] == "rule"
    assert payload_of(row, prompt_field="data.messages", answer_field="answer.key").answer == "flat"
    with pytest.raises(ValueError) as error:
        payload_of(row, prompt_field="data.messages", answer_field="reward_model.truth")
    assert str(error.value) == (
        "rows.jsonl, row 7: no field 'reward_model.truth' ('reward_model' has 'style', "
        "'ground_truth'); name the right one with data.answer_field=..."
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [(4, "4"), (0.5, "0.5"), (Decimal("1.50"), "1.50"), (" 4 ", " 4 "), ("", ""), ("é", "é")],
)
def test_answers_are_converted_to_text(answer: Any, text: str) -> None:
    assert payload_of({"prompt": "a", "answer": answer}).answer == text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"answer": ["a", "b"]}, '["a", "b"]'),
        ({"answer": {"x": 1}}, '{"x": 1}'),
        ({"answer": None}, ""),
        ({}, ""),
    ],
)
def test_a_verifier_of_the_user_may_have_any_answer_or_none(row: dict[str, Any], text: str) -> None:
    assert payload_of({"prompt": "a"} | row, environment="my:verify").answer == text


def test_the_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    payload = payload_of({"prompt": [{"role": "user", "content": parts}], "answer": 1})
    assert payload.messages == [{"role": "user", "content": "two parts"}]


def test_rows_differ_if_anything_that_reaches_the_verifier_differs() -> None:
    row = {"prompt": "sort", "answer": "1", "tests": ["a"]}
    others = [{"tests": ["b"]}, {"answer": "2"}, {"prompt": "sort it"}, {"more": 1}]
    found = [payload_of(row | other).prompt_id for other in [{}, *others]]
    assert len(set(found)) == 5
    assert payload_of(dict(reversed(row.items()))).prompt_id == found[0]
    # Text and answer are not simply concatenated.
    assert payload_of({"prompt": "a1", "answer": ""}).prompt_id != (
        payload_of({"prompt": "a", "answer": "1"}).prompt_id
    )


def test_rows_of_one_prompt_are_held_out_together_and_each_is_evaluated(tmp_path: Path) -> None:
    table = [{"prompt": f"{i // 2}?", "answer": "1", "test": i} for i in range(100)]
    sources = make_sources(config_of(write_jsonl(tmp_path / "a.jsonl", table)))
    assert len(set(ids(sources.eval_prompts))) == 20
    assert len({payload.text for payload in sources.eval_prompts}) == 10
    trained_on = {payload.text for payload in sources.train.draw(80)}
    assert len(trained_on) == 40
    assert not trained_on & {payload.text for payload in sources.eval_prompts}


def test_a_table_of_one_prompt_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    table = [{"prompt": "the same", "answer": "1", "test": i} for i in range(100)]
    with pytest.raises(ValueError, match="too few to hold out"):
        make_sources(config_of(write_jsonl(tmp_path / "a.jsonl", table)))


@pytest.mark.parametrize(
    ("encoded", "text"),
    [
        ('{"prompt": "a", "answer": "é"}'.encode("utf-8-sig"), "é"),
        ('{"prompt": "a", "answer": "é"}\r\n\r\n'.encode(), "é"),
        (b'{"prompt": "a", "answer": "\\ud83d\\ude00"}', "\U0001f600"),
    ],
)
def test_byte_order_marks_and_foreign_line_ends_are_not_part_of_a_row(
    tmp_path: Path, encoded: bytes, text: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(encoded)
    config = config_of(str(path))
    config.eval.every = 0
    (payload,) = make_sources(config).train.draw(1)
    assert (payload.answer, payload.source) == (text, f"{path}, row 1")


def test_another_encoding_is_refused_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xe9", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: not UTF-8 text") as error:
        make_sources(config_of(str(path)))
    assert "\n" not in str(error.value)


def test_a_row_that_its_library_cannot_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        def __iter__(self) -> Iterator[Any]:
            yield {"prompt": "a", "answer": "b"}
            raise OSError("cannot identify\nimage file")

    datasets = types.SimpleNamespace(load_dataset=lambda *_, **__: Rows())
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(ValueError) as error:
        make_sources(config_of("hf:owner/name"))
    assert str(error.value).startswith(
        "data.train=hf:owner/name, row 2: cannot be read: OSError: cannot identify image file"
    )


def test_a_library_is_not_left_to_retry_a_hub_that_is_unreachable(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    """It may still load a dataset of its cache."""
    offline: list[bool] = []

    def load_dataset(*_: Any, **__: Any) -> Any:
        offline.append(constants.HF_HUB_OFFLINE)
        if len(offline) == 1:
            return [{"prompt": f"a{number}", "answer": "b"} for number in range(50)]
        raise OSError("not cached")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    port = free_port()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    make_sources(config_of("hf:owner/name"))
    with pytest.raises(ValueError, match=rf"hub, http://127.0.0.1:{port}, cannot be reached"):
        make_sources(config_of("hf:owner/name"))
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ValueError, match="cannot load it: OSError: not cached; check name"):
            make_sources(config_of("hf:owner/name"))
    assert offline == [True, True, False] and constants.HF_HUB_OFFLINE is False


def test_a_value_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(ValueError) as error:
        payload_of({"prompt": "a", "answer": "b", "image": object()})
    assert str(error.value) == (
        "rows.jsonl, row 7: field 'image' holds object, which cannot be sent to a verifier; "
        "remove the column"
    )


def test_a_reasoning_gym_task_that_fails_later_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gym = pytest.importorskip("reasoning_gym")
    stream = make_sources(config_of("reasoning_gym:chain_sum")).train
    kind = type(stream.source._entries)
    assert gym is not None

    def fail(*_: Any) -> Any:
        raise IndexError("no such\nword")

    monkeypatch.setattr(kind, "__getitem__", fail)
    with pytest.raises(ValueError) as error:
        stream.draw(1)
    message = str(error.value)
    assert message.startswith("data.train=reasoning_gym:chain_sum: entry ")
    assert "IndexError: no such word" in message


def test_repetitions_of_a_generated_prompt_share_an_id() -> None:
    pytest.importorskip("reasoning_gym")
    source = make_sources(config_of("reasoning_gym:chain_sum")).train.source
    entry = {"question": "1?", "answer": "2", "metadata": {"source_index": 1, "n": 3}}
    other = {"question": "1?", "answer": "2", "metadata": {"source_index": 2, "n": 3}}
    harder = {"question": "1?", "answer": "2", "metadata": {"source_index": 2, "n": 4}}
    first, second, third = ids([source._payload([entry, other, harder], i) for i in range(3)])
    assert first == second != third


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"prompt": ["a", None], "answer": ["b", "b"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: field 'prompt' is null"):
        make_sources(config_of(str(tmp_path / "a.parquet")))


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        make_sources(config_of(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("form", ["nowhere.jsonl", "nowhere.parquet"])
def test_a_missing_file_is_named(form: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.train={form}: there is no such file"):
        make_sources(config_of(form))


def test_an_unknown_kind_of_source_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.eval='gsm8k' is no known source; it must be tagged_sum, reasoning_gym",
    ):
        make_sources(config_of(eval="gsm8k"))


def test_an_unknown_reasoning_gym_task_names_similar_ones() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=r"no task 'chainsum'; near ones: chain_sum"):
        make_sources(config_of("reasoning_gym:chainsum"))


def test_a_missing_dataset_is_reported_in_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError) as error:
        make_sources(config_of(f"hf:{tmp_path / 'absent'}"))
    assert (
        "\n" not in str(error.value)
        and "data.train=hf:" in str(error.value)
        and "hub is reachable" in str(error.value)
    )


def test_too_few_rows_to_hold_out_is_refused_with_the_remedies(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"30 distinct prompts, too few to hold out eval\.num_prompts=20 .* eval\.every=0",
    ):
        make_sources(config_of(write_jsonl(tmp_path / "a.jsonl", rows(30))))


def test_more_tagged_sums_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.num_prompts=597861 must be at most"):
        make_sources(config_of(num_prompts=597_861))


def test_importing_sources_loads_no_model_or_data_library() -> None:
    heavy = ["torch", "transformers", "vllm", "datasets", "pyarrow", "reasoning_gym"]
    found = subprocess.run(
        [sys.executable, "-c", "import sys, buffer.data.sources; "
         f"print([name for name in {heavy} if name in sys.modules])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("through_datasets", [True, False])
def test_rows_of_the_shape_of_gsm8k_are_read(through_datasets: bool, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    answer = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072"
    path = write_jsonl(tmp_path / "set" / "train.jsonl", [{"question": "How?", "answer": answer}])
    if through_datasets:
        pytest.importorskip("datasets")
        path = f"hf:{tmp_path / 'set'}:train"
    config = config_of(path, prompt_field="question")
    config.eval.every = 0
    (payload,) = make_sources(config).train.draw(1)
    assert (payload.text, payload.answer, payload.metadata) == ("How?", answer, "")
    verify = INLINE["numeric_or_exact"]
    assert verify(payload.text, "so \\boxed{1072}", payload.answer, {}) == 1
    assert verify(payload.text, "so \\boxed{24}", payload.answer, {}) == 0
