"""Runs what `up` has planned: children, the watch over their readiness, and what the user sees of both."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import MicroserveError
from microserve.runtime.service import EXIT_CONFIG, EXIT_OK
from microserve.tools.supervisor import Child, ChildState, describe_exit
from microserve.tools.up import STOP_SIGNALS
from microserve.tools.up_screen import Screen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microserve.runtime.messages import StatusReply
    from microserve.tools.up import Plan

_LOOK_EVERY = 0.5
"""Seconds between two looks at the router's status."""
_EXIT_SECOND_SIGNAL = 130


class Up:
    """One run of `microserve up`, on one event loop."""

    def __init__(self, plan: Plan, *, screen: bool) -> None:
        self._plan = plan
        self._logs: dict[str, IO[str]] = {}
        self._screen = Screen(plan.engine_names, plan.router_endpoint, on=screen)
        self._children = [Child(spec, told=self._told) for spec in plan.specs()]
        self._tasks: dict[Child, asyncio.Task[int]] = {}
        self._signals = 0
        self._stopping = asyncio.Event()
        self._phase = ""
        self._was_ready = False
        self._joined: set[str] = set()
        """Engines that the router has known since they were last started."""

    async def run(self) -> int:
        """Until Ctrl-C, or until a child refuses its configuration; the exit code."""
        with self._signals_taken(), self._logs_open(), self._screen:
            self._tasks = {child: asyncio.create_task(child.run(), name=child.name) for child in self._children}
            watching = asyncio.create_task(self._watch(), name="watch")
            stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
            try:
                await asyncio.wait({*self._tasks.values(), stopping, watching}, return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    watching.result()
                return await self._stop()
            finally:
                for task in (watching, stopping, *self._tasks.values()):
                    task.cancel()
                await asyncio.wait({watching, stopping, *self._tasks.values()})

    async def _stop(self) -> int:
        """The router first: it finishes what runs, and needs its engines for that."""
        refused = next((child for child, task in self._tasks.items() if task.done()), None)
        if refused is not None:
            self._say(f"{refused.name} does not start ({describe_exit(refused.exit_code or 0)}); stopping")
        elif not self._signals > 1:
            self._say("stopping: running requests may finish; Ctrl-C again ends them now")
        router, *engines = self._children
        for group in ([router], engines):
            for child in group:
                if child in engines and child.name not in self._joined:
                    # Still loading: it has nothing to finish, and would load to the end before it looked at a signal.
                    child.kill()
                child.stop()
            if group:
                await asyncio.wait([self._tasks[child] for child in group])
        if refused is not None:
            self._screen.close()
            for line in list(refused.lines)[-10:]:
                print(f"{refused.name} | {line}", file=sys.stderr)
            return EXIT_CONFIG
        # The screen vanishes; this line stays.
        self._screen.close()
        self._say("stopped" if self._signals < 2 else "stopped; what still ran was cut off")
        return _EXIT_SECOND_SIGNAL if self._signals > 1 else EXIT_OK

    # --- watching ---

    async def _watch(self) -> None:
        client = AsyncClient(self._plan.router_endpoint, connect_timeout=_LOOK_EVERY)
        try:
            while True:
                try:
                    status: StatusReply | None = await client.status()
                except MicroserveError:
                    # Not there yet, or on its way back; the phase says so.
                    status = None
                self._show(status)
                await asyncio.sleep(_LOOK_EVERY)
        finally:
            await client.close()

    def _show(self, status: StatusReply | None) -> None:
        ready = {engine.info.engine_id for engine in status.engines if engine.state == "ready"} if status else set()
        waiting = [name for name in self._plan.engine_names if name not in ready]
        states = {engine.info.engine_id: engine.state for engine in status.engines} if status else {}
        drained = [name for name in waiting if states.get(name) == "draining"]
        phase = self._describe(status, waiting, drained)
        # A router that ends lets go of its engines first, and still answers: they have joined all the same.
        if status is not None and not self._stopping.is_set():
            self._joined = {engine.info.engine_id for engine in status.engines}
        self._screen.show(status, self._children, phase)
        if phase != self._phase and not self._stopping.is_set():
            self._phase = phase
            self._screen.line(phase)
            if status is not None and not waiting and not self._was_ready:
                self._was_ready = True
                self._screen.announce(status)

    def _describe(self, status: StatusReply | None, waiting: list[str], drained: list[str]) -> str:
        if status is None:
            return "waiting for the router"
        if not self._plan.engines:
            return f"the router is ready at {status.http}; waiting for engines at {self._plan.router_endpoint}"
        if not waiting:
            return "ready"
        down = [
            child.name for child in self._children if child.name in waiting and child.state is not ChildState.RUNNING
        ]
        if down:
            return f"waiting for {', '.join(down)} to be restarted"
        if drained == waiting:
            return f"ready, but for what is drained: `microserve resume {' '.join(drained)}` takes it back"
        waiting = [name for name in waiting if name not in drained]
        return f"waiting for {', '.join(waiting)} to load {self._plan.engine.model}"

    # --- what is seen ---

    def _told(self, name: str, line: str) -> None:
        log = self._logs.get(name)
        if log is not None:
            print(line, file=log, flush=True)
        self._screen.child_line(name, line)

    def _say(self, line: str) -> None:
        self._screen.line(line)

    @contextmanager
    def _logs_open(self) -> Iterator[None]:
        folder = self._plan.logs
        if folder is None:
            yield
            return
        try:
            for child in self._children:
                self._logs[child.name] = (folder / f"{child.name}.log").open("a", encoding="utf-8")
                print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} microserve up", file=self._logs[child.name])
            yield
        finally:
            for log in self._logs.values():
                log.close()

    @contextmanager
    def _signals_taken(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._signal)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _signal(self) -> None:
        self._signals += 1
        self._stopping.set()
        self._screen.stopping()
        if self._signals > 1:
            for child in self._children:
                child.kill()
