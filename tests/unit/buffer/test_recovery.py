"""A restarted buffer decides as the earlier process did, or says that it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.recovery import agree
from buffer.service import Service
from buffer.wire import messages as msg
from configs import cli
from configs.schema import Config
from darts import events as ev
from darts.core import Core
from darts.sizing.lengths import LengthStats


def make_config(folder: Path, port: int, *overrides: str) -> Config:
    return cli.load(
        [
            f"run.dir={folder}", "run.name=r", "run.trackers=[]", "batch.groups=2",
            "darts.group_size=2", "eval.every=0", "sampling.max_tokens=40", "data.num_prompts=50",
            f"buffer.address=tcp://127.0.0.1:{port}", *overrides,
        ]
    )  # fmt: skip


def log_some_launches(config: Config) -> None:
    service = Service(config)
    service._recover()
    service._apply([ev.PolicyPublished(0)])
    hello = msg.EngineHello(
        engine_id="e", engine_type="t", slots=4, policy_version=0, pid=1, incarnation="0" * 16
    )
    service._greet(b"e", hello)
    service._apply(service.run.due_events())
    assert service.run.core.rollouts
    service.run.write_logs()
    service.run.close("")


def test_a_run_is_not_continued_by_code_that_decides_otherwise(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines and learner acted on the logged decisions, so the state would not be theirs."""
    config = make_config(tmp_path, free_port())
    log_some_launches(config)
    handle = Core.handle

    def launches_fewer(self: Core, event: ev.Event) -> Sequence[ev.Decision]:
        decisions = handle(self, event)
        return [*decisions][:-1] if any(isinstance(d, ev.Launch) for d in decisions) else decisions

    config.run.resume = True
    with monkeypatch.context() as patch:
        patch.setattr(Core, "handle", launches_fewer)
        service = Service(config)
        with pytest.raises(ValueError, match="decides otherwise.*tools.replay .*/r` shows"):
            service._recover()
        service.run.close("")
    service = Service(config)  # the version that wrote the log still can
    service._recover()
    assert service.run.core.rollouts
    service.run.close("")


def test_decisions_agree_if_they_differ_by_rounding_only() -> None:
    def remember(mean_log: float) -> ev.RememberLengths:
        return ev.RememberLengths("p", LengthStats(3.0, mean_log, 0.125))

    logged, rounded = remember(4.25), remember(4.25 * (1 + 1e-15))
    count = ev.CountOvershoot(1, 7, 3)
    assert rounded != logged
    assert agree([logged, count], [rounded, count])
    assert not agree([logged, count], [remember(4.26), count])
    assert not agree([logged, count], [logged])
    assert not agree([count], [replace(count, num_tokens=4)])
    assert not agree([logged], [count])
