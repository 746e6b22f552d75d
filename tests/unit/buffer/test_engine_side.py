"""Engines that send impossible messages, or messages about rollouts of another engine: nothing is
stored, and no other engine is affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buffer.peers import Peer
from buffer.records.event_log import read_sessions
from buffer.records.live_state import live_state
from buffer.service import Service
from buffer.wire import messages as msg
from buffer.wire.transport import Violation
from configs import cli
from darts import events as ev
from darts.sizing.lengths import LengthStats
from darts.sizing.rewards import RewardStats
from tests.fakes import chunk

INCARNATION = "0123456789abcdef"


@pytest.fixture
def service(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Service]:
    """A service with two engines, `a` and `b`, each with rollouts in flight."""
    service = Service(
        cli.load(
            [
                f"run.dir={tmp_path}", "run.trackers=[]", "batch.groups=2", "darts.group_size=2",
                "redundancy.rule=none", "sampling.max_tokens=40", "eval.every=0",
                f"buffer.address=tcp://127.0.0.1:{free_port()}", "data.num_prompts=50",
            ]
        )
    )  # fmt: skip
    service._recover()
    service._apply([ev.PolicyPublished(0)])
    for name in ("a", "b"):
        hello = msg.EngineHello(
            engine_id=name,
            engine_type="t",
            slots=2,
            policy_version=0,
            pid=1,
            incarnation=INCARNATION,
        )
        service._greet(name.encode(), hello)
    service._apply(service.run.due_events())
    yield service
    service.run.close("")


def of(service: Service, name: str) -> int:
    """The id of a rollout in flight on engine `name`."""
    return next(i for i, r in service.run.core.rollouts.items() if r.engine_id == name)


def sampled(rollout_id: int, num_tokens: int, version: int = 0, offset: int = 0) -> msg.Chunk:
    return chunk(rollout_id, offset, [7] * num_tokens, version)


def engines(service: Service) -> set[str]:
    return set(service.run.core.engines.by_id)


@pytest.mark.parametrize("kind", ["progress", "finished", "failed", "unusable", "stopped"])
def test_a_message_about_the_rollout_of_another_engine_dismisses_only_the_sender(
    service: Service, kind: str
) -> None:
    victim = of(service, "a")
    forged: dict[str, msg.Message] = {
        "progress": msg.Progress(chunks=[sampled(victim, 3)]),
        "finished": msg.Finished(
            rollout_id=victim, num_tokens=3, truncated=False, reward=1.0, text=""
        ),
        "failed": msg.Failed(rollout_id=victim, error="x"),
        "unusable": msg.Failed(rollout_id=victim, error="x", unusable=True),
        "stopped": msg.Stopped(rollout_id=victim, num_tokens=0),
    }
    service._receive(b"b", forged[kind])
    assert engines(service) == {"a"}
    assert service.run.store.num_sampled(victim) == 0
    assert service.run.core.rollouts[victim].runs


def test_a_rollout_lends_its_slot_from_its_wait_to_its_observation(service: Service) -> None:
    mine = of(service, "a")
    engine = service.run.core.engines.by_id["a"]
    service._receive(b"a", msg.Progress(chunks=[sampled(mine, 3)], waits=[mine]))
    assert engine.waiting == {mine} and engine.num_decoding <= engine.slots
    given = chunk(mine, 3, [8, 9], None)
    service._receive(b"a", msg.Progress(chunks=[given]))
    assert engine.waiting == set()  # before it has sampled anything
    more = msg.Progress(chunks=[sampled(mine, 2, offset=5)], waits=[mine])
    service._receive(b"a", more)
    assert engine.waiting == {mine}
    assert service.run.store.num_sampled(mine) == 5


def test_all_records_are_in_the_files_before_a_message_is_sent(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, run = of(service, "a"), service.run
    told: dict[type[msg.Message], list[str]] = {}

    def sent(identity: bytes, message: msg.Message) -> bool:
        events = [e.event for s in read_sessions(run.folder / "events") for e in s.events]
        told[type(message)] = [type(event).__name__ for event in events]
        return True

    monkeypatch.setattr(run.router, "send", sent)
    service._receive(b"a", msg.Progress(chunks=[sampled(mine, 3)]))
    assert told == {} and run.log.log.num_waiting > 0
    service._receive(
        b"a", msg.Finished(rollout_id=mine, num_tokens=3, truncated=False, reward=1.0, text="mine")
    )
    service._apply(service.engines.flush())
    assert told[msg.Settled][-2:] == ["RolloutProgressed", "RolloutFinished"]
    assert run.store.log is not None and run.store.log.log.num_waiting == 0


def test_statistics_of_a_prompt_are_known_before_and_after_they_are_saved(
    service: Service,
) -> None:
    run, lengths = service.run, LengthStats(weight=3.0, mean_log=2.0, var_log=0.5)
    drawn = run.prompts.draw(1)
    prompt_id = drawn[0][1].prompt_id
    run.remember_lengths(prompt_id, lengths)
    run.learned_rewards[prompt_id] = rewards = RewardStats(3.0, 0.5)
    for _ in range(2):
        [prompt] = run._with_statistics(drawn)
        assert (prompt.lengths, prompt.rewards) == (lengths, rewards)
        run.save_learned()
        assert not run.learned and not run.learned_rewards


def test_messages_about_a_finished_rollout_change_nothing(service: Service) -> None:
    mine = of(service, "a")
    service._receive(b"a", msg.Progress(chunks=[sampled(mine, 3)]))
    finished = msg.Finished(rollout_id=mine, num_tokens=3, truncated=False, reward=1.0, text="mine")
    service._receive(b"a", finished)
    for forged in (
        msg.Progress(chunks=[sampled(mine, 5)]),
        msg.Finished(rollout_id=mine, num_tokens=9, truncated=False, reward=0.0, text="forged"),
        msg.Failed(rollout_id=mine, error="x", unusable=True),
    ):
        service._receive(b"b", forged)
    assert service.run.store.num_sampled(mine) == 3
    assert service.run.store.text(mine) == "mine"


def test_tokens_of_an_engine_that_broke_the_protocol_are_not_continued(service: Service) -> None:
    mine = of(service, "a")
    service._receive(b"a", msg.Progress(chunks=[sampled(mine, 30)]))
    service._receive(b"a", msg.Progress(chunks=[sampled(mine, 30, offset=30)]))
    assert engines(service) == {"b"}
    service._receive(b"b", msg.Heartbeat())
    assert all(r.tokens == 0 for r in service.run.core.rollouts.values())
    assert mine not in service.run.store


@pytest.mark.parametrize("version", [-1, 1])
def test_an_impossible_version_is_refused_before_anything_is_stored(
    service: Service, version: int
) -> None:
    mine = of(service, "a")
    service._receive(
        b"a", msg.Progress(chunks=[sampled(mine, 3), sampled(mine, 3, version, offset=3)])
    )
    assert engines(service) == {"b"}


def test_a_violation_dismisses_only_its_sender(service: Service) -> None:
    mine = of(service, "a")
    service._receive(b"a", msg.Progress(chunks=[sampled(mine, 3)]))
    service._receive(b"a", Violation("a reward of NaN"))
    service._receive(b"stranger", Violation("no message at all"))
    assert engines(service) == {"b"}
    assert mine not in service.run.store


def test_lengths_beyond_the_limit_dismiss_their_sender(service: Service) -> None:
    over = {"num_tokens": 41}
    service._receive(b"a", msg.Stopped(rollout_id=of(service, "a"), **over))
    assert engines(service) == {"b"}
    finished = msg.Finished(
        rollout_id=of(service, "b"), truncated=False, reward=0.0, text="", **over
    )
    service._receive(b"b", finished)
    assert engines(service) == set()


def test_a_token_beyond_the_vocabulary_of_the_learner_dismisses_its_sender(
    service: Service,
) -> None:
    service._greet(b"l", msg.LearnerHello(rank=0, num_ranks=1, step=0, pid=1, vocab_size=7))
    # Its token has id 7.
    service._receive(b"a", msg.Progress(chunks=[sampled(of(service, "a"), 1)]))
    assert engines(service) == {"b"}


def test_a_probe_of_other_tokens_dismisses_its_engine_and_ends_no_run(service: Service) -> None:
    service.run.probes.published(0, b"12345678")
    probed = msg.Probed(version=0, model_type="t", logprobs=b"12345")
    service._receive(b"a", probed)
    assert engines(service) == {"b"}


def published(version: int, path: str = "x") -> msg.Published:
    policy = msg.SnapshotRef(version=version, digest="", num_bytes=0, address="", path=path)
    return msg.Published(policy=policy, seconds=0.0)


HELLO = msg.LearnerHello(rank=0, num_ranks=1, step=0, pid=1, vocab_size=7)


@pytest.mark.parametrize(
    ("message", "version"),
    [
        (msg.NewPolicy(version=2), 3),
        (msg.NewPolicy(version=3 + 1001), 3),
        (published(2), 3),
        (published(3 + 1001), 3),
        (published(3, "another"), 3),
    ],
)
def test_an_implausible_publication_dismisses_the_learner(
    service: Service, message: msg.NewPolicy | msg.Published, version: int
) -> None:
    service._greet(b"l", HELLO)
    service._receive(b"l", published(3))
    service._receive(b"l", message)
    assert service.run.core.policy_version == service.run.offered_version == version
    assert service.run.peers.ranks() == []


def test_a_policy_counts_before_its_snapshot_and_engines_hear_of_the_snapshot_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def send(identity: bytes, message: msg.Message) -> bool:
        told.extend([message.policy.version] if isinstance(message, msg.PolicyPublished) else [])
        return True

    monkeypatch.setattr(service.run.router, "send", send)
    service._greet(b"l", HELLO)
    for message in (msg.NewPolicy(version=1), msg.NewPolicy(version=1)):
        service._receive(b"l", message)
        assert (service.run.core.policy_version, service.run.offered_version, told) == (1, -1, [])
    for message in (published(1), published(1), msg.NewPolicy(version=1)):
        service._receive(b"l", message)
        assert (service.run.offered_version, told) == (1, [1, 1])  # one per engine
    assert len(service.run.peers.ranks()) == 1


def test_a_metric_of_the_learner_replaces_none_of_the_buffer(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_buffer = {"tokens/trained": 0, "darts/uniform_frac": 0.0}
    monkeypatch.setattr(service.run.metrics, "row", lambda records: of_buffer)
    service.learner._trained_metrics = {"tokens/trained": -5.0, "train/loss": 0.5}
    record = ev.GroupRecord(
        group_id=0,
        prompt_id="p",
        opened_version=0,
        shipped_version=0,
        budget=2,
        long_end="survivor",
        end="shipped",
        rollouts=(ev.RolloutRecord(0, "a", 3, 1.0, "selected_short", 0),),
    )
    row = service.learner._finish_step([record])
    assert (row["step"], row["train/loss"], row["tokens/trained"]) == (0, 0.5, 0)


def test_a_second_name_on_one_connection_ends_the_first(service: Service) -> None:
    hello = msg.EngineHello(
        engine_id="c", engine_type="t", slots=1, policy_version=0, pid=1, incarnation=INCARNATION
    )
    service._receive(b"a", hello)
    assert engines(service) == {"b"}
    assert b"a" not in service.run.peers.by_identity


def engine_report(**verifier: float) -> msg.EngineReport:
    load = msg.VerifierReport(num_workers=2, **verifier)
    return msg.EngineReport(batch=1, ms_per_token=1, tokens_per_s=1, busy_frac=1, verifier=load)


@pytest.mark.parametrize("time_s", [-1.0, float("nan"), float("inf")])
def test_impossible_times_of_a_verifier_are_refused(service: Service, time_s: float) -> None:
    service._receive(b"a", engine_report(num_verified=1, time_s=time_s))
    assert engines(service) == {"b"}


def test_a_verifier_that_holds_the_rollouts_is_named_instead_of_the_engines(
    service: Service,
) -> None:
    run = service.run
    assert len(run.core.rollouts) == 4
    service._apply([ev.ShardsRequested(0)])
    service._receive(b"a", engine_report(num_busy=1))
    service._receive(b"b", engine_report())
    assert live_state(run).waiting.startswith("learner waits for actors: ")
    service._receive(b"a", engine_report(num_waiting=0, num_busy=2, num_verified=1, time_s=2.5))
    assert live_state(run).waiting == (
        "learner waits for the verifier: 2 of 4 rollouts in flight wait only for their reward "
        "(4 workers, 2.5 s each); make it faster, or raise data.verifier_workers"
    )


def test_a_wait_for_the_learner_is_reported_even_if_a_verifier_is_slow(
    service: Service,
) -> None:
    before = live_state(service.run).waiting
    service._receive(b"a", engine_report(num_waiting=4, num_busy=2))
    assert live_state(service.run).waiting == before


def test_before_the_first_step_monitors_learn_what_it_waits_for(service: Service) -> None:
    run = service.run
    run.phase = "training"
    service._apply([ev.ShardsRequested(0)])
    state = live_state(run, evaluated=(3, 16))
    assert state.phase == "first evaluation"
    assert state.waiting == "the first policy is evaluated: 3 of 16 prompts done"
    assert live_state(run).phase == "training"
    for engine in run.core.engines.by_id.values():
        engine.version = -1
    state = live_state(run, evaluated=(0, 16))
    assert state.phase == "starting"
    assert state.waiting == "the start waits for engines to load the model; 2 engines joined"


def test_monitors_get_the_newest_warnings_without_control_characters(service: Service) -> None:
    for number in range(20):
        service.run.warn(f"\x1b[31m warning {number}")
    (_, first), *_, (_, newest) = live_state(service.run).warnings
    assert newest == "?[31m warning 19" and first == "?[31m warning 12"


def test_each_peer_has_one_name() -> None:
    assert (
        Peer(b"x", 0.0, "e").name == "engine e" and Peer(b"x", 0.0, rank=1).name == "learner rank 1"
    )


def test_a_peer_cannot_write_to_the_terminal(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.run.warn("engine \x1b[2J\nbuffer: all is well\x07 is refused: " + "x" * 10_000)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and len(line) < 2000


def test_a_rank_of_another_learner_cannot_end_the_run(service: Service) -> None:
    """Rank 0 of a learner joins last, so until then anything may say that it is another rank."""
    own = msg.LearnerHello(rank=0, num_ranks=2, step=0, pid=1, vocab_size=50, incarnation="own")
    service._receive(b"own", own)
    other = msg.LearnerHello(rank=1, num_ranks=2, step=0, pid=2, vocab_size=50, incarnation="other")
    service._receive(b"other", other)
    service._receive(b"other", msg.LearnerFailed(rank=1, error="forged"))
    assert [peer.identity for peer in service.run.peers.ranks()] == [b"own"]


def test_monitors_keep_an_evaluation_that_only_one_row_has(service: Service) -> None:
    """They look less often than a fast step ends, so they would miss it."""
    run = service.run
    run.write_row({"step": 0, "eval/step": 0, "eval/reward_mean": 0.25})
    run.write_row({"step": 1, "eval/step": 1, "eval/reward_mean": 0.5})
    run.write_row({"step": 2, "reward/mean": 0.75})
    metrics = live_state(run).metrics
    assert metrics["step"] == 2 and metrics["reward/mean"] == 0.75
    assert metrics["eval/step"] == 1 and metrics["eval/reward_mean"] == 0.5
    run.step = 0  # withdrawn, so its evaluation did not happen
    run.cut_rows()
    assert "eval/reward_mean" not in live_state(run).metrics
