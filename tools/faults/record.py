"""The learner's own record of its training: one JSON line per shard, written before the step."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

from buffer.wire.messages import Shard


def record(path: Path, shard: Shard, rank: int = 0) -> None:
    rows = [
        {
            "rollout_id": t.rollout_id,
            "group_id": t.group_id,
            "tokens": array("i", t.tokens).tolist(),
            "sampled": list(t.sampled),
            "logprobs": array("f", t.actor_logprobs).tolist(),
            "versions": t.versions,
            "reward": t.reward,
        }
        for t in shard.trajectories
    ]
    line = {
        "step": shard.step,
        "rank": rank,
        "portion": shard.portion,
        "policy_version": shard.policy_version,
        "trajectories": rows,
    }
    with path.open("ab", buffering=0) as file:  # one write, because the ranks share the file
        file.write(json.dumps(line).encode() + b"\n")
