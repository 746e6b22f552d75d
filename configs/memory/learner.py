"""The peak memory of one rank of the learner: on its device, and in the machine's memory.

The parts follow `learner.fsdp` (float32 master weights, sharded), `learner.packs` (activations of
one pack, and a chunk of its logits), `learner.saving` and `learner.snapshots.publish`. Measured
peaks on a CPU are within `TOLERANCE` of it; nothing of it was measured on a GPU. A model whose head
is not linear needs more, since the learner then keeps the logits of a whole pack.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.adapters import swaps_adapters
from configs.memory.shape import DTYPE_BYTES, Memory, ModelShape, Part, billions, gib
from configs.schema import Config

TOLERANCE = 0.25
# Parts that a rank holds between steps.
HELD = ("weights", "gradients", "optimizer", "adapters", "reference model")
MIB = 2**20
CHUNK_ELEMENTS = 2**26  # float32 elements of logits per chunk: 256 MiB, of which two exist at once
CUDA_BYTES = 1024 * MIB  # context, kernels' workspaces and the allocator's rounding
LIBRARY_BYTES = 700 * MIB  # resident after the imports of torch and transformers
WORKSPACE_BYTES = 30 * MIB  # of torch's threads and kernels on a CPU


def compute_bytes(config: Config) -> int:
    """Bytes of a number in the learner's forward pass, which is never done in float16."""
    return 2 if config.model.dtype == "bfloat16" else 4


def pack_tokens(config: Config) -> int:
    """Tokens of the largest pack: a longer response has one to itself."""
    return max(config.batch.max_tokens, config.model.max_context)


def on_device(shape: ModelShape, config: Config, cuda: bool) -> Memory:
    """Peak of one rank during a step: on its GPU if `cuda`, otherwise in the machine's memory."""
    offloads = cuda and config.learner.offload
    held = _under_way(shape, config) if offloads else _held(shape, config)
    parts = [*held, _gathered(shape, config), *_passes(shape, config)]
    if cuda:
        parts.append(Part("CUDA", CUDA_BYTES, "context and kernels, a guess"))
    else:
        parts.append(Part("libraries", LIBRARY_BYTES + WORKSPACE_BYTES, "measured"))
        parts.append(_published(shape, config))
        parts.append(_copied(shape, config, 1))
    return Memory(tuple(parts))


def num_shards(config: Config) -> int:
    """Ranks that a copy of the model is divided among."""
    learner = config.learner
    return learner.shard_ranks or learner.num_ranks * config.cluster.learner.num_nodes


def _per_rank(parameters: int, config: Config) -> tuple[int, str]:
    ranks = num_shards(config)
    of = f"{billions(parameters)} parameters" + (f" / {ranks} ranks" if ranks > 1 else "")
    return parameters // ranks, of


def weight_bytes(config: Config) -> int:
    """Bytes of a number of the model's own weights: frozen ones need no float32."""
    return compute_bytes(config) if config.model.lora.rank else 4


def moment_bytes(config: Config) -> int:
    """Bytes of both of AdamW's moments of a number that is trained."""
    return 4 if config.optimizer.moments == "bfloat16" else 8


def saved_bytes(config: Config) -> int:
    """Bytes that a checkpoint has of a number that is trained: float32 and its moments."""
    return 4 + moment_bytes(config)


def _held(shape: ModelShape, config: Config) -> Iterator[Part]:
    """All that a rank holds between steps."""
    size, (number, of) = weight_bytes(config), _per_rank(shape.parameters, config)
    yield Part("weights", size * number, f"{size} B x {of}")
    if config.loss.kl:
        size = compute_bytes(config)
        yield Part("reference model", size * number, f"{size} B x {of}")
    number, of = _per_rank(shape.parameters, config)
    if not config.model.lora.rank:
        yield Part("gradients", 4 * number, f"4 B x {of}")
        moments = moment_bytes(config)
        yield Part("optimizer", moments * number, f"{moments} B x {of}")
        return
    number, of = _per_rank(adapter_parameters(shape, config), config)
    size = 8 + moment_bytes(config)
    yield Part("adapters", size * number, f"{size} B x {of}, with gradients and optimizer")


def _under_way(shape: ModelShape, config: Config) -> Iterator[Part]:
    """Shards that a GPU has only while it gathers them, of a rank that holds its own elsewhere."""
    size = weight_bytes(config)
    number, of = _per_rank(shape.outer_parameters + 2 * shape.block_parameters, config)
    yield Part("shards under way", size * number, f"{size} B x {of}: embeddings and two layers")


def adapter_parameters(shape: ModelShape, config: Config) -> int:
    """Of all adapters. A layer whose sizes are not known from its name counts as a feed-forward
    one.
    """
    hidden, query, kv = shape.hidden, shape.query_width, shape.kv_width
    feed_forward = hidden + shape.intermediate
    linear = {
        "q_proj": hidden + query, "k_proj": hidden + kv, "v_proj": hidden + kv,
        "o_proj": query + hidden, "gate_proj": feed_forward, "up_proj": feed_forward,
        "down_proj": feed_forward,
    }  # fmt: skip
    targets = config.model.lora.targets
    names = list(linear) if targets == ["all-linear"] else targets
    per_layer = sum(linear.get(name, feed_forward) for name in names)
    return config.model.lora.rank * per_layer * shape.num_layers


