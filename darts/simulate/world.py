"""The simulated world: it drives the core with the events that a real service would send.

Owns the virtual clock, the engines, the learner and the prompt stream around one `Core` (or one of
`darts.simulate.baselines`). The loop below is the only driver, and decides nothing. Deterministic
by `run.seed`. Everything that is modelled rather than measured (latency curves, length
distributions, learning) is a configuration key in `darts.simulate.schema`.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from darts import events as ev
from darts.config import core_config
from darts.core import Core
from darts.simulate.baselines import PartialRollout, Rounds, TailBatching
from darts.simulate.engines import SimEngine, SimRollout, ptl_table
from darts.simulate.lengths import Responses, Shaping, SimPrompt, SimPromptStream, make_prompts
from darts.simulate.schema import SimulateConfig, check
from darts.simulate.tally import Files, Row, Tally

Observer = Callable[[ev.Event, list[ev.Decision]], None]


@dataclass(slots=True)
class OpenedGroup:
    """A group as the world knows it: its responses, and the rollouts that it launched."""

    responses: Responses
    rollouts: dict[int, SimRollout] = field(default_factory=dict)
    prompt_read_by: set[str] = field(default_factory=set)


def make_scheduler(config: SimulateConfig) -> Core | Rounds:
    match config.baseline.scheduler:
        case "tail_batching":
            return TailBatching(config)
        case "partial_rollout":
            return PartialRollout(config)
        case "core":
            return Core(core_config(config))


class Simulation:
    """One run. `observer` gets every event with its decisions (golden tests, event logs)."""

    def __init__(
        self, config: SimulateConfig, files: Files | None = None, observer: Observer | None = None
    ) -> None:
        check(config)
        self.config = config
        self.scheduler = make_scheduler(config)
        self.tally = Tally(config.darts.group_size, config.darts.num_long)
        self.shaping = Shaping(config.shaping)
        self.rows: list[Row] = []
        self.num_events: Counter[str] = Counter()
        self.now = 0.0
        self._files, self._observer = files, observer
        prompts = make_prompts(config.lengths, config.pattern, config.run.seed)
        self._stream = SimPromptStream(prompts, config.sampling.max_tokens, config.run.seed)
        self._engines = self._make_engines()
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self._dirty: dict[str, SimEngine] = {}
        self._groups: dict[int, OpenedGroup] = {}
        self._rollouts: dict[int, SimRollout] = {}
        self._cancelled: set[int] = set()
        self._version = self._step = 0
        self._shipped: list[ev.GroupRecord] = []  # groups of the present step
        self._portion: list[ev.GroupRecord] = []  # those of them that the learner gets next
        self._num_portions = 0  # of the present step, that the learner got
        self._requested_s = 0.0
        self._waited_s = 0.0
        self._at_last_row = (0.0, 0.0)  # time, occupied slot seconds
        started = 1 if config.baseline.scheduler == "core" else config.baseline.oversample
        self._keep_pending = math.ceil(config.batch.groups * started)

    def _make_engines(self) -> dict[str, SimEngine]:
        keys = self.config.engines
        tables = {
            speed: ptl_table(keys.batches, keys.ms_per_token, speed, keys.slots)
            for speed in set(keys.speeds)
        }
        engines: dict[str, SimEngine] = {}
        for index in range(keys.num_engines):
            speed, name = keys.speeds[index % len(keys.speeds)], f"sim/{index}"
            engines[name] = SimEngine(
                name, f"x{speed:g}", keys.slots, tables[speed], keys.kv_tokens, keys.chunk_tokens
            )
        return engines

    # The clock
    # ----------------------------------------------------------------------------------------------

    def run(self) -> Row:
        """Simulate `run.steps` learner steps and return the comparison table's row.

        Raises `RuntimeError` if the world comes to a halt before that.
        """
        self._send(ev.PolicyPublished(0))
        for engine in self._engines.values():
            self._send(ev.EngineJoined(engine.engine_id, engine.engine_type, engine.slots, 0))
        # The reports are spread over the interval, as engines are not synchronised.
        for index, engine in enumerate(self._engines.values()):
            self._at(
                self.config.engines.latency_every_s * (index + 1) / len(self._engines),
                self._report_latency,
                engine,
            )
        self._request()
        self._settle()
        while self._step < self.config.run.steps:
            self.now, _, action, arguments = heapq.heappop(self._agenda)
            action(*arguments)
            self._settle()
            # Only the engines' latency reports are due.
            if len(self._agenda) <= len(self._engines):
                raise RuntimeError(
                    f"the simulation stands still at {self.now:.1f} s in step {self._step}: "
                    f"{self.scheduler.num_pending} prompts wait"
                )
        if self._files is not None:
            self._files.close()
        return self.tally.summary(self.rows) | {"events": sum(self.num_events.values())}

    def _at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._serial += 1
        heapq.heappush(self._agenda, (time_s, self._serial, action, arguments))

    def _settle(self) -> None:
        """Draw enough prompts, and let engines whose batch changed plan again."""
        while self.scheduler.num_pending < self._keep_pending:
            self._send(ev.PromptsDrawn(self._stream.draw(self.config.batch.groups)))
        for engine in self._dirty.values():
            recomputed = engine.relieve_cache()
            if recomputed:
                engine.pause(recomputed * self.config.engines.prefill_ms_per_token / 1e3)
            due_s = engine.plan()
            if due_s < math.inf:
                self._at(due_s, self._engine_due, engine, engine.serial)
        self._dirty.clear()

    def _send(self, event: ev.Event) -> None:
        self.num_events[type(event).__name__] += 1
        decisions = self.scheduler.handle(event)
        if self._observer is not None:
            self._observer(event, list(decisions))
        for decision in decisions:
            match decision:
                case ev.Launch():
                    self._launch(decision)
                case ev.Cancel():
                    self._cancelled.add(decision.rollout_id)
                    self._at(
                        self.now + self.config.engines.cancel_s, self._stop, decision.rollout_id
                    )
                case ev.Curtail():
                    self._at(
                        self.now + self.config.engines.cancel_s, self._curtail, decision.rollout_id
                    )
                case ev.OpenGroup():
                    self._open(decision)
                case ev.Ship():
                    self._ship(decision)
                case ev.Drop():
                    self._close(decision.record)
                case ev.Close():
                    self._close(decision.record)
                case ev.CountOvershoot():
                    self.tally.count_overshoot(decision.num_tokens)
                case ev.Evaluated():
                    raise AssertionError("a simulation has no held-out prompts")
                case ev.RememberLengths():
                    self._stream.remember(decision.prompt_id, decision.lengths)
                case ev.RememberRewards():
                    self._stream.rewards[decision.prompt_id] = decision.rewards
        if self._portion:
            self._train_portion()

    # Engines
    # ----------------------------------------------------------------------------------------------

    def _open(self, decision: ev.OpenGroup) -> None:
        self._groups[decision.group_id] = OpenedGroup(
            self._stream.visit(decision.prompt_id, self.shaping)
        )
        self.tally.groups["opened"] += 1

    def _launch(self, decision: ev.Launch) -> None:
        engine, group = self._changing(decision.engine_id), self._groups[decision.group_id]
        prompt_tokens = self.config.lengths.prompt_tokens
        if decision.continues is None:
            draw = group.responses.next()
            rollout = SimRollout(
                decision.rollout_id,
                decision.group_id,
                engine,
                draw.length,
                draw.truncated,
                draw.reward,
                engine.version,
                prompt_tokens,
            )
        else:
            before = group.rollouts.pop(decision.continues)
            rollout = SimRollout(
                decision.rollout_id,
                decision.group_id,
                engine,
                before.length,
                before.truncated,
                before.reward,
                before.oldest_version,
                prompt_tokens,
                before.tokens,
            )
        group.rollouts[rollout.rollout_id] = self._rollouts[rollout.rollout_id] = rollout
        if not engine.admit(rollout):
            return
        to_read = rollout.tokens + (
            0 if engine.engine_id in group.prompt_read_by else prompt_tokens
        )
        group.prompt_read_by.add(engine.engine_id)
        if to_read:
            engine.pause(to_read * self.config.engines.prefill_ms_per_token / 1e3)

    def _changing(self, engine_id: str) -> SimEngine:
        engine = self._engines[engine_id]
        engine.advance(self.now)
        self._dirty[engine_id] = engine
        return engine

    def _engine_due(self, engine: SimEngine, serial: int) -> None:
        if serial != engine.serial:
            return
        engine.arrive(self.now)
        self._dirty[engine.engine_id] = engine
        for rollout in engine.finished():
            self._finish(rollout)
        if engine.report_due() and self.config.learner.streaming:
            for rollout in list(engine.decoding.values()):
                tokens = rollout.sampled()
                if tokens and rollout.rollout_id not in self._cancelled:
                    self._send(ev.RolloutProgressed(rollout.rollout_id, tokens))

    def _finish(self, rollout: SimRollout) -> None:
        del self._rollouts[rollout.rollout_id]
        self._cancelled.discard(rollout.rollout_id)
        self._send(
            ev.RolloutFinished(
                rollout.rollout_id,
                rollout.length,
                rollout.truncated,
                rollout.reward,
                rollout.oldest_version,
            )
        )

    def _stop(self, rollout_id: int) -> None:
        rollout = self._rollouts.pop(rollout_id, None)
        if rollout is None:
            return  # it finished first
        self._cancelled.discard(rollout_id)
        engine = self._changing(rollout.engine.engine_id)
        engine.remove(rollout)
        self._send(ev.RolloutStopped(rollout_id, rollout.tokens))

    def _curtail(self, rollout_id: int) -> None:
        """It ends where it is, without an answer."""
        rollout = self._rollouts.get(rollout_id)
        if rollout is None or rollout_id in self._cancelled:
            return
        engine = self._changing(rollout.engine.engine_id)
        engine.remove(rollout)
        rollout.length, rollout.truncated, rollout.reward = rollout.tokens, True, 0.0
        self._finish(rollout)

    def _report_latency(self, engine: SimEngine) -> None:
        batch = len(engine.decoding)
        if batch:
            self._send(
                ev.LatencyReported(engine.engine_id, float(batch), 1e3 * engine.ptl_s[batch])
            )
        self._at(self.now + self.config.engines.latency_every_s, self._report_latency, engine)

    def _swap(self, engine: SimEngine, version: int) -> None:
        if version <= engine.version:
            return
        engine = self._changing(engine.engine_id)
        engine.version = version
        engine.pause(self.config.weights.swap_s)
        self._send(ev.PolicyLoaded(engine.engine_id, version))

    # Learner
    # ----------------------------------------------------------------------------------------------

    def _request(self) -> None:
        self._requested_s = self.now
        self._send(ev.ShardsRequested(self._step, self._num_portions))

    def _ship(self, ship: ev.Ship) -> None:
        group = self._groups[ship.record.group_id]
        if isinstance(self.scheduler, Core):
            self.tally.compare_offline(ship.record, self._offline_draws(ship.record, group))
        self._portion.append(ship.record)

    def _train_portion(self) -> None:
        """The learner works on the groups that it was shipped, and updates after the last ones."""
        portion, self._portion = self._portion, []
        self._shipped += portion
        self._num_portions += 1
        self._waited_s += self.now - self._requested_s
        keys, per_ms = self.config.learner, 1e-3 / self.config.learner.num_gpus
        trained = [
            r.tokens for record in portion for r in record.rollouts if r.end.startswith("selected")
        ]
        tokens = sum(trained) + len(trained) * self.config.lengths.prompt_tokens
        preparing = 0.0 if keys.streaming else keys.prepare_ms_per_token * tokens * per_ms
        is_last = len(self._shipped) == self.config.batch.groups
        fixed_s = keys.fixed_s if is_last else 0.0
        self._at(
            self.now + preparing + fixed_s + keys.ms_per_token * tokens * per_ms,
            self._trained if is_last else self._request,
        )

    def _offline_draws(self, record: ev.GroupRecord, group: OpenedGroup) -> list[Any]:
        """The responses of the group's whole budget, launched or not."""
        while len(group.responses.draws) < record.budget:
            group.responses.next()
        return group.responses.draws

    def _trained(self) -> None:
        records, self._shipped, self._num_portions = self._shipped, [], 0
        lessons: list[tuple[SimPrompt, list[int], list[int]]] = []
        for record in records:
            group = self._groups[record.group_id]
            self._send(ev.GroupTrained(record.group_id))
            drawn = [draw.length for draw in group.responses.draws[: record.budget]]
            lessons.append(
                (
                    group.responses.prompt,
                    drawn,
                    [r.tokens for r in record.rollouts if r.end.startswith("selected")],
                )
            )
        self.shaping.learn(lessons)
        self._record_step(records)
        self._step += 1
        if self._step % self.config.weights.publish_every == 0:
            self._at(self.now + self.config.weights.publish_s, self._publish)
        else:
            self._request()

    def _publish(self) -> None:
        self._version += 1
        self._send(ev.PolicyPublished(self._version))
        for engine in self._engines.values():
            self._at(self.now + self.config.weights.fetch_s, self._swap, engine, self._version)
        self._request()

    def _close(self, record: ev.GroupRecord) -> None:
        self.tally.closed(record)
        del self._groups[record.group_id]
        if self._files is not None:
            self._files.group(record, self._step)

    def _record_step(self, records: list[ev.GroupRecord]) -> None:
        for engine in self._engines.values():
            engine.advance(self.now)
        before_s, occupied_before = self._at_last_row
        occupied = sum(engine.occupied_slot_s for engine in self._engines.values())
        took_s = self.now - before_s
        slots = self.config.engines.num_engines * self.config.engines.slots
        row = {
            "step": self._step,
            "time_s": self.now,
            "step_s": took_s,
            "policy_version": self._version,
            **self.tally.row(records),
            "wait/learner_s": self._waited_s,
            "wait/learner_frac": self._waited_s / took_s,
            "engine/busy_frac": (occupied - occupied_before) / (slots * took_s),
            "engine/preemptions": sum(engine.num_preemptions for engine in self._engines.values()),
        }
        self._at_last_row, self._waited_s = (self.now, occupied), 0.0
        self.rows.append(row)
        if self._files is not None:
            self._files.metrics(row)


def simulate(config: SimulateConfig, files: Files | None = None) -> Row:
    """Run one simulation and return the comparison table's row.

    Raises `ValueError` if the configuration cannot be simulated.
    """
    return Simulation(config, files).run()


def report(summary: Row) -> str:
    """The summary as lines for people."""
    lines: list[str] = []
    for name, value in summary.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in cast("dict[str, Any]", value).items())
            if isinstance(value, dict)
            else f"{value:,.4g}"
        )
        lines.append(f"{name:<18}{f'{value:,}' if isinstance(value, int) else shown}")
    return "\n".join(lines)
