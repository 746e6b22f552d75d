"""One line of a check: its verdict, its subject and its result. Printed by `tools.check` and
`tools.doctor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "warning", "error"]
WIDTHS = (7, 12)  # of the verdict and the subject


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    verdict: "note" is worth knowing; "warning" is almost certainly a mistake, but a run would work;
    "error" is something with which no run can work.
    """

    verdict: Verdict
    subject: str
    result: str

    def __str__(self) -> str:
        return f"  {self.verdict:<{WIDTHS[0]}} {self.subject:<{WIDTHS[1]}} {self.result}"

    @property
    def good(self) -> bool:
        return self.verdict in ("ok", "note")
