"""The sets of variants that `tools.compare` runs. Each variant is a list of overrides."""

from __future__ import annotations

Variants = dict[str, list[str]]

PLAIN = ["darts.policy=plain"]
UNLIMITED = ["darts.relative_limit=0"]  # as published; the demo has a limit
SYNC, ASYNC = ["pipeline.mode=sync", *UNLIMITED], ["pipeline.mode=async", *UNLIMITED]
LIMITED = ["darts.relative_limit=3"]
STREAMING = ["batch.stream=group"]  # the learner takes a group once it is decided
LIMITED_SYNC = [*SYNC, *STREAMING, *LIMITED]
FIXED = ["redundancy.rule=fixed", "redundancy.upper=1.5"]
# At saturation the mean budget is about 12, that of FIXED; free slots raise it to 15.5.
ADAPTIVE = ["redundancy.rule=paper", "redundancy.upper=2.0", "redundancy.price=0.6"]
DEARER = [*ADAPTIVE, "redundancy.price=1.2"]  # a mean of about 11 on emulated latency
MARGINAL = ["redundancy.rule=marginal", "redundancy.upper=2.0"]
# The same 32 devices in two parts that are about equally busy under async plain.
SPLIT_32 = ["engines.num_engines=12", "learner.num_gpus=20"]
# The demo in smaller steps. A plain step has 32 responses, for which the latency of this engine is
# flat, as on a GPU that is not full.
FLAT = ["batch.groups=4", "run.steps=128", "optimizer.lr=1e-4"]
LONGER = [*FLAT, "run.steps=192"]  # still ends earlier than sync plain

