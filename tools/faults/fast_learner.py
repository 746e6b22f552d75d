"""`python -m tools.faults.fast_learner RECORD key=value ...`: the stand-in learner without pauses.

For runs of many thousand steps. It keeps no record of its shards.
"""

from __future__ import annotations

from tools.faults import standin_learner


def main() -> None:
    standin_learner.STEP_S = standin_learner.OFFER_S = 0.0
    standin_learner.record = lambda path, shard: None
    standin_learner.main()


if __name__ == "__main__":
    main()
