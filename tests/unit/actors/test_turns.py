"""Rollouts of several turns: tokens are never turned into tokens again, cancels are exact in every
phase, and a user's class runs in the verifier's processes.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator
from math import inf

import numpy as np
import pytest

from actors.environments import Environment, EnvironmentFailure, make_environment
from actors.prompts import observation_ids
from actors.verifier_limit import CANCELLED_S, Limit
from actors.verifier_load import Step
from buffer.records.trajectories import TrajectoryStore
from buffer.wire.messages import Cancel, Curtail, Failed, Finished, Stopped, Trajectory, Welcome
from configs.schema import DataConfig
from learner.packs.batch import make_packs
from tests.unit.actors.test_environments import config_of, payload
from tests.unit.actors.test_prompts import make_tokenizer
from tests.unit.actors.test_worker import EOS, Scene, play, quick_config, snapshot


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.worker.RECONNECT_S", 0.0)


async def respond(scene: Scene, turn: int, *tokens: int, end: str | None = "stop") -> None:
    """The engine samples the response of a turn of rollout 1."""
    request_id = f"1.{turn}" if turn else "1"
    await scene.until(lambda: request_id in scene.engine.generations)
    scene.engine.generations[request_id].extend(scene.engine.version, tokens, [-0.5] * len(tokens))
    if end is not None:
        scene.engine.generations[request_id].end(end)


def prepare(scene: Scene, *observations: list[int]) -> None:
    scene.environment.has_turns, scene.environment.observations = True, list(observations)
    scene.launch(1)


def received(scene: Scene) -> Trajectory:
    """Rollout 1 as the learner gets it: every chunk goes through the buffer's own checks."""
    store = TrajectoryStore(1 << 20, 40)
    store.open(1, 1, None)
    for chunk in scene.chunks(1):
        store.append(store.new_part(chunk))
    return store.trajectory(1, 1.0, False, 1.0)


async def three_turns(scene: Scene) -> None:
    prepare(scene, [20, 21], [22])
    await scene.until(lambda: scene.engine.version == 0)
    for turn, tokens in enumerate([(3, EOS), (4, 5, EOS), (6, EOS)]):
        await respond(scene, turn, *tokens)
    await scene.answered(1)


def test_each_turn_extends_exactly_the_sampled_tokens() -> None:
    scene = play(three_turns, policy=snapshot(0))
    (answer,) = scene.answers()
    assert isinstance(answer, Finished) and not answer.truncated
    assert (answer.num_tokens, answer.reward) == (7, 3.0)  # a reward of 1 per turn
    assert scene.environment.finished == []
    assert [scene.engine.launched[i] for i in ("1", "1.1", "1.2")] == [
        ([1, 2], 20, 101, 0),
        ([1, 2, 3, EOS, 20, 21], 18, 101, 2),
        ([1, 2, 3, EOS, 20, 21, 4, 5, EOS, 22], 15, 101, 5),
    ]
    trajectory = received(scene)
    whole = [1, 2, 3, EOS, 20, 21, 4, 5, EOS, 22, 6, EOS]
    assert array("i", trajectory.tokens).tolist() == whole
    assert list(trajectory.sampled) == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]


def test_only_sampled_tokens_are_trained() -> None:
    trajectory = received(play(three_turns, policy=snapshot(0)))
    (pack,) = make_packs([trajectory], max_tokens=64, current_version=0)
    assert pack.targets_S.tolist() == [3, EOS, 4, 5, EOS, 6, EOS]
    assert pack.predicts_S.tolist() == [1, 2, 5, 6, 7, 9, 10]
    logprobs = np.frombuffer(trajectory.actor_logprobs, dtype="<f4")
    assert logprobs.tolist() == [-0.5 * sampled for sampled in trajectory.sampled]


