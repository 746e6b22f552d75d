"""Shared by the learner's tests: a tiny model on disk, random trajectories, and a buffer that hands
out prepared shards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from buffer.advantages import group_advantages
from buffer.records.event_log import Learner
from buffer.shards import make_shards as split_step
from buffer.wire.messages import (
    Acknowledged,
    Evaluated,
    Heartbeat,
    LearnerFailed,
    LearnerHello,
    LearnerMessage,
    LearnerWelcome,
    Message,
    Minibatch,
    NewPolicy,
    Published,
    Pull,
    Shard,
    Shutdown,
    Trained,
    Trajectory,
)
from buffer.wire.transport import Router, Violation
from configs.objectives import objective
from configs.schema import Config, LossConfig
from learner import checkpoint, fsdp
from learner.metrics import TokenSums
from learner.packs.batch import make_packs
from learner.snapshots.publish import gather
from learner.train import LearnerState, build_state, micro_batch_loss, save, train_step

VOCABULARY = 48


def save_model(folder: Path, family: str = "qwen3", tied: bool = True, seed: int = 0) -> Path:
    """Save a two-layer model with random weights, the same for the same `seed`."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
    }
    config: PreTrainedConfig = Qwen3Config(**sizes) if family == "qwen3" else LlamaConfig(**sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # Moves it away from the uniform distribution, so that positions and neighbours matter.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_config(model: Path, run: Path, **changes: Any) -> Config:
    """Defaults for a tiny run; `changes` are `section__key=value`."""
    config = Config()
    config.model.path, config.run.dir, config.run.name = str(model), str(run.parent), run.name
    config.batch.max_tokens, config.optimizer.lr, config.learner.device = 64, 1e-3, "cpu"
    config.learner.max_logprob_diff = 9.0  # the actors' log-probabilities are random
    for name, value in changes.items():
        section, key = name.split("__")
        assert hasattr(getattr(config, section), key), name
        setattr(getattr(config, section), key, value)
    return config


def make_trajectory(
    rng: np.random.Generator,
    num_prompt: int,
    num_sampled: int,
    reward: float,
    group_id: int = 0,
    truncated: bool = False,
    version: int = 0,
) -> Trajectory:
    num_tokens = num_prompt + num_sampled
    sampled = np.arange(num_tokens) >= num_prompt
    logprobs = np.where(sampled, -np.log(VOCABULARY) + 0.3 * rng.standard_normal(num_tokens), 0.0)
    return Trajectory(
        rollout_id=int(rng.integers(1 << 40)),
        group_id=group_id,
        tokens=rng.integers(0, VOCABULARY, num_tokens).astype("<i4").tobytes(),
        sampled=sampled.astype(np.uint8).tobytes(),
        actor_logprobs=logprobs.astype("<f4").tobytes(),
        versions=[(version, num_sampled)],
        reward=reward,
        truncated=truncated,
        advantage=0.0,  # until `with_advantages`
    )


def make_trajectories(
    seed: int, num_groups: int = 3, group_size: int = 4, version: int = 0
) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    trajectories = []
    for group_id in range(num_groups):
        group = [float(reward) for reward in rng.permutation([1.0] + [0.0] * (group_size - 1))]
        for reward in group:
            trajectories.append(
                make_trajectory(
                    rng,
                    int(rng.integers(2, 8)),
                    int(rng.integers(3, 50)),
                    reward,
                    group_id,
                    version=version,
                )
            )
    return with_advantages(trajectories)


def make_groups(
    seed: int, num_prompt: int = 20, num_groups: int = 3, group_size: int = 4
) -> list[Trajectory]:
    """Like `make_trajectories`, with prompts of about `num_prompt` tokens, one for each group."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for group_id in range(num_groups):
        given = num_prompt + int(rng.integers(5))
        prompt = rng.integers(0, VOCABULARY, given).astype("<i4").tobytes()
        for reward in rng.permutation([1.0] + [0.0] * (group_size - 1)):
            t = make_trajectory(rng, given, int(rng.integers(1, 40)), float(reward), group_id)
            trajectories.append(msgspec.structs.replace(t, tokens=prompt + t.tokens[len(prompt) :]))
    return with_advantages(trajectories)


def with_advantages(
    trajectories: list[Trajectory], loss: LossConfig | None = None
) -> list[Trajectory]:
    """The same trajectories, with the advantages that the buffer computes for `loss`."""
    groups: dict[int, list[float]] = {}
    for t in trajectories:
        groups.setdefault(t.group_id, []).append(t.reward)
    rules = objective(loss or LossConfig())
    of_group = {g: iter(group_advantages(r, rules)) for g, r in groups.items()}
    return [msgspec.structs.replace(t, advantage=next(of_group[t.group_id])) for t in trajectories]


def num_sampled(trajectories: list[Trajectory]) -> int:
    return sum(count for trajectory in trajectories for _, count in trajectory.versions)


def make_shards(
    trajectories: list[Trajectory], step: int = 0, parts: list[int] | None = None, version: int = 0
) -> list[Shard]:
    """A step's shards, one per rank, of all trajectories. `parts` has the number of trajectories of
    each, in order; if None, one rank takes all.
    """
    shards, start = [], 0
    for part in parts or [len(trajectories)]:
        whole = Minibatch(
            num_trajectories=part,
            loss_tokens=num_sampled(trajectories),
            loss_responses=len(trajectories),
        )
        shards.append(
            Shard(
                step=step,
                policy_version=version,
                trajectories=trajectories[start : start + part],
                minibatches=[whole],
            )
        )
        start += part
    return shards


def shipped(
    trajectories: list[Trajectory],
    loss: LossConfig,
    step: int = 0,
    num_ranks: int = 1,
    updates: int = 1,
) -> list[Shard]:
    """A step's shards as the buffer makes them, without the trajectories that have no gradient."""
    learner = Learner("incarnation", num_ranks, VOCABULARY)
    advised = with_advantages(trajectories, loss)
    size = len(advised) // updates
    minibatches = [advised[start : start + size] for start in range(0, len(advised), size)]
    return split_step(minibatches, loss, learner, step=step, policy_version=0)


def in_portions(
    trajectories: list[Trajectory], loss: LossConfig, step: int = 0, num_ranks: int = 1
) -> list[list[Shard]]:
    """A step's portions, of one group each, as the buffer makes them: the shards of every rank."""
    groups: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(t.group_id, []).append(t)
    portions = [shipped(group, loss, step, num_ranks) for group in groups.values()]
    return [
        [
            msgspec.structs.replace(shard, portion=number, last=number == len(portions) - 1)
            for shard in shards
        ]
        for number, shards in enumerate(portions)
    ]


@contextmanager
def single_rank(config: Config) -> Iterator[LearnerState]:
    """A learner state in this process."""
    with fsdp.process_group(config) as device:
        yield build_state(config, device)


def in_ranks(
    num_ranks: int, check: Callable[[int, Config], None], config: Config, folder: Path
) -> None:
    """Call `check(rank, config)` in processes that gloo connects."""
    arguments = (num_ranks, check, config, str(folder / "store"))
    multiprocessing.spawn(_rank, arguments, nprocs=num_ranks)


def _rank(rank: int, num_ranks: int, check: Any, config: Config, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, init_method=f"file://{store}")
    check(rank, config)
    dist.destroy_process_group()


def train(state: LearnerState, num_steps: int) -> None:
    """Train steps of trajectories that depend on nothing but the step."""
    for step in range(state.step, state.step + num_steps):
        train_step(state, make_shards(make_trajectories(seed=step), step)[0])


def with_and_without_restart(
    config: Config,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after four steps: of a learner that starts again from its checkpoint after two,
    and of one that does not.
    """
    with single_rank(config) as state:
        train(state, 2)
        save(state)
        train(state, 2)
        undisturbed = gather(state.model, torch.float32, keep=True)
    with single_rank(config) as state:
        folder = Path(config.run.dir) / config.run.name / "checkpoints"
        assert checkpoint.load_latest(folder, state.model, state.optimizer) is not None
        state.step = 2
        train(state, 2)
        return gather(state.model, torch.float32, keep=True), undisturbed


def pack_gradients(
    state: LearnerState,
    max_tokens: int,
    trajectories: list[Trajectory] | None = None,
    share_prompts: bool = False,
) -> dict[str, torch.Tensor]:
    """The gradient of a step's loss with packs of `max_tokens`."""
    shard = make_shards(trajectories or make_trajectories(seed=0))[0]
    for pack in make_packs(shard.trajectories, max_tokens, 0, share_prompts=share_prompts):
        micro_batch_loss(state, pack, shard.loss_tokens, TokenSums()).backward()
    gradients = {
        name: fsdp.whole(parameter.grad)
        for name, parameter in state.model.named_parameters()
        if parameter.grad is not None
    }
    state.model.zero_grad()
    return gradients


def assert_same_gradients(
    measured: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert measured.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.norm().item(), 1e-4)
        assert (measured[name] - gradient).norm().item() < 1e-5 * scale, name


def step_gradients(
    state: LearnerState, shard: Shard
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Take a training step. Returns its metrics and the gradient that the optimizer received."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = fsdp.whole(parameter.grad).clone()

    handle = state.optimizer.register_step_pre_hook(keep)
    metrics = train_step(state, shard)
    handle.remove()
    return metrics, gradients


@dataclass
class FakeBuffer:
    """Answers hellos, and pulls with prepared shards, `steps[step][rank]`, then sends `Shutdown`.
    Records all messages. `more` has the later portions of steps, by step and portion.
    """

    address: str
    steps: dict[int, list[Shard]]
    last_step: int
    policy_version: int = -1
    error: str = ""
    rewards: dict[int, float] = field(default_factory=dict)  # of the evaluation after a step
    more: dict[tuple[int, int], list[Shard]] = field(default_factory=dict)
    heard: list[Message] = field(default_factory=list)
    trained: dict[int, dict[str, float]] = field(default_factory=dict)
    on_pull: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._closing = threading.Event()
        self._router = Router(self.address, {"learner": LearnerMessage | Heartbeat})
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()
        self._router.close()

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def _serve(self) -> None:
        peers: set[bytes] = set()
        while not self._closing.is_set():
            for peer, message in self._router.receive(0.05):
                peers.add(peer)
                if isinstance(message, Heartbeat):
                    self._router.send(peer, Heartbeat())
                    continue
                assert not isinstance(message, Violation), message
                self.heard.append(message)
                if isinstance(message, LearnerHello):
                    version = self.policy_version
                    welcome = LearnerWelcome(policy_version=version, offered_version=version)
                    self._router.send(peer, welcome)
                elif isinstance(message, Pull):
                    self.on_pull.set()
                    if message.step in self.steps:
                        step, portion = message.step, message.portion
                        shards = self.more[step, portion] if portion else self.steps[step]
                        self._router.send(peer, shards[message.rank])
                elif isinstance(message, Trained):
                    self.trained[message.step] = message.metrics
                    self._router.send(peer, Acknowledged(step=message.step))
                    if (done := message.step + 1) in self.rewards:
                        result = Evaluated(step=done, reward_mean=self.rewards[done])
                        self._router.send(peer, result)
                    if message.step == self.last_step:
                        self._shut_down(peers)
                elif isinstance(message, LearnerFailed | NewPolicy | Published):
                    continue

    def _shut_down(self, peers: set[bytes]) -> None:
        for peer in peers:
            self._router.send(peer, Shutdown(error=self.error))
