"""Events over ZMQ: PUB and SUB."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import zmq

from microserve.runtime.errors import ConfigError, PeerLost, ProtocolError, VersionMismatch
from microserve.runtime.frames import pack, unpack
from microserve.runtime.log import get_logger
from microserve.runtime.messages import EngineEvent
from microserve.runtime.zmq_bus.sockets import LINGER_MS, NOBLOCK, Port, allow_ipv6, bind

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.zmq_bus.bus import ZmqBus

_log = get_logger(__name__)

_REBIND: Final = 0.01
"""Seconds between attempts to have an address again that was ours a moment ago."""


class ZmqPublisher:
    """A PUB that is bound to `endpoint`. Implements `bus.Publisher`."""

    def __init__(self, bus: ZmqBus, endpoint: str) -> None:
        self._bus = bus
        self._socket = bus.new_socket(zmq.PUB, binds=True)
        self._again: asyncio.TimerHandle | None = None
        self.endpoint = bind(self._socket, endpoint)

    def reopen(self) -> None:
        """Ends every subscriber's connection: they come back at once, if their key is still let in."""
        self._socket.unbind(self.endpoint)
        self._socket.close(0)
        self._bind_again()

    def _bind_again(self) -> None:
        """libzmq lets go of an address in its own time: tried until it has. Events in between are missed, as ever."""
        self._again = None
        socket = self._bus.new_socket(zmq.PUB, binds=True)
        try:
            self.endpoint = bind(socket, self.endpoint)
        except ConfigError:
            self._again = asyncio.get_running_loop().call_later(_REBIND, self._bind_again)
        else:
            self._socket = socket

    def publish(self, event: EngineEvent) -> None:
        if self._socket.closed:
            return
        # A PUB never blocks: it drops for subscribers that are too slow, and the event's `seq` shows them that.
        self._socket.send(pack(event, event.seq), NOBLOCK)
        self._bus.counters.sent += 1

    def close(self) -> None:
        self._bus.forget_endpoint(self)
        if self._again is not None:
            self._again.cancel()
        if not self._socket.closed:
            self._socket.unbind(self.endpoint)
            self._socket.close(LINGER_MS)


class ZmqSubscription:
    """A SUB that is connected to a publisher. Implements `bus.Subscription`."""

    def __init__(self, bus: ZmqBus, endpoint: str, receive: Callable[[EngineEvent], None]) -> None:
        self._bus = bus
        self._receive = receive
        socket = bus.new_socket(zmq.SUB)
        try:
            allow_ipv6(socket, endpoint)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise PeerLost(f"cannot subscribe to {endpoint!r}: {error}") from error
        self._port = Port(socket, self._take)

    def _take(self) -> None:
        parts = self._port.socket.recv_multipart(NOBLOCK)
        counters = self._bus.counters
        try:
            _seq, event = unpack(parts[0] if len(parts) == 1 else b"")
            if not isinstance(event, EngineEvent):
                raise ProtocolError(f"{type(event).__name__.lower()} is no event")
        except VersionMismatch:
            counters.unknown_version += 1
            return
        except ProtocolError as error:
            counters.malformed += 1
            _log.debug("dropped a published frame", why=error.message)
            return
        counters.received += 1
        try:
            self._receive(event)
        except Exception:  # a receiver's bug must not take the bus down
            _log.exception("receiver of events failed", engine=event.engine_id)

    def close(self) -> None:
        if not self._port.closed:
            self._bus.forget_endpoint(self)
            self._port.close()