def _gathered(shape: ModelShape, config: Config) -> Part:
    size = compute_bytes(config)
    number = shape.outer_parameters + 2 * shape.block_parameters
    return Part(
        "gathered layers",
        size * number,
        f"{size} B x {billions(number)}: embeddings and two layers",
    )


def _passes(shape: ModelShape, config: Config) -> list[Part]:
    """Activations and loss of one pack.

    The gradient of the embeddings is reduced in float32 at the end of the backward pass, when the
    rest is free again, so it counts only if it is larger.
    """
    tokens, size = pack_tokens(config), compute_bytes(config)
    layer = tokens * _activation_bytes(shape, size)
    if config.learner.activation_checkpointing:
        kept = tokens * shape.hidden * size * shape.num_layers
        activations, how = kept + layer, "one layer's, and every layer's input"
    else:
        activations, how = layer * shape.num_layers, f"{shape.num_layers} layers"
    activations += 4 * tokens * shape.intermediate * size  # gradients within one layer
    elements = min(CHUNK_ELEMENTS, tokens * shape.vocabulary)
    loss = (8 if size == 4 else 8 + size) * elements
    reduced, whose = 0, ""
    if not config.model.lora.rank:
        loss += 4 * shape.hidden * shape.vocabulary
        reduced, whose = (size + 8) * shape.outer_parameters, ", and the head's gradient"
    parts = [
        Part("activations", activations, f"{tokens} tokens x {how}"),
        Part("loss", loss, f"a chunk of {billions(elements)} logits{whose}"),
    ]
    if (more := reduced - activations - loss) > 0:
        parts.append(Part("gradient of embeddings", more, "beyond activations and loss"))
    return parts


def _activation_bytes(shape: ModelShape, size: int) -> int:
    """Bytes that one layer keeps per token for the backward pass.

    Two norms (each keeps its input and result in float32, and its output), attention (projections,
    their norms, rotated queries and keys, values, output twice) and the feed-forward part (gate,
    its activation, up, and their product).
    """
    norms = 2 * (4 + 2 * size) * shape.hidden
    attention = (3 * size + 4 + 2 * size) * shape.query_width + (3 * size + 4) * shape.kv_width
    return norms + attention + 4 * size * shape.intermediate


def snapshots(shape: ModelShape, config: Config, copies: int, what: str) -> Part:
    """Copies in the machine's memory of what is published: all weights, or adapters alone."""
    size, number, of = DTYPE_BYTES[config.model.dtype], shape.parameters, "parameters"
    if swaps_adapters(config):
        number, of = adapter_parameters(shape, config), "parameters of adapters"
    return Part(
        "snapshots",
        copies * size * number,
        f"{what}: {copies} x {size} B x {billions(number)} {of}",
    )


def _published(shape: ModelShape, config: Config) -> Part:
    """The buffers of `learner.snapshots.publish`."""
    if config.weights.transport == "file":
        return snapshots(shape, config, 1, "1 to write from")
    if config.weights.deltas:
        return snapshots(shape, config, 4, "2 served with their deltas, and 1 to copy to")
    return snapshots(shape, config, 3, "2 served, and 1 to copy to")


def _copied(shape: ModelShape, config: Config, ranks: int) -> Part:
    """The copies of weights and optimizer that `ranks` ranks write checkpoints from."""
    trained = adapter_parameters(shape, config) if config.model.lora.rank else shape.parameters
    number, of = _per_rank(trained, config)
    of += f" x {ranks} ranks" if ranks > 1 else ""
    size = saved_bytes(config)
    return Part("checkpoint", size * number * ranks, f"copies to write from: {size} B x {of}")


def on_host(shape: ModelShape, config: Config) -> Memory:
    """Memory of the machine that all ranks on GPUs of one node need together.

    Ranks share the files of the model, which they map (`learner.stored`); of a model whose experts
    are packed, each rank makes a copy. Afterwards, rank 0 keeps buffers for snapshots, and every
    rank a copy of its shard for checkpoints. A model whose experts are fused needs another copy
    while it publishes. With `learner.offload` ranks hold everything here; torch rounds the size of
    a tensor that it pins up to a power of two, which is not counted.
    """
    p, ranks = shape.parameters, config.learner.num_ranks
    size = weight_bytes(config)
    loading = size * p * (ranks if shape.has_experts else 1)
    shared = f"x {ranks} ranks" if shape.has_experts else "in files that all ranks share"
    later = (_published(shape, config), _copied(shape, config, ranks))
    most = (
        (Part("loading", loading, f"{size} B x {billions(p)} parameters {shared}"),)
        if loading > sum(part.num_bytes for part in later)
        else later
    )
    if config.learner.offload:
        held = sum(part.num_bytes for part in _held(shape, config))
        most = (*most, Part("offloaded", ranks * held, f"{gib(held)} x {ranks} ranks"))
    return Memory((Part("libraries", ranks * LIBRARY_BYTES, f"{ranks} ranks"), *most))
