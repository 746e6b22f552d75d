"""`python -m buffer.data.public_rows NAME SPLIT FILE`: the rows of an environment of the package
`verifiers`, as JSON lines.

A process of its own, because an environment replaces signal handlers, starts threads and prints.
Started by `buffer.data.public_environments`; `actors.public.turns` plays the environments that
`load` returns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from buffer.data.tool_calls import described
from buffer.processes.child import ERROR
from configs.errors import one_line
from configs.extras import import_extra

NOT_OURS = ("logprobs", "top_logprobs", "stop", "logit_bias", "response_format", "tool_choice")
REMOTE = ("SandboxEnv", "SandboxMixin", "OpenEnvEnv", "BrowserEnv")  # classes of the package


def load(name: str) -> Any:
    """The environment. Raises ValueError if it cannot be loaded, or cannot be played here."""
    needed_by = f"verifiers:{name}"
    import_extra("verifiers.envs.multiturn_env", needed_by, "verifiers")
    verifiers = import_extra("verifiers", needed_by, "verifiers")
    try:
        environment = verifiers.load_environment(name)
    except Exception as error:  # of the environment's own code
        cause = error.__cause__ or error
        raise ValueError(
            f"environment {name!r} cannot be loaded: {one_line(cause, with_type=True)}"
        ) from error
    if reason := _refusal(environment, verifiers):
        raise ValueError(f"environment {name!r} cannot be played here: {reason}")
    return environment


def sampling_refusal(arguments: Mapping[str, Any]) -> str:
    """Why responses cannot be sampled with these arguments of a completion; "" if they can.

    Temperature, length and so on are those of the run, which the keys in sampling name.
    """
    if (number := arguments.get("n", 1)) != 1:
        return f"it asks for n={number} responses to one prompt; a rollout has one"
    asked = next((name for name in NOT_OURS if arguments.get(name)), None)
    return f"it asks for {asked}={arguments[asked]!r}, which cannot be given" if asked else ""


def _refusal(environment: Any, verifiers: Any) -> str:
    kind = environment.__class__
    if getattr(kind, "rollout", None) is not verifiers.MultiTurnEnv.rollout:
        return f"{kind.__name__} is no MultiTurnEnv; if it is a group, name one of its members"
    if remote := next((base.__name__ for base in kind.__mro__ if base.__name__ in REMOTE), None):
        return f"it is a {remote}, whose remote machines would outlive a cancelled rollout"
    if environment.requires_group_rollouts:
        return "its rubric compares the rollouts of a group, but each is scored when it ends"
    if not environment.score_rollouts:
        return "it gives no rewards (score_rollouts=False)"
    return sampling_refusal(environment.sampling_args)


def rows_of(environment: Any, split: str) -> Iterator[dict[str, Any]]:
    """For each row of the dataset: prompt, answer, and in `row` everything that it holds.

    Tools that the environment offers are described in the system message of the prompt.
    """
    if split == "eval" and environment.build_eval_dataset() is None:
        raise ValueError("the environment has no evaluation dataset; leave :eval out")
    dataset = environment.get_eval_dataset() if split == "eval" else environment.get_dataset()
    for row in dataset:
        answer = row.get("answer", "")
        yield {
            "prompt": _with_tools(row["prompt"], _tools(environment, row)),
            "answer": answer if isinstance(answer, str) else json.dumps(answer, default=str),
            "row": row,
        }


def _tools(environment: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    info = row.get("info")
    info = json.loads(info) if isinstance(info, str) and info else info
    own = cast("dict[str, Any]", info).get("tool_defs") if isinstance(info, dict) else None
    tools = cast("list[Any]", own or environment.tool_defs or [])
    return [
        {
            field: tool[field] if isinstance(tool, dict) else getattr(tool, field)
            for field in ("name", "description", "parameters")
        }
        for tool in tools
    ]


def _with_tools(prompt: Any, tools: list[dict[str, Any]]) -> Any:
    if not tools:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    offer = {"role": "system", "content": described(tools)}
    if messages and messages[0]["role"] == "system":
        offer["content"] = f"{messages[0]['content']}\n\n{offer['content']}"
        del messages[0]
    return [offer, *messages]


def main(argv: list[str]) -> None:
    name, split, path = argv
    try:
        lines = [json.dumps(row, default=str) for row in rows_of(load(name), split)]
    except Exception as error:  # of the environment's own code
        is_ours = isinstance(error, ValueError)
        sys.exit(ERROR + one_line(error, with_type=not is_ours))
    Path(path).write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
