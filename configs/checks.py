"""Whether the keys of a run fit together.

Each check names the keys, their values, the allowed values and the consequence. `configs.schema`
has the values that a single key allows. Driven by `configs.cli.load`.
"""

from __future__ import annotations

import re

from configs.schema import Config, largest_budget

# A token is an int32 and its log-probability a float32. The other records take 4 bytes.
BYTES_PER_TOKEN = 12
LOOPBACK = re.compile(r"tcp://(127\.|localhost:|\[::1\])")


def check(config: Config) -> None:
    """Raise `ValueError` on the first combination of keys that cannot work."""
    for rule in (
        _group,
        _relative_limit,
        _pilot,
        _rank,
        _updates,
        _stream,
        _upper,
        _context,
        _overlong,
        _min_step_ms,
        _betas,
        _ranks,
        _shards,
        _attention,
        _addresses,
        _deltas,
        _reach,
        _bytes_held,
    ):
        rule(config)


def _group(config: Config) -> None:
    darts = config.darts
    if darts.long_end != "none" and darts.num_long >= darts.group_size:
        raise ValueError(
            f"darts.num_long={darts.num_long}: must be < darts.group_size={darts.group_size}; "
            "otherwise no seat is left for the shortest responses (darts.long_end=none trains on "
            "only the shortest)"
        )


def _relative_limit(config: Config) -> None:
    darts = config.darts
    if 0 < darts.relative_limit <= 1:
        raise ValueError(
            f"darts.relative_limit={darts.relative_limit:g}: must be above 1, or 0 for no limit; "
            "otherwise half of all responses would have to end early"
        )


def _pilot(config: Config) -> None:
    darts = config.darts
    if darts.pilot > darts.group_size:
        raise ValueError(
            f"darts.pilot={darts.pilot}: must be <= darts.group_size={darts.group_size}; "
            "otherwise a group would be complete before its pilot is judged"
        )


def _rank(config: Config) -> None:
    darts = config.darts
    if darts.rank == "reward_per_token" and darts.long_end != "none":
        raise ValueError(
            f"darts.rank=reward_per_token: needs darts.long_end=none, not {darts.long_end}; "
            "otherwise seats for the longest responses would contradict the ranking"
        )


def _updates(config: Config) -> None:
    batch = config.batch
    if batch.groups % batch.updates:
        raise ValueError(
            f"batch.updates={batch.updates}: must divide batch.groups={batch.groups}; otherwise "
            "some groups would be left over, since each update takes whole groups and all take "
            "equally many"
        )


def _stream(config: Config) -> None:
    batch = config.batch
    if batch.stream == "group" and batch.updates > 1:
        raise ValueError(
            f"batch.stream=group: needs batch.updates=1, not {batch.updates}; the first of several "
            "updates would need log-probabilities of the whole batch before it is there"
        )


def _upper(config: Config) -> None:
    upper, group_size = config.redundancy.upper, config.darts.group_size
    if (
        config.redundancy.rule != "none"
        and upper > 1
        and largest_budget(group_size, upper) == group_size
    ):
        least = (group_size + 0.5) / group_size
        raise ValueError(
            f"redundancy.upper={upper:g}: with darts.group_size={group_size} must be 1 or >= "
            f"{least:g}; otherwise no prompt gets more than darts.group_size rollouts"
        )


def _context(config: Config) -> None:
    max_tokens, max_context = config.sampling.max_tokens, config.model.max_context
    if max_tokens >= max_context:
        raise ValueError(
            f"sampling.max_tokens={max_tokens}: must be < model.max_context={max_context}; "
            "otherwise a prompt and its longest response do not fit into an engine"
        )


def _overlong(config: Config) -> None:
    zone, max_tokens = config.loss.overlong_buffer, config.sampling.max_tokens
    if zone > max_tokens:
        raise ValueError(
            f"loss.overlong_buffer={zone}: must be <= sampling.max_tokens={max_tokens}; otherwise "
            "even an empty response would be penalised"
        )


def _min_step_ms(config: Config) -> None:
    curve = config.actors.min_step_ms
    name = f"actors.min_step_ms={curve}"
    if len(curve) > 12 or any(len(point) != 2 for point in curve):
        raise ValueError(
            f"{name}: must be at most 12 pairs [batch, milliseconds], such as [[1,12],[64,26]]; "
            "otherwise a step has no duration"
        )
    batches = [batch for batch, _ in curve]
    if any(batch < 1 for batch in batches) or batches != sorted(set(batches)):
        raise ValueError(
            f"{name}: batches must be >= 1 and ascending; otherwise the latency between them is "
            "undefined"
        )
    if not all(0 < ms <= 60_000 for _, ms in curve):
        raise ValueError(
            f"{name}: milliseconds must be > 0 and <= 60000; otherwise the engine would not step"
        )


