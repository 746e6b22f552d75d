"""Hostile peers of a buffer, which send anything: strangers, joined engines and learner ranks.

Frames are random bytes, messages with drawn fields, mutations of those, repetitions of earlier
frames, and a few that are too large. Some honest messages are left out because they end a run by
design: a learner that takes over explicitly, and a probe that differs. A hostile engine also sends
no tokens for rollouts of its own, which it may sample as it likes.
"""

from __future__ import annotations

import random
import re
import threading
import types
import typing
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from buffer.wire import messages as msg
from buffer.wire.keys import secure_client
from buffer.wire.limits import MESSAGE_BYTES
from buffer.wire.transport import decoder, encode
from tools.faults.cluster import Cluster
from tools.faults.flooding import Flood
from tools.faults.host import LoggedProcess
from tools.faults.sampled import VOCAB_SIZE
from tools.launching.supervision import Run

INTEGERS = (-(2**63), -(2**31), -5, -1, 0, 1, 2, 7, 8, 100, 10**6, 2**31, 2**53, 2**63 - 1)
FLOATS = (0.0, 1.0, -1.0, 1e9, -1e300, float("inf"), float("nan"))
KINDS: tuple[type[msg.Message], ...] = typing.get_args(msg.Inbound)
LEFT_OUT = (msg.Probed,)
FRAMES_PER_SESSION = 25
NUM_REPEATED = 200
OVERSIZED_EVERY = 50_000
WELCOME_MS = 300
SEND_MS = 300  # after which a connection that takes nothing is replaced
MAX_GROWTH = 50 << 20


