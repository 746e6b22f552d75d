"""The quick check of the user's own data before a run, in a process of its own.

The process loads libraries that the launcher does not want to hold for a whole run. Driven by
`tools.launch`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from buffer.data.sources import is_table
from buffer.processes.child import ERROR, python_path
from configs import cli
from configs.schema import Config

TIMEOUT_S = 600.0  # large tables, and verifiers that load libraries


def check_data(config: Config) -> None:
    """Print suspicions about data and verifier. Raises `ValueError` if no run can use them.

    The data that comes with this software is not checked, unless a verifier is named for it.
    """
    own = is_table(config.data.train) or config.data.train.startswith("reasoning_gym:")
    if not own and config.data.environment == "auto":
        return
    print("checking a few rows of the data", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(cli.to_yaml(config))
        file.flush()
        command = ["-m", "tools.check", "--config", file.name, "depth=quick"]
        try:
            done = subprocess.run(
                [sys.executable, *command],
                env={**os.environ, **python_path()},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"data.train={config.data.train}: a few of its rows could not be checked within "
                f"{TIMEOUT_S:g} s; run python -m tools.check with the same keys"
            ) from None
    print(done.stdout, end="", flush=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        reasons = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        raise ValueError((reasons or lines)[-1])