SETS: dict[str, Variants] = {
    "ablation": {  # the published order, with the published rule for the long seat
        "sync plain": [*SYNC, *PLAIN, "learner.streaming=false"],
        "+ streaming": [*SYNC, *PLAIN],
        "+ sampling (longest)": [*SYNC, *FIXED, "darts.long_end=longest"],
        "+ adaptive (longest)": [*SYNC, *ADAPTIVE, "darts.long_end=longest"],
        "+ sampling (survivor)": [*SYNC, *FIXED],
        "+ adaptive (survivor)": [*SYNC, *ADAPTIVE],
        "random of 12": [*SYNC, *FIXED, "darts.policy=random"],
    },
    "sensitivity": {  # K:L
        "sync plain": [*SYNC, *PLAIN],
        "K7 L1": [*SYNC, *FIXED],
        "K6 L2": [*SYNC, *FIXED, "darts.num_long=2"],
        "K4 L4": [*SYNC, *FIXED, "darts.num_long=4"],
    },
    "async": {  # 32 devices each: sync uses all of them for both tasks, async splits them
        "sync plain": [*SYNC, *PLAIN],
        "sync tail batching": [*SYNC, "baseline.scheduler=tail_batching"],
        "sync partial rollout": [*SYNC, "baseline.scheduler=partial_rollout"],
        "sync darts": [*SYNC, *FIXED],
        "async plain": [*ASYNC, *PLAIN, *SPLIT_32],
        "async first finished": [*ASYNC, *FIXED, "darts.policy=first_finished", *SPLIT_32],
        "async random of 12": [*ASYNC, *FIXED, "darts.policy=random", *SPLIT_32],
        "async darts, longest": [*ASYNC, *FIXED, "darts.long_end=longest", *SPLIT_32],
        "async darts, fixed 12": [*ASYNC, *FIXED, *SPLIT_32],
        "async darts, marginal": [*ASYNC, *MARGINAL, *SPLIT_32],
    },
    "rules": {  # on the hardware of the base configuration
        "async plain": [*ASYNC, *PLAIN],
        "random of 12": [*ASYNC, *FIXED, "darts.policy=random"],
        "exact, longest": [*ASYNC, *FIXED, "darts.long_end=longest"],
        "exact, survivor": [*ASYNC, *FIXED],
        "exact, none": [*ASYNC, *FIXED, "darts.long_end=none"],
        "eager": [*ASYNC, *FIXED, "darts.cancel=eager"],
        "first finished": [*ASYNC, *FIXED, "darts.policy=first_finished"],
        "marginal": [*ASYNC, *MARGINAL],
    },
    "k_of_g": {  # M = 8 of a growing budget
        "8 of 8": [*SYNC, *PLAIN],
        **{
            f"8 of {budget}": [*SYNC, "redundancy.rule=fixed", f"redundancy.upper={budget / 8}"]
            for budget in (10, 12, 16, 24)
        },
    },
    "live_ablation": {  # the published order, each with what comes before it
        "sync plain": [*SYNC, *PLAIN],
        "+ streaming": [*SYNC, *PLAIN, *STREAMING],
        "+ sampling (survivor)": [*SYNC, *STREAMING, *FIXED],
        "+ adaptive (survivor)": [*SYNC, *STREAMING, *ADAPTIVE],
        "+ sampling (limited)": [*SYNC, *STREAMING, *FIXED, *LIMITED],
        "+ relative limit": [*SYNC, *STREAMING, *ADAPTIVE, *LIMITED],
        "+ marginal, limited": [*SYNC, *STREAMING, *MARGINAL, *LIMITED],  # the demo's budgets
        "+ relative limit (dearer)": [*SYNC, *STREAMING, *DEARER, *LIMITED],
        "+ sampling (none)": [*SYNC, *STREAMING, *FIXED, "darts.long_end=none"],
        "+ sampling (longest)": [*SYNC, *STREAMING, *FIXED, "darts.long_end=longest"],
        "+ adaptive (longest)": [*SYNC, *STREAMING, *ADAPTIVE, "darts.long_end=longest"],
        "random of 12": [*SYNC, *STREAMING, *FIXED, "darts.policy=random"],
    },
    "live_k_l": {  # K:L, with streaming and the demo's limit
        "K7 L1": [*LIMITED_SYNC, *FIXED],
        "K6 L2": [*LIMITED_SYNC, *FIXED, "darts.num_long=2"],
        "K4 L4": [*LIMITED_SYNC, *FIXED, "darts.num_long=4"],
    },
    "live_k_of_g": {  # M = 8 of a growing budget, with streaming and the demo's limit
        "8 of 8": [*LIMITED_SYNC, "redundancy.rule=none"],
        **{
            f"8 of {budget}": [
                *LIMITED_SYNC,
                "redundancy.rule=fixed",
                f"redundancy.upper={budget / 8}",
            ]
            for budget in (10, 12, 16, 24)
        },
    },
    "live_async": {  # on the hardware and with the lag bound of the base configuration
        "async plain": [*ASYNC, *PLAIN],
        "first finished": [*ASYNC, *FIXED, "darts.policy=first_finished"],
        "random of 12": [*ASYNC, *FIXED, "darts.policy=random"],
        "as published": [*ASYNC, *ADAPTIVE, "darts.long_end=longest"],
        "darts, 12": [*ASYNC, *FIXED],
        "darts, 12, none": [*ASYNC, *FIXED, "darts.long_end=none"],
        "darts, 12, limited": [*ASYNC, *FIXED, *LIMITED],
        "darts, marginal": [*ASYNC, *MARGINAL],
        "darts, marginal, limited": [*ASYNC, *MARGINAL, *LIMITED],  # the demo
        "darts, 8, limited": [*ASYNC, "redundancy.rule=none", *LIMITED],  # no surplus
    },
    "live": {
        "sync plain": [*SYNC, *PLAIN, *FLAT],
        "async plain": [*ASYNC, *PLAIN, *LONGER],
        "async darts, 12": [*ASYNC, *FIXED, *LONGER],
        "async darts, marginal": [*ASYNC, "redundancy.rule=marginal", *LONGER],  # the default rule
        "async random of 12": [*ASYNC, *FIXED, "darts.policy=random", *LONGER],
    },
}
