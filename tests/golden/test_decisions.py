"""The core's decisions on a recorded sequence of events must not change by accident.

The events come from a small simulated run and are fed to a fresh core as recorded. So a change of
the simulator alone does not fail this test, but a change of any rule does. `WRITE_GOLDEN=1`
rewrites the recording.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import msgspec

from buffer.records.event_log import DECISION_TYPES, EVENT_TYPES
from configs import cli
from darts import events as ev
from darts.config import core_config
from darts.core import Core
from darts.simulate.schema import SimulateConfig
from darts.simulate.world import Simulation

GOLDEN = Path(__file__).with_name("decisions.jsonl.gz")
OVERRIDES = ["run.steps=6", "batch.groups=4", "lengths.num_prompts=12", "engines.num_engines=2",
             "engines.slots=24", "engines.speeds=[1.0,0.5]", "learner.ms_per_token=0.1",
             "staleness.max_lag=2", "sampling.max_tokens=300",
             "engines.chunk_tokens=16"]  # fmt: skip
Step = tuple[ev.Event, list[ev.Decision]]


def config() -> SimulateConfig:
    return cli.load(OVERRIDES, SimulateConfig)


def test_decisions_equal_the_golden_ones() -> None:
    if os.environ.get("WRITE_GOLDEN") == "1":
        write(simulated())
    golden = read()
    core = Core(core_config(config()))
    for number, (event, decisions) in enumerate(golden):
        assert [rounded(d) for d in core.handle(event)] == decisions, f"event {number}: {event}"
    kinds = {type(decision) for _, decisions in golden for decision in decisions}
    assert kinds >= {ev.OpenGroup, ev.Launch, ev.Cancel, ev.Ship, ev.RememberLengths}


def simulated() -> list[Step]:
    steps: list[Step] = []
    Simulation(config(), observer=lambda event, decisions: steps.append((event, decisions))).run()
    return steps


def rounded(decision: ev.Decision) -> ev.Decision:
    """Round length statistics to six digits: `exp` and `log` differ slightly between machines."""
    if not isinstance(decision, ev.RememberLengths):
        return decision
    stats = decision.lengths
    return ev.RememberLengths(
        decision.prompt_id,
        type(stats)(*(float(f"{x:.6g}") for x in (stats.weight, stats.mean_log, stats.var_log))),
    )


def write(steps: list[Step]) -> None:
    lines = []
    for event, decisions in steps:
        entries = [event, *map(rounded, decisions)]
        lines.append(
            json.dumps([[type(entry).__name__, msgspec.to_builtins(entry)] for entry in entries])
        )
    GOLDEN.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def read() -> list[Step]:
    steps: list[Step] = []
    for line in gzip.decompress(GOLDEN.read_bytes()).decode().splitlines():
        (event_name, event), *decisions = json.loads(line)
        steps.append(
            (
                msgspec.convert(event, EVENT_TYPES[event_name]),
                [msgspec.convert(decision, DECISION_TYPES[name]) for name, decision in decisions],
            )
        )
    return steps
