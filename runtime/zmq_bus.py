"""The bus over ZeroMQ: ROUTER and DEALER for sessions, PUB and SUB for events; tcp, ipc and inproc.

Only this module knows zmq.

A ZMQ socket has one edge-triggered descriptor: it becomes readable when the socket's state *may* have changed, and any
call on the socket may consume that. So after the descriptor fires the socket is read until it is empty, and after every
send the state is looked at again. This costs less than half of what `zmq.asyncio` does.

libzmq reconnects and buffers by itself, and loses messages silently when it must. Here a session has exactly one
connection: monitors report a lost one within milliseconds and the session ends; what does not fit into libzmq's
(short) queues waits in ours, which is bounded in bytes and fails loudly.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import zmq
import zmq.utils.z85

from microserve.runtime.bus import BusStatistics
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import (
    ConfigError,
    MicroserveError,
    PeerLost,
    ProtocolError,
    Unauthorized,
    VersionMismatch,
)
from microserve.runtime.frames import MAX_FRAME_BYTES, pack, unpack
from microserve.runtime.ids import Peer
from microserve.runtime.log import get_logger
from microserve.runtime.messages import EngineEvent
from microserve.runtime.session import LiveSession, SessionSettings
from microserve.runtime.switchboard import Switchboard, dialling_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.bus import SessionHandler
    from microserve.runtime.clock import Clock
    from microserve.runtime.keys import BusSecurity, KeyPair

_log = get_logger(__name__)

_EVENTS: Final = int(zmq.EVENTS)
_RCVMORE: Final = int(zmq.RCVMORE)
_POLLIN: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)

_FAIR_SHARE: Final = 256
"""Messages read from one socket before the loop may do something else."""

_DRAIN_ROUNDS: Final = 16
"""Fair shares that a drain reads at most: more than the buffers of a peer hold, and still an end for busy listeners."""

_HIGH_WATER: Final = 256
"""Messages that libzmq buffers per connection and direction; more waits in our own queue, which counts bytes."""

_LINGER_MS: Final = 250
"""How long a goodbye may take to leave after a socket was closed on purpose."""

_SETTLE: Final = 0.005
"""Seconds between the news of a disconnect and acting on it: what had arrived before is delivered first."""

_REBIND: Final = 0.01
"""Seconds between attempts to have an address again that was ours a moment ago."""

_MONITOR_EVENT: Final = struct.Struct("=HI")

_REFUSALS: Final = int(
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
"""Where libzmq asks whether a key may come in (ZeroMQ RFC 27)."""


class _Port:
    """A ZMQ socket on the loop: calls `take` to receive one message, whenever there may be one.

    `take` raises `zmq.Again` when there is none.
    """

    def __init__(self, socket: zmq.Socket[bytes], take: Callable[[], None]) -> None:
        self.socket = socket
        self.closed = False
        self.blocked: set[LiveSession] = set()
        """Sessions whose frames found no room."""
        self._take = take
        self._events: Callable[[int], int] = socket.getsockopt  # type: ignore[assignment]
        self._loop = asyncio.get_running_loop()
        self._fd: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._reading = False
        self._touched = False
        self._scheduled = False
        self._loop.add_reader(self._fd, self._wake)
        self.recheck()

    def recheck(self) -> None:
        """Must follow every send: it may have taken the descriptor's edge. Looks at the socket again if that is so."""
        if self._reading:
            self._touched = True
        elif not self._scheduled and not self.closed and (self.blocked or self._events(_EVENTS) & _POLLIN):
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self.closed:
            self._scheduled = True
            self._loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        self._scheduled = False
        self._read_all()

    def _wake(self) -> None:
        """The descriptor fired, so there is a message, most likely: one is received without asking first."""
        if self._reading or self.closed:
            return
        self._reading = True
        self._touched = False
        try:
            self._take()
        except zmq.Again:
            self._touched = True
        finally:
            self._reading = False
        if self._touched or self.blocked:
            self._read_all()
        else:
            # Whoever was woken by this message runs first; then one look covers what has arrived and what they sent.
            self._schedule()

    def _read_all(self) -> None:
        """Receives and flushes until there is nothing to do, or others should have a turn."""
        if self._reading or self.closed:
            return
        self._reading = True
        exhausted = False
        try:
            for _ in range(_FAIR_SHARE):
                if self._events(_EVENTS) & _POLLIN:
                    self._take()
                elif not self._flush():
                    exhausted = True
                if exhausted or self.closed:
                    break
            else:
                self._flush()
        finally:
            self._reading = False
            if not exhausted:
                self._schedule()

    def _flush(self) -> bool:
        """Moves blocked frames; returns whether any moved (then the socket must be looked at again)."""
        moved = False
        for session in tuple(self.blocked):
            moved |= session.flush()
            if not session.queued_bytes:
                self.blocked.discard(session)
        return moved

    def drain(self) -> None:
        """Delivers what has arrived, now."""
        for _ in range(_DRAIN_ROUNDS):
            self._scheduled = False
            self._read_all()
            if self.closed or not self._scheduled:
                return

    def close(self, *, linger: int = 0) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        self.socket.close(linger)