def _betas(config: Config) -> None:
    betas = config.optimizer.betas
    if len(betas) != 2:
        raise ValueError(
            f"optimizer.betas={betas}: must be two numbers, such as [0.9,0.95]; AdamW takes two"
        )


def _ranks(config: Config) -> None:
    per_node, nodes = config.learner.num_ranks, config.cluster.learner.num_nodes
    trajectories = config.batch.groups // config.batch.updates * config.darts.group_size
    if per_node * nodes > trajectories:
        raise ValueError(
            f"learner.num_ranks={per_node}"
            + (f", cluster.learner.num_nodes={nodes}" if nodes > 1 else "")
            + ": must be <= batch.groups / batch.updates x darts.group_size = "
            + f"{trajectories}{' in total' if nodes > 1 else ''}; otherwise a rank has nothing to "
            "train on"
        )


def _shards(config: Config) -> None:
    per_node, nodes = config.learner.num_ranks, config.cluster.learner.num_nodes
    if (shards := config.learner.shard_ranks) and per_node * nodes % shards:
        raise ValueError(
            f"learner.shard_ranks={shards}: must be 0 or divide learner.num_ranks"
            + (" x cluster.learner.num_nodes" if nodes > 1 else "")
            + f" = {per_node * nodes}; otherwise some ranks would hold no whole copy of the model"
        )


def _attention(config: Config) -> None:
    if config.model.attention != "flash_attention_2":
        return
    if config.model.dtype == "float32":
        raise ValueError(
            "model.attention=flash_attention_2: needs model.dtype=bfloat16 or float16; it has no "
            "float32 kernels"
        )
    if config.learner.device == "cpu":
        raise ValueError(
            "model.attention=flash_attention_2: needs learner.device=cuda; it has no CPU kernels "
            "(use sdpa)"
        )


def _addresses(config: Config) -> None:
    address = re.fullmatch(r"tcp://[^\s/]+:(\d+)", config.buffer.address)
    if not address or not 1 <= int(address[1]) <= 65534:
        raise ValueError(
            f"buffer.address={config.buffer.address}: must be tcp://HOST:PORT with a port in "
            "1..65534, since statistics are published on the next port; otherwise no process finds "
            "the buffer"
        )
    address = re.fullmatch(r"tcp://[^\s/]+:(\d+|\*)", config.weights.address)
    if not address or (address[1] != "*" and not 1 <= int(address[1]) <= 65535):
        raise ValueError(
            f"weights.address={config.weights.address}: must be tcp://HOST:PORT, or tcp://HOST:* "
            "for a free port; otherwise no engine finds the weights"
        )


def _deltas(config: Config) -> None:
    if config.weights.deltas and config.weights.transport == "file":
        raise ValueError(
            "weights.deltas=true: needs weights.transport=zmq; a folder holds whole snapshots, so "
            "engines would keep a copy of the weights for nothing"
        )


def _reach(config: Config) -> None:
    """Engines on other machines reach the buffer and the weights, or neither."""
    weights = config.weights
    if LOOPBACK.match(config.buffer.address) or not LOOPBACK.match(weights.address):
        return
    if weights.transport == "zmq":
        raise ValueError(
            f"weights.address={weights.address}: must not be on the loopback interface if "
            f"buffer.address={config.buffer.address} is not; otherwise engines on other machines "
            "join and cannot fetch weights (tcp://0.0.0.0:* takes the learner's own address)"
        )


def _bytes_held(config: Config) -> None:
    """The groups of one step must fit at full length, or a full store admits none of them."""
    plain = config.redundancy.rule == "none" or config.darts.policy == "plain"
    upper = 1.0 if plain else config.redundancy.upper
    rollouts = config.batch.groups * largest_budget(config.darts.group_size, upper)
    needed = rollouts * config.model.max_context * BYTES_PER_TOKEN
    if config.buffer.max_bytes < needed:
        raise ValueError(
            f"buffer.max_bytes={config.buffer.max_bytes}: must be >= {needed}, the {rollouts} "
            f"rollouts of one step (batch.groups x budget) at model.max_context="
            f"{config.model.max_context}; otherwise admission stalls, and the learner with it"
        )
