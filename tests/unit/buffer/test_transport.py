"""Addresses, framing and keys, as far as they can be tested without a peer."""

import os
import stat
from pathlib import Path

import msgpack
import msgspec
import pytest
import zmq

from buffer.wire.credit import cost
from buffer.wire.keys import ROLES, find_keys, keys_of_run, make_keys
from buffer.wire.messages import (
    SPEAKERS,
    Chunk,
    EngineHello,
    Finished,
    Heartbeat,
    Inbound,
    Launch,
    LaunchedRollout,
    Outbound,
    Progress,
    PromptPayload,
    Received,
)
from buffer.wire.transport import (
    Router,
    TransportError,
    check_address,
    decoder,
    encode,
    next_port,
)
from tests.fakes import chunk


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5577",
        "tcp://127.9.9.9:1",
        "tcp://localhost:*",
        "tcp://[::1]:5577",
        "ipc:///tmp/x",
        "inproc://x",
    ],
)
def test_a_local_address_needs_no_keys(address):
    check_address(address, "")


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:5577",
        "tcp://*:5577",
        "tcp://10.0.0.5:5577",
        "tcp://node-7.cluster:5577",
        "tcp://eth0:*",
        "tcp://[2001:db8::1]:5577",
    ],
)
def test_an_address_beyond_this_machine_requires_keys(address):
    with pytest.raises(ValueError, match=r"python -m tools\.keys FOLDER.*buffer\.keys"):
        check_address(address, "")
    check_address(address, "some/folder")


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:5577", "tcp://127.0.0.1", "tcp://127.0.0.1:", "tcp://127.0.0.1:0",
     "tcp://127.0.0.1:65536", "tcp://:5577", "tcp://127.0.0.1:5577/x", "http://127.0.0.1:80",
     "tcp://::1:5577", "ipc://", "inproc://", "tcp://127.0.0.1:55 77"],
)  # fmt: skip
@pytest.mark.parametrize("keys", ["", "some/folder"])
def test_a_malformed_address_is_refused_with_its_value(address, keys):
    with pytest.raises(ValueError) as raised:
        check_address(address, keys)
    assert repr(address) in str(raised.value)


def test_the_publisher_takes_the_next_port():
    assert next_port("tcp://127.0.0.1:5577") == "tcp://127.0.0.1:5578"
    assert next_port("tcp://[::1]:5577") == "tcp://[::1]:5578"
    assert next_port("ipc:///tmp/run.sock") == "ipc:///tmp/run.sock.pub"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://127.0.0.1:65535"])
def test_an_address_without_a_next_port_is_refused(address):
    with pytest.raises(ValueError, match="no next port"):
        next_port(address)


def test_frames_are_plain_msgpack():
    message = Progress(
        chunks=[
            Chunk(
                rollout_id=7,
                offset=0,
                sampled=True,
                version=3,
                tokens=b"\1\0\0\0",
                logprobs=b"\0\0\0\xbf",
            )
        ]
    )
    assert msgpack.unpackb(encode(message)) == {
        "type": "Progress",
        "chunks": [
            {
                "rollout_id": 7,
                "offset": 0,
                "sampled": True,
                "version": 3,
                "tokens": b"\1\0\0\0",
                "logprobs": b"\0\0\0\xbf",
            }
        ],
        "waits": [],
    }
    by_reference = msgpack.packb(
        {
            "type": "Finished",
            "rollout_id": 7,
            "num_tokens": 3,
            "truncated": False,
            "reward": 1.0,
            "text": "#22",
        }
    )
    assert decoder(Inbound).decode(by_reference) == Finished(
        rollout_id=7, num_tokens=3, truncated=False, reward=1.0, text="#22"
    )


def test_messages_of_both_directions_round_trip():
    prompt = PromptPayload(
        prompt_id="p",
        text="1+1=",
        messages=[{"role": "user", "content": "é"}],
        answer="2",
        metadata="{}",
    )
    launch = Launch(
        group_id=1,
        prompt=prompt,
        rollouts=[LaunchedRollout(rollout_id=2, seed=2**63 - 1, prefix=b"\1\0\0\0")],
    )
    assert decoder(Outbound).decode(encode(launch)) == launch
    assert decoder(Outbound).decode(encode(Heartbeat())) == Heartbeat()
    assert decoder(Inbound).decode(encode(Heartbeat())) == Heartbeat()


