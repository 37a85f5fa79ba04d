"""The life of a daemon: event loop, signals, drain, exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from microserve.runtime.errors import CheckpointError, ConfigError, MicroserveError
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import FrameType

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
"""The operator must change something: a restart alone does not help."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Lifecycle:
    """What a service's main is given: when to finish.

    `draining` is set by the first SIGTERM or SIGINT: refuse what is new, finish what runs, return.
    A second signal ends the process at once, whatever it is doing.
    """

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.reason = ""

    def drain(self, reason: str) -> None:
        """Begin to drain, as a signal does. Idempotent; on the event loop only."""
        if not self.draining.is_set():
            self.reason = reason
            self.draining.set()

    async def wait_drained(self, work: Awaitable[object], timeout: float) -> bool:
        """Wait for `work` (what runs) for at most `timeout` seconds. Whether it finished."""
        try:
            await asyncio.wait_for(asyncio.ensure_future(work), timeout)
        except TimeoutError:
            return False
        return True


def run_service(main: Callable[[Lifecycle], Awaitable[None]], *, name: str = "microserve") -> int:
    """Run `main` on a fresh event loop until it returns; the exit code for `sys.exit`.

    0: it returned (after a drain, usually). 2: wrong configuration or checkpoint. 1: anything else.
    An expected error (`MicroserveError`, a port in use) is told in one line; a bug, with its traceback.
    A second signal ends the process with 128 plus the signal's number.
    """
    try:
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(_supervised(main))
    except (ConfigError, CheckpointError) as error:
        _tell(name, error.message)
        return EXIT_CONFIG
    except MicroserveError as error:
        _tell(name, error.message)
        return EXIT_FAILED
    except OSError as error:
        _tell(name, str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        # The last line of defence of a process: a bug is shown whole, and the supervisor sees a failure.
        traceback.print_exc()
        _tell(name, "internal error (the traceback above is a bug)")
        return EXIT_FAILED
    return EXIT_OK


async def _supervised(main: Callable[[Lifecycle], Awaitable[None]]) -> None:
    lifecycle = Lifecycle()
    with _signals(lifecycle, asyncio.get_running_loop()):
        await main(lifecycle)


@contextmanager
def _signals(lifecycle: Lifecycle, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Plain signal handlers, not the loop's: the second signal must work while the loop is blocked."""
    log = get_logger(__name__)
    received = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 1:
            os._exit(128 + number)
        name = signal.Signals(number).name
        loop.call_soon_threadsafe(lifecycle.drain, name)
        loop.call_soon_threadsafe(lambda: log.info("draining", signal=name))

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _tell(name: str, message: str) -> None:
    print(f"{name}: error: {message}", file=sys.stderr, flush=True)
