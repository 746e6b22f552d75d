"""`python -m buffer.processes.janitor FOLDER GRACE_S`: cleans up after a supervisor.

Waits until its standard input closes, which happens however the supervisor ends. Then it ends the
processes of the folder, and removes the folder and the shared memory of those processes. Owns no
process. Started by `buffer.processes.private_folder`.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

from buffer.processes.descendants import kill_processes_of, processes_of
from buffer.processes.shared_memory import SharedMemory

LOOK_S = 0.25
AT_ONCE = b"!"  # sent by a supervisor that has ended its children


def main(folder: Path, grace_s: float) -> None:
    """Processes whose supervisor was killed have `grace_s` to end, as the kernel told them to."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    shared_memory = SharedMemory(folder)
    while not select.select([0], [], [], LOOK_S)[0]:
        shared_memory.look()
    deadline = time.monotonic() + (0.0 if os.read(0, 1) == AT_ONCE else grace_s)
    while time.monotonic() < deadline and processes_of(folder):
        shared_memory.look()
        time.sleep(LOOK_S)
    kill_processes_of(folder)
    shared_memory.look()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
