"""The life of a daemon: event loop, signals, drain, reload, the service manager's watchdog, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

from microserve.runtime.clock import monotonic
from microserve.runtime.errors import AddressError, CheckpointError, ConfigError, MicroserveError
from microserve.runtime.log import get_logger, last_words
from microserve.runtime.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from types import FrameType

T = TypeVar("T")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
"""The operator must change something: a restart alone does not help."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


STATUS_INTERVAL = 2.0
"""Seconds between status texts for the service manager."""
_MORE_TIME = 30.0
"""Seconds that a start-up asks for, again and again, while it moves."""
_TELL_START = 10.0
"""Seconds between lines in the log about a start-up that takes long."""
_SIGN_AGAIN = 1.0
"""Seconds until a sign of life that could not be sent is sent again."""
_LAST_TASKS = 2.0
"""Seconds that tasks get to end when they are cancelled at the end of a service."""
_STOP_SLACK = 15.0
"""Seconds that a service gets, above what its drain may take, to say goodbye and to end its threads."""


class Lifecycle:
    """What a service's main is given: when to finish, and whom to tell.

    `draining` is set by the first SIGTERM or SIGINT: refuse what is new, finish what runs, return.
    A second signal ends the process at once, whatever it is doing. SIGHUP calls `reload`.
    """

    def __init__(self, notifier: Notifier | None = None) -> None:
        self.draining = asyncio.Event()
        self.reason = ""
        self.notifier = notifier if notifier is not None else Notifier({})
        self.reload: Callable[[], None] | None = None
        """Reads the configuration again; None: this service cannot. Raises `ConfigError` and changes nothing then.
        Not called before `ready`: a SIGHUP that comes earlier waits for it."""
        self.drain_limit: Callable[[], float] | None = None
        """How many seconds a drain may take: the service manager is asked for them."""
        self.healthy: Callable[[], bool] = lambda: True
        """Asked before each sign of life for the watchdog: whether everything beside the event loop moves, too."""
        self._status: Callable[[], str] | None = None
        self._serving = False
        self._hung_up = False
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, work: Callable[[], T], look: Callable[[], str | None] = lambda: "starting") -> T | None:
        """What `work` returns: something that takes long, in a thread, so that signals and the event loop need not
        wait. None: told to end meanwhile. `look` as `starting` has it."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if opened.done():
                return
            if error is not None:
                opened.set_exception(error)
            else:
                opened.set_result(cast("T", result))

        def run() -> None:
            result: T | None = None
            failed: BaseException | None = None
            try:
                result = work()
            except BaseException as error:  # raised again by whoever waits
                failed = error
            # The loop is gone when the process was told to end meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, failed)

        # A daemon thread, and not the loop's pool: a process that is told to end does not wait for it.
        threading.Thread(target=run, name="service-open", daemon=True).start()
        draining = asyncio.create_task(self.draining.wait(), name="service drain")
        try:
            async with self.starting(look):
                await asyncio.wait((opened, draining), return_when=asyncio.FIRST_COMPLETED)
            return opened.result() if opened.done() else None
        finally:
            opened.cancel()
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)

    @asynccontextmanager
    async def starting(
        self, look: Callable[[], str | None], *, interval: float = STATUS_INTERVAL
    ) -> AsyncIterator[None]:
        """Around what takes long before `ready`: asks the service manager for more time every `interval` seconds.

        `look` says what is done now, or None when nothing moves any more: then nothing more is asked for, and the
        service manager ends it when its own patience does.
        """
        asking = asyncio.create_task(self._ask_for_time(look, interval), name="service start")
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def ready(self, status: Callable[[], str] | None = None) -> None:
        """The service serves from now on. `status` makes the line that `systemctl status` shows."""
        self._status = status
        self._serving = True
        self.notifier.ready(status() if status is not None else "")
        if status is not None and self.notifier.active:
            self._tasks.append(asyncio.create_task(self._tell_status(status), name="service status"))
        if self._hung_up:
            self.reload_now()

    def drain(self, reason: str) -> None:
        """Begin to drain, as a signal does. Idempotent; on the event loop only."""
        if not self.draining.is_set():
            self.reason = reason
            self.notifier.stopping(within=self.drain_limit() + _STOP_SLACK if self.drain_limit is not None else None)
            self.draining.set()

    async def wait_drained(self, work: Awaitable[object], timeout: float) -> bool:
        """Wait for `work` (what runs) for at most `timeout` seconds. Whether it finished."""
        try:
            async with asyncio.timeout(timeout):
                await work
        except TimeoutError:
            return False
        return True

    def start_watchdog(self) -> None:
        """Feed the service manager's watchdog, if it has one, from this event loop: a loop that hangs is restarted."""
        if self.notifier.watchdog_interval is not None:
            feeding = self._feed(self.notifier.watchdog_interval)
            self._tasks.append(asyncio.create_task(feeding, name="service watchdog"))

    async def close(self) -> None:
        """Ends what this started."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def reload_now(self) -> None:
        """What SIGHUP does. The service manager hears of its end, however it goes."""
        log = get_logger(__name__)
        if self.draining.is_set():
            log.warning("SIGHUP: nothing is reloaded while this service ends")
            return
        if not self._serving:
            self._hung_up = True
            return
        if self.reload is None:
            log.warning("SIGHUP: this service has nothing that can be reloaded")
            return
        self.notifier.reloading()
        try:
            self.reload()
        except ConfigError as error:
            log.error("the configuration was not reloaded; the old one stays", error=error.message)
        except Exception:  # a bug in reloading must not end what runs
            log.exception("the configuration was not reloaded: a bug")
        self.notifier.ready(self._status() if self._status is not None else "")

    async def _feed(self, interval: float) -> None:
        log = get_logger(__name__)
        while True:
            told = False
            try:
                # What was not sent is sent again soon: a busy manager must not take two lost signs for a hang.
                told = not self.healthy() or self.notifier.alive()
            except Exception:  # a bug in looking is no life, and must be told
                log.exception("whether this service is healthy cannot be said: a bug", every=60.0)
            await asyncio.sleep(interval if told else min(interval, _SIGN_AGAIN))

    async def _ask_for_time(self, look: Callable[[], str | None], interval: float) -> None:
        log, began, told = get_logger(__name__), monotonic(), monotonic()
        while not self.draining.is_set():
            doing, now = look(), monotonic()
            if doing is None:
                log.error("the start-up does not move", every=60.0, seconds=round(now - began))
            else:
                self.notifier.extend_start(_MORE_TIME, doing)
                if now - told >= _TELL_START:
                    told = now
                    log.info("starting", doing=doing, seconds=round(now - began))
            await asyncio.sleep(interval)

    async def _tell_status(self, status: Callable[[], str]) -> None:
        log = get_logger(__name__)
        while not self.draining.is_set():
            try:
                self.notifier.status(status())
            except Exception:  # a bug once must not leave an old status there for months
                log.exception("the status cannot be told: a bug", every=60.0)
            await asyncio.sleep(STATUS_INTERVAL)


def run_service(
    main: Callable[[Lifecycle], Awaitable[None]], *, name: str = "microserve", environ: Mapping[str, str] = os.environ
) -> int:
    """Run `main` on a fresh event loop until it returns; the exit code for `sys.exit`.

    0: it returned (after a drain, usually). 2: wrong configuration or checkpoint. 1: anything else.
    An expected error (`MicroserveError`, a port in use) is told in one line; a bug, with its traceback.
    A second signal ends the process with 128 plus the signal's number. A task that refuses to end, as a user's strategy
    may, is told and left behind: then this does not return, and ends the process itself.
    """
    if not faulthandler.is_enabled():
        # A watchdog ends a service that hangs with SIGABRT: where each thread was belongs in the log.
        faulthandler.enable()
    runner = asyncio.Runner(loop_factory=_new_loop)
    refusing: list[str] = []
    code = _exit_code(lambda: runner.run(_supervised(main, environ, refusing)), name)
    if refusing:
        get_logger(__name__).error("tasks that refuse to end are left behind", tasks=", ".join(refusing))
        # Closing the loop would wait for them, for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    runner.close()
    return code


def _exit_code(run: Callable[[], object], name: str) -> int:
    """Runs it, and tells why it failed if it did."""
    try:
        run()
    except AddressError as error:
        # Unlike what follows, this may pass: whoever restarts us should.
        last_words(name, error.message)
        return EXIT_FAILED
    except (ConfigError, CheckpointError) as error:
        last_words(name, error.message)
        return EXIT_CONFIG
    except MicroserveError as error:
        last_words(name, error.message)
        return EXIT_FAILED
    except OSError as error:
        last_words(name, str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        # The last line of defence of a process: a bug is shown whole, and the supervisor sees a failure.
        last_words(name, "internal error (the traceback above is a bug)", bug=True)
        return EXIT_FAILED
    return EXIT_OK


async def _supervised(
    main: Callable[[Lifecycle], Awaitable[None]], environ: Mapping[str, str], refusing: list[str]
) -> None:
    """Runs `main`, and ends every task that it leaves; adds the names of those that do not end to `refusing`."""
    with contextlib.closing(Notifier(environ)) as notifier:
        lifecycle = Lifecycle(notifier)
        lifecycle.start_watchdog()
        try:
            with _signals(lifecycle, asyncio.get_running_loop()):
                await main(lifecycle)
        finally:
            await lifecycle.close()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            if left:
                _, stubborn = await asyncio.wait(left, timeout=_LAST_TASKS)
                refusing += sorted(task.get_name() for task in stubborn)


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

    def hang_up(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(lifecycle.reload_now)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
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
