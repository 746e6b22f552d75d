"""The learner as a user starts it, with real processes and sockets, against a buffer that hands
out prepared shards.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch

from buffer.wire.messages import (
    LearnerHello,
    Leaving,
    NewPolicy,
    Published,
    Pull,
    Shard,
    Trained,
)
from configs.errors import ExitStatus
from configs.schema import LossConfig
from tests.families import save_family
from tests.learner_cases import (
    FakeBuffer,
    in_portions,
    make_shards,
    make_trajectories,
    save_model,
    shipped,
)

ROOT = Path(__file__).parents[2]
NUM_STEPS = 3
START_TIMEOUT_S = 180

Start = Callable[..., subprocess.Popen[str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def address(free_port: Callable[[], int]) -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@contextmanager
def started(
    model: Path, run: Path, address: str, *overrides: str
) -> Iterator[subprocess.Popen[str]]:
    """`python -m learner`. All of its processes that still run at the end are killed."""
    keys = [
        f"model.path={model}",
        f"run.dir={run.parent}",
        f"run.name={run.name}",
        f"run.steps={NUM_STEPS}",
        f"buffer.address={address}",
        "learner.device=cpu",
        "batch.max_tokens=64",
        "optimizer.lr=1e-3",
        "weights.transport=file",
        "learner.max_logprob_diff=9",  # the actors' log-probabilities are random
        *overrides,
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "learner", *keys], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as learner:
        try:
            yield learner
        finally:
            learner.kill()


def steps_for(
    parts: list[int] | None, first: int = 0, last: int = NUM_STEPS, updates: int = 1
) -> dict[int, list[Shard]]:
    if updates > 1:  # the buffer divides each of them among the ranks
        num_ranks = len(parts or [0])
        return {
            step: shipped(make_trajectories(seed=step), LossConfig(), step, num_ranks, updates)
            for step in range(first, last)
        }
    return {
        step: make_shards(make_trajectories(seed=step, version=step), step, parts, version=step)
        for step in range(first, last)
    }


def train(
    model: Path,
    run: Path,
    address: str,
    parts: list[int] | None,
    *overrides: str,
    first: int = 0,
    last: int = NUM_STEPS,
    updates: int = 1,
    portions: list[list[list[Shard]]] | None = None,
) -> FakeBuffer:
    """`portions` has the shards of each step, portion and rank, if steps come in portions."""
    steps = steps_for(parts, first, last, updates)
    more: dict[tuple[int, int], list[Shard]] = {}
    for step, shards in enumerate(portions or []):
        steps[step] = shards[0]
        more |= {(step, number): shards[number] for number in range(1, len(shards))}
    with FakeBuffer(address, steps, last_step=last - 1, more=more) as buffer:
        with started(
            model,
            run,
            address,
            f"learner.num_ranks={len(parts or [0])}",
            f"run.steps={last}",
            *overrides,
        ) as learner:
            _, stderr = learner.communicate(timeout=START_TIMEOUT_S * 2)
            assert learner.returncode == 0, stderr
    return buffer


@pytest.fixture
def learners() -> Iterator[Start]:
    """A function that starts learners like `started`, which run until the test ends."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(started(*arguments))


