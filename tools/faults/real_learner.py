"""`python -m tools.faults.real_learner RECORD key=value ...`: the learner, recording each shard."""

from __future__ import annotations

import sys
from pathlib import Path

from buffer.wire.messages import Shard
from learner import __main__ as command
from learner import train
from tools.faults.record import record


def main() -> None:
    path = Path(sys.argv.pop(1))
    train_step = train.train_step

    def recorded(state: train.LearnerState, shard: Shard) -> dict[str, float]:
        record(path, shard, state.rank)
        return train_step(state, shard)

    train.train_step = recorded
    command.RANK = ("-m", "tools.faults.real_learner", str(path))
    command.main()


if __name__ == "__main__":
    main()