class _Monitor:
    """Calls `disconnected()` when a connection of `port`'s socket has gone, after what it delivered has been read.

    `refused()` is called when a handshake failed: one of the two sides has the wrong key, or none.
    """

    def __init__(self, port: _Port, disconnected: Callable[[], None], refused: Callable[[], None]) -> None:
        self._watched = port
        self._disconnected = disconnected
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._port = _Port(port.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSALS), self._take)

    def _take(self) -> None:
        event, _value = _MONITOR_EVENT.unpack(self._port.socket.recv_multipart(_NOBLOCK)[0])
        if event & _REFUSALS:
            self._refused()
        elif event == zmq.EVENT_DISCONNECTED and self._timer is None:
            self._timer = self._loop.call_later(_SETTLE, self._settled)

    def _settled(self) -> None:
        self._timer = None
        self._watched.drain()
        self._disconnected()

    def close(self) -> None:
        """Must come before the watched socket is closed."""
        if self._port.closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._watched.socket.disable_monitor()
        self._port.close()


class _Dialled:
    """The connection of one session that we dialled: a DEALER of its own. A `session.Channel`."""

    def __init__(self, bus: ZmqBus, endpoint: str, handler: SessionHandler) -> None:
        self._bus = bus
        socket = bus.new_socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, dialling_id(bus.me, bus.next_dial()))
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._send = _plain_send(socket)
        self._receive = socket.recv
        self._port = _Port(socket, self._take)
        self._monitor = _Monitor(self._port, self._disconnected, self._refused)
        self.greeted: asyncio.Future[MicroserveError | None] = asyncio.get_running_loop().create_future()
        unknown = Peer("listener", endpoint, 0)
        self.session = LiveSession(unknown, handler, self, bus.settings, bus.counters, on_greeted=self._on_greeted)
        try:
            _allow_ipv6(socket, endpoint)
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
        self.session.receive(self._receive(_NOBLOCK))

    def _disconnected(self) -> None:
        # libzmq would reconnect, perhaps to another incarnation; a session is never resumed.
        self.session.end(PeerLost(f"the connection to {self.session.peer} broke"))

    def _refused(self) -> None:
        # A restarted peer's half-open socket fails a handshake, too; only who has not greeted yet learns from it.
        self.session.give_up(Unauthorized(f"{self.session.peer.name} refused our key, or does not know keys"))

    def drain(self) -> None:
        self._port.drain()

    def transmit(self, frame: bytes) -> bool:
        try:
            self._send(frame, _NOBLOCK)
        except zmq.Again:
            self._port.blocked.add(self.session)
            return False
        self._port.recheck()
        return True

    def release(self, session: LiveSession) -> None:
        self._bus.forget_dialled(self)
        self._monitor.close()
        self._port.close(linger=_LINGER_MS)


class _RouterChannel:
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
            self._send(self._routing_id, _NOBLOCK_MORE)
            # The ROUTER has chosen the peer and found room, so this part cannot be refused.
            self._send(frame, _NOBLOCK)
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
        self.endpoint = _bind(socket, endpoint)
        self.switchboard = Switchboard(
            bus.me,
            handler,
            lambda routing_id: _RouterChannel(self, routing_id),
            bus.settings,
            bus.counters,
            admit=bus.security.admit if bus.security is not None else None,
        )
        self.send = _plain_send(socket)
        self._receive = socket.recv
        self._option = socket.getsockopt
        self._take = self._take_plain if bus.security is None else self._take_with_user
        self.port = _Port(socket, self._take)
        self._monitor = _Monitor(self.port, self.switchboard.probe, self._refused)

    def _refused(self) -> None:
        self._bus.counters.unauthorized += 1
        _log.warning("a connection was refused: no key, or one that is not authorized", every=1.0, at=self.endpoint)

    def _take_with_user(self) -> None:
        routing_id = self._receive(_NOBLOCK)
        part = self.port.socket.recv(_NOBLOCK, copy=False)
        frame = part.bytes
        if self._option(_RCVMORE):
            self.port.socket.recv_multipart(_NOBLOCK)
            frame = b""
        # What the ZAP handler below said of the connection: its public key.
        self.switchboard.receive(routing_id, frame, str(part.get("User-Id")))

    def _take_plain(self) -> None:
        routing_id = self._receive(_NOBLOCK)
        frame = self._receive(_NOBLOCK)
        if self._option(_RCVMORE):
            # Our messages have one frame; a longer one counts as a frame that says nothing.
            self.port.socket.recv_multipart(_NOBLOCK)
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
        self.port.close(linger=_LINGER_MS)


