"""Whether `model.path` names a model that can be loaded, without loading it, and the hub's answer.

Each process that loads a model or a dataset asks this first, since libraries try a name that is on
no hub, and a hub that does not answer, for half a minute. Owns no knowledge of the model itself.
"""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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
    if trouble := hub_trouble():
        raise ValueError(f"model.path={name}: {trouble}; {remedy}")


def hub_trouble() -> str:
    """A text that says why the hub cannot be reached, "" if it, or the proxy to it, answers."""
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    proxies = {} if proxy_bypass(hub.hostname or "") else getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    target = urlsplit(proxy) if proxy else hub
    port = target.port or (443 if target.scheme == "https" else 80)
    answers = [f"no answer within {CONNECT_S:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((target.hostname or "", port), CONNECT_S).close()
        except OSError as error:
            answers.append(str(error))
        else:
            answers.append("")

    # In a thread, since a name server that does not answer takes longer than the timeout given.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    if not (trouble := answers[-1]):
        return ""
    through = f" through the proxy {target.hostname}:{port}" if proxy else ""
    return f"the hub, {constants.ENDPOINT}, cannot be reached{through} ({trouble})"
