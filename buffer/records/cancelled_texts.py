"""The texts of some cancelled responses, for `samples.jsonl`.

Owns their bound: `NUM_KEPT` of each training group, until the group is trained or dropped. They are
in memory only, so a restart of the buffer loses those of groups that were outstanding. Driven by
`buffer.engine_side` and `buffer.run_state`.
"""

from __future__ import annotations

from darts.events import GroupRecord
from darts.state.groups import GroupState, Rollout, RolloutState

NUM_KEPT = 2  # per group, the first to stop


class CancelledTexts:
    def __init__(self) -> None:
        self._of_group: dict[int, dict[int, str]] = {}  # group -> rollout -> text

    def keep(self, rollout: Rollout, text: str) -> None:
        """Keep the text of a rollout that has stopped, if its group can still be sampled."""
        group = rollout.group
        if (
            text
            and rollout.state is RolloutState.CANCELLED
            and group.purpose == "train"
            and group.state is not GroupState.CLOSED
        ):
            texts = self._of_group.setdefault(group.group_id, {})
            if len(texts) < NUM_KEPT:
                texts[rollout.rollout_id] = text

    def of(self, record: GroupRecord) -> dict[int, str]:
        """Rollout -> text."""
        return self._of_group.get(record.group_id, {})

    def forget(self, record: GroupRecord) -> None:
        self._of_group.pop(record.group_id, None)

    def __len__(self) -> int:
        return sum(map(len, self._of_group.values()))
