"""Imports optional packages if a setting needs them, and names the extra that is missing.

The extras are listed in `pyproject.toml`. Used for every package that is not a core dependency.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from configs.errors import one_line


def check_extra(module: str, needed_by: str, extra: str) -> None:
    """Raises `ValueError` if an optional top-level module is not installed. Does not import it."""
    if sys.modules.get(module, module) is None or importlib.util.find_spec(module) is None:
        raise ValueError(_missing(module, needed_by, extra, "it is not installed"))


def import_extra(module: str, needed_by: str, extra: str) -> Any:
    """Import an optional module and return it.

    `needed_by` is the setting or command that needs it, as the user wrote it. Raises `ValueError`
    if the module is missing or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(_missing(module, needed_by, extra, one_line(error))) from error


def _missing(module: str, needed_by: str, extra: str, reason: str) -> str:
    return (
        f"{needed_by}: needs the optional package {module.partition('.')[0]}, which cannot be "
        f"imported ({reason}); install it with: pip install 'darts-rl[{extra}]'"
    )
