"""The worker's side of a verifier,
`actors.verifier_process VERIFIER REQUESTS REPLIES MEMORY_MB FOLDER`.

It is two processes. The guard runs none of the user's code: it adopts every process that the
verifier leaves behind, and ends them all when the verifier or the engine has ended. The other one
answers requests, one JSON line each, with a reward or an error, and an observation if the
environment has turns. Environments that have to be closed are in FOLDER while they are open; if
there may be any, a worker that is to end is first stopped by a signal, and closes the one that it
holds, or all if the engine has ended. Started by `actors.verifier_workers`, whose end closes the
guard's standard input.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import math
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from actors.open_environments import OpenEnvironments
from actors.turns import Turns, settled
from buffer.processes.descendants import CLOSE_S, KILL_S
from configs.errors import one_line

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ALONE = b"."  # written to the guard if only its own worker is to end, and not the engine
STOP, STOP_ALL = signal.SIGTERM, signal.SIGUSR1
set_handler = signal.signal  # a verifier may replace it
TICK_S = 2.0  # between looks for processes that the verifier has left to the guard


def main(argv: list[str]) -> NoReturn:
    name, requests, replies, memory_mb = argv[0], int(argv[1]), int(argv[2]), int(argv[3])
    opened = OpenEnvironments(Path(argv[4]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if pid == 0:
        _answer(name, requests, replies, memory_mb, opened)
    os.close(requests)
    os.close(replies)
    status = _guard(pid, opened)
    os._exit(128 - status if status < 0 else status)


# The guard ----------------------------------------------------------------------------------------


def _guard(pid: int, opened: OpenEnvironments) -> int:
    """Wait until process `pid` or the engine has ended, then end every process that is left.

    If environments have to be closed, process `pid` is stopped first, and has some time for that.

    Returns the status of `pid`.
    """
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told to the whole group; ours is the pipe
    poller = select.poll()
    poller.register(0, select.POLLHUP)
    poller.register(wake, select.POLLIN)
    tick_s, close_by = TICK_S, math.inf
    while True:
        ready = dict(poller.poll(tick_s * 1000))
        if wake in ready:
            os.read(wake, 4096)
        status = _reap().get(pid)
        if 0 in ready and status is None and close_by == math.inf and opened.exists:
            poller.unregister(0)
            os.kill(pid, STOP if os.read(0, 1) == ALONE else STOP_ALL)
            tick_s, close_by = TICK_S / 20, time.monotonic() + CLOSE_S
        elif status is not None or 0 in ready or time.monotonic() > close_by:
            break
        kill_all(set(children_of(os.getpid())) - {pid})
    deadline = time.monotonic() + KILL_S
    while (left := children_of(os.getpid())) and time.monotonic() < deadline:
        kill_all(left)
        status = _reap().get(pid, status)
        time.sleep(0.002)
    return status or 0


def _reap() -> dict[int, int]:
    """The statuses of all children that have ended."""
    ended = {}
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return ended
            ended[pid] = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        return ended


def children_of(parent: int) -> list[int]:
    """Its children, those included that have ended and were not reaped."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text(errors="replace")
            except OSError:
                continue  # it has ended meanwhile
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(name))
    return found


def kill_all(pids: Any) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


# The verifier -------------------------------------------------------------------------------------


class Stopped(BaseException):
    """This process is to end, and interrupts the user's code."""


class Stop:
    """asked: the signal that asked this process to end, 0 if none has."""

    asked = 0

    def listen(self) -> None:
        """Again before every request, since a verifier may set handlers of its own."""
        for number in (STOP, STOP_ALL):
            set_handler(number, self._stop)

    def _stop(self, number: int, _frame: object) -> NoReturn:
        self.asked = number
        for each in (STOP, STOP_ALL):
            set_handler(each, signal.SIG_IGN)
        raise Stopped


def _answer(
    name: str, requests: int, replies: int, memory_mb: int, opened: OpenEnvironments
) -> NoReturn:
    """Says {} when ready, then answers each request. Ends when the requests do."""
    os.setpgid(0, 0)  # a verifier that kills its group must not kill the guard
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for pipe in (requests, replies):
        os.set_inheritable(pipe, False)
    _limit(resource.RLIMIT_CORE, 0)
    if memory_mb:
        _limit(resource.RLIMIT_AS, memory_mb << 20)
    verify = _load(name, replies)
    has_turns, has_close = isinstance(verify, Turns), getattr(verify, "has_close", False)
    stop = Stop()
    if has_close:
        opened.create()
        verify.opened = opened
        stop.listen()
    about = {"has_turns": has_turns, "has_finish": has_turns and verify.has_finish}
    try:
        _reply(replies, {**about, "has_close": has_close})
        _answer_requests(verify, requests, replies, stop)
    except Stopped:
        pass  # while it waited for a request
    if has_close:
        if has_turns and stop.asked == STOP_ALL:
            verify.close_all()
        atexit._run_exitfuncs()  # an environment may have more to close than its rollouts
    os._exit(0)


def _answer_requests(verify: Any, requests: int, replies: int, stop: Stop) -> None:
    own = os.getpid()
    helpers = set(_living_children())  # started at import, so they may stay
    with os.fdopen(requests) as lines:
        for line in lines:
            if getattr(verify, "has_close", False):
                stop.listen()
            reply = _verified(verify, json.loads(line))
            if os.getpid() != own:
                os._exit(0)  # a copy of us, made by the verifier: the original answers
            if stop.asked:
                break
            kill_all(set(_living_children()) - helpers)
            _reply(replies, reply)
            if "lost" in reply:
                break


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _load(name: str, replies: int) -> Any:
    try:
        from actors.verifiers import load_verifier

        return load_verifier(name)
    except BaseException as error:  # whatever a user's module raises, SystemExit included
        _reply(replies, {"error": _described(error)})
        os._exit(1)


def _verified(verify: Any, request: list[Any]) -> dict[str, Any]:
    from actors.verifiers import BadReward, finite

    try:
        prompt, response, answer, metadata, state, key = request
        if not isinstance(verify, Turns):
            return {"reward": finite(settled(verify(prompt, response, answer, metadata)))}
        if response is None and not state:
            verify.close(key)
            return {"reward": 0.0}
        if response is None:
            return {"reward": finite(verify.finish(state))}
        row = {"prompt": prompt, "answer": answer, "metadata": metadata}
        reward, observation, state = verify.step(row, state, response, key)
        return {"reward": finite(reward), "observation": observation, "state": state}
    except BadReward as error:
        return {"error": str(error)}
    except BaseException as error:  # whatever a user's code raises, KeyboardInterrupt included
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return {"error": "ran out of memory (data.verifier_memory_mb)", "lost": True}
        return {"error": f"raised {_described(error)}"}


def _described(error: BaseException) -> str:
    try:
        return one_line(error, with_type=True)
    except BaseException:  # its own text raises
        return type(error).__name__


def _living_children() -> list[int]:
    """Processes that this one has started; those that have ended are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return []  # as a rule, so this costs nothing
    return children_of(os.getpid())


def _reply(replies: int, reply: dict[str, Any]) -> None:
    os.write(replies, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