def test_max_turns_ends_a_rollout_with_its_rewards() -> None:
    config = quick_config()
    config.data.max_turns = 2

    async def script(scene: Scene) -> None:
        prepare(scene, [20], [21], [22])
        await respond(scene, 0, EOS)
        await respond(scene, 1, EOS)
        await scene.answered(1)

    (answer,) = play(script, config=config).answers()
    assert isinstance(answer, Finished)
    assert (answer.num_tokens, answer.reward, answer.truncated) == (2, 2.5, False)


@pytest.mark.parametrize(
    ("max_tokens", "max_context", "num_sampled"), [(4, 40, 4), (20, 20, 4), (20, 40, 20)]
)
def test_limits_hold_over_all_turns(max_tokens: int, max_context: int, num_sampled: int) -> None:
    """A rollout without room for a response after the observation is truncated."""
    config = quick_config()
    config.sampling.max_tokens, config.model.max_context = max_tokens, max_context

    async def script(scene: Scene) -> None:
        prepare(scene, list(range(20, 34)))
        await respond(scene, 0, *[3] * (num_sampled - 1), EOS)
        await scene.answered(1)

    scene = play(script, config=config)
    (answer,) = scene.answers()
    assert isinstance(answer, Finished) and answer.truncated
    assert answer.num_tokens == num_sampled and list(scene.engine.launched) == ["1"]
    assert answer.reward == 1.5 and scene.environment.finished == ["x"]


@pytest.mark.parametrize("phase", ["decodes", "waits", "has ended"])
def test_a_cancel_in_the_second_turn_is_answered_once(phase: str) -> None:
    async def script(scene: Scene) -> None:
        prepare(scene, [20], [21])
        await respond(scene, 0, 3, EOS)
        await scene.until(lambda: "1.1" in scene.engine.generations)
        if phase == "waits":
            scene.environment.release.clear()
            await respond(scene, 1, 4, EOS)
            await scene.until(lambda: len(scene.environment.scored) == 2)
            scene.link.incoming.put(Cancel(rollout_ids=[1]))
        else:
            await respond(scene, 1, 4, EOS, end=None)
            scene.link.incoming.put(Cancel(rollout_ids=[1]))
            if phase == "has ended":  # while the engine aborts it
                rollout = scene.worker._rollouts[1]
                await scene.until(lambda: rollout.cancelled)
                scene.engine.generations["1.1"].end("stop")
        await scene.answered(1)
        scene.environment.release.set()
        await asyncio.sleep(0.02)

    scene = play(script)
    (answer,) = scene.answers()
    assert answer == Stopped(rollout_id=1, num_tokens=4, text="3\n20\n4")
    assert "1.2" not in scene.engine.launched


@pytest.mark.parametrize("waits", [True, False])
def test_a_curtailed_rollout_gets_no_further_turn_but_its_last_reward(waits: bool) -> None:
    async def script(scene: Scene) -> None:
        prepare(scene, [20], [21])
        if waits:
            scene.environment.release.clear()
            await respond(scene, 0, 3, EOS)
            await scene.until(lambda: len(scene.environment.scored) == 1)
        else:
            await respond(scene, 0, 3, 4, end=None)
        rollout = scene.worker._rollouts[1]
        scene.link.incoming.put(Curtail(rollout_ids=[1]))
        await scene.until(lambda: rollout.curtailed)
        scene.environment.release.set()
        await scene.answered(1)

    scene = play(script)
    (answer,) = scene.answers()
    assert isinstance(answer, Finished) and answer.truncated and answer.num_tokens == 2
    assert list(scene.engine.launched) == ["1"] and scene.environment.finished == ["x"]


def test_a_turn_without_a_token_is_not_shown_to_the_environment() -> None:
    """A rollout is curtailed after its second turn was launched and before its first token."""

    async def script(scene: Scene) -> None:
        prepare(scene, [20])
        await respond(scene, 0, 3, EOS)
        await scene.until(lambda: "1.1" in scene.engine.generations)
        scene.link.incoming.put(Curtail(rollout_ids=[1]))
        await scene.answered(1)

    scene = play(script)
    (answer,) = scene.answers()
    assert isinstance(answer, Finished) and answer.truncated and answer.num_tokens == 2
    assert len(scene.environment.scored) == 1 and scene.environment.finished == ["x"]


