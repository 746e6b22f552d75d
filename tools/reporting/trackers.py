"""Experiment trackers, each behind the same three methods.

Owns the translation of a step into the calls of each tracker's own library. Never reads a run's
files, and never waits for a network longer than that library does. Driven by `tools.track`.
"""

from __future__ import annotations

import importlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.extras import check_extra, import_extra

LENGTHS = "length/histogram"  # sampled tokens per response of the step's groups
RESPONSES = "samples"
NUM_BINS = 30
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Identity:
    """The run as a tracker knows it. `known` is the tracker's own name of a run to continue."""

    folder: Path
    project: str
    name: str
    config: Mapping[str, Any]
    known: str = ""


@dataclass(frozen=True)
class Step:
    """All that is logged about one step."""

    number: int
    values: Mapping[str, float]
    lengths: Sequence[int] = ()
    responses: Sequence[Mapping[str, Any]] = field(default=())  # prompt, response, tokens, reward


class Tracker(Protocol):
    """An open run of a tracker. Every method may raise whatever its library raises."""

    known: str  # the tracker's name of this run, with which it is continued
    where: str  # completes "logging to", for the user

    def log(self, step: Step) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in <run>/tb. Steps that the run has withdrawn disappear from the plots."""

    def __init__(self, run: Identity) -> None:
        writer = import_extra(
            "tensorboard.summary.writer.event_file_writer", _needed_by("tensorboard"), "trackers"
        )
        events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.known = str(run.folder / "tb")
        self.where = f"{self.known} (tensorboard --logdir {run.folder.parent})"
        self._scalar, self._histogram, self._text = scalar_pb, histogram_pb, text_pb
        self._event, self._session = events.Event, events.SessionLog
        self._next_step = 0
        self._writer = writer.EventFileWriter(self.known)

    def log(self, step: Step) -> None:
        if step.number != self._next_step:
            self._add(step.number, session_log=self._session(status=self._session.START))
        self._next_step = step.number + 1
        for name, value in step.values.items():
            self._add(step.number, summary=self._scalar(name, value))
        if step.lengths:
            bins = self._histogram(LENGTHS, list(step.lengths), buckets=NUM_BINS)
            self._add(step.number, summary=bins)
        if step.responses:
            self._add(step.number, summary=self._text(RESPONSES, _markdown(step.responses)))
        self._writer.flush()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. Without a login the run is kept on disk, for `wandb sync`."""

    def __init__(self, run: Identity) -> None:
        wandb = import_extra("wandb", _needed_by("wandb"), "trackers")
        login = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        self._wandb = wandb
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.known or secrets.token_hex(4),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            mode=None if login else "offline",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.known = self._run.id
        folder = Path(self._run.dir).parent
        offline = f"{folder} (wandb sync {folder} uploads it)"
        self.where = offline if self._run.offline else str(self._run.url)

    def log(self, step: Step) -> None:
        content: dict[str, Any] = {"step": step.number, **step.values}
        if step.lengths:
            counts = np.histogram(step.lengths, bins=NUM_BINS)
            content[LENGTHS] = self._wandb.Histogram(np_histogram=counts)
        if step.responses:
            content[RESPONSES] = self._wandb.Table(*_table(step.responses))
        self._run.log(content)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI or, without it, in <run.dir>/mlruns."""

    def __init__(self, run: Identity) -> None:
        mlflow = import_extra("mlflow", _needed_by("mlflow"), "trackers")
        local = (run.folder.parent / "mlruns").resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or local.as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = mlflow.MlflowClient(uri)
        self._metric = mlflow.entities.Metric
        if run.known:
            self._client.set_terminated(run.known, "RUNNING")
            self.known = run.known
        else:
            experiment = self._client.get_experiment_by_name(run.project)
            number = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(run.project)
            )
            self.known = self._client.create_run(number, run_name=run.name).info.run_id
            self._client.log_dict(self.known, dict(run.config), "config.json")
        self.where = f"{uri}, run {self.known}"

    def log(self, step: Step) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [
            self._metric(name, value, now_ms, step.number) for name, value in step.values.items()
        ]
        self._client.log_batch(self.known, metrics=metrics)
        if step.lengths:
            counts, edges = np.histogram(step.lengths, bins=NUM_BINS)
            histogram = {"counts": counts.tolist(), "edges": edges.tolist()}
            self._client.log_dict(self.known, histogram, f"lengths/step_{step.number:06d}.json")
        if step.responses:
            text = _markdown(step.responses)
            self._client.log_text(self.known, text, f"samples/step_{step.number:06d}.md")

    def close(self) -> None:
        self._client.set_terminated(self.known)


class Trackio:
    """Trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another."""

    def __init__(self, run: Identity) -> None:
        self._trackio = import_extra("trackio", _needed_by("trackio"), "trackers")
        self.known = run.known or f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._run = self._trackio.init(
            project=run.project,
            name=self.known,
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            server_url=os.environ.get("TRACKIO_SERVER_URL"),
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"project {run.project} of Trackio (trackio show --project {run.project})"

    def log(self, step: Step) -> None:
        content: dict[str, Any] = dict(step.values)
        if step.lengths:
            content[LENGTHS] = self._trackio.Histogram(
                np_histogram=np.histogram(step.lengths, bins=NUM_BINS)
            )
        if step.responses:
            content[RESPONSES] = self._trackio.Markdown(_markdown(step.responses))
        self._run.log(content, step=step.number)

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """The newest step, as gauges to be scraped from this machine while the run goes on.

    The metric `reward/mean` is called `darts_reward_mean`, with the label `run`; `darts_step` is
    the number of the step.
    """

    def __init__(self, run: Identity) -> None:
        client = import_extra("prometheus_client", _needed_by("prometheus"), "trackers")
        self._gauge, self._run = client.Gauge, run.name
        self._registry, self._gauges = client.CollectorRegistry(), dict[str, Any]()
        port = run.config["run"]["prometheus_port"]
        self._server, self._thread = client.start_http_server(port, LOOPBACK, self._registry)
        self.known = ""
        self.where = f"http://{LOOPBACK}:{self._server.server_port}/metrics"

    def log(self, step: Step) -> None:
        for name, value in {"step": step.number, **step.values}.items():
            if name not in self._gauges:
                gauge = self._gauge(gauge_name(name), name, ["run"], registry=self._registry)
                self._gauges[name] = gauge.labels(self._run)
            self._gauges[name].set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def gauge_name(metric: str) -> str:
    return "darts_" + metric.replace("/", "_")


TRACKERS: dict[str, Callable[[Identity], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
    "prometheus": Prometheus,
}
MODULES = {name: name for name in TRACKERS} | {"prometheus": "prometheus_client"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ValueError` if a package is missing. Imports none of them, as that takes seconds."""
    for name in names:
        check_extra(MODULES[name], _needed_by(name), "trackers")


def _needed_by(name: str) -> str:
    return f"run.trackers=[{name}] ([] turns trackers off)"


def _table(responses: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    columns = ["prompt", "response", "tokens", "reward", "end"]
    return columns, [[response.get(column) for column in columns] for response in responses]


def _markdown(responses: Sequence[Mapping[str, Any]]) -> str:
    columns, rows = _table(responses)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")
