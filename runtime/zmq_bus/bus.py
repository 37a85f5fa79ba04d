"""The bus itself: makes sockets, keeps what is open, looks at the clock and at the keys."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import zmq

from microserve.runtime.bus import BusStatistics
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import ConfigError, PeerLost, Unauthorized
from microserve.runtime.frames import MAX_FRAME_BYTES
from microserve.runtime.log import get_logger
from microserve.runtime.session import LiveSession, SessionSettings
from microserve.runtime.zmq_bus.curve import Doorman, secure
from microserve.runtime.zmq_bus.events import ZmqPublisher, ZmqSubscription
from microserve.runtime.zmq_bus.sessions import Dialled, ZmqListener

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.bus import SessionHandler
    from microserve.runtime.clock import Clock
    from microserve.runtime.ids import Peer
    from microserve.runtime.keys import BusSecurity
    from microserve.runtime.messages import EngineEvent

_log = get_logger(__name__)

HIGH_WATER: Final = 256
"""Messages that libzmq buffers per connection and direction; more waits in our own queue, which counts bytes."""


class ZmqBus:
    """Implements `bus.Bus` over ZeroMQ. Make it, use it and close it on one running loop."""

    def __init__(
        self,
        me: Peer,
        *,
        clock: Clock = monotonic,
        heartbeat: float = 1.0,
        silence: float = 3.0,
        max_queue_bytes: int = MAX_FRAME_BYTES,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        security: BusSecurity | None = None,
    ) -> None:
        """Times are seconds. `context` is shared by buses that talk over inproc, and stays its owner's to end.

        With `security` every socket speaks CURVE: we prove who we are, and only authorized keys are let in.
        """
        self.me = me
        self.security = security
        self.settings = SessionSettings(heartbeat, silence, max_queue_bytes, clock)
        self.counters = BusStatistics()
        self._context = zmq.Context() if context is None else context
        self._owns_context = context is None
        self._listeners: set[ZmqListener] = set()
        self._dialled: set[Dialled] = set()
        self._endpoints: set[ZmqPublisher | ZmqSubscription] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        self._dials = 0
        self._closed = False
        self._doorman = Doorman(self._context, security) if security is not None else None

    async def listen(self, endpoint: str, handler: SessionHandler) -> ZmqListener:
        if self.security is not None:
            self.security.check_name(self.me.kind, self.me.name)
        listener = ZmqListener(self, endpoint, handler)
        self._listeners.add(listener)
        self._start_ticking()
        return listener

    async def dial(self, endpoint: str, handler: SessionHandler, *, timeout: float = 5.0) -> LiveSession:
        connection = Dialled(self, endpoint, handler)
        session = connection.session
        self._dialled.add(connection)
        self._start_ticking()
        try:
            session.greet(self.me)
            timeout_error = PeerLost(f"no answer from {endpoint} within {timeout:g} s")
            timer = asyncio.get_running_loop().call_later(timeout, session.give_up, timeout_error)
            try:
                error = await connection.greeted
            finally:
                timer.cancel()
        except BaseException:
            session.close("the dial was given up")
            raise
        if error is not None:
            raise error
        if self.security is not None and not self.security.knows(session.peer):
            session.close("your key is not authorized")
            raise Unauthorized(f"the key of {session.peer} is not authorized here")
        return session

    async def publisher(self, endpoint: str) -> ZmqPublisher:
        publisher = ZmqPublisher(self, endpoint)
        self._endpoints.add(publisher)
        return publisher

    async def subscribe(self, endpoint: str, receive: Callable[[EngineEvent], None]) -> ZmqSubscription:
        subscription = ZmqSubscription(self, endpoint, receive)
        self._endpoints.add(subscription)
        return subscription

    def statistics(self) -> BusStatistics:
        return replace(self.counters)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for listener in tuple(self._listeners):
            listener.close()
        for connection in tuple(self._dialled):
            connection.session.close("the process closes its bus")
        for endpoint in tuple(self._endpoints):
            endpoint.close()
        if self._doorman is not None:
            self._doorman.close()
        if self._owns_context:
            # Waits until the goodbyes have left, at most the linger time.
            await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    # --- for the parts above ---

    def new_socket(self, kind: int, *, binds: bool = False) -> zmq.Socket[bytes]:
        """A socket with the options that all of ours have; one that `binds` speaks in the fleet's name."""
        if self._closed:
            raise PeerLost("the bus is closed")
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if self.security is not None:
            secure(socket, self.security, binds=binds)
        return socket

    def next_dial(self) -> int:
        """Numbers the connections that this process dials."""
        self._dials += 1
        return self._dials

    def forget_listener(self, listener: ZmqListener) -> None:
        self._listeners.discard(listener)

    def forget_dialled(self, connection: Dialled) -> None:
        self._dialled.discard(connection)

    def forget_endpoint(self, endpoint: ZmqPublisher | ZmqSubscription) -> None:
        self._endpoints.discard(endpoint)

    # --- keys ---

    def _reload_keys(self, security: BusSecurity) -> None:
        """authorized.toml is another: a CURVE connection outlives its key, so sessions of revoked ones end here."""
        before = security.ring.keys
        try:
            security.ring.reload()
        except ConfigError as error:
            _log.error("keys were not reloaded; the old ones stay", every=10.0, error=error.message)
            return
        self._renew_identity(security)
        # One with another role, too: its sessions have the old one.
        ended = {key.public for key in before if security.ring.find(key.public) != key}
        _log.info("keys reloaded", authorized=len(security.ring), revoked=len(ended))
        if not ended:
            return
        for endpoint in tuple(self._endpoints):
            if isinstance(endpoint, ZmqPublisher):
                endpoint.reopen()
        for listener in tuple(self._listeners):
            for session in listener.switchboard.sessions:
                if session.user in ended:
                    self.counters.unauthorized += 1
                    session.end(PeerLost(f"the key of {session.peer} was revoked"), bye="your key was revoked")
        for connection in tuple(self._dialled):
            session = connection.session
            if not session.closed and not security.knows(session.peer):
                session.end(PeerLost(f"the key of {session.peer} was revoked"), bye="your key was revoked")

    def _renew_identity(self, security: BusSecurity) -> None:
        """A new key of ours comes into the list when it is made: what we dial from here on is dialled with it."""
        try:
            self.security = security.renewed()
        except ConfigError as error:
            _log.warning("our own key was not read again; the old one stays", every=10.0, error=error.message)
            return
        if self.security.identity.public != security.identity.public:
            _log.info("our own key is another; connections from now on use it", name=self.security.identity.name)

    # --- time ---

    def _start_ticking(self) -> None:
        if self._timer is None:
            self._looked_at = self.settings.clock()
            self._timer = asyncio.get_running_loop().call_later(self.settings.tick, self._tick)

    def _tick(self) -> None:
        # What arrived while we were busy counts as heard before anybody is called silent.
        for listener in tuple(self._listeners):
            listener.port.drain()
        for connection in tuple(self._dialled):
            connection.drain()
        if self.security is not None and self.security.ring.changed():
            self._reload_keys(self.security)
        now = self.settings.clock()
        stalled = max(0.0, now - self._looked_at - 2 * self.settings.tick)
        self._looked_at = now
        for listener in tuple(self._listeners):
            listener.switchboard.tick(stalled)
        for connection in tuple(self._dialled):
            connection.session.tick(stalled)
        self._timer = None
        if self._listeners or self._dialled:
            self._timer = asyncio.get_running_loop().call_later(self.settings.tick, self._tick)