@pytest.fixture(scope="module")
def reference(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> FakeBuffer:
    """A buffer that has recorded all messages of a single rank which trained all steps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    return train(model_path, tmp_path_factory.mktemp("runs") / "reference", address, None)


def newest_weights(buffer: FakeBuffer) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(Path(buffer.of(Published)[-1].policy.path).read_bytes())


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_the_messages_of_a_run_have_the_right_order(reference: FakeBuffer) -> None:
    kinds = [type(message) for message in reference.heard if not isinstance(message, Published)]
    assert kinds == [LearnerHello, NewPolicy, *([Pull, NewPolicy, Trained] * NUM_STEPS)]
    versions = [
        message.version if isinstance(message, NewPolicy) else message.policy.version
        for message in reference.heard
        if isinstance(message, NewPolicy | Published)
    ]
    assert versions == [version for version in range(NUM_STEPS + 1) for _ in range(2)]
    assert [message.step for message in reference.of(Pull)] == list(range(NUM_STEPS))
    expected = {
        *("train/loss", "train/grad_norm", "train/entropy", "train/clip_frac", "train/ratio_mean"),
        *("train/tis_clip_frac", "train/tokens_per_s", "train/lr", "train/tokens", "train/skipped"),
        *("train/logprob_diff", "train/logprob_diff_all", "train/step_s", "publish/seconds"),
        *("publish/bytes", "publish/wait_s", "publish/wait_frac", "wait/pull_s", "train/kl"),
        *("memory/learner_peak_bytes", "train/shared_tokens_frac", "checkpoint/wait_s"),
        *("train/portions", "probe/wait_s"),
    }
    saved = {"checkpoint/copy_s", "checkpoint/seconds"}  # the last step's, before its report
    for step, metrics in reference.trained.items():
        assert set(metrics) == (expected | saved if step == NUM_STEPS - 1 else expected)


# 11 trajectories against 1: the second rank runs out of micro-batches and must still join the
# collectives of the first.
@pytest.mark.parametrize(("parts", "shards"), [([11, 1], 0), ([5, 0, 7], 0), ([5, 0, 4, 3], 2)])
def test_several_ranks_train_the_same_weights_as_one(
    reference: FakeBuffer,
    model_path: Path,
    tmp_path: Path,
    address: str,
    parts: list[int],
    shards: int,
) -> None:
    several = train(
        model_path, tmp_path / "several", address, parts, f"learner.shard_ranks={shards}"
    )
    expected, measured = newest_weights(reference), newest_weights(several)
    assert expected.keys() == measured.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(measured[name], tensor, rtol=1e-3, atol=1e-5)
    for step in range(NUM_STEPS):
        for name in ("train/loss", "train/grad_norm", "train/entropy", "train/logprob_diff_all"):
            assert several.trained[step][name] == pytest.approx(
                reference.trained[step][name], rel=1e-3
            ), (step, name)


def test_two_ranks_make_the_updates_of_one(
    model_path: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    kind = "loss.kind=decoupled_ppo"
    one, two = (
        train(
            model_path, tmp_path / name, f"tcp://127.0.0.1:{free_port()}", parts, kind,
            last=2, updates=3,
        )
        for name, parts in (("one", None), ("two", [6, 6]))
    )  # fmt: skip
    for name, tensor in newest_weights(one).items():
        torch.testing.assert_close(newest_weights(two)[name], tensor, rtol=1e-3, atol=1e-5)
    for name in ("train/loss", "train/grad_norm", "train/clip_frac", "train/logprob_diff_all"):
        assert two.trained[1][name] == pytest.approx(one.trained[1][name], rel=1e-3), name


def test_two_ranks_train_portions_as_one_rank_trains_the_whole(
    model_path: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """In one portion the second rank has no trajectory, and in another one neither has."""
    batches = [make_trajectories(seed=seed, num_groups=4) for seed in range(2)]
    for batch in batches:
        for index, t in enumerate(batch):
            if t.group_id == 1:
                batch[index] = msgspec.structs.replace(t, reward=1.0)
            elif t.group_id == 2 and t.reward == 0.0:
                batch[index] = msgspec.structs.replace(t, truncated=True)
    loss = LossConfig()
    one = train(
        model_path, tmp_path / "one", f"tcp://127.0.0.1:{free_port()}", None, last=2,
        portions=[[shipped(batch, loss, step)] for step, batch in enumerate(batches)],
    )  # fmt: skip
    portions = [in_portions(batch, loss, step, 2) for step, batch in enumerate(batches)]
    assert [len(shard.trajectories) for shard in portions[0][1]] == [0, 0]
    assert [len(shard.trajectories) for shard in portions[0][2]] == [1, 0]
    two = train(
        model_path, tmp_path / "two", f"tcp://127.0.0.1:{free_port()}", [6, 6], last=2,
        portions=portions,
    )  # fmt: skip
    asked = [(pull.step, pull.portion) for pull in two.of(Pull) if pull.rank == 0]
    assert asked == [(step, portion) for step in range(2) for portion in range(4)]
    for name, tensor in newest_weights(one).items():
        torch.testing.assert_close(newest_weights(two)[name], tensor, rtol=1e-3, atol=1e-5)
    for name in ("train/loss", "train/grad_norm", "train/entropy", "train/tokens"):
        assert two.trained[1][name] == pytest.approx(one.trained[1][name], rel=1e-3), name


def test_two_ranks_agree_on_a_model_whose_layers_are_split(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    model = save_family(tmp_path / "model", "lfm2")
    one, two = (
        train(model, tmp_path / name, f"tcp://127.0.0.1:{free_port()}", parts, last=1)
        for name, parts in (("one", None), ("two", [7, 5]))
    )
    for name, tensor in newest_weights(one).items():
        torch.testing.assert_close(newest_weights(two)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("merge", ["true", "false"])
def test_two_ranks_train_and_publish_the_adapters_of_one(
    model_path: Path, tmp_path: Path, free_port: Callable[[], int], merge: str
) -> None:
    one, two = (
        train(
            model_path,
            tmp_path / name,
            f"tcp://127.0.0.1:{free_port()}",
            parts,
            "model.lora.rank=3",  # does not divide by the number of ranks
            f"model.lora.merge={merge}",
            "optimizer.lr=1e-2",
            last=2,
        )
        for name, parts in (("one", None), ("two", [7, 5]))
    )
    base = safetensors.torch.load_file(model_path / "model.safetensors")
    measured, expected = newest_weights(two), newest_weights(one)
    assert measured.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(measured[name], tensor, rtol=1e-3, atol=1e-5)
    if merge == "false":
        assert len(measured) == 2 * sum(name.endswith("_proj.weight") for name in base)
        return
    assert measured.keys() == base.keys()
    for name, tensor in base.items():
        is_matrix = name.endswith("_proj.weight")
        assert torch.equal(measured[name], tensor) != is_matrix, name


def test_a_run_resumes_on_another_number_of_ranks(
    reference: FakeBuffer,
    model_path: Path,
    tmp_path: Path,
    address: str,
    free_port: Callable[[], int],
) -> None:
    run = tmp_path / "run"
    train(model_path, run, address, [5, 7], last=2)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000002"
    resumed = train(
        model_path, run, f"tcp://127.0.0.1:{free_port()}", None, "run.resume=true", first=2
    )
    assert resumed.of(LearnerHello)[0].step == 2
    assert list(resumed.trained) == [2]
    for name, tensor in newest_weights(reference).items():
        torch.testing.assert_close(newest_weights(resumed)[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_learner_keeps_its_state_while_the_buffer_restarts(
    learners: Start, model_path: Path, tmp_path: Path, address: str
) -> None:
    with FakeBuffer(address, {0: steps_for(None)[0]}, last_step=NUM_STEPS) as buffer:
        learner = learners(model_path, tmp_path / "run", address)
        assert wait_until(
            lambda: len(buffer.of(Pull)) == len(buffer.of(Published)) == 2, START_TIMEOUT_S
        )
    with FakeBuffer(
        address, steps_for(None, first=1), last_step=NUM_STEPS - 1, policy_version=1
    ) as buffer:
        learner.communicate(timeout=START_TIMEOUT_S)
        assert learner.returncode == 0
    assert [hello.step for hello in buffer.of(LearnerHello)] == [1]
    assert [message.policy.version for message in buffer.of(Published)] == [2, 3]


def test_a_run_that_the_buffer_stops_with_an_error_fails(
    learners: Start, model_path: Path, tmp_path: Path, address: str
) -> None:
    with FakeBuffer(address, steps_for(None), last_step=0, error="no engine is left") as buffer:
        learner = learners(model_path, tmp_path / "run", address)
        _, stderr = learner.communicate(timeout=START_TIMEOUT_S)
        assert learner.returncode == 1
        assert stderr.splitlines()[-1] == "error: the buffer stopped the run: no engine is left"
    assert list(buffer.trained) == [0]


def test_ranks_that_find_no_buffer_say_so_in_one_line(
    model_path: Path, address: str, tmp_path: Path
) -> None:
    """The first to give up breaks the collective in which rank 0 waits, which is no news."""
    keys = ("learner.num_ranks=2", "buffer.connect_timeout_s=2")
    with started(model_path, tmp_path / "run", address, *keys) as process:
        _, said = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == ExitStatus.FAILED
    assert [line for line in said.splitlines() if "no buffer answered" in line]
    assert "Traceback" not in said


@pytest.mark.parametrize("victim", ["rank", "supervisor"])
def test_a_killed_process_ends_all_others(
    learners: Start, model_path: Path, tmp_path: Path, address: str, victim: str
) -> None:
    with FakeBuffer(address, {}, last_step=0) as buffer:  # never answers a pull
        learner = learners(model_path, tmp_path / "run", address, "learner.num_ranks=2")
        assert wait_until(lambda: len(buffer.of(Pull)) == 2, START_TIMEOUT_S)
        pids = {hello.rank: hello.pid for hello in buffer.of(LearnerHello)}
        os.kill(pids[1] if victim == "rank" else learner.pid, signal.SIGKILL)
        _, stderr = learner.communicate(timeout=30)
        assert wait_until(lambda: not any(is_alive(pid) for pid in pids.values()), 10)
    if victim == "rank":
        assert learner.returncode == ExitStatus.TRY_AGAIN
        assert "rank 1" in stderr.splitlines()[-1]


def test_sigterm_ends_all_ranks(
    learners: Start, model_path: Path, tmp_path: Path, address: str
) -> None:
    with FakeBuffer(address, {}, last_step=0) as buffer:  # never answers a pull
        learner = learners(
            model_path, tmp_path / "run", address, "learner.num_ranks=2", "run.stop_s=1"
        )
        assert wait_until(lambda: len(buffer.of(Pull)) == 2, START_TIMEOUT_S)
        learner.terminate()
        learner.communicate(timeout=30)
        assert learner.returncode == ExitStatus.INTERRUPTED
        assert not any(is_alive(hello.pid) for hello in buffer.of(LearnerHello))


@pytest.mark.parametrize(("parts", "asked"), [(None, "all"), ([5, 7], "all"), ([5, 7], "rank 1")])
def test_a_learner_that_is_told_to_stop_saves_its_completed_step(
    learners: Start,
    model_path: Path,
    tmp_path: Path,
    address: str,
    parts: list[int] | None,
    asked: str,
) -> None:
    run, num_ranks = tmp_path / "run", len(parts or [0])
    with FakeBuffer(address, {0: steps_for(parts)[0]}, last_step=NUM_STEPS) as buffer:
        learner = learners(model_path, run, address, f"learner.num_ranks={num_ranks}")
        assert wait_until(lambda: len(buffer.of(Pull)) == 2 * num_ranks, START_TIMEOUT_S)
        pids = {hello.rank: hello.pid for hello in buffer.of(LearnerHello)}
        os.kill(learner.pid if asked == "all" else pids[1], signal.SIGTERM)
        learner.communicate(timeout=30)
        assert learner.returncode == ExitStatus.INTERRUPTED
        assert wait_until(lambda: len(buffer.of(Leaving)) == num_ranks, 10)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000001"
