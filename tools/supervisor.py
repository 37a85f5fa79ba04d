"""Child processes that are kept running: started, watched, restarted with back-off, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from microserve.runtime.clock import monotonic
from microserve.runtime.service import EXIT_CONFIG
from microserve.tools.signs import Signs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microserve.runtime.clock import Clock

_KEPT_LINES = 200
_LONGEST_LINE = 1 << 20
_OF_A_MANAGER = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run: `python -m module arguments…`, with `environ` added to our environment.

    A process that gives no sign of life for `watchdog` seconds (`Signs`; None: any time) is ended, and started again.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] | None = None
    watchdog: float | None = None


class ChildState(Enum):
    """Where a child is in its life."""

    WAITING = "waiting"
    """Not running: not started yet, or in the pause before a restart."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Told to end."""
    ENDED = "ended"
    """Gone, and not to come back."""


class Backoff:
    """How long to pause before a restart: doubling, and back to the start after a run that was long enough. Seconds."""

    def __init__(self, first: float = 0.5, most: float = 30.0, settled: float = 30.0) -> None:
        self._first = first
        self._most = most
        self._settled = settled
        self._next = first

    def after(self, ran: float) -> float:
        """The pause after a process that ran for `ran` seconds."""
        if ran >= self._settled:
            self._next = self._first
        pause = self._next
        self._next = min(self._next * 2, self._most)
        return pause


class Child:
    """One supervised process. `run` is its whole life; everything happens on one event loop."""

    def __init__(
        self,
        spec: ChildSpec,
        *,
        told: Callable[[str, str], None],
        backoff: Backoff | None = None,
        patience: float = 10.0,
        clock: Clock = monotonic,
    ) -> None:
        """`told(name, line)` gets every line that the process prints, and what happens to it. `patience`: seconds that
        one that hangs gets to say where it stands."""
        self.spec = spec
        self.state = ChildState.WAITING
        self.restarts = 0
        self.exit_code: int | None = None
        """Of the last process: negative for a signal."""
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        """The last lines that it printed."""
        self._told = told
        self._backoff = backoff if backoff is not None else Backoff()
        self._patience = patience
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None
        self._stop = asyncio.Event()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def run(self) -> int:
        """Keep the process running until `stop`; its last exit code. Ends at once with a configuration that it refuses,
        which a restart would not mend. Cancelled, it kills the process."""
        try:
            while True:
                began = self._clock()
                self.exit_code = await self._run_once()
                if self._stop.is_set() or self.exit_code == EXIT_CONFIG:
                    return self.exit_code
                pause = self._backoff.after(self._clock() - began)
                self.state = ChildState.WAITING
                self._told(self.name, f"ended ({describe_exit(self.exit_code)}); starting again in {pause:g} s")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), pause)
                    return self.exit_code
                self.restarts += 1
        finally:
            self.state = ChildState.ENDED

    async def _run_once(self) -> int:
        # Ours is not theirs: the service manager that may watch us knows nothing of them.
        environ = {name: value for name, value in os.environ.items() if name not in _OF_A_MANAGER}
        with contextlib.ExitStack() as stack:
            if self.spec.watchdog is not None and sys.platform == "linux":
                signs = stack.enter_context(Signs(self.spec.watchdog, self._hangs))
                environ |= signs.environ
            return await self._run_with({**environ, **(self.spec.environ or {})})

    def _hangs(self) -> None:
        self._told(self.name, f"no sign of life for {self.spec.watchdog:g} s: ended; where it stood follows")
        self._signal(signal.SIGABRT)
        asyncio.get_running_loop().call_later(self._patience, self._still_there, self._process)

    def _still_there(self, process: asyncio.subprocess.Process | None) -> None:
        """A process that is stopped, or waits for a device, does not take a SIGABRT."""
        if process is self._process:
            self._signal(signal.SIGKILL)

    async def _run_with(self, environ: Mapping[str, str]) -> int:
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "microserve.tools.child",
            str(os.getpid()),
            self.spec.module,
            *self.spec.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LONGEST_LINE,
            env=environ,
            # Its own session: Ctrl-C in the terminal is for us, and we stop children in order.
            start_new_session=True,
        )
        self.state = ChildState.RUNNING
        if self._stop.is_set():
            self.stop()
        try:
            await self._read_lines(process)
            return await process.wait()
        finally:
            if process.returncode is None:
                self._signal(signal.SIGKILL)
                await process.wait()

    async def _read_lines(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # it was asked for
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                # A line longer than the limit; what was read of it is gone.
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self.lines.append(text)
            self._told(self.name, text)

    def stop(self) -> None:
        """Tell the process to finish what runs and end. Idempotent; `run` returns when it has."""
        self._stop.set()
        if self.pid is not None:
            self.state = ChildState.STOPPING
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process now. Idempotent."""
        self._stop.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            # It may have ended without our having heard. Process.send_signal would look first, and one that looks takes
            # the exit code from the event loop, which then makes one up (255; CPython issue 87744).
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
