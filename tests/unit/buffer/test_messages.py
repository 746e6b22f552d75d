"""A peer's values are bounded by their types: the decoder takes the bounds themselves, and refuses
every value beyond them, in every field of every message that a server receives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from buffer.wire import messages as msg

CHUNK = {
    "rollout_id": 1,
    "offset": 0,
    "sampled": True,
    "version": 0,
    "tokens": b"",
    "logprobs": b"",
}
POLICY = {
    "version": 0, "digest": "a" * 64, "num_bytes": 1, "address": "", "path": "",
    "delta_bytes": 1, "base_digest": "b" * 64,
}  # fmt: skip
VERIFIER = {
    "num_workers": 1, "num_waiting": 0, "num_busy": 0, "num_verified": 0, "num_failed": 0,
    "num_timeouts": 0, "queue_s": 0.5, "time_s": 0.5, "longest_s": 0.5,
}  # fmt: skip
WORK = {"per_prediction": 0.5, "per_pair": 0.5, "shares_prompts": False}
VALID: dict[str, dict[str, Any]] = {
    "EngineHello": {
        "engine_id": "pool b/0", "engine_type": "cpu/float32/tp1", "slots": 1,
        "policy_version": -1, "pid": 1, "incarnation": "a", "rollouts": [1], "run": "r",
    },
    "Progress": {"chunks": [CHUNK], "waits": [1]},
    "Finished": {"rollout_id": 1, "num_tokens": 1, "truncated": False, "reward": 1.0, "text": "x"},
    "Failed": {"rollout_id": 1, "error": "x", "unusable": False},
    "Stopped": {"rollout_id": 1, "num_tokens": 1, "text": "x"},
    "PolicyLoaded": {"version": 0, "fetch_s": 0.5, "pause_s": 0.5},
    "Probed": {"version": 0, "model_type": "qwen3", "logprobs": b"1234"},
    "EngineReport": {
        "batch": 1.0, "ms_per_token": 1.0, "tokens_per_s": 1.0, "busy_frac": 1.0,
        "verifier": VERIFIER,
    },
    "Leaving": {},
    "LearnerHello": {
        "rank": 0, "num_ranks": 1, "step": 0, "pid": 1, "vocab_size": 100, "incarnation": "a",
        "resumed": False, "take_over": False, "run": "r", "work": WORK,
    },
    "Pull": {"rank": 0, "step": 0, "portion": 1},
    "Trained": {"step": 0, "num_tokens": 1, "metrics": {"train/loss": 0.5}},
    "NewPolicy": {"version": 6},
    "Published": {"policy": POLICY, "seconds": 0.5, "probe": b"1234"},
    "LearnerFailed": {"rank": 0, "error": "x"},
    "Heartbeat": {},
    "FetchSnapshot": {"version": 0, "offset": 0, "num_bytes": 1, "delta": False},
}  # fmt: skip
TYPES: dict[str, type] = {t.__name__: t for t in (*get_args(msg.Inbound), msg.FetchSnapshot)}

NESTED: Any = []
for _ in range(200):
    NESTED = [NESTED]
HOSTILE: dict[str, Any] = {
    "nothing": None, "minus one": -1, "minus two": -2, "minus 2**63": -(2**63), "2**63": 2**63,
    "2**64-1": 2**64 - 1, "a half": 0.5, "nan": math.nan, "inf": math.inf, "-inf": -math.inf,
    "1e308": 1e308, "true": True, "empty": "", "number as text": "1", "line feed": "a\n",
    "escape": "a\x1b[2J", "accent": "é", "zero byte": "a\0", "parent folder": "../x",
    "long": "x" * 100_001, "bytes": b"\xff" * 5, "many bytes": b"\0" * 100_001, "list": [1],
    "long list": [0] * 100_001, "nested": NESTED, "map": {"a": 1}, "map of text": {"a/b": "1"},
    "map with nan": {"a/b": math.nan}, "map with inf": {"a/b": math.inf},
    "map over a name of the buffer": {"step": 1.0}, "map with a long name": {"a/" + "x" * 99: 1.0},
    "map with a line feed": {"a/b\n": 1.0}, "large map": {f"a/{i}": 1.0 for i in range(1001)},
}  # fmt: skip
FREE_TEXT = {
    "empty",
    "number as text",
    "line feed",
    "escape",
    "accent",
    "zero byte",
    "parent folder",
}
HARMLESS = {  # by field: values that are hostile elsewhere but allowed here
    "policy_version": {"minus one"}, "version": {"minus one"},
    "reward": {"minus one", "minus two", "a half"},
    "fetch_s": {"a half"}, "pause_s": {"a half"}, "seconds": {"a half"}, "batch": {"a half"},
    "ms_per_token": {"a half"}, "tokens_per_s": {"a half"}, "busy_frac": {"a half"},
    "per_prediction": {"a half"}, "per_pair": {"a half"}, "shares_prompts": {"true"},
    "queue_s": {"a half"}, "time_s": {"a half"}, "longest_s": {"a half"},
    "engine_id": {"number as text", "parent folder"},
    "engine_type": {"number as text", "parent folder"},
    "model_type": {"number as text", "parent folder"},
    "run": {"empty", "number as text", "parent folder"},
    "incarnation": {"number as text", "parent folder"}, "rollouts": {"list"}, "waits": {"list"},
    "digest": {"empty"}, "base_digest": {"empty"}, "delta": {"true"},
    "address": FREE_TEXT, "path": FREE_TEXT, "text": FREE_TEXT,
    "error": FREE_TEXT, "logprobs": {"bytes"}, "probe": {"bytes"},
    "sampled": {"true"}, "truncated": {"true"}, "unusable": {"true"}, "resumed": {"true"},
    "take_over": {"true"},
}  # fmt: skip
CHUNK_BYTES_FIELDS = {"tokens", "logprobs"}  # bounded by the largest message, not by a type


def spoken(name: str, fields: dict[str, Any]) -> msg.Message:
    decode = msgspec.msgpack.Decoder(msg.Inbound if name != "FetchSnapshot" else TYPES[name]).decode
    return decode(msgpack.packb({"type": name, **fields}))


def places() -> Iterator[tuple[str, str, str]]:
    """(message, field that holds a struct or "", field) for every value that a peer chooses."""
    for name, fields in VALID.items():
        for field, value in fields.items():
            yield name, "", field
            inner = value[0] if field == "chunks" else value
            if inner in (CHUNK, POLICY, VERIFIER, WORK):
                for part in inner:
                    yield name, field, part


def with_value(name: str, outer: str, field: str, value: Any) -> dict[str, Any]:
    if not outer:
        return VALID[name] | {field: value}
    if outer == "chunks":
        return {"chunks": [CHUNK | {field: value}]}
    return VALID[name] | {outer: VALID[name][outer] | {field: value}}


def is_harmless(name: str, outer: str, field: str, hostile: str) -> bool:
    if outer == "chunks" and field in CHUNK_BYTES_FIELDS:
        return hostile in ("bytes", "many bytes")
    if (name, field) == ("NewPolicy", "version"):
        return False
    if (name, field) == ("LearnerHello", "incarnation"):
        return hostile in HARMLESS["run"]
    return hostile in HARMLESS.get(field, set())


def test_every_message_and_every_field_is_tried() -> None:
    assert VALID.keys() == TYPES.keys()
    for name, fields in VALID.items():
        assert fields.keys() == {f.name for f in msgspec.structs.fields(TYPES[name])}
    assert CHUNK.keys() == {f.name for f in msgspec.structs.fields(msg.Chunk)}
    assert VERIFIER.keys() == {f.name for f in msgspec.structs.fields(msg.VerifierReport)}
    assert WORK.keys() == {f.name for f in msgspec.structs.fields(msg.Work)}
    assert POLICY.keys() == {f.name for f in msgspec.structs.fields(msg.SnapshotRef)}


@pytest.mark.parametrize("name", VALID)
def test_an_honest_message_is_accepted(name: str) -> None:
    assert isinstance(spoken(name, VALID[name]), TYPES[name])


@pytest.mark.parametrize(("name", "outer", "field"), list(places()))
def test_a_hostile_value_is_refused_in_every_field(name: str, outer: str, field: str) -> None:
    taken = set[str]()
    for hostile, value in HOSTILE.items():
        try:
            spoken(name, with_value(name, outer, field, value))
        except msgspec.ValidationError:
            continue
        taken.add(hostile)
    assert taken == {hostile for hostile in HOSTILE if is_harmless(name, outer, field, hostile)}


@pytest.mark.parametrize("name", VALID)
def test_unknown_and_missing_fields_are_refused(name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        spoken(name, VALID[name] | {"unknown": 1})
    required = [f.name for f in msgspec.structs.fields(TYPES[name]) if f.required]
    for field in required:
        with pytest.raises(msgspec.ValidationError):
            spoken(name, {k: v for k, v in VALID[name].items() if k != field})


AT_THE_BOUND = [
    ("EngineHello", {"engine_id": "x" * 200}, {"engine_id": "x" * 201}),
    ("EngineHello", {"slots": 2**13}, {"slots": 2**13 + 1}),
    ("EngineHello", {"slots": 1}, {"slots": 0}),
    ("Finished", {"reward": -1e6}, {"reward": -1.1e6}),
    ("Finished", {"reward": 1}, {"reward": "1"}),
    ("Finished", {"text": "é" * msg.TEXT_CHARS}, {"text": "x" * (msg.TEXT_CHARS + 1)}),
    ("Failed", {"error": "x" * msg.LINE_CHARS}, {"error": "x" * (msg.LINE_CHARS + 1)}),
    ("Stopped", {"rollout_id": 2**53}, {"rollout_id": 2**53 + 1}),
    ("Stopped", {"text": "é" * msg.TEXT_CHARS}, {"text": "x" * (msg.TEXT_CHARS + 1)}),
    ("EngineReport", {"busy_frac": 2.0}, {"busy_frac": 2.1}),
    ("LearnerHello", {"vocab_size": 2**31}, {"vocab_size": 0}),
    ("Trained", {"metrics": {"a/b": 1e300}}, {"metrics": {"a/b": 1e301}}),
    ("Progress", {"waits": [1] * msg.MAX_CHUNKS}, {"waits": [1] * (msg.MAX_CHUNKS + 1)}),
    ("Progress", {"chunks": [CHUNK] * msg.MAX_CHUNKS}, {"chunks": [CHUNK] * (msg.MAX_CHUNKS + 1)}),
]


@pytest.mark.parametrize(("name", "allowed", "beyond"), AT_THE_BOUND)
def test_a_value_equal_to_its_bound_is_allowed(
    name: str, allowed: dict[str, Any], beyond: dict[str, Any]
) -> None:
    spoken(name, VALID[name] | allowed)
    with pytest.raises(msgspec.ValidationError):
        spoken(name, VALID[name] | beyond)


def test_a_sender_cuts_texts_that_would_be_refused() -> None:
    long = "x" * 100_000
    for message in (
        msg.Stopped(rollout_id=1, num_tokens=1, text=long),
        msg.Failed(rollout_id=1, error=long),
        msg.LearnerFailed(rank=0, error=long),
        msg.Finished(rollout_id=1, num_tokens=1, truncated=False, reward=0.0, text=long),
        msg.Shutdown(error=long),
    ):
        kind = type(message)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind) == message
