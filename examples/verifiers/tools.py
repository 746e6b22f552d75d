"""Products with a calculator, as a `ToolEnv` of the package."""

import verifiers
from datasets import Dataset


def multiply(left: int, right: int) -> int:
    """Multiply two integers."""
    return left * right


def is_right(completion, answer):
    return float(completion[-1].content == answer)


def load_environment():
    pairs = [(x, y) for x in range(10, 100) for y in range(10, 100)]
    rows = [{"question": f"{x}*{y}=", "answer": str(x * y)} for x, y in pairs]
    rows = Dataset.from_list(rows).train_test_split(64, 900, seed=0)
    rubric, (train, held_out) = verifiers.Rubric(funcs=[is_right]), rows.values()
    return verifiers.ToolEnv([multiply], dataset=train, eval_dataset=held_out, rubric=rubric)
