"""Whether `model.path` names a model that can be loaded, without loading it.

Each process that loads a model asks this first, since libraries try a name that is on no hub, and a
hub that does not answer, for half a minute. Owns no knowledge of the model itself.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

CONNECT_S = 3.0
# The tool that makes a missing model, by a part of the name of its folder.
BUILDERS = {"tiny": "tools.warm_start", "smollm2": "tools.smollm2"}


def check_model(path: str) -> None:
    """Raises `ValueError` if `path` is no folder with a model, and no name on a hub that can be
    reached or has been cached.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.path={path}: this folder holds no model (no config.json); give the folder "
                "of a Hugging Face model"
            )
    elif (
        folder.parent.is_dir()
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        or path.startswith(("models/", "runs/"))
    ):
        raise ValueError(
            f"model.path={path}: no such folder; give the folder of a Hugging Face model, or its "
            f"name on the hub. The embedded default is made by `make demo`{_builder(path)}"
        )
    else:
        _check_hub(path)


def _builder(path: str) -> str:
    tool = next((tool for word, tool in BUILDERS.items() if word in path), None)
    return f" (`python -m {tool} {path}` makes this one)" if tool else ""


def _check_hub(name: str) -> None:
    from huggingface_hub import constants, try_to_load_from_cache  # here, since it takes a second

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    remedy = "download the model where the hub can be reached, and set model.path to its folder"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"model.path={name}: HF_HUB_OFFLINE is set, and it is not cached; {remedy}"
        )
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        socket.create_connection((hub.hostname or "", port), CONNECT_S).close()
    except OSError as error:
        raise ValueError(
            f"model.path={name}: the hub, {constants.ENDPOINT}, cannot be reached ({error}); "
            f"{remedy}"
        ) from error
