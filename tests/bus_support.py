"""What tests of the bus share: a handler that records, and the same small world on either implementation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import zmq

from microserve.runtime.ids import Peer
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microserve.runtime.bus import Bus, Session
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.messages import RpcMessage

PATIENCE = 20.0
"""Seconds after which something that must happen is taken to have failed; nothing waits for it to pass."""

ENGINE = Peer("engine", "a", 7)
ROUTER = Peer("router", "r", 3)


class Signal:
    """Something happened: whoever waits for a condition looks again."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def set(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                await waiter


class Recorder:
    """A session handler that keeps everything."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.messages: list[RpcMessage] = []
        self.losses: list[tuple[Session, MicroserveError]] = []
        self._signal = Signal()

    @property
    def session(self) -> Session:
        return self.sessions[-1]

    def opened(self, session: Session) -> None:
        self.sessions.append(session)
        self._signal.set()

    def received(self, session: Session, message: RpcMessage) -> None:
        self.messages.append(message)
        self._signal.set()

    def lost(self, session: Session, error: MicroserveError) -> None:
        assert session.closed
        self.losses.append((session, error))
        self._signal.set()

    async def until(self, condition: Callable[[Recorder], object]) -> None:
        await self._signal.until(lambda: condition(self))


class World:
    """A few processes of one test, over `kind`: "memory", "tcp", "ipc" or "inproc"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.network = MemoryNetwork()
        self._stack = contextlib.AsyncExitStack()
        self._names = 0

    async def __aenter__(self) -> Self:
        if self.kind == "inproc":
            self._context = zmq.Context()
            self._stack.callback(self._context.term)
        if self.kind == "ipc":
            self._folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def bus(self, me: Peer, *, heartbeat: float = 1.0, silence: float = 3.0, max_queue_bytes: int = 1 << 20) -> Bus:
        bus: Bus
        if self.kind == "memory":
            bus = self.network.bus(me, heartbeat=heartbeat, silence=silence, max_queue_bytes=max_queue_bytes)
        else:
            bus = ZmqBus(
                me,
                heartbeat=heartbeat,
                silence=silence,
                max_queue_bytes=max_queue_bytes,
                context=self._context if self.kind == "inproc" else None,
            )
        self._stack.push_async_callback(bus.close)
        return bus

    def endpoint(self) -> str:
        """A place where nobody listens yet."""
        self._names += 1
        return {
            "memory": "memory://*",
            "tcp": "tcp://127.0.0.1:*",
            "ipc": f"ipc://{Path(getattr(self, '_folder', '')) / str(self._names)}",
            "inproc": f"inproc://{self._names}",
        }[self.kind]


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fails when a descriptor or a child process is left behind."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= len(before)