@pytest.mark.parametrize(
    "frame",
    [
        {
            "type": "Finished",
            "rollout_id": 7,
            "offset": 0,
            "truncated": False,
            "reward": 1.0,
            "text": "",
            "extra": 1,
        },
        {"type": "Finished", "rollout_id": "7", "truncated": False, "reward": 1.0, "text": ""},
        {"type": "Finished", "rollout_id": 7},
        {"type": "Welcome", "policy": None},
        {"type": "NoSuchMessage"},
        {},
        [1, 2],
    ],
    ids=[
        "unknown field",
        "wrong type",
        "field missing",
        "of the other direction",
        "unknown tag",
        "no tag",
        "no map",
    ],
)
def test_a_frame_that_does_not_fit_the_schema_is_refused(frame):
    with pytest.raises(msgspec.ValidationError):
        decoder(Inbound).decode(msgpack.packb(frame))


def test_a_peer_is_told_once_what_was_read_of_all_its_messages():
    with (
        Router("inproc://buffer", SPEAKERS) as router,
        router._context.socket(zmq.DEALER) as link,
    ):
        link.connect("inproc://buffer")
        hello = EngineHello(
            engine_id="e", engine_type="t", slots=1, policy_version=-1, pid=1, incarnation="i"
        )
        report = encode(Progress(chunks=[chunk(0, 0, [7] * 2000, 0)]))
        for frame in (encode(hello), report, report, report, report):
            link.send(frame)
        assert len(router.receive(1.0)) == 5
        answer = msgspec.msgpack.decode(link.recv(), type=Outbound)
        assert answer == Received(num_bytes=4 * cost(len(report)))
        assert not link.poll(0)


def test_a_port_in_use_is_named_with_the_remedy():
    with Router("tcp://127.0.0.1:*", SPEAKERS) as router, pytest.raises(TransportError) as raised:
        Router(router.address, SPEAKERS)
    assert router.address in str(raised.value)
    assert "choose another address" in str(raised.value)


def test_an_address_of_another_machine_cannot_be_bound(tmp_path):
    make_keys(tmp_path / "keys")
    with pytest.raises(TransportError, match=r"192\.0\.2\.1.*no address of this machine"):
        Router("tcp://192.0.2.1:5577", SPEAKERS, str(tmp_path / "keys"))


def test_missing_keys_are_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"buffer\.key_secret.*python -m tools\.keys"):
        Router("tcp://127.0.0.1:*", SPEAKERS, str(tmp_path))


def test_secret_keys_are_readable_only_by_their_owner(tmp_path):
    make_keys(tmp_path / "keys")
    assert {path.name for path in (tmp_path / "keys").iterdir()} == {
        f"{role}.{kind}" for role in ROLES for kind in ("key", "key_secret")
    }
    for path in (tmp_path / "keys").glob("*.key_secret"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_are_never_overwritten(tmp_path):
    make_keys(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"buffer\.key_secret"):
        make_keys(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_of_keys_is_private(tmp_path):
    make_keys(tmp_path / "keys")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("buffer.key_secret", 0o640),
        ("buffer.key_secret", 0o604),
        ("engine.key", 0o666),
        ("", 0o770),
    ],
)
def test_keys_that_others_could_read_or_replace_are_refused(tmp_path, name, mode):
    make_keys(tmp_path / "keys")
    place = tmp_path / "keys" / name
    place.chmod(mode)
    with pytest.raises(ValueError, match=f"has mode {mode:03o}.*chmod go= .*{name}"):
        Router("tcp://127.0.0.1:*", SPEAKERS, str(tmp_path / "keys"))


def test_a_run_keeps_the_keys_that_it_was_given(tmp_path):
    folder = keys_of_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert keys_of_run(tmp_path / "run") == folder == str(tmp_path / "run" / "keys")
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before


def test_the_keys_of_the_newest_run_at_an_address_are_found(tmp_path):
    for number, (address, keys) in enumerate([("a", "/1"), ("b", "/2"), ("a", "/3"), ("c", "")]):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"buffer: {{address: {address}, keys: '{keys}'}}")
        os.utime(folder / "config.yaml", (number, number))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("- a list")
    assert [find_keys(address, tmp_path) for address in "abcd"] == ["/3", "/2", "", ""]