def test_a_failed_step_is_a_failure_and_no_reward() -> None:
    async def script(scene: Scene) -> None:
        prepare(scene, [20])
        await respond(scene, 0, EOS)
        await scene.until(lambda: "1.1" in scene.engine.generations)
        scene.environment.reward = EnvironmentFailure("the tool is broken")
        await respond(scene, 1, EOS)
        await scene.answered(1)

    (answer,) = play(script).answers()
    assert answer == Failed(rollout_id=1, error="the tool is broken")


def test_the_buffer_hears_which_rollouts_wait_for_their_environment() -> None:
    """Also after a lost link, with which the news may have been lost."""

    async def script(scene: Scene) -> None:
        prepare(scene, [20])
        scene.environment.release.clear()
        await respond(scene, 0, 3, EOS)
        await scene.until(lambda: len(scene.environment.scored) == 1)
        assert scene.waits() == {1}
        scene.link.sent.clear()
        scene.link.break_off()
        await scene.until(lambda: bool(scene.link.hellos))
        scene.link.welcomes.put(Welcome(policy=None, resend={1: 4}))
        await scene.until(lambda: scene.waits() == {1})
        scene.environment.release.set()
        await respond(scene, 1, EOS)
        await scene.answered(1)

    play(script)


def test_an_observation_is_sent_before_the_response_to_it() -> None:
    """So that the buffer hears at once that the rollout decodes again."""

    async def script(scene: Scene) -> None:
        prepare(scene, [20, 21])
        await respond(scene, 0, 3, EOS)
        await scene.until(lambda: len(scene.chunks(1)) == 3)
        given = scene.chunks(1)[-1]
        assert (given.offset, array("i", given.tokens).tolist()) == (4, [20, 21])
        assert not scene.engine.generations["1.1"].tokens
        await respond(scene, 1, EOS)
        await scene.answered(1)

    play(script)


@pytest.mark.parametrize("held", range(8))
def test_after_a_lost_link_the_buffer_gets_every_token_that_it_lacks(
    at_once: None, held: int
) -> None:
    """In the middle of turn 2, whatever the buffer holds: [1, 2 | 3, EOS | 20, 21 | 4, 5]."""

    async def script(scene: Scene) -> None:
        prepare(scene, [20, 21])
        await respond(scene, 0, 3, EOS)
        await respond(scene, 1, 4, 5, end=None)
        scene.link.break_off()
        await scene.until(lambda: bool(scene.link.hellos))
        scene.link.sent.clear()
        scene.link.welcomes.put(Welcome(policy=None, resend={1: held}))
        await respond(scene, 1, EOS)
        await scene.answered(1)

    scene = play(script)
    whole, known = [1, 2, 3, EOS, 20, 21, 4, 5, EOS], held
    for chunk in scene.chunks(1):
        tokens = array("i", chunk.tokens).tolist()
        assert chunk.offset <= known
        assert tokens == whole[chunk.offset : chunk.offset + len(tokens)]
        assert chunk.sampled == (whole[chunk.offset] not in (1, 2, 20, 21))
        known = max(known, chunk.offset + len(tokens))
    assert known == len(whole)
    assert isinstance(scene.answers()[-1], Finished)