class ZmqPublisher:
    """A PUB that is bound to `endpoint`. Implements `bus.Publisher`."""

    def __init__(self, bus: ZmqBus, endpoint: str) -> None:
        self._bus = bus
        self._socket = bus.new_socket(zmq.PUB, binds=True)
        self._again: asyncio.TimerHandle | None = None
        self.endpoint = _bind(self._socket, endpoint)

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
            self.endpoint = _bind(socket, self.endpoint)
        except ConfigError:
            self._again = asyncio.get_running_loop().call_later(_REBIND, self._bind_again)
        else:
            self._socket = socket

    def publish(self, event: EngineEvent) -> None:
        if self._socket.closed:
            return
        # A PUB never blocks: it drops for subscribers that are too slow, and the event's `seq` shows them that.
        self._socket.send(pack(event, event.seq), _NOBLOCK)
        self._bus.counters.sent += 1

    def close(self) -> None:
        self._bus.forget_endpoint(self)
        if self._again is not None:
            self._again.cancel()
        if not self._socket.closed:
            self._socket.unbind(self.endpoint)
            self._socket.close(_LINGER_MS)


class ZmqSubscription:
    """A SUB that is connected to a publisher. Implements `bus.Subscription`."""

    def __init__(self, bus: ZmqBus, endpoint: str, receive: Callable[[EngineEvent], None]) -> None:
        self._bus = bus
        self._receive = receive
        socket = bus.new_socket(zmq.SUB)
        try:
            _allow_ipv6(socket, endpoint)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise PeerLost(f"cannot subscribe to {endpoint!r}: {error}") from error
        self._port = _Port(socket, self._take)

    def _take(self) -> None:
        parts = self._port.socket.recv_multipart(_NOBLOCK)
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
        self._dialled: set[_Dialled] = set()
        self._endpoints: set[ZmqPublisher | ZmqSubscription] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        self._dials = 0
        self._closed = False
        self._doorman = _Doorman(self._context, security) if security is not None else None

    async def listen(self, endpoint: str, handler: SessionHandler) -> ZmqListener:
        listener = ZmqListener(self, endpoint, handler)
        self._listeners.add(listener)
        self._start_ticking()
        return listener

    async def dial(self, endpoint: str, handler: SessionHandler, *, timeout: float = 5.0) -> LiveSession:
        connection = _Dialled(self, endpoint, handler)
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
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if self.security is not None:
            _secure(socket, self.security, binds=binds)
        return socket

    def next_dial(self) -> int:
        """Numbers the connections that this process dials."""
        self._dials += 1
        return self._dials

    def forget_listener(self, listener: ZmqListener) -> None:
        self._listeners.discard(listener)

    def forget_dialled(self, connection: _Dialled) -> None:
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


class _Doorman:
    """Answers libzmq's question whether a connection may come in, for every socket of a context that binds."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], security: BusSecurity) -> None:
        self._security = security
        socket = context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(_ZAP_ENDPOINT)
        self._port = _Port(socket, self._take)

    def _take(self) -> None:
        version, request, _domain, _address, _identity, mechanism, *credentials = self._port.socket.recv_multipart(
            _NOBLOCK
        )
        public = zmq.utils.z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        known = self._security.ring.find(public) is not None
        status, text = (b"200", b"OK") if known else (b"400", b"not authorized")
        self._port.socket.send_multipart([version, request, status, text, public.encode(), b""], _NOBLOCK)
        self._port.recheck()

    def close(self) -> None:
        self._port.close()


def new_key_pair() -> KeyPair:
    """A fresh CURVE key pair: public, secret; Z85 text."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def curve_available() -> bool:
    """Whether this libzmq can use keys."""
    return bool(zmq.has("curve"))


def _secure(socket: zmq.Socket[bytes], security: BusSecurity, *, binds: bool) -> None:
    identity = security.identity
    if binds:
        if identity.fleet_secret is None:
            socket.close(0)
            raise ConfigError(f"the key of {identity.name!r} is a {identity.role}'s: it cannot listen")
        socket.curve_secretkey = identity.fleet_secret.encode()
        socket.curve_server = True
        socket.setsockopt(zmq.ZAP_DOMAIN, b"microserve")
    else:
        socket.curve_publickey = identity.public.encode()
        socket.curve_secretkey = identity.secret.encode()
        socket.curve_serverkey = identity.fleet_public.encode()


def _plain_send(socket: zmq.Socket[bytes]) -> Callable[[bytes, int], object]:
    """`socket.send` without its conveniences, which cost as much as the rest of it."""
    return super(zmq.Socket, socket).send


def _allow_ipv6(socket: zmq.Socket[bytes], endpoint: str) -> None:
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Binds, and returns the resolved endpoint. Closes the socket and raises `ConfigError` when that is impossible."""
    try:
        _allow_ipv6(socket, endpoint)
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"cannot listen at {endpoint!r}: {error}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
