"""The processes of a run as manifests for Kubernetes: a Job for each, and a Service for the buffer.

Owns the manifests. Starts nothing and writes no file. Keys reach a pod as a Secret of its own role,
never through a command line or an environment. Driven by `tools.launching.scripts`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from buffer.wire.keys import key_files
from configs.schema import Config
from tools.launching.placement import group_variables
from tools.launching.processes import CONFIG, KEY_ROLES, Command

RENDEZVOUS_PORT = 29500
PRODUCT_LABEL = "nvidia.com/gpu.product"  # set by NVIDIA's GPU feature discovery
POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
# A secret's volume is writable by all, which `buffer.wire.keys` refuses.
TAKE_KEYS = "umask 077 && mkdir -p /tmp/keys && cp /secret/* /tmp/keys/ && "


def kubernetes(config: Config, commands: Sequence[Command], run_file: str) -> str:
    """All manifests. `run_file` is the text of the configuration file."""
    name = re.sub(r"[^a-z0-9-]+", "-", config.run.name.lower()).strip("-")
    port = config.buffer.address.rpartition(":")[2]
    manifests = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name},
            "data": {"run.yaml": run_file},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"run": name},
            },
        },
    ]
    run = shlex.quote(config.run.name)
    manifests += [_job(name, run, port, command) for command in commands]
    head = [
        "# Replace IMAGE by an image with this repository and its environment in its working",
        f"# directory, and create a PersistentVolumeClaim {name}-runs. Make the keys with",
        f"# `.venv/bin/python -m tools.keys {config.buffer.keys}`, then:",
    ]
    for role in KEY_ROLES.values():
        files = " ".join(f"--from-file={config.buffer.keys}/{file}" for file in key_files(role))
        head.append(f"#   kubectl create secret generic {name}-keys-{role} {files}")
    text = yaml.dump_all(manifests, Dumper=Dumper, sort_keys=False, width=1000)
    return "\n".join([*head, text])


class Dumper(yaml.SafeDumper):
    """Writes a text of several lines as such."""


Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def _job(name: str, run: str, port: str, command: Command) -> dict[str, Any]:
    own = f"{name}-{re.sub(r'[^a-z0-9-]+', '-', command.name.lower())}"
    nodes = command.place.num_nodes
    spec: dict[str, Any] = {
        "backoffLimit": 3,
        "completions": nodes,
        "parallelism": nodes,
        "completionMode": "Indexed",
        "template": {
            "metadata": {"labels": {"run": name}},
            "spec": _pod(name, run, port, command),
        },
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": own}, "spec": spec}


def _pod(name: str, run: str, port: str, command: Command) -> dict[str, Any]:
    place, role = command.place, KEY_ROLES.get(command.role, "")
    mounts: list[dict[str, Any]] = [
        {"name": "run", "mountPath": "/run-file"},
        {"name": "runs", "mountPath": "/runs"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "run", "configMap": {"name": name}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": f"{name}-runs"}},
    ]
    if role:
        mounts.append({"name": "keys", "mountPath": "/secret", "readOnly": True})
        secret = {"secretName": f"{name}-keys-{role}", "defaultMode": 0o400}
        volumes.append({"name": "keys", "secret": secret})
    container: dict[str, Any] = {
        "name": command.role,
        "image": "IMAGE",
        "command": ["sh", "-c", _command(name, run, port, command)],
        "env": [POD_IP],
        "volumeMounts": mounts,
    }
    if command.num_gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": math.ceil(command.num_gpus)}}
    accelerator = {PRODUCT_LABEL: place.accelerator_type} if place.accelerator_type else {}
    return {
        "restartPolicy": "OnFailure",
        "subdomain": name,
        "nodeSelector": accelerator | {key: str(value) for key, value in place.labels.items()},
        "containers": [container],
        "volumes": volumes,
    }


def _command(name: str, run: str, port: str, command: Command) -> str:
    """The shell command of a container. A pod's host is <job>-<index>.<service>."""
    filled = [argument.replace(CONFIG, "/run-file/run.yaml") for argument in command.arguments]
    if command.role == "tracker":
        filled[2] = f"/runs/{Path(filled[2]).name}"
        return f"exec python {shlex.join(filled)}"
    host = "$POD_IP" if command.role == "buffer" else f"{name}-buffer-0.{name}"
    group = group_variables(
        command.place, "$JOB_COMPLETION_INDEX", f"{name}-learner-0.{name}", RENDEZVOUS_PORT
    )
    exports = "".join(f"export {variable}={value} && " for variable, value in group.items())
    arguments = shlex.join([*filled, "run.dir=/runs", "buffer.keys=/tmp/keys"])
    if command.role != "actors":  # a restarted pod continues the run
        arguments += f" $([ ! -e /runs/{run}/config.yaml ] || echo run.resume=true)"
    return f'{TAKE_KEYS}{exports}exec python {arguments} "buffer.address=tcp://{host}:{port}"'
