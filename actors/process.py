"""The process of one engine: joins the buffer, loads the model, serves the run, and tells its pool
how it ended.

Owns the process: its signals, its status, the one line that it leaves. Never restarts anything.
Started by `actors.pool` as `python -m actors.process`, and ends with it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import zlib
from typing import TYPE_CHECKING

from actors.environments import Environment, make_environment
from actors.inference.device import engine_type
from actors.inference.fetching import SnapshotReader
from actors.inference.generation import BASE_VERSION, EngineDied
from actors.inference.weights import SwapFailed
from actors.loop_watch import LoopWatch
from actors.worker import PolicyUnavailable, Worker
from buffer.processes import by_hand
from buffer.processes.child import ERROR
from buffer.wire.client import EngineLink
from buffer.wire.messages import EngineHello, Shutdown, Welcome
from buffer.wire.transport import TransportError
from configs import cli
from configs.errors import ExitStatus, one_line
from configs.schema import Config

if TYPE_CHECKING:
    from actors.inference.engine import Engine

# How this process ends, for its pool. GAVE_UP: another attempt would end the same way.
DONE, DIED, RUN_FAILED, GAVE_UP = 0, 1, 3, 4


def serve(config: Config, engine_id: str) -> int:
    """Run one worker; returns its status, having said why in one line unless it is `DONE`.

    It joins the buffer before it loads the model, so that a wrong address shows at once; with
    policy -1 nothing is launched on it.
    """
    link = EngineLink(
        config.buffer.address, engine_id, config.buffer.keys, config.buffer.peer_timeout_s
    )
    hello = EngineHello(
        engine_id=engine_id,
        engine_type=engine_type(config),
        slots=config.actors.slots,
        policy_version=BASE_VERSION,
        pid=os.getpid(),
        incarnation=secrets.token_hex(8),
    )
    environment = engine = None
    try:
        environment = make_environment(config)
        welcome = link.connect(hello, config.buffer.connect_timeout_s)
        joined = f"{engine_id} joined the run at {config.buffer.address}"
        by_hand.tell(f"actors: {joined}, and loads {config.model.path}")
        from actors.inference.engine import Engine  # seconds of import, and only now needed

        engine = Engine(config, random_stream(config.run.seed, hello))
        by_hand.tell(f"actors: {engine_id} serves, with up to {config.actors.slots} rollouts")
    except Exception as error:  # another attempt would end the same way
        fail(f"could not start: {one_line(error)}")
        return GAVE_UP
    else:
        try:
            shutdown = asyncio.run(
                _until_shutdown(config, hello, engine, link, environment, welcome)
            )
        except (
            TransportError,
            SwapFailed,
            PolicyUnavailable,
        ) as error:  # TransportError: and the buffer did not come back
            fail(one_line(error))
            return GAVE_UP
        except EngineDied as error:
            fail(one_line(error))
            return DIED
        if shutdown.error:
            fail(shutdown.error)
        if shutdown.restart:
            return DIED
        return RUN_FAILED if shutdown.error else DONE
    finally:
        link.close()
        if environment is not None:
            environment.close()
        if engine is not None:
            engine.close()


def random_stream(run_seed: int, hello: EngineHello) -> int:
    """The seed of one life of an engine. No other engine, and no later life, has the same."""
    return zlib.crc32(f"{run_seed} {hello.engine_id} {hello.incarnation}".encode()) >> 1


async def _until_shutdown(
    config: Config,
    hello: EngineHello,
    engine: Engine,
    link: EngineLink,
    environment: Environment,
    welcome: Welcome,
) -> Shutdown:
    task = asyncio.current_task()
    assert task is not None
    worker = Worker(config, engine, link, environment, SnapshotReader(config), hello=hello)

    def leave() -> None:
        task.cancel()
        worker.hand_over()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leave)
    limit_s = config.buffer.rollout_timeout_s
    blocked = f"its event loop was blocked for {limit_s:g} s (buffer.rollout_timeout_s)"
    with LoopWatch(limit_s, DIED, f"{ERROR}{blocked}"):
        return await worker.run(welcome)


def _stop_while_loading(number: int, frame: object) -> None:
    """Raising here could be swallowed, deep inside vLLM. The pool ends what vLLM has started."""
    os._exit(ExitStatus.INTERRUPTED)


def fail(line: str) -> None:
    """Say why this process ends, for its pool."""
    print(f"{ERROR}{line}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """`python -m actors.process INDEX CONFIG_FILE`."""
    index, config_file = argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool's to answer
    signal.signal(signal.SIGTERM, _stop_while_loading)
    config = cli.load(["--config", config_file])
    try:
        return serve(config, f"{config.actors.name}/{index}")
    except asyncio.CancelledError:
        return ExitStatus.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
