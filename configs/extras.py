"""Imports optional packages if a setting needs them, and names the extra that is missing.

The extras are listed in `pyproject.toml`. Used for every package that is not a core dependency.
"""

from __future__ import annotations

import importlib
from typing import Any

from configs.errors import one_line


def import_extra(module: str, needed_by: str, extra: str) -> Any:
    """Import an optional module and return it.

    `needed_by` is the setting or command that needs it, as the user wrote it. Raises `ValueError`
    if the module is missing or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{needed_by}: needs the optional package {module.partition('.')[0]}, which cannot be "
            f"imported ({one_line(error)}); install it with: pip install 'darts-rl[{extra}]'"
        ) from error
