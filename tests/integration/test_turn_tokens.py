"""Zero trained tokens are re-tokenised: every id of every turn is compared from the engine, through
worker, socket and buffer, to the learner's packs.

The engine samples `a` and `b` one by one, and the tokenizer would write `ab` as one token, so any
way over text would change the ids.
"""

from __future__ import annotations

import asyncio
import random
import string
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from actors.environments import make_environment
from actors.inference.generation import Generation, Measurement
from actors.worker import Worker
from buffer.wire import messages as msg
from buffer.wire.client import EngineLink, LearnerLink
from learner.packs.batch import make_packs
from tests.fakes import FakeLearner
from tests.integration.test_service import Running, make_config

pytestmark = pytest.mark.timeout(120)
STEPS = 3
SPECIAL = ("<unk>", "<bos>", "<eos>")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL, *string.printable[:95], "ab"]
    model = BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


class LetterEngine:
    """Samples letters one by one, and keeps what it was given and what it sampled."""

    model_type, cause = "fake", ""

    def __init__(self) -> None:
        self.tokenizer = merging_tokenizer()
        self.vocab_size = len(self.tokenizer)
        self.eos = self.tokenizer.eos_token_id
        self.eos_ids, self.version, self.died = frozenset({self.eos}), -1, asyncio.Event()
        self.given: dict[str, list[int]] = {}
        self.sampled: dict[str, array[int]] = {}

    def launch(
        self,
        request_id: str,
        prompt_ids: list[int],
        max_tokens: int,
        *,
        seed: int,
        num_continued: int,
    ) -> Generation:
        generation, draws = Generation(request_id), random.Random(f"{seed} {num_continued}")
        letters = self.tokenizer.convert_tokens_to_ids(["a", "b"])
        tokens = [*draws.choices(letters, k=draws.randint(2, 9)), self.eos][:max_tokens]
        generation.extend(self.version, tokens, [-token / 128 for token in tokens])
        outcome = "stop" if tokens[-1] == self.eos else "length"
        asyncio.get_running_loop().call_later(0.002, generation.end, outcome)
        self.given[request_id], self.sampled[request_id] = prompt_ids, generation.tokens
        return generation

    async def abort(self, request_ids: list[str]) -> None: ...

    async def swap(self, path: str, version: int) -> float:
        self.version = version
        return 0.0

    async def score(self, token_ids: list[int]) -> array[float]:
        return array("f", [-1.0] * (len(token_ids) - 1))

    def measure(self) -> Measurement:
        return Measurement(1.0, 1.0, 1.0, 1.0)

    def turns(self, rollout_id: int) -> list[tuple[list[int], list[int]]]:
        """Tokens given and sampled in each turn of a rollout; the former hold all before them."""
        names = [str(rollout_id), *(f"{rollout_id}.{n}" for n in range(1, 9))]
        found = [name for name in names if name in self.given]
        return [(self.given[name], self.sampled[name].tolist()) for name in found]


class Learner(FakeLearner):
    """Publishes no probe, which the fake engine could not answer."""

    def publish(self, link: LearnerLink, version: int) -> None:
        policy = msg.SnapshotRef(version=version, digest="", num_bytes=0, address="", path="x")
        link.send(msg.Published(policy=policy, seconds=0.0, probe=b""))


def play(folder: Path, port: int) -> tuple[LetterEngine, list[msg.Shard]]:
    """A whole run with real buffer, worker and environment."""
    config = make_config(
        folder, port, f"run.steps={STEPS}", "data.verifier_workers=2", "batch.groups=3",
        "data.environment=tools.faults.sampled:Conversation", "model.max_context=512",
    )  # fmt: skip
    running = Running(config)
    address = running.service.run.router.address
    environment, learner = make_environment(config), Learner(address, STEPS)
    learner.start()

    async def serve() -> LetterEngine:
        engine: Any = LetterEngine()
        hello = msg.EngineHello(
            engine_id="e", engine_type="fake", slots=16, policy_version=-1, pid=1, incarnation="a"
        )
        with EngineLink(address, "e") as link:
            welcome = await asyncio.to_thread(link.connect, hello, 20.0)
            worker = Worker(config, engine, link, environment, lambda _: b"weights", hello=hello)
            await worker.run(welcome)
        return engine

    try:
        engine = asyncio.run(serve())
        assert running.wait() == 0
    finally:
        environment.close()
    return engine, learner.shards


def test_each_trained_token_is_one_that_was_sampled(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    engine, shards = play(tmp_path, free_port())
    encode, decode = engine.tokenizer.encode, engine.tokenizer.decode
    trajectories = [trajectory for shard in shards for trajectory in shard.trajectories]
    assert len(shards) == STEPS
    num_turns, num_changed_by_text = 0, 0
    for trajectory in trajectories:
        turns = engine.turns(trajectory.rollout_id)
        row, is_sampled, logprobs = list[int](), list[int](), list[float]()
        for number, (given, sampled) in enumerate(turns):
            new = given[len(row) :]
            assert given[: len(row)] == row  # it extends exactly the tokens so far
            if number:
                assert decode(new).startswith(f"turn {number} had")
                assert new == encode(decode(new), add_special_tokens=False)
            row += new + sampled
            is_sampled += [0] * len(new) + [1] * len(sampled)
            logprobs += [0.0] * len(new) + [-token / 128 for token in sampled]
            num_changed_by_text += encode(decode(sampled)) != sampled
        assert array("i", trajectory.tokens).tolist() == row
        assert list(trajectory.sampled) == is_sampled
        assert array("f", trajectory.actor_logprobs).tolist() == logprobs
        num_turns += len(turns)
    assert num_turns > 1.2 * len(trajectories)
    assert num_changed_by_text > num_turns / 2  # else this test would prove little

    for shard in shards:
        packs = make_packs(shard.trajectories, max_tokens=128, current_version=-1)
        trained = [
            pack.targets_S[pack.response_S == response].tolist()
            for pack in packs
            for response in pack.response_S.unique().tolist()
        ]
        of_engine = [
            [token for _, sampled in engine.turns(t.rollout_id) for token in sampled]
            for t in shard.trajectories
        ]
        assert sorted(trained) == sorted(of_engine)
