"""Saves checkpoints beside training, which waits only until its shard is copied to host memory.

A checkpoint is written, made durable and completed on a thread, by torch's `async_save`. At most
one save is under way, so that its memory is bounded: a slow one delays the next. Owns that thread,
its process group and the measurements of saves. Never decides when to save. Driven by
`learner.train`.

    the learner    copy ── train ────────────────────── copy ── train ──
                     │                                    │
    the thread       └── write, fsync, rename, latest     └── ...

The thread's collectives run in a process group of their own, on the CPU, because they must not
interleave with those of training.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Self, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from configs.errors import one_line, writing_to
from configs.schema import Config
from learner import retention
from learner.checkpoint import CheckpointWriter, tensors_of


class Saver:
    """The checkpoints of one learner. Every rank makes one and calls the same methods in order.

    A context manager that waits for the save under way, however the learner ends.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.folder = Path(config.run.dir) / config.run.name / "checkpoints"
        self._config = config
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        cuda = device.type == "cuda"
        self._stager = DefaultStager(  # keeps its host memory from one save to the next
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )
        self._step = 0
        self._save: Future[Metadata] | None = None
        self._waited_s, self._measured = 0.0, dict[str, float]()

    def start(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, meta: dict[str, int]
    ) -> None:
        """Copy the state as the checkpoint of `meta["step"]`, after which it may change.

        A collective, though it waits for no other rank. Raises the error of an earlier save.
        """
        self.wait()
        started = time.monotonic()
        writer = CheckpointWriter(self.folder, meta, lambda: self._completed(started))
        self._step = meta["step"]
        with writing_to(self.folder):
            self._save = cast(
                "Future[Metadata]",  # a response of two futures only if staging is asynchronous
                dcp.async_save(
                    tensors_of(model, optimizer),
                    storage_writer=writer,
                    process_group=self._group,
                    async_stager=self._stager,
                ),
            )
        self._measured["checkpoint/copy_s"] = time.monotonic() - started

    @property
    def under_way(self) -> int | None:
        """The step whose checkpoint is not complete yet."""
        return None if self._save is None or self._save.done() else self._step

    def wait(self) -> None:
        """Wait for the save under way. Raises its error: on a full disk, on every rank."""
        if self._save is None:
            return
        started = time.monotonic()
        save, self._save = self._save, None
        with writing_to(self.folder):
            try:
                save.result()
            except dcp.CheckpointException as error:  # every rank gets it, whichever has failed
                raise next(cause for cause, _ in error.failures.values()) from None
        self._waited_s += time.monotonic() - started

    def check(self) -> None:
        """Raise the error of a failed save. Never waits."""
        if self._save is not None and self._save.done():
            self.wait()

    def take_metrics(self) -> dict[str, float]:
        """Seconds waited for earlier saves since the last call, and the newest measurements."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return {"checkpoint/wait_s": waited_s} | self._measured

    def _completed(self, started: float) -> None:
        """For rank 0's thread, once the checkpoint is complete."""
        retention.remove_surplus(self.folder, self._config)
        self._measured["checkpoint/seconds"] = time.monotonic() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        step = self._step
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            # The learner ends because of `error`, which its supervisor has to see.
            line = f"learner: step {step}: its checkpoint is not complete: {one_line(failed)}"
            print(line, file=sys.stderr, flush=True)