@pytest.mark.parametrize("prefix", [(3, 4), (3, EOS)])
def test_another_engine_continues_the_first_turn(prefix: tuple[int, ...]) -> None:
    """A later turn never comes with a prefix: its environment was lost with its engine."""

    async def script(scene: Scene) -> None:
        scene.environment.has_turns, scene.environment.observations = True, [[20]]
        scene.launch(1, prefix=prefix)
        if EOS not in prefix:
            await respond(scene, 0, EOS)
        await respond(scene, 1, 5, EOS)
        await scene.answered(1)

    scene = play(script)
    (answer,) = scene.answers()
    assert isinstance(answer, Finished) and answer.num_tokens == 4 + (EOS not in prefix)
    sent = [(chunk.offset, array("i", chunk.tokens).tolist()) for chunk in scene.chunks(1)]
    ended = 2 + len(prefix) + (EOS not in prefix)
    assert (ended, [20]) in sent and (ended + 1, [5, EOS]) in sent


# Chat templates ----------------------------------------------------------------------------------

LOOP = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
ASK = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "= 4"),
        (LOOP + "{{ eos_token }}\n" + ASK, "\n<|user|>= 4<eos>\n<|assistant|>"),
        (LOOP + ASK, "<|user|>= 4<|assistant|>"),
    ],
)
def test_an_observation_is_the_part_of_the_template_after_the_response(
    template: str | None, expected: str
) -> None:
    tokenizer = make_tokenizer("<bos> $A <eos>", template)
    ids = observation_ids("= 4", tokenizer.eos_token_id, tokenizer, DataConfig())
    assert tokenizer.decode(ids) == expected


def test_a_template_that_changes_earlier_messages_is_refused() -> None:
    tokenizer = make_tokenizer("$A", "{{ messages | length }}" + LOOP + ASK)
    with pytest.raises(ValueError, match="earlier messages differently"):
        observation_ids("= 4", tokenizer.eos_token_id, tokenizer, DataConfig())


# A user's class ----------------------------------------------------------------------------------

CLASSES = """
import asyncio, time

class Countdown:
    def reset(self, row):
        self.left, self.seen = int(row["answer"]), []

    async def step(self, response):
        await asyncio.sleep(0)
        self.seen.append(response)
        self.left -= 1
        if response == "hang":
            time.sleep(600)
        if response == "raise":
            raise KeyError("no such move")
        if response == "odd":
            return 3, 4
        if response == "lambda":
            self.kept = lambda: 0
        if response == "pay":
            return "paid", 0.25
        return f"{self.left} left" if self.left else float(len(self.seen))

    async def finish(self):
        if "hang at the end" in self.seen:
            time.sleep(600)
        return self.left / 8

class Endless:
    def step(self, response):
        return "go on", 0.25

class Odd:
    # its row says what it returns: from reset, if it begins with "reset"
    def reset(self, row):
        import numpy
        self.answer = row["answer"]
        if self.answer.startswith("reset "):
            return eval(self.answer[6:])
    def step(self, response):
        import numpy
        return eval(self.answer)

class NoStep:
    pass
"""


@pytest.fixture(scope="module")
def countdown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_games.py").write_text(CLASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        environment = make_environment(config_of("my_games:Countdown", verifier_timeout_s=3.0))
        yield environment
        environment.close()


@pytest.fixture(scope="module")
def odd(countdown: Environment) -> Iterator[Environment]:
    environment = make_environment(config_of("my_games:Odd", verifier_timeout_s=20.0))
    yield environment
    environment.close()


def step(environment: Environment, response: str, state: str = "", answer: str = "2") -> Step:
    return asyncio.run(environment.step(payload(answer=answer), response, state))


def test_a_class_is_played_with_its_state(countdown: Environment) -> None:
    assert countdown.has_turns
    first = step(countdown, "a")
    assert (first.reward, first.observation) == (0.0, "1 left")
    other = step(countdown, "pay", answer="9")  # another rollout in between
    assert (other.reward, other.observation) == (0.25, "paid")
    assert step(countdown, "b", first.state) == Step(2.0, None, "")


