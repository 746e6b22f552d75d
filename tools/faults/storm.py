"""Applies a schedule of faults to the processes, connections and disk of a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.faults.proxy import Proxy
from tools.faults.schedule import BYTES_PER_S, DELAY_S, Fault
from tools.faults.small_disk import SmallDisk

Action = Callable[[], Any]


class Storm:
    """`pid` finds the process of a name, and `say` keeps a line with its time."""

    def __init__(
        self,
        faults: Sequence[Fault],
        proxies: Mapping[str, Proxy],
        disk: SmallDisk | None,
        pid: Callable[[str], int | None],
        say: Callable[[str], None],
    ) -> None:
        self._proxies, self._disk, self._pid, self._say = proxies, disk, pid, say
        self._waiting = list(faults)
        self._due: list[tuple[float, Action]] = []
        self._stopped: set[str] = set()

    def turn(self, step: int) -> None:
        """Apply the faults that are due after `step` steps. Call it often."""
        now = time.monotonic()
        while self._waiting and self._waiting[0].step <= step:
            self._due += self._actions(self._waiting.pop(0), now)
        self._due.sort(key=lambda due: due[0])
        while self._due and self._due[0][0] <= now:
            self._due.pop(0)[1]()

    def end(self) -> None:
        """End every fault that lasts, except that of the disk."""
        self._due.clear()
        for proxy in self._proxies.values():
            proxy.shape()
        for name in sorted(self._stopped):
            self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: signal.Signals) -> None:
        if number == signal.SIGSTOP:
            self._stopped.add(name)
        elif number == signal.SIGCONT:
            self._stopped.discard(name)
        pid = self._pid(name)
        if pid is None:
            self._say(f"{name} does not run, so it gets no {number.name}")
            return
        self._say(f"{number.name} to {name} (pid {pid})")
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            self._say(f"{name} has just ended")

    def _actions(self, fault: Fault, now: float) -> list[tuple[float, Action]]:
        """The start of a fault, and its end `seconds` later."""
        target, at = fault.target, now + fault.delay_s
        over = at + fault.seconds
        if fault.kind == "kill":
            return [(at, lambda: self._signal(target, signal.SIGKILL))]
        if fault.kind == "stop":
            return [
                (at, lambda: self._signal(target, signal.SIGSTOP)),
                (over, lambda: self._signal(target, signal.SIGCONT)),
            ]
        say = (at, lambda: self._say(f"{fault}"))
        if fault.kind == "full":
            assert self._disk is not None
            return [say, (at, self._disk.fill), (over, self._disk.free)]
        proxy = self._proxies[target]
        begin: dict[str, Action] = {
            "reset": proxy.reset,
            "cut": lambda: proxy.cut(fault.seconds),
            "delay": lambda: proxy.shape(delay_s=DELAY_S),
            "slow": lambda: proxy.shape(bytes_per_s=BYTES_PER_S),
        }
        actions: list[tuple[float, Action]] = [say, (at, begin[fault.kind])]
        return [*actions, (over, proxy.shape)] if fault.kind in ("delay", "slow") else actions