class Fuzzer(threading.Thread):
    """Sends `num_frames` frames to the buffer at `address`, drawn from `seed`.

    `keys`: the run's, or "" if it has none. Strangers hold no key.
    """

    def __init__(self, address: str, keys: str, num_frames: int, seed: int) -> None:
        super().__init__(daemon=True, name="fuzzer")
        self.address, self.keys, self.num_frames = address, keys, num_frames
        self.sent: Counter[str] = Counter()
        self.over = threading.Event()  # set it to end early
        self._rng = random.Random(f"fuzz {seed}")
        self._old: deque[bytes] = deque(maxlen=NUM_REPEATED)
        self._own: set[int] = set()
        self._session = 0

    def run(self) -> None:
        sessions: list[Callable[[zmq.Socket[bytes]], str]] = [
            self._stranger, self._engine, self._learner,
        ]  # fmt: skip
        with zmq.Context() as context:
            while self.sent.total() < self.num_frames and not self.over.is_set():
                self._session += 1
                with context.socket(zmq.DEALER) as socket:
                    socket.linger = 200
                    socket.sndtimeo = SEND_MS
                    who = self._rng.choice(sessions)(socket)
                    try:
                        self._flood(socket, who)
                    except zmq.Again:
                        continue  # the buffer has closed this connection

    def _stranger(self, socket: zmq.Socket[bytes]) -> str:
        socket.connect(self.address)
        return "strangers"

    def _engine(self, socket: zmq.Socket[bytes]) -> str:
        """Joins in good form, mostly; without a policy, nothing is launched on it."""
        hello = msg.EngineHello(
            engine_id=f"fuzz/{self._rng.randrange(3)}", engine_type="fuzz", slots=1,
            policy_version=-1, pid=1, incarnation=str(self._session),
        )  # fmt: skip
        return self._greet(socket, hello, "engine")

    def _learner(self, socket: zmq.Socket[bytes]) -> str:
        """A rank of no learner that trains here."""
        hello = msg.LearnerHello(
            rank=self._rng.randrange(3), num_ranks=4, step=self._rng.choice(INTEGERS), pid=1,
            vocab_size=VOCAB_SIZE, incarnation=str(self._session), resumed=self._rng.random() < 0.5,
        )  # fmt: skip
        return self._greet(socket, hello, "learner")

    def _greet(self, socket: zmq.Socket[bytes], hello: msg.Message, role: msg.Role) -> str:
        secure_client(socket, self.keys, role, "buffer")
        socket.connect(self.address)
        socket.send(encode(hello))
        self.sent["hellos"] += 1
        if socket.poll(WELCOME_MS):
            self._listen(socket)
        return f"{role}s"

    def _flood(self, socket: zmq.Socket[bytes], who: str) -> None:
        for _ in range(FRAMES_PER_SESSION * (20 if who == "strangers" else 1)):
            self._listen(socket)
            frame = self._frame()
            socket.send(frame)
            self._old.append(frame) if len(frame) < 1 << 16 else None
            self.sent[who] += 1

    def _listen(self, socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            command = decoder(msg.Outbound).decode(socket.recv())
            if isinstance(command, msg.Launch):
                self._own |= {rollout.rollout_id for rollout in command.rollouts}

    # Frames ---------------------------------------------------------------------------------------

    def _frame(self) -> bytes:
        rng = self._rng
        if rng.randrange(OVERSIZED_EVERY) == 0:
            return bytes(MESSAGE_BYTES + rng.choice((-100, 1, 10**6)))
        kind = rng.random()
        if kind < 0.2:
            return rng.randbytes(rng.choice((0, 1, 3, 20, 300, 5000)))
        if kind < 0.3 and self._old:
            return rng.choice(self._old)
        message = self._message()
        return self._mutated(encode(message)) if kind < 0.6 else encode(message)

    def _mutated(self, frame: bytes) -> bytes:
        changed = bytearray(frame)
        for _ in range(self._rng.randint(1, 4)):
            place = self._rng.randrange(len(changed))
            change = self._rng.randrange(3)
            if change == 0:
                changed[place] ^= 1 << self._rng.randrange(8)
            elif change == 1:
                del changed[place:]
                changed += self._rng.randbytes(3)
            else:
                changed[place:place] = changed[: self._rng.randrange(40)]
        try:
            decoded = decoder(msg.Inbound).decode(bytes(changed))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return bytes(changed)
        return bytes(changed) if self._may_say(decoded) else frame[:-1]

    def _message(self) -> msg.Message:
        while True:
            kind = self._rng.choice(KINDS)
            message = kind(**{f.name: self._value(f) for f in msgspec.structs.fields(kind)})
            if self._may_say(message):
                return message

    def _may_say(self, message: msg.Message) -> bool:
        if isinstance(message, LEFT_OUT):
            return False
        if isinstance(message, msg.LearnerHello):
            return not message.take_over
        ids = [chunk.rollout_id for chunk in getattr(message, "chunks", ())]
        ids.append(getattr(message, "rollout_id", -1))
        return not self._own & set(ids)

    def _value(self, described: msgspec.structs.FieldInfo) -> Any:
        if described.name == "rollout_id":  # of an honest engine, as likely as not
            return self._rng.randrange(500)
        return self._of_type(described.type)

    def _of_type(self, kind: Any) -> Any:
        rng = self._rng
        kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is bool:
            return rng.random() < 0.5
        if kind is int:
            return rng.choice((*INTEGERS, rng.randrange(40)))
        if kind is float:
            return rng.choice(FLOATS)
        if kind is str:
            return rng.choice(("", "engine/0", "fuzz/9", "x" * 5000, "\n\x1b[2J", "learner/0"))
        if kind is bytes:
            return rng.randbytes(rng.choice((0, 1, 4, 8, 40, 4000)))
        if origin is list:
            return [self._of_type(arguments[0]) for _ in range(rng.choice((0, 1, 2, 30)))]
        if origin is dict:
            return {self._of_type(arguments[0]): self._of_type(arguments[1]) for _ in range(3)}
        if origin in (typing.Union, types.UnionType):
            return self._of_type(rng.choice(arguments))
        if kind is type(None):
            return None
        return kind(**{f.name: self._value(f) for f in msgspec.structs.fields(kind)})


class Attack:
    """A fuzzer beside a run, from its first step to the last frame, then a flood, and the buffer's
    memory.
    """

    def __init__(
        self,
        cluster: Cluster,
        num_frames: int,
        flood_s: float,
        seed: int,
        all_sent: Callable[[], None],
    ) -> None:
        address, keys = f"tcp://127.0.0.1:{cluster.port}", cluster.config.buffer.keys
        self._fuzzer = Fuzzer(address, keys, num_frames, seed)
        self._flood = Flood(address, keys, flood_s)
        self._record, self._all_sent = cluster.record, all_sent
        self._before = self._most = 0  # resident bytes

    def turn(self, run: Run) -> str:
        buffer = run.members[0].process
        assert isinstance(buffer, LoggedProcess)
        if self._fuzzer.ident is None:
            if self._record.exists():
                forget_peak(buffer.pid)
                self._before = resident_bytes(buffer.pid)
                self._fuzzer.start()
            return ""
        self._most = max(self._most, resident_bytes(buffer.pid))
        if self._fuzzer.is_alive() or self._flood.is_alive():
            return ""
        if self._flood.ident is None:
            self._flood.start()
        else:
            self._all_sent()
        return ""

    def end(self) -> None:
        for attack in (self._fuzzer, self._flood):
            attack.over.set()
            if attack.ident is not None:
                attack.join()

    def faults(self) -> list[str]:
        faults: list[str] = []
        if (grown := self._most - self._before) > MAX_GROWTH:
            faults.append(f"the buffer has grown by {grown >> 20} MiB at most")
        if self._fuzzer.sent.total() < self._fuzzer.num_frames or not self._flood.num_bytes:
            faults.append("the run ended before all was sent")
        return faults

    def __str__(self) -> str:
        sent = ", ".join(f"{count:,} from {who}" for who, count in self._fuzzer.sent.items())
        return (
            f"frames: {sent}, and a flood of {self._flood.num_bytes / 2**20:,.0f} MiB; "
            f"the buffer grew by {(self._most - self._before) / 2**20:.0f} MiB at most"
        )


def forget_peak(pid: int) -> None:
    """Have the kernel measure a process's peak of resident memory from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident_bytes(pid: int) -> int:
    """The peak of a process's resident memory, 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) << 10 if found else 0
