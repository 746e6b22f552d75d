"""The `LiveState` of a running run, which monitors draw. Reads the run, never changes it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from buffer.records.metrics import HISTOGRAM_EDGES
from buffer.wire import messages as msg
from darts import waiting
from darts.state.engines import Engine
from darts.state.groups import Group
from darts.state.survivors import short_cutoff

if TYPE_CHECKING:
    from buffer.run_state import RunState

SHOWN_GROUPS = 32
HELD_UP_FRAC = 0.5  # a verifier that holds up this share of the rollouts in flight is slow


def live_state(
    run: RunState, waits: Sequence[msg.WaitView] = (), evaluated: tuple[int, int] = (0, 0)
) -> msg.LiveState:
    """The state as it is now. The buffer's loop knows the waits and the evaluation under way."""
    core, config = run.core, run.config
    return msg.LiveState(
        time_s=run.now(),
        run_name=config.run.name,
        phase=_phase(run, evaluated),
        step=run.step,
        steps=config.run.steps,
        policy_version=core.policy_version,
        max_lag=core.config.max_lag,
        waiting=_waiting(run, evaluated),
        groups_open=core.num_outstanding - core.num_ready,
        groups_ready=core.num_ready,
        bytes_held=run.store.bytes_held,
        refused_frames=run.router.num_rejected,
        histogram_edges=HISTOGRAM_EDGES,
        histogram=run.metrics.histogram(),
        lags=list(run.metrics.recent_lags),
        metrics={k: float(v) for k, v in (run.last_evaluation | run.last_row).items()},
        groups=[
            _group(g, run)
            for g in islice((g for g in core.groups.values() if g.running), SHOWN_GROUPS)
        ],
        engines=[_engine(e, run) for e in core.engines.by_id.values()],
        prompts=list(run.metrics.latest.prompts),
        waits=list(waits),
        evaluated=evaluated,
        warnings=list(run.warnings),
    )


def _phase(run: RunState, evaluated: tuple[int, int]) -> str:
    """The phase of the run, which in a monitor's eyes starts until an engine has a policy."""
    if run.phase != "training" or run.step:
        return run.phase
    if _is_loading(run):
        return "starting"
    return "first evaluation" if evaluated[1] else "training"


def _is_loading(run: RunState) -> bool:
    """Whether no engine has loaded the first policy yet."""
    return run.step == 0 and all(e.version < 0 for e in run.core.engines.by_id.values())


def _waiting(run: RunState, evaluated: tuple[int, int]) -> str:
    """Which side waits for the other, in words.

    Before the first step, it names what the start waits for. If the learner waits and most of the
    rollouts in flight are with a verifier, the text names the verifier instead of the engines.
    """
    if run.core.policy_version < 0:
        return _missing_at_start(run)
    engines = run.core.engines.by_id.values()
    if engines and _is_loading(run):
        return f"the start waits for engines to load the model; {_joined(len(engines))}"
    if engines and _phase(run, evaluated) == "first evaluation":
        return "the first policy is evaluated: {} of {} prompts done".format(*evaluated)
    described = waiting.describe(run.core)
    if run.core.requested_step is None:
        return described
    in_flight = sum(len(engine.in_flight) for engine in engines)
    reports = [
        report.verifier
        for engine_id, report in run.metrics.latest.reports.items()
        if engine_id in run.core.engines.by_id
    ]
    num_unscored = min(in_flight, sum(v.num_waiting + v.num_busy for v in reports))
    if num_unscored < HELD_UP_FRAC * max(1, in_flight):
        return described
    num_verified = sum(v.num_verified for v in reports)
    time_s = sum(v.time_s for v in reports) / max(1, num_verified)
    time_s = time_s or run.last_row.get("verifier/time_s_mean", 0.0)
    each = f", {time_s:.3g} s each" if time_s else ""
    num_workers = sum(v.num_workers for v in reports)
    workers = f"{num_workers} worker" + ("s" if num_workers > 1 else "")
    return (
        f"learner waits for the verifier: {num_unscored} of {in_flight} rollouts in flight wait "
        f"only for their reward ({workers}{each}); make it faster, or raise data.verifier_workers"
    )


def _missing_at_start(run: RunState) -> str:
    engines = _joined(len(run.core.engines.by_id))
    if not run.peers.ranks():
        return f"the start waits for a learner; {engines}"
    return f"the start waits for the learner's first policy; {engines}"


def _joined(num_engines: int) -> str:
    return f"{num_engines} engine{'' if num_engines == 1 else 's'} joined"


def _group(group: Group, run: RunState) -> msg.GroupView:
    cutoff = short_cutoff(group, run.core.config)
    prompt = (
        run.eval_payloads[group.prompt.prompt_id]
        if group.purpose == "eval"
        else run.prompts.payload(group.prompt.visit)
    )
    return msg.GroupView(
        group_id=group.group_id,
        prompt_id=group.prompt.prompt_id,
        long_end=group.long_end,
        budget=group.budget,
        short_cutoff=0 if cutoff == float("inf") else int(cutoff),
        rollouts=[
            msg.RolloutView(rollout_id=r.rollout_id, tokens=r.tokens, state=r.state.value)
            for r in group.rollouts.values()
        ],
        text=prompt.beginning,
    )


def _engine(engine: Engine, run: RunState) -> msg.EngineView:
    report = run.metrics.latest.reports.get(engine.engine_id)
    return msg.EngineView(
        engine_id=engine.engine_id,
        engine_type=engine.engine_type,
        slots=engine.slots,
        in_flight=len(engine.in_flight),
        policy_version=engine.version,
        tokens_per_s=report.tokens_per_s if report else 0.0,
        busy_frac=report.busy_frac if report else 0.0,
        curve=run.core.engines.curves[engine.engine_type].points(),
    )
