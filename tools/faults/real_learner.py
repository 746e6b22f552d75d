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
    train_step, accumulate = train.train_step, train.accumulate

    def recorded(
        state: train.LearnerState, shard: Shard, earlier: train.Accumulated
    ) -> dict[str, float]:
        if not earlier.num_portions:  # `accumulate` records the last one of several
            record(path, shard, state.rank)
        return train_step(state, shard, earlier)

    def portion_recorded(state: train.LearnerState, shard: Shard, into: train.Accumulated) -> None:
        record(path, shard, state.rank)
        accumulate(state, shard, into)

    train.train_step, train.accumulate = recorded, portion_recorded
    command.RANK = ("-m", "tools.faults.real_learner", str(path))
    command.main()


if __name__ == "__main__":
    main()
