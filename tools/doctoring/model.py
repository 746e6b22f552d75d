"""The sizes of the model that a run is to train, from its configuration: of a folder, the hub, or a
table of known models if neither has it.

Never waits long for a hub that does not answer: it is asked for a connection first.
"""

from __future__ import annotations

from configs.memory.shape import ModelShape, billions
from learner.model_shape import shape_of_path
from tools.checking.findings import Finding
from tools.doctoring.known_models import known_name, known_shape


def size_model(path: str) -> tuple[Finding, ModelShape | None]:
    """Whether the model is there, and its sizes. Sizes may be known without the model."""
    try:
        shape = shape_of_path(path)
    except ValueError as error:
        return _stand_in(path, str(error))
    return Finding("ok", "model", f"{path}: {billions(shape.parameters)} parameters"), shape


def _stand_in(path: str, error: str) -> tuple[Finding, ModelShape | None]:
    if (name := known_name(path)) is None:
        return Finding("error", "model", error), None
    shape = known_shape(name)
    result = f"{error} (sizes below: those of {name} in our table, {billions(shape.parameters)}"
    return Finding("warning", "model", f"{result} parameters)"), shape
