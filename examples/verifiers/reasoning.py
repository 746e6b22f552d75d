"""A task of reasoning-gym, through the package's `ReasoningGymEnv`."""

import verifiers

SIZE = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def load_environment():
    sums = {"name": "chain_sum", "weight": 1.0, "config": SIZE}
    return verifiers.ReasoningGymEnv([sums], 900, 64, system_prompt="Write <answer>N</answer>.")
