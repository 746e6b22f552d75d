"""The results of a simulated run: metrics, the selection ledger, and the offline comparison.

The files have the names and keys of a real run's, so that reports, monitors and comparisons read
both. Everything but `Files` is pure. Driven by `darts.simulate`. Lengths and tokens count sampled
tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts.events import GroupRecord
from darts.selection import Candidate, select_dual_end
from darts.simulate.lengths import Draw
from darts.step_row import ledger_row, step_row

Row = dict[str, Any]


class Tally:
    """Running sums over closed groups. Tokens of a group are counted once, when it closes."""

    def __init__(self, group_size: int, num_long: int) -> None:
        self._group_size, self._num_long = group_size, num_long
        self.tokens: Counter[str] = Counter(generated=0, trained=0, discarded=0, cancelled=0)
        self.groups: Counter[str] = Counter(
            opened=0, shipped=0, filled=0, uniform=0, stopped=0, dropped=0
        )
        self.lags: Counter[int] = Counter()
        self._num_uniform = self._num_stopped = 0  # replaced since the last row
        self.selected_lengths: list[int] = []
        self.num_compared = self.num_short_wrong = self.num_long_wrong = 0

    def closed(self, record: GroupRecord) -> None:
        for rollout in record.rollouts:
            selected = rollout.end.startswith("selected")
            use = (
                "trained"
                if selected
                else "cancelled"
                if rollout.end == "cancelled"
                else "discarded"
            )
            self.tokens["generated"] += rollout.tokens + rollout.overshoot
            self.tokens[use] += rollout.tokens
            self.tokens["cancelled"] += rollout.overshoot
            if selected:
                self.lags[record.shipped_version - rollout.oldest_version] += 1
                self.selected_lengths.append(rollout.tokens)
        self.groups["shipped" if record.end == "shipped" else "dropped"] += 1
        self.groups["uniform"] += record.uniform
        self.groups["stopped"] += record.end == "no_signal"
        self._num_uniform += record.end == "uniform"
        self._num_stopped += record.end == "no_signal"
        self.groups["filled"] += any(
            r.truncated and r.end.startswith("selected") for r in record.rollouts
        )

    def count_overshoot(self, num_tokens: int) -> None:
        """Count tokens that a rollout of a closed group decoded before its cancel arrived."""
        self.tokens["generated"] += num_tokens
        self.tokens["cancelled"] += num_tokens

    def compare_offline(self, record: GroupRecord, draws: Sequence[Draw]) -> None:
        """Compare with the selection that would follow if every response had run to its end.

        Seats are compared as lengths, so that ties make no difference.
        """
        ids = [Candidate(draw.length, index) for index, draw in enumerate(draws)]
        finished = [c for c in ids if not draws[c.rollout_id].truncated]
        truncated = [c for c in ids if draws[c.rollout_id].truncated]
        num_long = 0 if record.long_end == "none" else self._num_long
        ideal = select_dual_end(
            finished, truncated, self._group_size, num_long, fill_truncated=True
        )
        if ideal is None or ideal.filled:
            return
        self.num_compared += 1
        self.num_short_wrong += sorted(draws[i].length for i in ideal.short) != _seats(
            record, "selected_short"
        )
        self.num_long_wrong += sorted(draws[i].length for i in ideal.long) != _seats(
            record, "selected_long"
        )

    def summary(self, rows: Sequence[Row]) -> Row:
        """The comparison table's row, given the run's metrics.

        `step_s` leaves out the first step, which starts from empty engines. All other values are of
        the whole run. Lengths and lags are those of every trained trajectory.
        """
        selected, compared = np.array(self.selected_lengths), max(1, self.num_compared)
        total_s = rows[-1]["time_s"]
        return {
            "step_s": (total_s - rows[0]["time_s"]) / max(1, len(rows) - 1),
            **{f"tokens/{name}": count for name, count in self.tokens.items()},
            "busy_frac": sum(row["engine/busy_frac"] * row["step_s"] for row in rows) / total_s,
            "wait_frac": sum(row["wait/learner_s"] for row in rows) / total_s,
            "lag_mean": sum(lag * count for lag, count in self.lags.items()) / self.lags.total(),
            "lag_max": max(self.lags),
            "length_mean": float(selected.mean()),
            "length_p50": float(np.percentile(selected, 50)),
            "length_p99": float(np.percentile(selected, 99)),
            "reward": float(np.mean([row["reward/mean"] for row in rows])),
            "budget": float(np.mean([row["darts/budget_mean"] for row in rows])),
            "pruned_frac": float(np.mean([row["darts/pruned_frac"] for row in rows])),
            "short_wrong_frac": self.num_short_wrong / compared,
            "long_wrong_frac": self.num_long_wrong / compared,
            "groups": dict(self.groups),
            "virtual_s": total_s,
            "preemptions": rows[-1]["engine/preemptions"],
        }

    def row(self, records: Sequence[GroupRecord]) -> Row:
        """The row of `metrics.jsonl` for the step that trained `records`."""
        replaced = self._num_uniform, self._num_stopped
        self._num_uniform = self._num_stopped = 0
        tokens = {f"tokens/{name}": count for name, count in self.tokens.items()}
        return step_row(records, *replaced) | tokens


class Files:
    """A run's folder, written during the simulation. A folder that holds a run is refused."""

    def __init__(self, folder: Path, config_yaml: str) -> None:
        if (folder / "config.yaml").exists():
            raise ValueError(
                f"run.out={folder}: this folder holds a run already; choose another, or remove it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config_yaml)
        self._metrics = (folder / "metrics.jsonl").open("w")
        self._groups = (folder / "groups.jsonl").open("w")

    def metrics(self, row: Row) -> None:
        self._metrics.write(json.dumps(row) + "\n")

    def group(self, record: GroupRecord, step: int) -> None:
        self._groups.write(json.dumps(ledger_row(record, step)) + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._groups.close()


def _seats(record: GroupRecord, end: str) -> list[int]:
    return sorted(r.tokens for r in record.rollouts if r.end == end)
