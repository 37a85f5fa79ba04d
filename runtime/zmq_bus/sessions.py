"""Sessions over ZMQ: a ROUTER where we listen, a DEALER for each that we dial."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import zmq

from microserve.runtime.errors import MicroserveError, PeerLost, Unauthorized
from microserve.runtime.ids import Peer
from microserve.runtime.log import get_logger
from microserve.runtime.session import LiveSession
from microserve.runtime.switchboard import Switchboard, dialling_id
from microserve.runtime.zmq_bus.sockets import (
    LINGER_MS,
    NOBLOCK,
    NOBLOCK_MORE,
    RCVMORE,
    Monitor,
    Port,
    allow_ipv6,
    bind,
    plain_send,
)

if TYPE_CHECKING:
    from microserve.runtime.bus import SessionHandler
    from microserve.runtime.zmq_bus.bus import ZmqBus

_log = get_logger(__name__)


class Dialled:
    """The connection of one session that we dialled: a DEALER of its own. A `session.Channel`."""

    def __init__(self, bus: ZmqBus, endpoint: str, handler: SessionHandler) -> None:
        self._bus = bus
        socket = bus.new_socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, dialling_id(bus.me, bus.next_dial()))
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._send = plain_send(socket)
        self._receive = socket.recv
        self._port = Port(socket, self._take)
        self._monitor = Monitor(self._port, self._disconnected, self._refused)
        self.greeted: asyncio.Future[MicroserveError | None] = asyncio.get_running_loop().create_future()
        unknown = Peer("listener", endpoint, 0)
        self.session = LiveSession(unknown, handler, self, bus.settings, bus.counters, on_greeted=self._on_greeted)
        try:
            allow_ipv6(socket, endpoint)
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._monitor.close()
            self._port.close()
            raise PeerLost(f"cannot dial {endpoint!r}: {error}") from error

    def _on_greeted(self, error: MicroserveError | None) -> None:
        if not self.greeted.done():
            self.greeted.set_result(error)

    def _take(self) -> None:
        # Our messages have one frame; each frame of a longer one is judged by itself.
        self.session.receive(self._receive(NOBLOCK))

    def _disconnected(self) -> None:
        # libzmq would reconnect, perhaps to another incarnation; a session is never resumed.
        self.session.end(PeerLost(f"the connection to {self.session.peer} broke"))

    def _refused(self, _unsaid: bool) -> None:
        # A restarted peer's half-open socket fails a handshake, too; only who has not greeted yet learns from it.
        # Nor does libzmq say which of the two it was.
        peer = self.session.peer.name
        if self._bus.security is not None:
            why = f"{peer} refused our key: it is not authorized there, or no keys are used there"
        elif self._bus.me.kind == "client":
            why = f"{peer} asks for a key: --key-file or MICROSERVE_KEY_FILE (or it is no router's bus)"
        else:
            why = f"{peer} asks for a key, and key_file is not set"
        self.session.give_up(Unauthorized(why))

    def drain(self) -> None:
        self._port.drain()

    def transmit(self, frame: bytes) -> bool:
        try:
            self._send(frame, NOBLOCK)
        except zmq.Again:
            self._port.blocked.add(self.session)
            return False
        self._port.recheck()
        return True

    def release(self, session: LiveSession) -> None:
        self._bus.forget_dialled(self)
        self._monitor.close()
        self._port.close(linger=LINGER_MS)


class RouterChannel:
    """The way to one peer through a listener's ROUTER. A `session.Channel`."""

    __slots__ = ("_listener", "_routing_id", "_send")

    def __init__(self, listener: ZmqListener, routing_id: bytes) -> None:
        self._listener = listener
        self._routing_id = routing_id
        self._send = listener.send

    def transmit(self, frame: bytes) -> bool:
        listener = self._listener
        if listener.port.closed:
            raise PeerLost("the listener is closed")
        try:
            self._send(self._routing_id, NOBLOCK_MORE)
            # The ROUTER has chosen the peer and found room, so this part cannot be refused.
            self._send(frame, NOBLOCK)
        except zmq.Again:
            listener.block(self._routing_id)
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerLost("the connection is gone") from error
            raise
        listener.port.recheck()
        return True

    def release(self, session: LiveSession) -> None:
        self._listener.port.blocked.discard(session)


class ZmqListener:
    """A ROUTER that is bound to `endpoint`. Implements `bus.Listener`."""

    def __init__(self, bus: ZmqBus, endpoint: str, handler: SessionHandler) -> None:
        self._bus = bus
        socket = bus.new_socket(zmq.ROUTER, binds=True)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.endpoint = bind(socket, endpoint)
        self.switchboard = Switchboard(
            bus.me,
            handler,
            lambda routing_id: RouterChannel(self, routing_id),
            bus.settings,
            bus.counters,
            admit=bus.security.admit if bus.security is not None else None,
        )
        self.send = plain_send(socket)
        self._receive = socket.recv
        self._option = socket.getsockopt
        self._take = self._take_plain if bus.security is None else self._take_with_user
        self.port = Port(socket, self._take)
        self._monitor = Monitor(self.port, self.switchboard.probe, self._refused)

    def _refused(self, unsaid: bool) -> None:
        if self._bus.security is None and unsaid:
            # Where no keys are, nobody needs one: whoever looks whether a port is open leaves like that.
            _log.debug("a connection ended before its handshake", every=1.0, at=self.endpoint)
            return
        self._bus.counters.unauthorized += 1
        why = "no key, or one that is not authorized"
        if self._bus.security is None:
            why = "it has keys, and this bus has none"
        _log.warning(f"a connection was refused: {why}", every=1.0, at=self.endpoint)

    def _take_with_user(self) -> None:
        routing_id = self._receive(NOBLOCK)
        part = self.port.socket.recv(NOBLOCK, copy=False)
        frame = part.bytes
        if self._option(RCVMORE):
            self.port.socket.recv_multipart(NOBLOCK)
            frame = b""
        # What the ZAP handler below said of the connection: its public key.
        self.switchboard.receive(routing_id, frame, str(part.get("User-Id")))

    def _take_plain(self) -> None:
        routing_id = self._receive(NOBLOCK)
        frame = self._receive(NOBLOCK)
        if self._option(RCVMORE):
            # Our messages have one frame; a longer one counts as a frame that says nothing.
            self.port.socket.recv_multipart(NOBLOCK)
            frame = b""
        self.switchboard.receive(routing_id, frame)

    def block(self, routing_id: bytes) -> None:
        """The peer's buffers are full."""
        session = self.switchboard.session(routing_id)
        if session is not None:
            self.port.blocked.add(session)

    def close(self) -> None:
        if self.port.closed:
            return
        self._bus.forget_listener(self)
        self.switchboard.close("the listener closes")
        self._monitor.close()
        # Closing happens in the background; the address is free from here on.
        self.port.socket.unbind(self.endpoint)
        self.port.close(linger=LINGER_MS)