def test_a_limit_asks_the_class_for_its_last_reward(countdown: Environment) -> None:
    first = step(countdown, "a", answer="5")
    assert asyncio.run(countdown.finish(payload(answer="5"), first.state)) == 0.5
    stuck = step(countdown, "hang at the end", answer="5")
    with pytest.raises(EnvironmentFailure, match="took longer than 3 s"):
        asyncio.run(countdown.finish(payload(answer="5"), stuck.state))


def test_a_class_without_finish_keeps_its_rewards(countdown: Environment) -> None:
    endless = make_environment(config_of("my_games:Endless"))
    try:
        first = step(endless, "a")
        assert (first.reward, asyncio.run(endless.finish(payload(), first.state))) == (0.25, 0.0)
    finally:
        endless.close()


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        ("raise", "no such move"),
        ("odd", "no pair of observation"),
        ("lambda", "pickle"),
        ("hang", "took longer than 3 s"),
    ],
)
def test_a_fault_of_a_class_is_a_failure(countdown: Environment, response: str, cause: str) -> None:
    with pytest.raises(EnvironmentFailure, match=cause):
        step(countdown, response, answer="9")


ODD_STEPS: dict[str, Step | str] = {
    "True": Step(1.0),
    "numpy.float32(0.5)": Step(0.5),
    "(None, 1)": Step(1.0),
    "('more', numpy.int64(2))": Step(2.0, "more"),
    "''": Step(0.0, ""),
    "numpy.str_('more')": Step(0.0, "more"),
    "'x' * 100_000": Step(0.0, "x" * 100_000),
    "chr(0x1F600) * 100_000": Step(0.0, chr(0x1F600) * 100_000),
    "'x' * 3_000_000": "its observation has 3000000 characters; the limit is 131072",
    "None": "returned None",
    "('more', None)": "returned None",
    "(1.0, 'more')": "no pair of observation",
    "('more', 0.0, False, {})": "returned ('more', 0.0, False, {})",
    "['more', 0.0]": "returned ['more', 0.0]",
    "{'reward': 1}": "returned {'reward': 1}",
    "b'more'": "returned b'more'",
    "float('nan')": "returned nan",
    "reset 'the first observation'": "reset returned 'the first observation'",
    "reset ('obs', {})": "reset returned ('obs', {})",
    "reset numpy.zeros(2)": "reset returned array",
}


@pytest.mark.parametrize("returned", ODD_STEPS)
def test_an_odd_step_has_its_meaning_or_is_a_failure_in_one_line(
    odd: Environment, returned: str
) -> None:
    expected = ODD_STEPS[returned]
    if isinstance(expected, Step):
        found = step(odd, "a", answer=returned)
        assert (found.reward, found.observation) == (expected.reward, expected.observation)
        return
    with pytest.raises(EnvironmentFailure) as failure:
        step(odd, "a", answer=returned)
    assert expected in str(failure.value) and "\n" not in str(failure.value)


def test_a_cancelled_step_is_stopped_and_occupies_no_process(countdown: Environment) -> None:
    """Long before data.verifier_timeout_s, and a step that ends in time keeps its process."""

    async def script() -> None:
        hanging = asyncio.ensure_future(countdown.step(payload(answer="9"), "hang"))
        async with asyncio.timeout(2):
            while not countdown.measure().num_busy:
                await asyncio.sleep(0.01)
        hanging.cancel()
        after = await countdown.step(payload(answer="9"), "pay")
        assert (after.reward, after.observation) == (0.25, "paid")

    countdown.measure()
    asyncio.run(script())
    assert countdown.measure().num_timeouts == 0


def test_a_limit_is_shortened_by_a_cancel() -> None:
    limit = Limit(60.0)
    assert limit.left_s == inf  # it has not started
    limit.start()
    assert 50 < limit.left_s <= 60 and not limit.cancelled
    limit.cancel()
    assert limit.left_s <= CANCELLED_S and limit.cancelled


def test_a_class_without_step_is_refused(countdown: Environment) -> None:
    with pytest.raises(ValueError, match="no method step"):
        make_environment(config_of("my_games:NoStep"))
