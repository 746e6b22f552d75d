"""Tables: files and datasets, each row of which is a prompt. All rows are checked at once.

Every error is one `ValueError` that names the file and the row, whatever a library raised.
`buffer.data.rows` knows the meaning of a row. A table's own dependencies (pyarrow, datasets) are
imported when it is opened.
"""

from __future__ import annotations

import csv
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buffer.data.identity import HELD_OUT_FRAC, digest, hash_frac, text_of
from buffer.data.rows import BadRow, not_utf8, parsed, payload_of_row
from buffer.wire.messages import PromptPayload
from configs.errors import one_line
from configs.extras import import_extra
from configs.model_path import hub_trouble
from configs.schema import DataConfig

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
MAX_BAD_ROWS = 20  # that are looked for
Numbered = tuple[int, Any]  # the number of a row, from 1, and its value or the `BadRow` that it is


class TableSource:
    """Rows of a file or a dataset. `name` is how errors call it.

    digest: of all its rows in order, those included that are held out later.
    """

    def __init__(self, name: str, rows: Iterable[Numbered], data: DataConfig) -> None:
        self.name = name
        self._payloads = _payloads(name, rows, data)
        self.size = len(self._payloads)
        self.digest = digest(payload.prompt_id for payload in self._payloads)

    def __getitem__(self, index: int) -> PromptPayload:
        return self._payloads[index]

    def hold_out(self, num_prompts: int) -> list[PromptPayload]:
        distinct = self._distinct()
        num_held_out = max(num_prompts, round(HELD_OUT_FRAC * len(distinct)))
        held_out = {text_of(payload) for payload in distinct[:num_held_out]}
        left = [payload for payload in self._payloads if text_of(payload) not in held_out]
        if 2 * num_held_out > len(distinct) or not left:
            raise ValueError(
                f"{self.name} has {len(distinct)} distinct prompts, too few to hold out "
                f"eval.num_prompts={num_prompts} "
                "and train on at least as many; lower eval.num_prompts, name data.eval, or set "
                "eval.every=0"
            )
        self._payloads, self.size = left, len(left)
        return distinct[:num_prompts]

    def sample(self, num_prompts: int) -> list[PromptPayload]:
        return self._distinct()[:num_prompts]

    def _distinct(self) -> list[PromptPayload]:
        """Each prompt once, in an order that does not depend on that of the rows."""
        first = {payload.prompt_id: payload for payload in reversed(self._payloads)}
        return sorted(first.values(), key=lambda p: (hash_frac(text_of(p)), p.prompt_id))


def open_table(key: str, form: str, data: DataConfig) -> TableSource:
    """The table that `form`, the value of `key`, names: one of `SUFFIXES`, or hf:..."""
    if form.startswith("hf:"):
        return TableSource(f"{key}={form}", _read_dataset(key, form), data)
    if os.path.isdir(form):
        raise ValueError(
            f"{key}={form}: is a folder; name one file in it, or read all of it with hf:{form}"
        )
    if not os.path.exists(form):  # nor can there be one, if its name is too long
        raise ValueError(
            f"{key}={form}: there is no such file (looked from {Path.cwd()}); give the path "
            "of an existing one"
        )
    return TableSource(form, READERS[suffix_of(form)](form), data)


def suffix_of(form: str) -> str:
    """The one of `SUFFIXES` with which `form` ends, or ""."""
    return next((suffix for suffix in SUFFIXES if form.endswith(suffix)), "")


def _payloads(name: str, rows: Iterable[Numbered], data: DataConfig) -> list[PromptPayload]:
    payloads: list[PromptPayload] = []
    bad: list[tuple[int, BadRow]] = []
    for number, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            payloads.append(payload_of_row(f"{name}, row {number}", row, data))
        except BadRow as error:
            bad.append((number, error))
            if len(bad) == MAX_BAD_ROWS:
                break
    if bad:
        (number, error), others = bad[0], [str(number) for number, _ in bad[1:]]
        them = f"row{'s' if len(others) > 1 else ''} {', '.join(others)}"
        more = f" ({them} cannot be used either)" if others else ""
        raise ValueError(f"{name}, row {number}: {error}{more}") from error
    if not payloads:
        raise ValueError(f"{name} holds no rows; a source needs at least one prompt")
    return payloads


# Readers
# --------------------------------------------------------------------------------------------------


def _read_jsonl(path: str) -> Iterator[Numbered]:
    """Rows of a file that may be compressed. Blank lines count as rows, but hold none."""
    number = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parsed(line)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}, row {number + 1}: cannot be read: {one_line(error)}; write the file again"
        ) from error


def _parsed(line: bytes) -> Any:
    try:
        return parsed(line)
    except BadRow as error:
        return error


def _read_csv(path: str) -> Iterator[Numbered]:
    """Rows below the header, which is the first line with text. All values are text, and row 1 is
    the first one below the header.
    """
    number = 0
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, "rb") as file:
            lines = csv.reader((line.decode("utf-8-sig") for line in file), strict=True)
            header = next((line for line in lines if line), None) or []
            if len(set(header)) < len(header):
                raise ValueError(
                    f"{path}: the header {header} must name each column once; fix the first line"
                )
            for number, values in enumerate(lines, start=1):
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                elif values:
                    yield (
                        number,
                        BadRow(f"{len(values)} values for {len(header)} columns; fix the row"),
                    )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {number + 1}: {not_utf8(error)}") from error
    except (OSError, csv.Error) as error:
        raise ValueError(
            f"{path}, row {number + 1}: cannot be read: {one_line(error)}; fix the row"
        ) from error


def _read_parquet(path: str) -> Iterator[Numbered]:
    parquet = import_extra("pyarrow.parquet", path, "data")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"two columns have the same name, of {', '.join(names)}")
            for batch in file.iter_batches():
                rows: list[Any] = batch.to_pylist()
                for row in rows:
                    number += 1
                    yield number, row
    except Exception as error:  # pyarrow's own kinds, of which not all are ValueErrors
        raise ValueError(
            f"{path}, at row {number + 1} or behind it: not a readable parquet file: "
            f"{one_line(error, with_type=True)}; write it again"
        ) from error


def _read_dataset(key: str, form: str) -> Iterator[tuple[int, Any]]:
    """`hf:<dataset>[:<split>]`, the split `train` unless named;
    `hf:<owner>/<dataset>/<configuration>` if it has several.
    """
    datasets = import_extra("datasets", f"{key}={form}", "data")
    name, _, split = form.removeprefix("hf:").partition(":")
    configuration = None
    if name.count("/") == 2 and not Path(name).exists():
        name, _, configuration = name.rpartition("/")
    trouble = "" if Path(name).exists() else hub_trouble()
    try:
        with _offline(bool(trouble)):
            rows = datasets.load_dataset(name, configuration, split=split or "train")
    except Exception as error:  # a wrong name, split or network raises a dozen unrelated types
        if trouble:
            raise ValueError(
                f"{key}={form}: {trouble}, and it is not cached; write it to a .jsonl or .parquet "
                f"file where the hub is reachable, and set {key} to this file"
            ) from error
        raise ValueError(
            f"{key}={form}: cannot load it: {one_line(error, with_type=True)}; check name and "
            "split, and that the hub is reachable or the dataset cached"
        ) from error
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row
    except Exception as error:  # a column that cannot be decoded, say
        raise ValueError(
            f"{key}={form}, row {number + 1}: cannot be read: {one_line(error, with_type=True)}; "
            "fix or remove the row"
        ) from error


@contextmanager
def _offline(offline: bool) -> Generator[None]:
    """Within it, if `offline`, a library takes from its cache what it would ask the hub for."""
    constants = import_extra("huggingface_hub.constants", "hf:", "data")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


READERS: dict[str, Callable[[str], Iterator[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
